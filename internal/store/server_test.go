package store_test

import (
	"context"
	"encoding/json"
	"errors"
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
	w := write(t, s)
	w.more(10)
	for i := range members {
		members[i].Close()
		w.more(10)
		members[i] = begin(t, configs[i])[0]
		if err := members[i].Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.more(10)
	}
	lostWrites(t, open(t, dial(t, endpoints[1:2], file)), w.stop())

	// Most are gone: the last one is not ready, and says so.
	members[0].Close()
	members[1].Close()
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := members[2].Ready(short); err == nil {
		t.Error("one of three is ready alone")
	}
}

// writer writes until it is stopped, and knows what was acknowledged.
type writer struct {
	t    *testing.T
	stop func() []int

	mu    sync.Mutex
	acked []int
}

func write(t *testing.T, s *store.Store) *writer {
	ctx, cancel := context.WithCancel(t.Context())
	w := &writer{t: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			if s.Commit(ctx, record.Change{Path: fmt.Sprintf("x/%06d", i), Value: thing{i}}) == nil {
				w.mu.Lock()
				w.acked = append(w.acked, i)
				w.mu.Unlock()
			}
		}
	}()
	w.stop = func() []int {
		cancel()
		<-done
		return w.acked
	}
	return w
}

func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acked)
}

// more waits until so many writes more were acknowledged.
func (w *writer) more(n int) {
	w.t.Helper()
	for want := w.count() + n; w.count() < want; {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-w.t.Context().Done():
			w.t.Fatal("no more writes")
		}
	}
}

// lostWrites looks for what was acknowledged.
func lostWrites(t *testing.T, s *store.Store, acked []int) {
	t.Helper()
	for _, i := range acked {
		var v thing
		if _, err := s.Get(t.Context(), fmt.Sprintf("x/%06d", i), &v); err != nil || v.N != i {
			t.Errorf("write %d was acknowledged and is lost: %v", i, err)
		}
	}
	t.Logf("%d writes acknowledged", len(acked))
}

// TestStoreGrows: a store of one goes on while two members join it, one
// of which is killed twice on the way, and each of the three has everything then.
func TestStoreGrows(t *testing.T) {
	configs, endpoints, file := trio(t)
	alone := configs[0]
	alone.Members = map[string]string{"s0": configs[0].ListenPeer}
	first := begin(t, alone)[0]
	w := write(t, open(t, dial(t, endpoints[:1], file)))
	w.more(10)

	// Killed when the store has taken it, and before it had any data.
	c := dial(t, endpoints[:1], file)
	if _, err := c.MemberAddAsLearner(t.Context(), []string{configs[1].ListenPeer}); err != nil {
		t.Fatal(err)
	}
	w.more(10)
	// Killed when it had data, and had no vote.
	func() {
		defer store.StopAsLearner(errHalfWay)()
		if m, err := store.OpenServer(t.Context(), configs[1]); !errors.Is(err, errHalfWay) {
			t.Fatalf("%v %v", m, err)
		}
	}()
	if got := shape(t, c); got != "s0 s1(learns)" {
		t.Errorf("half-way: %s", got)
	}
	w.more(10)
	// While one learns no other is taken, and each waits for its turn.
	begin(t, configs[2], configs[1])
	if got := shape(t, c); got != "s0 s1 s2" {
		t.Errorf("grown: %s", got)
	}
	w.more(10)

	// The first one takes the new settings over, and the others go on meanwhile.
	first.Close()
	begin(t, configs[0])
	acked := w.stop()
	for _, at := range endpoints {
		lostWrites(t, open(t, dial(t, []string{at}, file)), acked)
	}
}

var errHalfWay = errors.New("half-way")

// shape is the members of a store, in words.
func shape(t *testing.T, c *clientv3.Client) string {
	t.Helper()
	res, err := c.MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, m := range res.Members {
		if m.IsLearner {
			m.Name += "(learns)"
		}
		out = append(out, m.Name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// TestStoreOfOneFromBefore: a member that listened to nobody, as it did before
// stores grew, is heard after one start with its address.
func TestStoreOfOneFromBefore(t *testing.T) {
	configs, endpoints, file := trio(t)
	old := configs[0]
	old.Members = nil
	m := begin(t, old)[0]
	if err := open(t, dial(t, endpoints[:1], file)).Commit(t.Context(), record.Change{Path: "x/000001", Value: thing{1}}); err != nil {
		t.Fatal(err)
	}
	m.Close()
	if err := os.Remove(filepath.Join(old.Dir, "members.json")); err != nil {
		t.Fatal(err)
	}
	begin(t, configs...)
	for _, at := range endpoints {
		lostWrites(t, open(t, dial(t, []string{at}, file)), []int{1})
	}
}

// TestStoreKeepsItsMembers: no member is left out, and none begins a store of
// its own beside one that is there or may be.
func TestStoreKeepsItsMembers(t *testing.T) {
	configs, _, _ := trio(t)
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
		if err := <-faults; fault.KindOf(err) != fault.Unreachable || !strings.Contains(err.Error(), `"s0"`) || fault.HintOf(err) == "" {
			t.Errorf("a store began without its first member: %v, hint %q", err, fault.HintOf(err))
		}
	}
	members := begin(t, configs...)
	var had []string
	b, err := os.ReadFile(filepath.Join(configs[1].Dir, "members.json"))
	if err != nil || json.Unmarshal(b, &had) != nil || !slices.Equal(had, []string{"s0", "s1", "s2"}) {
		t.Errorf("%s %v", b, err)
	}

	members[2].Close()
	alone := configs[2]
	alone.Members = map[string]string{"s2": configs[2].ListenPeer}
	if _, err := store.OpenServer(t.Context(), alone); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "never shrinks") {
		t.Errorf("one of three alone: %v, hint %q", err, fault.HintOf(err))
	}
	stranger := configs[2]
	stranger.Dir = t.TempDir()
	stranger.Name = "s9"
	stranger.Members = map[string]string{"s9": configs[2].ListenPeer, "s0": configs[0].ListenPeer, "other": configs[1].ListenPeer}
	if _, err := store.OpenServer(t.Context(), stranger); fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "none of the members") {
		t.Errorf("another store: %v", err)
	}
	begin(t, configs[2])
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
