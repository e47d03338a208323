package store_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
)

// trio is the configuration of three members on this machine.
func trio(t *testing.T) (all []store.ServerConfig, endpoints []string, file func(string) string) {
	t.Helper()
	file = certs(t)
	members := map[string]string{}
	for i := range 3 {
		members[fmt.Sprint("s", i)] = "https://127.0.0.1:" + freePort(t)
	}
	for i := range 3 {
		name := fmt.Sprint("s", i)
		client := "https://127.0.0.1:" + freePort(t)
		endpoints = append(endpoints, client)
		all = append(all, store.ServerConfig{Name: name, Dir: t.TempDir(), ListenClient: client, AdvertiseHost: "127.0.0.1", Members: members, ListenPeer: members[name],
			CertFile: file("storage.crt"), KeyFile: file("storage.key"), CAFile: file("ca.crt")})
	}
	return all, endpoints, file
}

// begin starts members side by side, since none is ready alone.
func begin(t *testing.T, all ...store.ServerConfig) []*store.Member {
	t.Helper()
	out := make([]*store.Member, len(all))
	var wg sync.WaitGroup
	for i, s := range all {
		wg.Go(func() {
			m, err := store.OpenServer(t.Context(), s)
			if err != nil {
				t.Error(err)
				return
			}
			out[i] = m
			t.Cleanup(m.Close)
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return out
}

func dial(t *testing.T, endpoints []string, file func(string) string) *clientv3.Client {
	t.Helper()
	c, err := store.Dial(t.Context(), store.Remote{Endpoints: endpoints, CAFile: file("ca.crt"), CertFile: file("client.crt"), KeyFile: file("client.key")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestThreeMembersLoseNothing: members go away and come back, one after the
// other, while a client writes; what was acknowledged is there afterwards, and
// in every member alone.
func TestThreeMembersLoseNothing(t *testing.T) {
	configs, endpoints, file := trio(t)
	members := begin(t, configs...)
	s := open(t, dial(t, endpoints, file))
	ctx, stop := context.WithCancel(t.Context())
	acked := make(chan int, 100000)
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := 0; ctx.Err() == nil; i++ {
			if s.Commit(ctx, record.Change{Path: fmt.Sprintf("x/%06d", i), Value: thing{i}}) == nil {
				acked <- i
			}
		}
	}()
	more := func(n int) { // so many writes were acknowledged since
		t.Helper()
		for want := len(acked) + n; len(acked) < want; {
			select {
			case <-time.After(10 * time.Millisecond):
			case <-t.Context().Done():
				t.Fatal("no more writes")
			}
		}
	}
	more(10)
	for i := range members {
		members[i].Close()
		more(10)
		members[i] = begin(t, configs[i])[0]
		if err := members[i].Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		more(10)
	}
	stop()
	<-written
	close(acked)
	fresh := open(t, dial(t, endpoints[1:2], file))
	n := 0
	for i := range acked {
		n++
		var v thing
		if _, err := fresh.Get(t.Context(), fmt.Sprintf("x/%06d", i), &v); err != nil || v.N != i {
			t.Errorf("write %d was acknowledged and is lost: %v", i, err)
		}
	}
	t.Logf("%d writes acknowledged, none lost", n)

	// Most are gone: the last one is not ready, and says so.
	members[0].Close()
	members[1].Close()
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := members[2].Ready(short); err == nil {
		t.Error("one of three is ready alone")
	}
}

// TestStoreKeepsItsMembers: a folder is opened with the members that its store
// has, and no store of other members begins beside it.
func TestStoreKeepsItsMembers(t *testing.T) {
	configs, endpoints, file := trio(t)
	alone := configs[0]
	alone.Members = nil
	m, err := store.OpenServer(t.Context(), alone)
	if err != nil {
		t.Fatal(err)
	}
	if err := open(t, dial(t, endpoints[:1], file)).Commit(t.Context(), record.Change{Path: "x/1", Value: thing{1}}); err != nil {
		t.Fatal(err)
	}
	m.Close()
	if _, err := store.OpenServer(t.Context(), configs[0]); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "as many members as it has") {
		t.Fatalf("one member grown to three: %v, hint %q", err, fault.HintOf(err))
	}
	// The two others are most of three, and must not begin without the first.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	faults := make(chan error, 2)
	for _, c := range configs[1:] {
		go func() {
			_, err := store.OpenServer(ctx, c)
			faults <- err
		}()
	}
	for range 2 {
		if err := <-faults; fault.KindOf(err) != fault.Unreachable || !strings.Contains(err.Error(), `"s0"`) {
			t.Errorf("a store began without its first member: %v", err)
		}
	}
	if m, err = store.OpenServer(t.Context(), alone); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)

	// A folder from before the members were written down is one of a store of one.
	if err := os.Remove(filepath.Join(alone.Dir, "members.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := store.OpenServer(t.Context(), configs[0]); fault.KindOf(err) != fault.Conflict {
		t.Errorf("without the file: %v", err)
	}
	var had []string
	b, err := os.ReadFile(filepath.Join(configs[1].Dir, "members.json"))
	if err != nil || json.Unmarshal(b, &had) != nil || !slices.Equal(had, []string{"s0", "s1", "s2"}) {
		t.Errorf("%s %v", b, err)
	}
}

func TestServerConfigCheck(t *testing.T) {
	good := store.ServerConfig{Name: "a", ListenClient: "https://0.0.0.0:2379", ListenPeer: "https://0.0.0.0:2380",
		Members: map[string]string{"a": "https://a:2380", "b": "https://b:2380", "c": "https://c:2380"}}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(*store.ServerConfig){
		"--listen-client":               func(s *store.ServerConfig) { s.ListenClient = "http://0.0.0.0:1" },
		"--listen-peer":                 func(s *store.ServerConfig) { s.ListenPeer = "" },
		`none of them is "x"`:           func(s *store.ServerConfig) { s.Name = "x" },
		"2 of them; a store has 1 or 3": func(s *store.ServerConfig) { s.Members = map[string]string{"a": "https://a:1", "b": "https://b:1"} },
		`of "c" is not https://HOST:PORT`: func(s *store.ServerConfig) {
			s.Members = map[string]string{"a": "https://a:1", "b": "https://b:1", "c": "c"}
		},
	} {
		s := good
		spoil(&s)
		if err := s.Check(); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if err := (store.ServerConfig{ListenClient: "https://:1"}).Check(); err != nil {
		t.Errorf("one member: %v", err)
	}
}
