package storagecmd

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
)

type replaceOptions struct {
	*app.App
	kube    app.KubeFlags
	confirm app.ConfirmFlags
	member  string
	dryRun  bool
	timeout time.Duration

	ask func(ctx context.Context, flags ...string) (cluster.Store, error) // of a pod, but for tests
}

func newReplaceCmd(a *app.App, run func(context.Context, *replaceOptions) error) *cobra.Command {
	o := &replaceOptions{App: a}
	o.ask = func(ctx context.Context, flags ...string) (cluster.Store, error) {
		return o.Store(ctx, &o.kube, flags...)
	}
	if run == nil {
		run = runReplace
	}
	cmd := &cobra.Command{
		Use: "replace MEMBER", Short: "Let a member that lost its volume learn everything from the others", Args: cobra.ExactArgs(1),
		Long: `Replace a member of a release's store that has lost its volume. A member that comes back empty must
not vote as the one that it was: what it had agreed to could be lost. So it waits, and says so, until
this command takes it out of the store. Then its pod joins anew by itself, learns everything from
the others, and votes when it has. The KMS goes on meanwhile.

It is refused while the member has its data or does not answer, and while the others are not most
of those who vote. For a pod that cannot start with its old volume, delete the volume's claim and
the pod: it starts with an empty one.

It shows what it would do and has the member's name typed. Stopped anywhere and run again, it goes
on; for a member that votes already there is nothing to do.`,
		Example: "  kmsctl storage replace key-management-hsm-storage-1 --dry-run\n  kmsctl storage replace key-management-hsm-storage-1",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.member = args[0]
			return app.Run(cmd.Context(), o, run)
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return install.StorageMembers(o.kube.Release), cobra.ShellCompDirectiveNoFileComp
		},
	}
	fs := cmd.Flags()
	o.kube.Add(fs)
	o.confirm.Add(fs, app.WithDryRun)
	fs.BoolVar(&o.dryRun, "dry-run", false, "only say whether it may be replaced")
	fs.DurationVar(&o.timeout, "timeout", app.DefaultTimeout, "how long to wait until the member votes; it goes on by itself")
	return cmd
}

// Check holds the rules of the flags.
func (o *replaceOptions) Check() error {
	if o.timeout <= 0 {
		return fault.Usagef("--timeout: %s is not positive", o.timeout)
	}
	return nil
}

// replaceResult says what became of a member.
type replaceResult struct {
	Member  string `json:"member"`
	Was     string `json:"oldId,omitempty"` // the id that was taken out, or would be
	ID      string `json:"id,omitempty"`
	DryRun  bool   `json:"dryRun,omitempty"`
	Changed bool   `json:"changed"`
}

// Table is one fact a line.
func (r replaceResult) Table() ([]string, [][]string) {
	rows := [][]string{{"member", r.Member}}
	switch {
	case r.DryRun && r.Was != "":
		rows = append(rows, []string{"would take out", r.Was}, []string{"then", "it joins anew, and votes when it has everything"})
	case r.DryRun:
		rows = append(rows, []string{"would wait", "until it votes"})
	case !r.Changed:
		rows = append(rows, []string{"nothing to do", "it votes, as " + r.ID})
	case r.Was != "":
		rows = append(rows, []string{"taken out", r.Was}, []string{"votes as", r.ID})
	default:
		rows = append(rows, []string{"votes as", r.ID})
	}
	return nil, rows
}

func runReplace(ctx context.Context, o *replaceOptions) error {
	st, err := o.ask(ctx)
	if err != nil {
		return err
	}
	m, ok := st.Member(o.member)
	if !ok {
		var names []string
		for _, o := range st.Members {
			names = append(names, o.Name)
		}
		return fault.Newf(fault.NotFound, "replace member", o.member, "the members are %s", strings.Join(names, ", "))
	}
	res := replaceResult{Member: m.Name, ID: m.ID, DryRun: o.dryRun}
	if m.Votes() {
		return o.Print(res)
	}
	res.Changed = !o.dryRun
	if !onItsWay(m) {
		if res.Was, err = m.ID, o.takeOut(ctx, m); err != nil {
			return err
		}
	}
	if o.dryRun {
		return o.Print(res)
	}
	if res.ID, err = o.wait(ctx); err != nil {
		return err
	}
	return o.Print(res)
}

// onItsWay says whether a member becomes a voter by itself: it is out of the
// store, or learns.
func onItsWay(m cluster.StoreMember) bool {
	return m.Role != cluster.Voter && m.State != cluster.MemberEmpty
}

// takeOut takes the member out, when that is wanted.
func (o *replaceOptions) takeOut(ctx context.Context, m cluster.StoreMember) error {
	forget := []string{"--forget", m.Name, "--id", m.ID}
	if _, err := o.ask(ctx, append(forget, "--dry-run")...); err != nil || o.dryRun {
		return err
	}
	goes := fmt.Sprintf("the vote of %s, id %s, whose volume is empty: it joins anew and learns from the others", m.Name, m.ID)
	if err := o.Confirm(&o.confirm, m.Name, []string{goes}); err != nil {
		return err
	}
	if _, err := o.ask(ctx, forget...); err != nil {
		return err
	}
	o.Progress().Line("taken out", m.Name, m.ID)
	return nil
}

// lookEvery is how often a member that joins is looked at.
const lookEvery = 2 * time.Second

// wait gives the member's id when it votes.
func (o *replaceOptions) wait(ctx context.Context) (id string, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	var m cluster.StoreMember
	for told := ""; ; {
		st, err := o.ask(ctx)
		if err != nil && ctx.Err() == nil {
			return "", err
		}
		if err == nil {
			m, _ = st.Member(o.member)
		}
		if m.Votes() {
			return m.ID, nil
		}
		if now := strings.TrimSpace(m.State + " " + m.Role); now != told {
			told = now
			o.Progress().Line("waiting", o.member, now)
		}
		select {
		case <-ctx.Done():
			return "", fault.Newf(fault.NotReady, "wait for member", o.member, "it does not vote yet: %s", told).
				WithHint("does its pod run (`kmsctl status -n %s`)? the same command again goes on", o.kube.Namespace)
		case <-time.After(lookEvery):
		}
	}
}
