package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pattern"
)

const (
	// electionTime is how long members may have no leader and be well all the same.
	electionTime = 3 * time.Second
	// removeTime is for who removes a member: etcd lets none go before those
	// that stay have been connected for five seconds.
	removeTime = 15 * time.Second
)

// heard is what one member says about the store and itself.
type heard struct {
	list   []*membership.Member
	status *clientv3.StatusResponse
	err    error
}

// Look tells how the members stand that the settings name, and those that the
// store has beside them. It asks each for itself and needs no majority.
func (s ServerConfig) Look(ctx context.Context) (cluster.Store, error) {
	said, err := s.hearAll(ctx)
	if err != nil {
		return cluster.Store{}, err
	}
	return s.standing(said), nil
}

// hearAll asks all members side by side.
func (s ServerConfig) hearAll(ctx context.Context) (map[string]heard, error) {
	m, hangUp, err := s.meet(transport.TLSInfo{CertFile: s.CertFile, KeyFile: s.KeyFile, TrustedCAFile: s.CAFile})
	if err != nil {
		return nil, err
	}
	defer hangUp()
	var mu sync.Mutex
	said := map[string]heard{}
	var wg sync.WaitGroup
	for name := range s.Members {
		wg.Go(func() {
			h := m.hear(ctx, name)
			mu.Lock()
			defer mu.Unlock()
			said[name] = h
		})
	}
	wg.Wait()
	return said, nil
}

// hear asks one member.
func (m meeting) hear(ctx context.Context, name string) (h heard) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	if h.list, h.err = m.members(ctx, m.s.Members[name]); h.err != nil {
		return h
	}
	me := m.s.called(h.list, name)
	if me == nil || len(me.ClientURLs) == 0 {
		h.err = errors.New("it does not answer clients yet")
		return h
	}
	c, err := Dial(ctx, m.s.remote(me.ClientURLs))
	if err != nil {
		h.err = err
		return h
	}
	h.status, h.err = status(ctx, c, me.ClientURLs[0])
	h.err = errors.Join(h.err, c.Close())
	return h
}

// status is what a member says of itself, once it has a leader, if it finds
// one: when a leader goes, the others choose another within two seconds.
func status(ctx context.Context, c *clientv3.Client, at string) (*clientv3.StatusResponse, error) {
	for until := time.Now().Add(electionTime); ; {
		st, err := c.Status(ctx, at)
		if err != nil || st.Leader != 0 || time.Now().After(until) {
			return st, err
		}
		if !pause(ctx, meetPause) {
			return st, nil
		}
	}
}

// called is the member of a list with a name of the settings: one that has just
// been added has an address and no name.
func (s ServerConfig) called(list []*membership.Member, name string) *membership.Member {
	for _, o := range list {
		if o.Name == name || (o.Name == "" && slices.Contains(o.PeerURLs, s.Members[name])) {
			return o
		}
	}
	return nil
}

// remote reaches members as one of them does.
func (s ServerConfig) remote(endpoints []string) Remote {
	return Remote{Endpoints: endpoints, CAFile: s.CAFile, CertFile: s.CertFile, KeyFile: s.KeyFile}
}

// standing puts together what the members said. The one that has come furthest
// knows best who belongs to the store.
func (s ServerConfig) standing(said map[string]heard) (out cluster.Store) {
	var list []*membership.Member
	var furthest, agreed uint64
	for _, h := range said {
		if h.status != nil {
			agreed = max(agreed, h.status.RaftIndex)
			if list == nil || h.status.RaftAppliedIndex > furthest {
				list, furthest = h.list, h.status.RaftAppliedIndex
			}
		}
	}
	known := map[*membership.Member]bool{}
	for name, h := range said {
		o := s.called(list, name)
		known[o] = true
		out.Members = append(out.Members, h.member(name, o, agreed))
	}
	for _, o := range list {
		if !known[o] {
			out.Members = append(out.Members, heard{err: errors.New("it is none of the members of the settings")}.member(cmp.Or(o.Name, o.PeerURLs[0]), o, 0))
		}
	}
	slices.SortFunc(out.Members, func(a, b cluster.StoreMember) int { return strings.Compare(a.Name, b.Name) })
	voters, there := 0, 0
	for _, m := range out.Members {
		if m.Role != cluster.Voter {
			continue
		}
		voters++
		if m.Votes() && said[m.Name].status.Leader != 0 {
			there++
		}
	}
	out.Quorum = there > voters/2
	return out
}

// alarm is one of the alarms in etcd's status.
var alarm = pattern.Lazy(`memberID:(\d+)\s+alarm:(\w+)`)

