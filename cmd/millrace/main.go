// Command millrace works with streams and consumer groups from a shell. Installed as kubectl-millrace it is kubectl millrace.
package main

import (
	"os"

	_ "golang.org/x/crypto/x509roots/fallback" // the public authorities, where the system has none

	"github.com/millrace-dev/millrace/internal/cli"
)

// version is set by the Makefile.
var version string

func main() { os.Exit(cli.Run(version)) }
