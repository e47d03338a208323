package diagnose

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
)

const (
	nearlyFull = 0.8  // of what a member's file may hold
	farBehind  = 1000 // changes
)

// store asks the members themselves: a pod that is not ready does not say
// whether the store goes on without it.
func (d Doctor) store(ctx context.Context) []Finding {
	if d.Store == nil {
		return skip("the store cannot be asked")
	}
	st, err := d.Store(ctx)
	if err != nil {
		switch fault.KindOf(err) {
		case fault.NotFound:
			return skip("the release has no storage")
		case fault.Denied:
			return skip("may not run a command in the pods of the storage")
		}
		return failErr(err, "see the check \"pods\"")
	}
	var out []Finding
	if !st.Quorum {
		out = append(out, bad(Fail, d.lostCure(), "most members of the store are not there with their data: nothing is written"))
	}
	for _, m := range st.Members {
		if f := d.member(m, st.Quorum); f != nil {
			out = append(out, *f)
		}
	}
	return orElse(out, "all %d members are there", len(st.Members))
}

// lostCure is for a store that has no majority.
func (d Doctor) lostCure() string {
	return fmt.Sprintf("bring the members back with their volumes; when those of most are lost, so is the store: "+
		"`kubectl delete pvc,pod -n %s -l app.kubernetes.io/instance=%s,app.kubernetes.io/component=storage` makes an empty one, and `kmsctl restore FILE --in-cluster-service` brings a backup in", d.Namespace, d.Release)
}

// roomCure is for a member whose data fill what its volume lets it hold.
func (d Doctor) roomCure(name, replace string) string {
	return fmt.Sprintf("enlarge its volume (`kubectl edit pvc etcd-%s -n %s`) and delete its pod: it may hold half of what the volume has over 512 MiB, 8 GiB at most; "+
		"where a volume cannot grow, give it a larger one instead, and then: %s", name, d.Namespace, replace)
}

// member is what is wrong with one member, or nil. Without a majority nobody
// can be replaced.
func (d Doctor) member(m cluster.StoreMember, quorum bool) *Finding {
	replace := fmt.Sprintf("`kmsctl storage replace %s -n %s`", m.Name, d.Namespace)
	renew := "delete its volume's claim and its pod, and then: " + replace
	var f Finding
	switch {
	case m.State == cluster.MemberEmpty && !quorum:
		f = bad(Fail, "bring its volume back", "%s has lost its data, and it must not vote", m.Name)
	case m.State == cluster.MemberEmpty:
		f = bad(Fail, "bring its volume back; when that is lost: "+replace, "%s has lost its data: its volume is empty, and it must not vote", m.Name)
	case m.State == cluster.MemberAway && !quorum:
		f = bad(Fail, "see why its pod does not run", "%s is away: %s", m.Name, m.Why)
	case m.State == cluster.MemberAway:
		f = bad(Fail, "see why its pod does not run; when its volume is lost or damaged, "+renew, "%s does not answer: %s", m.Name, m.Why)
	case m.State == cluster.MemberJoining, m.Role == cluster.Learner:
		f = bad(Warn, "wait a little: it votes when it has everything", "%s joins the store", m.Name)
	case slices.Contains(m.Alarms, cluster.NoSpace):
		f = bad(Fail, d.roomCure(m.Name, replace), "%s has no room: its file of %d MiB has reached what it may hold (%d MiB); nothing is written, and reads go on", m.Name, m.Bytes>>20, m.Quota>>20)
	case len(m.Alarms) > 0:
		f = bad(Fail, renew, "%s has raised the alarm %s: its data are damaged", m.Name, strings.Join(m.Alarms, ", "))
	case m.Quota > 0 && float64(m.InUse) > nearlyFull*float64(m.Quota):
		f = bad(Warn, "purge keys that are not needed; or "+d.roomCure(m.Name, replace), "%s holds %d of the %d MiB that it may", m.Name, m.InUse>>20, m.Quota>>20)
	case m.Lag > farBehind:
		f = bad(Warn, "is its disk slow, or its network? see its node", "%s is %d changes behind the others", m.Name, m.Lag)
	default:
		return nil
	}
	return &f
}
