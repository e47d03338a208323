// Package addoncmd has the verbs on ICP's cluster folder: what its installer
// did with archive_addons of config.yaml and with the folder resources. The
// loading and installing itself is that of load and install.
package addoncmd

import (
	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	cmd := &cobra.Command{Use: "addon", Short: "Bring in archives by ICP's cluster folder, as its installer did",
		Long: `Bring in archives by the folder that ICP's installer works on:

  cluster/config.yaml    archive_addons: which archive goes where, and which charts are installed
  cluster/resources/     objects that are applied before any archive is loaded
  cluster/addon/         the archives`}
	cmd.AddCommand(newInitCmd(a, nil), newApplyCmd(a, nil))
	return []*cobra.Command{cmd}
}

// Folders below the cluster folder, as the manual has them.
const (
	resourcesFolder = "resources"
	archiveFolder   = "addon"
)
