package cli

import (
	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cli/keyscmd"
	"github.com/kmsctl/kmsctl/internal/cli/rendercmd"
)

// verbs lists the commands of floor 5.
func verbs(a *app.App) []*cobra.Command {
	var all []*cobra.Command
	all = append(all, keyscmd.New(a)...)
	all = append(all, rendercmd.New(a)...)
	return all
}
