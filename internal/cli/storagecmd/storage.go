// Package storagecmd has the verbs for the members of a release's store.
package storagecmd

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	cmd := &cobra.Command{Use: "storage", Short: "Look at the members of a release's store, and replace one that lost its volume"}
	cmd.AddCommand(newMembersCmd(a, nil), newReplaceCmd(a, nil))
	return []*cobra.Command{cmd}
}

type membersOptions struct {
	*app.App
	kube app.KubeFlags
}

func newMembersCmd(a *app.App, run func(context.Context, *membersOptions) error) *cobra.Command {
	o := &membersOptions{App: a}
	if run == nil {
		run = runMembers
	}
	cmd := &cobra.Command{
		Use: "members", Short: "List the members of the store", Args: cobra.NoArgs,
		Long: `List the members of a release's store, asked from within one of its pods: who votes and who leads, who
answers, the size of each one's file and of what it may hold, its revision, and how many changes
that were agreed on it has not made yet. States: healthy; empty, when it has lost its data;
joining, when it has none yet; away, when it does not answer.

The exit code is 7 when a member is not healthy, does not vote, or is full.`,
		Example: "  kmsctl storage members\n  kmsctl storage members -n kms -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	o.kube.Add(cmd.Flags())
	return cmd
}

// Check has nothing to check.
func (o *membersOptions) Check() error { return nil }

func runMembers(ctx context.Context, o *membersOptions) error {
	st, err := o.Store(ctx, &o.kube)
	if err != nil {
		return err
	}
	if err := o.Print(app.Members(st)); err != nil {
		return err
	}
	if !st.Whole() {
		return fault.Newf(fault.NotReady, "look at the store of release", o.kube.Release, "it is not whole").WithHint("`kmsctl doctor -n %s` says what cures it", o.kube.Namespace)
	}
	return nil
}
