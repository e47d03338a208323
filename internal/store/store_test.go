package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pki"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
)

type thing struct{ N int }

func codec(t *testing.T) *record.Codec {
	t.Helper()
	c, err := record.NewCodec(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func member(t *testing.T, dir string) (*store.Member, *clientv3.Client) {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	c := m.Client()
	t.Cleanup(func() { c.Close(); m.Close() })
	return m, c
}

func open(t *testing.T, c *clientv3.Client) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), c, codec(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestCommitReadsBackAtOnceAndInOtherReplicas(t *testing.T) {
	_, c := member(t, t.TempDir())
	a, b := open(t, c), open(t, c)
	ctx := t.Context()
	if err := a.Commit(ctx, record.Change{Path: "x/1", Value: thing{1}}, record.Change{Path: "x/2", Value: thing{2}}); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*store.Store{a, b} {
		var got thing
		rev, err := s.Get(ctx, "x/2", &got)
		if err != nil || got.N != 2 || rev == 0 {
			t.Fatalf("%+v rev %d: %v", got, rev, err)
		}
	}
	var paths []string
	err := a.List(ctx, "x/", func(m record.Meta, decode func(any) error) error {
		paths = append(paths, m.Path)
		var v thing
		return decode(&v)
	})
	if err != nil || !slices.Equal(paths, []string{"x/1", "x/2"}) {
		t.Errorf("%v %v", paths, err)
	}
	if _, err := a.Get(ctx, "x/3", &thing{}); !errors.Is(err, record.ErrNotFound) {
		t.Errorf("absent: %v", err)
	}
}

func TestCommitIsAllOrNothing(t *testing.T) {
	_, c := member(t, t.TempDir())
	s := open(t, c)
	ctx := t.Context()
	if err := s.Commit(ctx, record.Change{Path: "a", Value: thing{1}}); err != nil {
		t.Fatal(err)
	}
	err := s.Commit(ctx, record.Change{Path: "b", Value: thing{2}}, record.Change{Path: "a", Value: thing{3}})
	if !errors.Is(err, record.ErrConflict) {
		t.Fatalf("creating what exists: %v", err)
	}
	if _, err := s.Get(ctx, "b", &thing{}); !errors.Is(err, record.ErrNotFound) {
		t.Errorf("half a transaction was written: %v", err)
	}
	rev, _ := s.Get(ctx, "a", &thing{})
	if err := s.Commit(ctx, record.Change{Path: "a", Rev: rev}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, "a", &thing{}); !errors.Is(err, record.ErrNotFound) {
		t.Errorf("after delete: %v", err)
	}
}

func TestConcurrentUpdatesAreNeitherLostNorDoubled(t *testing.T) {
	_, c := member(t, t.TempDir())
	replicas := []*store.Store{open(t, c), open(t, c)}
	ctx := t.Context()
	if err := replicas[0].Commit(ctx, record.Change{Path: "n", Value: thing{0}}); err != nil {
		t.Fatal(err)
	}
	const each = 20
	var wg sync.WaitGroup
	for _, s := range replicas {
		wg.Go(func() {
			for done := 0; done < each; {
				var v thing
				rev, err := s.Get(ctx, "n", &v)
				if err != nil {
					t.Error(err)
					return
				}
				switch err := s.Commit(ctx, record.Change{Path: "n", Value: thing{v.N + 1}, Rev: rev}); {
				case err == nil:
					done++
				case !errors.Is(err, record.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	// A fresh view: either replica may still be waiting for the other's last write.
	var v thing
	if _, err := open(t, c).Get(ctx, "n", &v); err != nil || v.N != 2*each {
		t.Errorf("%d, want %d: %v", v.N, 2*each, err)
	}
}

func TestForgedRecordIsRefused(t *testing.T) {
	_, c := member(t, t.TempDir())
	s := open(t, c)
	ctx := t.Context()
	if err := s.Commit(ctx, record.Change{Path: "tenant-a/key", Value: thing{1}}); err != nil {
		t.Fatal(err)
	}
	// An intruder in etcd copies a record to another tenant.
	res, err := c.Get(ctx, "/kmsctl/v1/rec/tenant-a/key")
	if err != nil || len(res.Kvs) != 1 {
		t.Fatal(err, res)
	}
	if _, err := c.Put(ctx, "/kmsctl/v1/rec/tenant-b/key", string(res.Kvs[0].Value)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, "tenant-b/key", &thing{}); !errors.Is(err, record.ErrForged) || fault.KindOf(err) != fault.BadContent {
		t.Errorf("running store: %v", err)
	}
	if _, err := store.Open(ctx, c, codec(t)); !errors.Is(err, record.ErrForged) {
		t.Errorf("store opened over a forged record: %v", err)
	}
}

func TestRecordsSurviveARestart(t *testing.T) {
	dir := t.TempDir()
	func() {
		m, err := store.OpenEmbedded(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		c := m.Client()
		defer c.Close()
		s, err := store.Open(t.Context(), c, codec(t))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for i := range 50 {
			if err := s.Commit(t.Context(), record.Change{Path: fmt.Sprintf("x/%02d", i), Value: thing{i}}); err != nil {
				t.Fatal(err)
			}
		}
	}()
	_, c := member(t, dir)
	s := open(t, c)
	var v thing
	if _, err := s.Get(t.Context(), "x/49", &v); err != nil || v.N != 49 {
		t.Errorf("%+v %v", v, err)
	}
}

// certs writes a CA's leaves into a folder and gives the paths by name.
func certs(t *testing.T) func(string) string {
	t.Helper()
	dir, now := t.TempDir(), time.Now()
	ca, err := pki.NewCA("etcd", now)
	if err != nil {
		t.Fatal(err)
	}
	other, err := pki.NewCA("other", now)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, ca pki.Pair, use pki.Usage) {
		p, err := pki.Issue(ca, name, use, []string{"127.0.0.1", "localhost"}, now)
		if err != nil {
			t.Fatal(err)
		}
		for f, b := range map[string][]byte{name + ".crt": p.Cert, name + ".key": p.Key} {
			if err := os.WriteFile(filepath.Join(dir, f), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("server", ca, pki.Peer)
	write(pki.StorageName, ca, pki.Peer)
	write("client", ca, pki.Client)
	write("stranger", other, pki.Client)
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), ca.Cert, 0o600); err != nil {
		t.Fatal(err)
	}
	return func(name string) string { return filepath.Join(dir, name) }
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

func TestRemoteNeedsAClientCertificateAndLagShowsSilence(t *testing.T) {
	file, port := certs(t), freePort(t)
	m, err := store.OpenServer(t.Context(), store.ServerConfig{Name: "s0", Dir: t.TempDir(), ListenClient: "https://127.0.0.1:" + port,
		CertFile: file("server.crt"), KeyFile: file("server.key"), CAFile: file("ca.crt")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	dial := func(name string) *clientv3.Client {
		c, err := store.Dial(t.Context(), store.Remote{Endpoints: []string{"https://127.0.0.1:" + port},
			CAFile: file("ca.crt"), CertFile: file(name + ".crt"), KeyFile: file(name + ".key")})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := store.NewPlain(dial("stranger")).Put(short, "x", thing{1}, 0); fault.KindOf(err) != fault.Unreachable {
		t.Errorf("a stranger's certificate: %v", err)
	}
	s := open(t, dial("client"))
	if err := s.Commit(t.Context(), record.Change{Path: "x", Value: thing{1}}); err != nil {
		t.Fatal(err)
	}
	// Several heartbeats pass: the watch must answer them though nothing changes.
	deadline := time.After(20 * time.Second)
	for seen := 0; seen < 3; {
		before := s.Lag()
		select {
		case <-deadline:
			t.Fatal("the watch gave no sign of life")
		case <-time.After(10 * time.Millisecond):
		}
		if s.Lag() < before {
			seen++
		}
	}
	m.Close()
	for s.Lag() < time.Second {
		select {
		case <-deadline:
			t.Fatal("a dead store does not look stale")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func TestPlain(t *testing.T) {
	_, c := member(t, t.TempDir())
	p := store.NewPlain(c)
	ctx := context.Background()
	if _, err := p.Get(ctx, "install", &thing{}); !errors.Is(err, record.ErrNotFound) {
		t.Fatalf("%v", err)
	}
	rev, err := p.Put(ctx, "install", thing{1}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Put(ctx, "install", thing{2}, 0); !errors.Is(err, record.ErrConflict) {
		t.Errorf("%v", err)
	}
	if _, err := p.Put(ctx, "install", thing{2}, rev); err != nil {
		t.Error(err)
	}
	var v thing
	if _, err := p.Get(ctx, "install", &v); err != nil || v.N != 2 {
		t.Errorf("%+v %v", v, err)
	}
}

func TestVersionGrowsWithAFolder(t *testing.T) {
	_, c := member(t, t.TempDir())
	s := open(t, c)
	ctx := t.Context()
	if v := s.Version("x/"); v != 0 {
		t.Errorf("an empty folder has version %d", v)
	}
	last := int64(0)
	for i := range 3 {
		if err := s.Commit(ctx, record.Change{Path: fmt.Sprint("x/", i), Value: thing{i}}); err != nil {
			t.Fatal(err)
		}
		if v := s.Version("x/"); v <= last {
			t.Errorf("version %d after %d", v, last)
		}
		last = s.Version("x/")
	}
	if err := s.Commit(ctx, record.Change{Path: "y/1", Value: thing{1}}); err != nil || s.Version("x/") != last {
		t.Errorf("another folder moved this one: %v", err)
	}
	before := s.Version("x/")
	if err := s.Commit(ctx, record.Change{Path: "x/9", Value: thing{9}}, record.Change{Path: "z/1", Value: thing{9}}); err != nil {
		t.Fatal(err)
	}
	if paths, now, ok := s.Since("x/", before); !ok || !slices.Equal(paths, []string{"x/9"}) || now != s.Version("x/") {
		t.Errorf("since %d: %q up to %d, %v", before, paths, now, ok)
	}
	if paths, _, ok := s.Since("x/", s.Version("x/")); !ok || len(paths) != 0 {
		t.Errorf("nothing changed, but %q %v", paths, ok)
	}
	if _, _, ok := s.Since("x/", 0); ok {
		t.Error("it claims to know what was before it was opened")
	}
	if v := open(t, c).Version("x/"); v == 0 {
		t.Error("a fresh view does not know that the folder was used")
	}
}

// TestTheViewIsFreshAgainWithoutAWrite: a store that went away and came back
// serves by itself. Whoever waits for a fresh view writes nothing meanwhile.
func TestTheViewIsFreshAgainWithoutAWrite(t *testing.T) {
	file, dir := certs(t), t.TempDir()
	at := "https://127.0.0.1:" + freePort(t)
	config := store.ServerConfig{Name: "s0", Dir: dir, ListenClient: at, AdvertiseHost: "127.0.0.1", CertFile: file("server.crt"), KeyFile: file("server.key"), CAFile: file("ca.crt")}
	m := begin(t, config)[0]
	s := open(t, dial(t, []string{at}, file))
	if err := s.Commit(t.Context(), record.Change{Path: "x", Value: thing{1}}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		m.Close()
		await(t, "a stale view", func() bool { return s.Lag() > time.Second })
		m = begin(t, config)[0]
		await(t, "a fresh view", func() bool { return s.Lag() < time.Second })
	}
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for until := time.Now().Add(time.Minute); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("not seen: %s", what)
		}
	}
}
