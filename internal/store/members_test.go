package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/store"
)

// opening is a member that is being opened in the background.
type opening struct {
	waits  chan error // what it waits for, the newest
	done   chan error // how the opening ended
	cancel func()
}

func openLater(t *testing.T, s store.ServerConfig) *opening {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	o := &opening{make(chan error, 1), make(chan error, 1), cancel}
	s.Waits = func(err error) {
		select {
		case o.waits <- err:
		default:
		}
	}
	go func() {
		m, err := store.OpenServer(ctx, s)
		if m != nil {
			t.Cleanup(m.Close)
		}
		o.done <- err
	}()
	return o
}

// wipe empties the folder of a member that is closed.
func wipe(t *testing.T, s store.ServerConfig) {
	t.Helper()
	if err := os.RemoveAll(s.Dir); err != nil {
		t.Fatal(err)
	}
}

// until waits for a standing of the store.
func until(t *testing.T, s store.ServerConfig, what string, is func(cluster.Store) bool) cluster.Store {
	t.Helper()
	for {
		st, err := s.Look(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if is(st) {
			return st
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-t.Context().Done():
			t.Fatalf("never %s: %+v", what, st)
		}
	}
}

// stands is the members of a store in words: name, role and state.
func stands(st cluster.Store) string {
	var out []string
	for _, m := range st.Members {
		out = append(out, strings.TrimSuffix(fmt.Sprintf("%s:%s-%s", m.Name, m.State, m.Role), "-"))
	}
	if !st.Quorum {
		out = append(out, "no quorum")
	}
	return strings.Join(out, " ")
}

func is(want string) func(cluster.Store) bool {
	return func(st cluster.Store) bool { return stands(st) == want }
}

// TestMemberThatLostItsData: it has no vote, until it was taken out by name and
// has learned all from the others; who takes it out may be killed anywhere, and
// is refused while that would cost the store its majority. No acknowledged
// write is lost.
func TestMemberThatLostItsData(t *testing.T) {
	configs, endpoints, file := trio(t)
	members := begin(t, configs...)
	w := write(t, open(t, dial(t, endpoints, file)))
	w.more(10)
	look := func() cluster.Store { return until(t, configs[0], "", func(cluster.Store) bool { return true }) }
	whole := until(t, configs[0], "whole", is("s0:healthy-voter s1:healthy-voter s2:healthy-voter"))
	if n := slices.IndexFunc(whole.Members, func(m cluster.StoreMember) bool { return m.Leader }); n < 0 || whole.Members[n].Bytes == 0 || whole.Members[n].Quota == 0 || whole.Members[n].Revision == 0 {
		t.Errorf("%+v", whole)
	}
	old, _ := whole.Member("s1")
	if err := configs[0].Forget(t.Context(), "s1", old.ID, false); fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "it has its data") {
		t.Errorf("a member with its data was taken out: %v", err)
	}
	if err := configs[0].Forget(t.Context(), "s9", old.ID, false); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a stranger: %v", err)
	}

	members[1].Close()
	if err := configs[0].Forget(t.Context(), "s1", old.ID, false); fault.KindOf(err) != fault.NotReady || !strings.Contains(err.Error(), "nobody knows whether it has its data") {
		t.Errorf("a member that is away was taken out: %v", err)
	}
	wipe(t, configs[1])
	lost := openLater(t, configs[1])
	if err := <-lost.waits; !strings.Contains(err.Error(), "its folder is empty") || !strings.Contains(fault.HintOf(err), "kmsctl storage replace s1") {
		t.Errorf("it does not say what happened: %v, hint %q", err, fault.HintOf(err))
	}
	until(t, configs[0], "empty", is("s0:healthy-voter s1:empty-voter s2:healthy-voter"))
	w.more(10)

	// Two are there, and one of them has a vote.
	members[2].Close()
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := members[0].Ready(short); err == nil {
		t.Error("the empty member voted")
	}
	until(t, configs[0], "without a majority", is("s0:healthy-voter s1:empty-voter s2:away-voter no quorum"))
	err := configs[0].Forget(t.Context(), "s1", old.ID, false)
	if fault.KindOf(err) != fault.NotReady || !strings.Contains(err.Error(), "of the 3 members that vote, 1 are there with their data, and 2 must agree") || !strings.Contains(fault.HintOf(err), "kmsctl restore") {
		t.Errorf("the store lost its majority: %v, hint %q", err, fault.HintOf(err))
	}
	members[2] = begin(t, configs[2])[0]
	w.more(10)

	// Nothing yet goes: a look, and an id of another.
	until(t, configs[0], "whole but one", is("s0:healthy-voter s1:empty-voter s2:healthy-voter"))
	for _, err := range []error{configs[0].Forget(t.Context(), "s1", old.ID, true), configs[0].Forget(t.Context(), "s1", "1", false)} {
		if err != nil {
			t.Error(err)
		}
	}
	if got := stands(look()); got != "s0:healthy-voter s1:empty-voter s2:healthy-voter" {
		t.Errorf("it was taken out: %s", got)
	}

	// The pod is killed before it is taken out, when it is out, when it learns.
	lost.cancel()
	if err := <-lost.done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	lost = openLater(t, configs[1])
	<-lost.waits
	undo := store.StopAsLearner(errHalfWay)
	for range 2 { // the second time it is out already
		if err := configs[2].Forget(t.Context(), "s1", old.ID, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-lost.done; !errors.Is(err, errHalfWay) {
		t.Fatal(err)
	}
	undo()
	until(t, configs[0], "half-way", is("s0:healthy-voter s1:away-learner s2:healthy-voter"))
	w.more(10)
	members[1] = begin(t, configs[1])[0]
	until(t, configs[0], "whole again", is("s0:healthy-voter s1:healthy-voter s2:healthy-voter"))
	if m, _ := look().Member("s1"); m.ID == old.ID || m.ID == "" {
		t.Errorf("it has the id %q", m.ID)
	}
	w.more(10)

	// It counts as the others do, and has all.
	members[2].Close()
	w.more(10)
	begin(t, configs[2])
	acked := w.stop()
	for _, at := range endpoints {
		lostWrites(t, open(t, dial(t, []string{at}, file)), acked)
	}
}

// TestMemberThatWasTakenOut, and comes back with its data: it says what to do.
func TestMemberThatWasTakenOut(t *testing.T) {
	configs, endpoints, file := trio(t)
	members := begin(t, configs...)
	members[1].Close()
	c := dial(t, []string{endpoints[0], endpoints[2]}, file)
	list, err := c.MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range list.Members {
		if m.Name == "s1" {
			_, err := c.MemberRemove(t.Context(), m.ID)
			for errors.Is(err, rpctypes.ErrUnhealthy) { // until the others have been connected for long enough
				_, err = c.MemberRemove(t.Context(), m.ID)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := store.OpenServer(t.Context(), configs[1]); fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), `taken out member "s1"`) || !strings.Contains(fault.HintOf(err), "an empty volume") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	wipe(t, configs[1])
	begin(t, configs[1])
	until(t, configs[0], "whole again", is("s0:healthy-voter s1:healthy-voter s2:healthy-voter"))
}
