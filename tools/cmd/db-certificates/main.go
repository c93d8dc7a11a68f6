// Command db-certificates makes the certificates for TLS with the database.
package main

import "github.com/infra-pki/infra-pki/tools/internal/oneshot"

func main() { oneshot.Main("db-certificates", run) }
