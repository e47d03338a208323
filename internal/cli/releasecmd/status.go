package releasecmd

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
)

type statusOptions struct {
	*app.App
	kube app.KubeFlags
}

func newStatusCmd(a *app.App, run func(context.Context, *statusOptions) error) *cobra.Command {
	o := &statusOptions{App: a}
	if run == nil {
		run = runStatus
	}
	cmd := &cobra.Command{
		Use: "status", Short: "Show how the release stands", Args: cobra.NoArgs,
		Long: `Show the release, its workloads, what keeps pods from being ready, the members of the store that
are not as they should be, and what the API's replicas say is not right: a clock that the life of
keys does not follow, keys that come near their limit. Exits 7 when it is not healthy.`,
		Example: "  kmsctl status -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	o.kube.Add(cmd.Flags())
	return cmd
}

// Check has nothing to check.
func (o *statusOptions) Check() error { return nil }

// statusResult prints how a release stands, and its store, where that is told.
type statusResult struct {
	install.Status
	Store *cluster.Store     `json:"store,omitempty"`
	API   []diagnose.Finding `json:"api,omitempty"` // what its replicas say is not right
}

// Table is the release's line, then one a workload, then one a trouble.
func (s statusResult) Table() ([]string, [][]string) {
	rows := [][]string{{"release", s.Release.Name, s.Release.Status, fmt.Sprintf("revision %d, chart %s", s.Release.Revision, s.Release.Version)}}
	for _, w := range s.Workloads {
		rows = append(rows, []string{"workload", w.Name, fmt.Sprintf("%d/%d", w.Ready, w.Want), w.Kind})
	}
	for _, p := range s.Pods {
		state, why := p.Phase, ""
		if p.Ready {
			state = "Ready"
		}
		if t := p.Trouble; t != nil {
			state = t.Reason
			why = t.Message
			if t.Log != "" {
				why += " log: " + t.Log
			}
		}
		rows = append(rows, []string{"pod", p.Name, state, why})
	}
	if s.Store != nil {
		for _, m := range s.Store.Members {
			if !m.Well() {
				rows = append(rows, []string{"member", m.Name, strings.Join(append([]string{m.State}, m.Alarms...), ", "), cmp.Or(m.Why, m.Role)})
			}
		}
	}
	for _, f := range s.API {
		rows = append(rows, []string{f.Check, "", string(f.Verdict), f.Reason + "; cure: " + f.Cure})
	}
	return []string{"WHAT", "NAME", "STATE", "MORE"}, rows
}

func runStatus(ctx context.Context, o *statusOptions) error {
	c, h, err := o.OpenRelease(&o.kube)
	if err != nil {
		return err
	}
	s := statusResult{}
	if s.Status, err = o.InstallJob(c, h, app.Change{}).Look(ctx, install.Options{Release: o.kube.Release, Namespace: o.kube.Namespace}); err != nil {
		return err
	}
	// Who may look at pods may not always run a command in them.
	if st, err := o.Store(ctx, &o.kube); err == nil {
		s.Store, s.Healthy = &st, s.Healthy && st.Whole()
	}
	replicas, err := o.Replicas(ctx, c, o.kube)
	if err != nil {
		o.Warn("the API was not asked for its clock and its keys: %v", err)
	}
	for _, f := range diagnose.Run(ctx, diagnose.ReplicaChecks(func(context.Context) ([]diagnose.Replica, error) { return replicas, nil })).Findings {
		if f.Verdict == diagnose.Fail || f.Verdict == diagnose.Warn {
			s.API = append(s.API, f)
		}
	}
	if err := o.Print(s); err != nil {
		return err
	}
	if s.Healthy {
		return nil
	}
	f := fault.Newf(fault.NotReady, "status of release", o.kube.Release, "it is not healthy")
	for _, p := range s.Pods {
		if p.Trouble != nil && p.Trouble.Cure != "" {
			return f.WithHint("%s: %s", p.Name, p.Trouble.Cure)
		}
	}
	return f.WithHint("`kmsctl doctor -n %s` says what is wrong, and what cures it", o.kube.Namespace)
}
