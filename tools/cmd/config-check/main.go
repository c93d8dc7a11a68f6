// Command config-check tests all settings before anything starts: a mistake in
// .env must not reach a database that is then initialised with it.
package main

import "github.com/infra-pki/infra-pki/tools/internal/oneshot"

func main() { oneshot.Main("config-check", run) }
