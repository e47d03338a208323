package app

import (
	"context"
	"fmt"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/install"
)

// Store asks a member how the members of a release's store stand, or does with
// flags what `run members` does.
func (a *App) Store(ctx context.Context, f *KubeFlags, flags ...string) (cluster.Store, error) {
	var st cluster.Store
	err := a.RunInPod(ctx, f, "ask the store of release", "run the same command again: it goes on where it was", PodRun{
		Service: install.Storage(f.Release), Container: "storage", Verb: "members", Flags: flags,
		Keep: []string{"--member=", "--cert-file=", "--key-file=", "--ca-file="}}, &st)
	return st, err
}

// Members prints how the members of a store stand.
type Members cluster.Store

// Table is one line a member.
func (m Members) Table() ([]string, [][]string) {
	var rows [][]string
	for _, o := range m.Members {
		role := o.Role
		if o.Leader {
			role += ", leads"
		}
		row := []string{o.Name, o.ID, role, o.State, "", "", ""}
		if o.State == cluster.MemberHealthy {
			row = append(row[:4], fmt.Sprintf("%s of %s", MiB(o.Bytes), MiB(o.Quota)), fmt.Sprint(o.Revision), fmt.Sprint(o.Lag))
		}
		for _, a := range o.Alarms {
			row[3] += ", " + a
		}
		rows = append(rows, row)
	}
	if !m.Quorum {
		rows = append(rows, []string{"no majority: nothing is written"})
	}
	return []string{"MEMBER", "ID", "ROLE", "STATE", "SIZE", "REVISION", "LAG"}, rows
}

// MiB is a size as people read it.
func MiB(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
