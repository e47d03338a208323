// Command kmsctl delivers, configures and runs an HSM-backed KMS.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/app"
)

// version is set by the linker; without it, the build's own information counts.
var version string

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return cli.Main(ctx, app.New(cli.Version(version)), os.Args[1:])
}
