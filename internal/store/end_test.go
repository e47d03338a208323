package store_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
)

// TestEnd: every replica sees that the store ends, what is written before the
// reset goes with it, and a replica that comes late is fenced off.
func TestEnd(t *testing.T) {
	_, c := member(t, t.TempDir())
	p, ctx := store.NewPlain(c), t.Context()
	for name, v := range map[string]any{"install": thing{1}, "logins/s1": thing{2}, "job": thing{3}} {
		if _, err := p.Put(ctx, name, v, 0); err != nil {
			t.Fatal(err)
		}
	}
	a, b := open(t, c), open(t, c)
	var got thing
	if _, err := p.Ending(ctx, &got); !errors.Is(err, record.ErrNotFound) {
		t.Errorf("it ends: %v", err)
	}
	if err := a.Commit(ctx, record.Change{Path: "x/1", Value: thing{1}}, record.Change{Path: "audit/me", Value: thing{4}}, record.Change{Path: record.EndPath, Value: thing{5}}); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]*store.Store{"the one that wrote it": a, "another": b} {
		select {
		case <-s.Ended():
		case <-time.After(10 * time.Second):
			t.Fatalf("%s does not see the end", name)
		}
	}
	rev, err := p.Ending(ctx, &got)
	if err != nil || got.N != 5 {
		t.Fatalf("%+v %v", got, err)
	}
	if err := b.Commit(ctx, record.Change{Path: "x/2", Value: thing{2}}); err != nil {
		t.Errorf("before the reset: %v", err)
	}
	if err := p.Reset(ctx, rev+1, thing{6}); !errors.Is(err, record.ErrConflict) {
		t.Errorf("by another mark: %v", err)
	}
	if err := p.Reset(ctx, rev, thing{6}); err != nil {
		t.Fatal(err)
	}
	if err := p.Reset(ctx, rev, thing{7}); !errors.Is(err, record.ErrConflict) {
		t.Errorf("twice: %v", err)
	}
	left, err := c.Get(ctx, "/kmsctl/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range left.Kvs {
		names = append(names, strings.TrimPrefix(string(e.Key), "/kmsctl/v1/")+" "+string(e.Value))
	}
	if s := strings.Join(names, ", "); s != `plain/cleared {"N":6}, plain/heads/me {"N":4}, plain/logins/s1 {"N":2}` {
		t.Errorf("left: %s", s)
	}
	if err := b.Commit(ctx, record.Change{Path: "late", Value: thing{1}}); fault.KindOf(err) != fault.NotReady || fault.HintOf(err) == "" {
		t.Errorf("a late write: %v", err)
	}
	if _, err := p.Put(ctx, "install", thing{8}, 0); err != nil {
		t.Fatal(err)
	}
	if err := a.Commit(ctx, record.Change{Path: "late", Value: thing{1}}); fault.KindOf(err) != fault.NotReady {
		t.Errorf("a write into another installation: %v", err)
	}
	fresh := open(t, c)
	if err := fresh.Commit(ctx, record.Change{Path: "x/1", Value: thing{9}}); err != nil {
		t.Errorf("the new installation: %v", err)
	}
	select {
	case <-fresh.Ended():
		t.Error("the new installation has ended")
	default:
	}
}

// TestForgedEnd: a record that nobody of the service wrote ends nothing.
func TestForgedEnd(t *testing.T) {
	_, c := member(t, t.TempDir())
	s := open(t, c)
	if _, err := c.Put(t.Context(), "/kmsctl/v1/rec/"+record.EndPath, "forged"); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), record.Change{Path: "x/1", Value: thing{1}}); err != nil { // when it returns, the view has the forged one too
		t.Fatal(err)
	}
	select {
	case <-s.Ended():
		t.Error("it has ended")
	default:
	}
	if _, err := store.NewPlain(c).Ending(t.Context(), &thing{}); fault.KindOf(err) != fault.BadContent {
		t.Errorf("%v", err)
	}
}

// TestLeave: a store is left as it was looked at, or not at all.
func TestLeave(t *testing.T) {
	_, c := member(t, t.TempDir())
	p, ctx := store.NewPlain(c), t.Context()
	install, err := p.Put(ctx, "install", thing{1}, 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{"cleared": thing{2}, "job": thing{3}} {
		if _, err := p.Put(ctx, name, v, 0); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, c)
	if err := s.Commit(ctx, record.Change{Path: "audit/me", Value: thing{4}}); err != nil {
		t.Fatal(err)
	}
	var seen []string
	upTo, err := p.Peek(ctx, func(r record.Raw) error { seen = append(seen, r.Path); return nil })
	if err != nil || strings.Join(seen, " ") != "audit/me" {
		t.Fatalf("%q %v", seen, err)
	}
	if err := s.Commit(ctx, record.Change{Path: "x/1", Value: thing{5}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Leave(ctx, install, upTo); !errors.Is(err, record.ErrConflict) {
		t.Errorf("written meanwhile: %v", err)
	}
	if upTo, err = p.Peek(ctx, func(record.Raw) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := p.Leave(ctx, install+1, upTo); !errors.Is(err, record.ErrConflict) {
		t.Errorf("another installation: %v", err)
	}
	if err := p.Leave(ctx, install, upTo); err != nil {
		t.Fatal(err)
	}
	var got thing
	if _, err := p.Get(ctx, "cleared", &got); err != nil || got.N != 2 {
		t.Errorf("%+v %v", got, err)
	}
	for _, name := range []string{"install", "job"} {
		if _, err := p.Get(ctx, name, &got); !errors.Is(err, record.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := p.Get(ctx, "heads/me", &got); err != nil || got.N != 4 {
		t.Errorf("%+v %v", got, err)
	}
	if err := s.Commit(ctx, record.Change{Path: "late", Value: thing{6}}); fault.KindOf(err) != fault.NotReady {
		t.Errorf("a late write: %v", err)
	}
}

// TestStoreThatBeganAnew: an etcd that lost all its data under a running store
// is not taken for the one that it was.
func TestStoreThatBeganAnew(t *testing.T) {
	configs, endpoints, file := trio(t)
	alone := configs[0]
	alone.Members = nil
	m := begin(t, alone)[0]
	s := open(t, dial(t, endpoints[:1], file))
	for i := range 10 {
		if err := s.Commit(t.Context(), record.Change{Path: fmt.Sprint("x/", i), Value: thing{i}}); err != nil {
			t.Fatal(err)
		}
	}
	m.Close()
	m = begin(t, alone)[0]
	for i := 0; s.Commit(t.Context(), record.Change{Path: fmt.Sprint("later/", i), Value: thing{i}}) != nil; i++ { // until the view is fed again
		select {
		case <-s.Ended():
			t.Fatal("a restart ended the store")
		case <-time.After(50 * time.Millisecond):
		}
	}
	m.Close()
	wipe(t, alone)
	begin(t, alone)
	select {
	case <-s.Ended():
	case <-t.Context().Done():
	}
}
