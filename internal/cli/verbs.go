package cli

import (
	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/addoncmd"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cli/archivecmd"
	"github.com/kmsctl/kmsctl/internal/cli/auditcmd"
	"github.com/kmsctl/kmsctl/internal/cli/backupcmd"
	"github.com/kmsctl/kmsctl/internal/cli/hsmcmd"
	"github.com/kmsctl/kmsctl/internal/cli/keyscmd"
	"github.com/kmsctl/kmsctl/internal/cli/loadcmd"
	"github.com/kmsctl/kmsctl/internal/cli/releasecmd"
	"github.com/kmsctl/kmsctl/internal/cli/rendercmd"
	"github.com/kmsctl/kmsctl/internal/cli/servecmd"
	"github.com/kmsctl/kmsctl/internal/cli/setupcmd"
)

// verbs lists the commands of floor 5.
func verbs(a *app.App) []*cobra.Command {
	var all []*cobra.Command
	all = append(all, servecmd.New(a)...)
	all = append(all, keyscmd.New(a)...)
	all = append(all, rendercmd.New(a)...)
	all = append(all, releasecmd.New(a)...)
	all = append(all, auditcmd.New(a)...)
	all = append(all, archivecmd.New(a)...)
	all = append(all, loadcmd.New(a)...)
	all = append(all, addoncmd.New(a)...)
	all = append(all, hsmcmd.New(a)...)
	all = append(all, backupcmd.New(a)...)
	all = append(all, setupcmd.New(a)...)
	return all
}
