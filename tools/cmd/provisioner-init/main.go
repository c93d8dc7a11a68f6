// Command provisioner-init brings keys and configuration of the CA to what .env
// declares: it makes the keys on the first run, and renders ca.json,
// defaults.json and the edge's allow-list on every run.
package main

import "github.com/infra-pki/infra-pki/tools/internal/oneshot"

func main() { oneshot.Main("provisioner-init", run) }
