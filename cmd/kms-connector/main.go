// Command kms-connector holds one PKCS#11 token and serves it to the KMS. It
// is the only program of ours with cgo, so that a fault in a vendor's library
// ends it and nothing else.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/kmsctl/kmsctl/internal/connector/server"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return server.Main(ctx, os.Args[1:], os.Stdout, os.Stderr)
}
