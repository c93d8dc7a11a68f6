// Command db-migrate makes step-ca's tables, their guards and its database role.
package main

import "github.com/infra-pki/infra-pki/tools/internal/oneshot"

func main() { oneshot.Main("db-migrate", run) }
