package archivecmd

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
)

type readOptions struct {
	*app.App
	archive string
	limits  limitFlags
	key     string // of verify
}

// Check holds the rules of the flags.
func (o *readOptions) Check() error { return o.limits.check() }

func newInspectCmd(a *app.App, run func(context.Context, *readOptions) error) *cobra.Command {
	o := &readOptions{App: a}
	if run == nil {
		run = runInspect
	}
	cmd := &cobra.Command{
		Use: "inspect ARCHIVE", Short: "Show what an archive holds", Args: cobra.ExactArgs(1),
		Long: `Show the charts and images of an archive. One of kmsctl's own is shown from its index,
without reading the rest; any other is read once.`,
		Example: "  kmsctl archive inspect key-management-hsm-amd64.tar.gz\n  kmsctl archive inspect key-management-hsm-amd64.tar.gz -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.archive = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.limits.add(cmd.Flags())
	return cmd
}

func runInspect(ctx context.Context, o *readOptions) error {
	a, err := archive.Open(o.archive, o.In)
	if err != nil {
		return err
	}
	defer a.Close()
	c, err := a.Inspect(ctx, o.limits.limits())
	if err != nil {
		return err
	}
	return o.Print(describe(a, c, false))
}
