package servecmd

import (
	"context"
	"errors"
	"os"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
)

type prepareOptions struct {
	*app.App
	dirs []string
}

func newRunPrepareCmd(a *app.App, run func(context.Context, *prepareOptions) error) *cobra.Command {
	o := &prepareOptions{App: a}
	if run == nil {
		run = runPrepare
	}
	return &cobra.Command{
		Use: "prepare DIR...", Short: "Open folders of the node to the workloads' group", Args: cobra.MinimumNArgs(1), Hidden: true,
		Long: "Open folders to their group (mode 2770). kubelet makes a folder of the node for root alone; the workloads run as any user of group 0.",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.dirs = args
			return app.Run(cmd.Context(), o, run)
		},
	}
}

// Check has nothing to check.
func (o *prepareOptions) Check() error { return nil }

func runPrepare(_ context.Context, o *prepareOptions) error {
	var errs []error
	for _, d := range o.dirs {
		if err := os.Chmod(d, os.ModeSetgid|0o770); err != nil {
			errs = append(errs, fault.New(fault.Other, "open folder", d, err).WithHint("run as the folder's owner, which is root for a folder that kubelet made"))
		}
	}
	return errors.Join(errs...)
}
