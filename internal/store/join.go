package store

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"slices"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"

	"github.com/kmsctl/kmsctl/internal/fault"
)

const (
	meetPause = 200 * time.Millisecond
	meetLong  = 2 * time.Second // when it waits for a person
	lookTime  = 5 * time.Second
)

// errEarly is the word of a member that has no data and is ready to begin.
var errEarly = errors.New("it has not begun")

// meeting is a member without data that looks for its store. A store of
// several begins when all members say that they have none: most of them could
// do without one that holds the data of another. A store that is there is
// joined, by one member after the other.
type meeting struct {
	s   ServerConfig
	web *http.Client
}

// meet gives the meeting of this member with the others, until done.
func (s ServerConfig) meet(info transport.TLSInfo) (m meeting, done func(), err error) {
	tr, err := transport.NewTransport(info, lookTime)
	if err != nil {
		return meeting{}, nil, fault.New(fault.Usage, "read the certificates of storage", s.CertFile, err)
	}
	return meeting{s, &http.Client{Transport: tr, Timeout: lookTime}}, tr.CloseIdleConnections, nil
}

// find gives the members of the store as it shall start: nil when the store
// begins, with the members of the settings. It takes as long as ctx has, since
// a new start would find what this one finds.
func (s ServerConfig) find(ctx context.Context, info transport.TLSInfo, t *tls.Config) (types.URLsMap, error) {
	m, hangUp, err := s.meet(info)
	if err != nil {
		return nil, err
	}
	defer hangUp()
	l, err := listen(ctx, s.ListenPeer)
	if err != nil {
		return nil, err
	}
	early := &http.Server{ReadHeaderTimeout: lookTime, ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooEarly) })}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = early.Serve(tls.NewListener(l, t)) // it ends when it is closed
	}()
	defer func() { _ = early.Close(); <-done }()
	for pause := meetPause; ; pause = min(2*pause, meetLong) {
		found, ready, err := m.look(ctx)
		if err == nil && ready {
			return found, nil
		}
		if fault.KindOf(err) == fault.Conflict {
			return nil, err
		}
		if err != nil && s.Waits != nil {
			s.Waits(err)
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// look asks every other member once, and does the next step.
func (m meeting) look(ctx context.Context) (found types.URLsMap, ready bool, err error) {
	var store []*membership.Member
	var missing error
	for _, name := range m.s.names() {
		if name == m.s.Name {
			continue
		}
		list, err := m.members(ctx, m.s.Members[name])
		switch {
		case err == nil:
			store = list
		case !errors.Is(err, errEarly) && missing == nil:
			missing = fault.New(fault.Unreachable, "meet member", name, err).
				WithHint("all members must be there once for a store to begin or to grow; see the log of %s. A store of one that an older chart installed is heard by others after one upgrade without --storage-members", name)
		}
	}
	if store == nil {
		return nil, missing == nil, missing
	}
	mine, err := m.place(store)
	switch {
	case err != nil:
		return nil, false, err
	case mine == nil:
		return nil, false, m.add(ctx, store)
	case mine.Name == m.s.Name: // one of those who begin, and the others were quicker
		return nil, true, nil
	}
	return m.existing(ctx, store)
}

// members asks a member which members its store has.
func (m meeting) members(ctx context.Context, at string) ([]*membership.Member, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at+"/members", nil)
	if err != nil {
		return nil, err
	}
	res, err := m.web.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var list []*membership.Member
	switch res.StatusCode {
	case http.StatusOK:
		return list, json.NewDecoder(res.Body).Decode(&list)
	case http.StatusTooEarly:
		return nil, errEarly
	}
	return nil, fmt.Errorf("it answered %s", res.Status)
}

// place is this member's in a store that is there, nil when it has none yet.
func (m meeting) place(store []*membership.Member) (*membership.Member, error) {
	var mine *membership.Member
	for _, o := range store {
		at, known := m.s.Members[o.Name]
		switch {
		case o.Name == m.s.Name && len(o.ClientURLs) > 0:
			// What it had promised as a voter is lost: it must not vote again.
			return nil, fault.Newf(fault.NotReady, "start storage in", m.s.Dir, "the store knows member %q, and its folder is empty", o.Name).
				WithHint("bring back the volume of %s; when that is lost, `kmsctl storage replace %s` (with the --namespace of its pod) lets it learn all from the others", o.Name, o.Name)
		case o.Name == m.s.Name || (o.Name == "" && slices.Contains(o.PeerURLs, m.s.Members[m.s.Name])):
			mine = o
		case o.Name != "" && !known:
			return nil, fault.Newf(fault.Conflict, "join the store of", o.Name, "it is none of the members %v", m.s.names()).WithHint("check --member")
		case known && !slices.Contains(o.PeerURLs, at):
			return nil, fault.Newf(fault.Unreachable, "join the store of", o.Name, "it does not hear others at %s yet", at)
		}
	}
	return mine, nil
}

// add asks the store to take this member: one that learns, and has no vote
// until it has learned all. etcd takes one at a time.
func (m meeting) add(ctx context.Context, store []*membership.Member) error {
	var refused error
	for _, o := range store {
		if o.IsLearner || len(o.ClientURLs) == 0 {
			continue
		}
		c, err := Dial(ctx, m.s.remote(o.ClientURLs))
		if err != nil {
			return err
		}
		ask, cancel := context.WithTimeout(ctx, lookTime)
		_, err = c.MemberAddAsLearner(ask, []string{m.s.Members[m.s.Name]})
		cancel()
		err = errors.Join(err, c.Close())
		if err == nil {
			return nil
		}
		refused = fault.New(fault.Unreachable, "join the store of", o.Name, err).WithHint("see the log of %s", o.Name)
	}
	if refused == nil {
		return fault.Newf(fault.Unreachable, "join the store of", store[0].Name, "none of its members answers clients yet")
	}
	return refused
}

// existing is the store that has taken this member, once all others know it.
func (m meeting) existing(ctx context.Context, store []*membership.Member) (types.URLsMap, bool, error) {
	out := types.URLsMap{}
	var err error
	for _, o := range store {
		name := o.Name
		if slices.Contains(o.PeerURLs, m.s.Members[m.s.Name]) {
			name = m.s.Name
		} else if list, err := m.members(ctx, m.s.Members[name]); err != nil || len(list) != len(store) {
			return nil, false, fault.Newf(fault.Unreachable, "join the store with member", name, "it does not know all members yet").WithHint("see the log of %s", name)
		}
		if out[name], err = types.NewURLs(o.PeerURLs); err != nil {
			return nil, false, fault.New(fault.BadContent, "join the store of", name, err)
		}
	}
	return out, true, nil
}

// testOnlyLearning lets a test stop a member that has joined and has no vote.
var testOnlyLearning func() error

// settle makes a member that has joined a full one, and tells the others where
// it hears them.
func (m *Member) settle(ctx context.Context, at types.URLs) error {
	id := m.etcd.MemberID()
	if me := m.etcd.Cluster().Member(id); me != nil && !slices.Equal(me.PeerURLs, at.StringSlice()) {
		if _, err := m.etcd.UpdateMember(ctx, membership.Member{ID: id, RaftAttributes: membership.RaftAttributes{PeerURLs: at.StringSlice()}}); err != nil {
			return fault.New(fault.Other, "tell the others the address of", m.etcd.Cfg.Name, err)
		}
	}
	for m.etcd.IsLearner() {
		if testOnlyLearning != nil {
			return testOnlyLearning()
		}
		// It is refused until everything is learned.
		if _, err := m.etcd.PromoteMember(ctx, uint64(id)); err == nil {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.etcd.StopNotify():
			return fault.Newf(fault.Other, "join the store as", m.etcd.Cfg.Name, "it stopped by itself")
		case <-time.After(meetPause):
		}
	}
	return nil
}
