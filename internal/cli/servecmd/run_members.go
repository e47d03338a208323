package servecmd

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/store"
)

type membersOptions struct {
	*app.App
	cfg        store.ServerConfig
	forget, id string
	dryRun     bool
}

func newRunMembersCmd(a *app.App, run func(context.Context, *membersOptions) error) *cobra.Command {
	o := &membersOptions{App: a}
	if run == nil {
		run = runMembers
	}
	cmd := &cobra.Command{
		Use: "members", Short: "Look at the members of a store, or take out one that lost its data", Args: cobra.NoArgs,
		Long: `Look at the members of a store, as one of them. It is what ` + "`kmsctl storage`" + ` runs in a pod of
the storage. With --forget, a member that has lost its data is taken out first, so that it joins
anew; one that has its data, or may have them, never is, nor one whose vote is needed.`,
		Example: "  kms-server run members --member storage-0=https://storage-0.storage:2380 --cert-file … --key-file … --ca-file … -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	addPeer(fs, &o.cfg, "repeatable")
	fs.StringVar(&o.forget, "forget", "", "name of the member to take out")
	fs.StringVar(&o.id, "id", "", "its id: another one of its name stays")
	fs.BoolVar(&o.dryRun, "dry-run", false, "only look whether it may be taken out")
	return cmd
}

// Check holds the rules of the flags.
func (o *membersOptions) Check() error {
	errs := []error{checkPeer(o.cfg)}
	if len(o.cfg.Members) == 0 {
		errs = append(errs, fault.Usagef("--member: missing"))
	}
	if (o.forget == "") != (o.id == "") {
		errs = append(errs, fault.Usagef("--forget, --id: give both or none"))
	}
	return errors.Join(errs...)
}

func runMembers(ctx context.Context, o *membersOptions) error {
	if o.forget != "" {
		if err := o.cfg.Forget(ctx, o.forget, o.id, o.dryRun); err != nil {
			return err
		}
	}
	st, err := o.cfg.Look(ctx)
	if err != nil {
		return err
	}
	return o.Print(app.Members(st))
}
