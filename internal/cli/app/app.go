// Package app is what every command gets: the streams, the clock, the version,
// and functions that open the dear things (connector, store, registry,
// cluster). It is the only place that joins low-floor packages to the
// interfaces that the jobs declare.
package app

import (
	"context"
	"io"
	"os"
	"time"

	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/output"
	"github.com/kmsctl/kmsctl/internal/release"
)

// App is handed to every command. Tests replace its fields.
type App struct {
	In       io.Reader
	Out, Err io.Writer
	Now      func() time.Time
	Getenv   func(string) string
	Version  string
	Format   string // -o/--output, checked before any command runs
	Asker    Asker  // nil: the controlling terminal, where there is one

	// How to open the dear things; nil: the real ones.
	OpenCluster func(*KubeFlags) (*kube.Cluster, error)
	OpenHelm    func(*KubeFlags) (*release.Helm, error)

	atExit  []func()
	oneCall string // data folder whose KMS runs for this command
}

// Close ends what a command opened for its own time, last first.
func (a *App) Close() {
	for i := len(a.atExit) - 1; i >= 0; i-- {
		a.atExit[i]()
	}
	a.atExit = nil
}

// New is the App of the real program.
func New(version string) *App {
	return &App{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Now: time.Now, Getenv: os.Getenv, Version: version, Format: output.Formats[0]}
}

// Print writes a command's one result to stdout in the chosen format.
func (a *App) Print(v any) error { return output.Write(a.Out, a.Format, v) }

// Progress prints one line per finished object on stderr; with a machine's
// format it is silent.
func (a *App) Progress() *output.Progress { return output.NewProgress(a.Err, a.Format != "table") }

// Check is a command's second part: the flag rules, all faults at once.
type Check interface{ Check() error }

// Run checks the options, then runs.
func Run[O Check](ctx context.Context, opts O, run func(context.Context, O) error) error {
	if err := opts.Check(); err != nil {
		return err
	}
	return run(ctx, opts)
}
