// Command provider is an OpenID provider with a login form, on port 443 of a container,
// for the people and clients that a test names. Everything that is protocol is the
// library's. Its arguments are files: configuration, certificate and key. The key signs
// tokens as well.
package main

import (
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "provider: error:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: provider CONFIG CERTIFICATE KEY")
	}
	file, err := os.Open(args[0])
	if err != nil {
		return err
	}
	decoder := json.NewDecoder(file)
	decoder.DisallowUnknownFields()
	var config Config
	if err := decoder.Decode(&config); err != nil {
		return fmt.Errorf("reading %s: %w", args[0], err)
	}
	certificate, err := tls.LoadX509KeyPair(args[1], args[2])
	if err != nil {
		return err
	}
	key, ok := certificate.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return fmt.Errorf("%s is not an ECDSA key", args[2])
	}
	handler, err := newProvider(config, key)
	if err != nil {
		return err
	}
	server := http.Server{
		Addr: ":443", Handler: handler, ReadHeaderTimeout: 10 * time.Second,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12},
	}
	return server.ListenAndServeTLS("", "")
}