// member is how a member stands that the store knows as o; nil: not at all.
func (h heard) member(name string, o *membership.Member, agreed uint64) cluster.StoreMember {
	m := cluster.StoreMember{Name: name}
	if o != nil {
		m.ID, m.Role = o.ID.String(), cluster.Voter
		if o.IsLearner {
			m.Role = cluster.Learner
		}
	}
	switch {
	case h.err == nil:
		st := h.status
		m.State, m.Leader = cluster.MemberHealthy, st.Leader == st.Header.MemberId
		m.Bytes, m.InUse, m.Quota, m.Revision = st.DbSize, st.DbSizeInUse, st.DbSizeQuota, st.Header.Revision
		m.Lag = max(0, int64(agreed)-int64(st.RaftAppliedIndex))
		for _, e := range st.Errors {
			if a := alarm().FindStringSubmatch(e); a != nil && a[1] == fmt.Sprint(st.Header.MemberId) {
				m.Alarms = append(m.Alarms, a[2])
			}
		}
	case errors.Is(h.err, errEarly) && o != nil && len(o.ClientURLs) > 0:
		m.State = cluster.MemberEmpty
	case errors.Is(h.err, errEarly):
		m.State = cluster.MemberJoining
	default:
		m.State, m.Why = cluster.MemberAway, h.err.Error()
	}
	return m
}

// Forget takes the member of this name and id, which has lost its data, out of
// its store; it joins anew then, by itself. One that is out already is no
// fault. Only a member that says itself that it is empty goes, and only while
// most voters are there without it. A dry run only looks.
func (s ServerConfig) Forget(ctx context.Context, name, id string, dryRun bool) error {
	said, err := s.hearAll(ctx)
	if err != nil {
		return err
	}
	st := s.standing(said)
	m, ok := st.Member(name)
	switch {
	case !ok:
		return fault.Newf(fault.NotFound, opReplace, name, "the members are %s", strings.Join(s.names(), ", "))
	case m.State == cluster.MemberJoining || (m.ID != "" && m.ID != id):
		return nil
	case m.State == cluster.MemberHealthy:
		return fault.Newf(fault.Conflict, opReplace, name, "it has its data").WithHint("nothing was done; a member whose data are damaged is given an empty volume first")
	case m.State == cluster.MemberAway:
		return fault.Newf(fault.NotReady, opReplace, name, "nobody knows whether it has its data: %s", m.Why).
			WithHint("let its pod start: with its volume it goes on by itself, with an empty one it can be replaced")
	}
	if err := spares(st, name); err != nil || dryRun {
		return err
	}
	var endpoints []string
	for _, o := range st.Members {
		if o.Votes() {
			endpoints = append(endpoints, s.called(said[o.Name].list, o.Name).ClientURLs...)
		}
	}
	return s.remove(ctx, endpoints, m)
}

const opReplace = "replace member"

// spares is nil when a store has a majority without a member that is not there.
func spares(st cluster.Store, name string) error {
	voters, there := 0, 0
	for _, o := range st.Members {
		if o.Role != cluster.Voter {
			continue
		}
		voters++
		if o.Votes() {
			there++
		}
	}
	switch {
	case there <= voters/2:
		return fault.Newf(fault.NotReady, opReplace, name, "of the %d members that vote, %d are there with their data, and %d must agree", voters, there, voters/2+1).
			WithHint("bring the others back first; when the volumes of most members are lost, so is the store: delete the claims and pods of all members, and bring a backup into the new store with `kmsctl restore`")
	case !st.Quorum:
		return fault.Newf(fault.Unreachable, opReplace, name, "the others have no leader at this moment").WithHint("try again: they choose one within seconds")
	}
	return nil
}

// remove has the members at endpoints take one out.
func (s ServerConfig) remove(ctx context.Context, endpoints []string, m cluster.StoreMember) error {
	id, err := strconv.ParseUint(m.ID, 16, 64)
	if err != nil {
		return err
	}
	c, err := Dial(ctx, s.remote(endpoints))
	if err != nil {
		return err
	}
	ask, cancel := context.WithTimeout(ctx, removeTime)
	defer cancel()
	for {
		if _, err = c.MemberRemove(ask, id); !errors.Is(err, rpctypes.ErrUnhealthy) || !pause(ask, meetPause) {
			break
		}
	}
	if errors.Is(err, rpctypes.ErrMemberNotFound) {
		err = nil // somebody else was quicker
	}
	if err := errors.Join(err, c.Close()); err != nil {
		return fault.New(fault.Unreachable, opReplace, m.Name, err).WithHint("run the same command again: it goes on where it was")
	}
	return nil
}

// leftOut is a fault when the others say that this member, which has data, is
// none of theirs any more.
func (s ServerConfig) leftOut(ctx context.Context) error {
	said, err := s.hearAll(ctx)
	if err != nil {
		return nil //nolint:nilerr // it is asked for another error's sake
	}
	for name, h := range said {
		if name != s.Name && h.status != nil && s.called(h.list, s.Name) == nil {
			return fault.Newf(fault.Conflict, "start storage in", s.Dir, "its store has taken out member %q, and goes on without its data", s.Name).
				WithHint("give %s an empty volume: it learns all from the others", s.Name)
		}
	}
	return nil
}
