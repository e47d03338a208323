// Command kmsctl delivers, configures and runs an HSM-backed KMS.
package main

import (
	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/addoncmd"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cli/archivecmd"
	"github.com/kmsctl/kmsctl/internal/cli/auditcmd"
	"github.com/kmsctl/kmsctl/internal/cli/backupcmd"
	"github.com/kmsctl/kmsctl/internal/cli/clockcmd"
	"github.com/kmsctl/kmsctl/internal/cli/hsmcmd"
	"github.com/kmsctl/kmsctl/internal/cli/keyscmd"
	"github.com/kmsctl/kmsctl/internal/cli/loadcmd"
	"github.com/kmsctl/kmsctl/internal/cli/releasecmd"
	"github.com/kmsctl/kmsctl/internal/cli/rendercmd"
	"github.com/kmsctl/kmsctl/internal/cli/setupcmd"
	"github.com/kmsctl/kmsctl/internal/cli/storagecmd"
	_ "github.com/kmsctl/kmsctl/internal/gc"
)

// version is set by the linker; without it, the build's own information counts.
var version string

var program = cli.Program{
	Name:  "kmsctl",
	Short: "Put an HSM-backed key management service into an air-gapped Kubernetes site, and run it",
	Long: `kmsctl delivers a Key Management Service (KMS) that is backed by a hardware security
module (HSM) to a Kubernetes site that has no way out, and runs it.`,
	Verbs: cli.Verbs{keyscmd.New, rendercmd.New, releasecmd.New, auditcmd.New, archivecmd.New, loadcmd.New,
		addoncmd.New, hsmcmd.New, backupcmd.New, clockcmd.New, storagecmd.New, setupcmd.New, ofServer},
}

// ofServer are the commands that open the KMS in their own process.
func ofServer(a *app.App) []*cobra.Command {
	return []*cobra.Command{
		a.Delegate("serve", "Run the embedded KMS: API, storage and HSM connector in one"),
		a.Delegate("run", "Run one workload of the KMS, as the chart's pods do"),
		a.Delegate("restore FILE | --undo", "Bring a backup's records back into a KMS"),
		a.Delegate("plugin", "Let a Kubernetes API server encrypt its Secrets by a root key (KMS v2)"),
	}
}

func main() { cli.Run(program, version) }
