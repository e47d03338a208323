// Package hsmcmd has the verbs about the HSM itself: the certificates of its
// clients, what its token can do, and clearing what this product left there.
package hsmcmd

import (
	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	cmd := &cobra.Command{Use: "hsm", Short: "Look after the HSM: its clients' certificates, its token, its data"}
	cmd.AddCommand(newProbeCmd(a, nil), newClearCmd(a, nil), newRotateCmd(a), newMigrateCmd(a), newLunaCertCmd(a))
	return []*cobra.Command{cmd}
}

func newLunaCertCmd(a *app.App) *cobra.Command {
	cmd := &cobra.Command{Use: "luna-cert", Short: "Certificates between management nodes and a Luna appliance", Long: `Make the certificates by which a SafeNet Luna Network HSM (model gemalto) knows its clients,
and fetch the one by which the clients know the appliance.

Every management node needs a pair of its own: a pod on a node without one cannot reach the HSM.`}
	cmd.AddCommand(newLunaCreateCmd(a, nil), newLunaFetchCmd(a, nil))
	return cmd
}
