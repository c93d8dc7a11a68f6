// Command db-wait ends well once step-ca can work with its database.
package main

import "github.com/infra-pki/infra-pki/tools/internal/oneshot"

func main() { oneshot.Main("db-wait", run) }
