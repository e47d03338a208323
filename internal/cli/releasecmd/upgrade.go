package releasecmd

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/release"
)

func newUpgradeCmd(a *app.App, run func(context.Context, *changeOptions) error) *cobra.Command {
	o := &changeOptions{App: a, upgrade: true}
	if run == nil {
		run = runUpgrade
	}
	cmd := &cobra.Command{
		Use: "upgrade", Short: "Change the release: another chart, other settings", Args: cobra.NoArgs,
		Long: `Change the release to another version of the chart or to other settings. Without --values
and --model the settings of the release stay, and single flags change them. hsm-secret stays
as it is unless a new one is given.

--dry-run shows what would change, object by object, and what --clear-data would take. --atomic goes back to the last good
revision when the change fails.

--clear-data clears the HSM's application data as the manual's clear_data does: when the
change is up, every key, instance and service ID goes, with the master keys on the token. It
shows what will go and has the release's name typed before anything is changed, and the
release remembers it: the same command run again, a rollback, a clear_data in a file, or
helm alone clear nothing. "kmsctl hsm clear" clears once more.`,
		Example: `  kmsctl upgrade --repo ./charts --dry-run
  kmsctl upgrade --repo ./charts --version 1.1.0 --atomic
  kmsctl upgrade --repo ./charts --secret hsm-Secret.yaml --values overrides_hsm.yaml
  kmsctl upgrade --repo ./charts --clear-data --api-key-file admin.key`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	o.add(cmd)
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "show what would change in the cluster, secrets masked, and change nothing")
	return cmd
}

func runUpgrade(ctx context.Context, o *changeOptions) error {
	c, h, err := o.OpenRelease(&o.kube)
	if err != nil {
		return err
	}
	have, err := h.Get(o.kube.Release)
	if err != nil {
		return err
	}
	in, err := o.read(have.Values)
	if err != nil {
		return err
	}
	defer in.zero()
	chart, err := o.FindChart(ctx, &o.chart)
	if err != nil {
		return err
	}
	if o.dryRun {
		if err := install.SameModel(o.kube.Release, have.Values, in.values); err != nil {
			return err
		}
		after, err := h.Render(ctx, o.kube.Release, chart, in.values)
		if err != nil {
			return err
		}
		out := changes{From: fmt.Sprintf("%s %s", have.Chart, have.Version), To: fmt.Sprintf("%s %s", chart.Name(), chart.Version()), Objects: release.Diff(have.Manifest, after), kube: o.kube}
		if o.clear.asked {
			would, err := o.wouldClear(ctx, c)
			if err != nil {
				return err
			}
			out.Clearing = &would
		}
		return o.Print(out)
	}
	return o.carryOut(ctx, c, in, o.InstallJob(c, h, app.Change{Chart: chart, Values: in.values, Options: o.release()}).Upgrade)
}

// changes is what --dry-run of upgrade prints.
type changes struct {
	From    string               `json:"from"`
	To      string               `json:"to"`
	Objects []release.Difference `json:"objects"`
	// Clearing is what --clear-data would do when the change is up.
	Clearing *app.OnceResult `json:"clearing,omitempty"`
	kube     app.KubeFlags
}

// Table is one line an object, then its lines.
func (c changes) Table() ([]string, [][]string) {
	rows := [][]string{{"from " + c.From + " to " + c.To}}
	if len(c.Objects) == 0 {
		rows = append(rows, []string{"nothing would change"})
	}
	for _, d := range c.Objects {
		rows = append(rows, []string{d.Change + " " + d.Object})
		if d.Change == "changed" {
			rows = append(rows, []string{d.Text})
		}
	}
	if c.Clearing != nil {
		rows = append(rows, c.Clearing.Rows(c.kube)...)
	}
	return nil, rows
}

type rollbackOptions struct {
	*app.App
	kube     app.KubeFlags
	revision int
	repair   bool
	wait     bool
	timeout  time.Duration
}

func newRollbackCmd(a *app.App, run func(context.Context, *rollbackOptions) error) *cobra.Command {
	o := &rollbackOptions{App: a}
	if run == nil {
		run = runRollback
	}
	cmd := &cobra.Command{
		Use: "rollback [REVISION]", Short: "Go back to an earlier revision of the release", Args: cobra.MaximumNArgs(1),
		Long: `Go back to an earlier revision: to the last good one before the present, or to REVISION.
hsm-secret, certificates, keys and data stay as they are.`,
		Example: "  kmsctl rollback\n  kmsctl rollback 3",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				n, err := strconv.Atoi(args[0])
				if err != nil || n < 1 {
					return fault.Usagef("%q is not a revision", args[0]).WithHint("see: helm history %s -n %s", o.kube.Release, o.kube.Namespace)
				}
				o.revision = n
			}
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.kube.Add(cmd.Flags())
	cmd.Flags().BoolVar(&o.repair, "repair", false, "end a change that is pending although nobody works on it")
	addWait(cmd.Flags(), &o.wait)
	addTimeout(cmd.Flags(), &o.timeout)
	return cmd
}

// Check holds the rules of the flags.
func (o *rollbackOptions) Check() error {
	if o.timeout <= 0 {
		return fault.Usagef("--timeout: %s is not positive", o.timeout)
	}
	return nil
}

func runRollback(ctx context.Context, o *rollbackOptions) error {
	c, h, err := o.OpenRelease(&o.kube)
	if err != nil {
		return err
	}
	if _, err := h.Get(o.kube.Release); err != nil {
		return err
	}
	res, err := o.InstallJob(c, h, app.Change{Options: release.Options{Wait: o.wait, Timeout: o.timeout}}).
		Rollback(ctx, install.Options{Release: o.kube.Release, Namespace: o.kube.Namespace, Repair: o.repair, Wait: o.wait, Timeout: o.timeout}, o.revision)
	if err != nil {
		return err
	}
	return o.Print(changeResult{Result: res})
}
