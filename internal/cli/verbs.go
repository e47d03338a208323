package cli

import (
	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
)

// verbs lists the commands of floor 5.
func verbs(*app.App) []*cobra.Command {
	return nil
}
