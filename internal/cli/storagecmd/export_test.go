package storagecmd

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cluster"
)

// NewReplace gives the command with a store that is asked by ask.
func NewReplace(ask func(ctx context.Context, flags ...string) (cluster.Store, error)) func(*app.App) []*cobra.Command {
	return func(a *app.App) []*cobra.Command {
		return []*cobra.Command{newReplaceCmd(a, func(ctx context.Context, o *replaceOptions) error {
			o.ask = ask
			return runReplace(ctx, o)
		})}
	}
}
