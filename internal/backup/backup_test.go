package backup_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/backup"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
)

func codec(t *testing.T, n byte) *record.Codec {
	t.Helper()
	c, err := record.NewCodec(bytes.Repeat([]byte{n}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// etcd is a real member with nothing in it.
func etcd(t *testing.T) store.EtcdClient {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := m.Client()
	t.Cleanup(func() { c.Close(); m.Close() })
	return c
}

func open(t *testing.T, c store.EtcdClient) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), c, codec(t, 1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

type key struct {
	State   int            `json:"state"`
	Version map[string]any `json:"version"`
}

const install = `{"id":"i1","serial":"s1"}`

func keyPath(i int) string { return fmt.Sprintf("keys/inst/key-%04d", i) }

// fill makes a store with n keys, of which one lives in the token.
func fill(t *testing.T, n int) (store.EtcdClient, *store.Store) {
	t.Helper()
	c := etcd(t)
	if _, err := store.NewPlain(c).Put(t.Context(), "install", json.RawMessage(install), 0); err != nil {
		t.Fatal(err)
	}
	s := open(t, c)
	put(t, s, "instances/inst", map[string]string{"id": "inst"})
	put(t, s, "iam/serviceids/ServiceId-1", map[string]string{"id": "ServiceId-1"})
	put(t, s, "iam/names/orders", "ServiceId-1")
	put(t, s, "iam/policies/ServiceId-1/p1", map[string]string{"id": "p1"})
	put(t, s, "audit/embedded", map[string]int{"seq": 9})
	for i := range n {
		put(t, s, keyPath(i), key{State: 1, Version: map[string]any{"blob": []byte("wrapped")}})
	}
	put(t, s, "keys/inst/in-token", key{State: 1, Version: map[string]any{"id": "v", "blob": hsm.PlacedBlob([]byte("placed-id-123456"), false)}})
	put(t, s, "keys/inst/destroyed", key{State: 5, Version: map[string]any{"id": "v"}})
	return c, s
}

func put(t *testing.T, s *store.Store, path string, v any) {
	t.Helper()
	rev, err := s.Get(t.Context(), path, &json.RawMessage{})
	if err != nil && !errors.Is(err, record.ErrNotFound) {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), record.Change{Path: path, Value: v, Rev: rev}); err != nil {
		t.Fatal(err)
	}
}

func take(t *testing.T, s *store.Store) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := backup.Write(t.Context(), &b, s, codec(t, 1), backup.Header{CreatedAt: time.Now().UTC(), Install: json.RawMessage(install)}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func reader(t *testing.T, b []byte) *backup.Reader {
	t.Helper()
	r, err := backup.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// paths lists what a store holds.
func paths(t *testing.T, c store.EtcdClient) []string {
	t.Helper()
	var all []string
	_, _, err := store.NewRestorer(c).Present(t.Context(), func(r record.Raw) error {
		all = append(all, r.Path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func prepare(t *testing.T, b []byte, c store.EtcdClient, later map[string]string) (*backup.Plan, *store.Restorer) {
	t.Helper()
	target := store.NewRestorer(c)
	p, err := backup.Prepare(t.Context(), reader(t, b), codec(t, 1), target, later)
	if err != nil {
		t.Fatal(err)
	}
	return p, target
}

func run(t *testing.T, p *backup.Plan, b []byte, to *store.Restorer, revive bool) int {
	t.Helper()
	n, err := p.Run(t.Context(), reader(t, b), codec(t, 1), to, revive)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestBackupSaysWhatItHoldsAndLacks(t *testing.T) {
	_, s := fill(t, 3)
	h, sum, err := backup.Check(bytes.NewReader(take(t, s)))
	if err != nil || sum.Records != 9 || sum.Keys != 5 || sum.Instances != 1 || h.Revision == 0 {
		t.Fatalf("%+v %+v %v", h, sum, err)
	}
	lacks := strings.Join(sum.Lacks, "\n")
	if !strings.Contains(lacks, "inst/in-token") || strings.Contains(lacks, "inst/destroyed") || !strings.Contains(lacks, "master keys") {
		t.Errorf("%s", lacks)
	}
}

// TestOneRevision: what is written while a backup runs is not in it.
func TestOneRevision(t *testing.T) {
	_, s := fill(t, 1200) // more than two pages
	var b bytes.Buffer
	wrote := false
	slow := writerFunc(func(p []byte) (int, error) {
		if !wrote {
			wrote = true
			put(t, s, "keys/inst/zzz-late", key{State: 1})
			if err := s.Commit(t.Context(), record.Change{Path: keyPath(1199), Rev: revOf(t, s, keyPath(1199))}); err != nil {
				t.Error(err)
			}
		}
		return b.Write(p)
	})
	sum, err := backup.Write(t.Context(), slow, s, codec(t, 1), backup.Header{CreatedAt: time.Now(), Install: json.RawMessage(install)})
	if err != nil || !wrote || sum.Records != 1206 {
		t.Fatalf("%+v %v", sum, err)
	}
	if strings.Contains(b.String(), "zzz-late") || !strings.Contains(b.String(), keyPath(1199)) {
		t.Error("the backup is not of one moment")
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func revOf(t *testing.T, s *store.Store, path string) int64 {
	t.Helper()
	rev, err := s.Get(t.Context(), path, &json.RawMessage{})
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func TestRestoreIntoAnEmptyStore(t *testing.T) {
	from, s := fill(t, 250)
	b := take(t, s)
	to := etcd(t)
	p, target := prepare(t, b, to, nil)
	if n := run(t, p, b, target, false); n != 256 || len(p.Removed) != 0 {
		t.Errorf("%d written, removed %v", n, p.Removed)
	}
	want := slices.DeleteFunc(paths(t, from), func(p string) bool { return strings.HasPrefix(p, "audit/") })
	if got := paths(t, to); !slices.Equal(got, want) {
		t.Errorf("%d paths, want %d", len(got), len(want))
	}
	if err := store.NewPlain(to).Whole(t.Context()); err != nil {
		t.Error(err)
	}
	back := open(t, to) // every record is authentic
	var k key
	if _, err := back.Get(t.Context(), keyPath(7), &k); err != nil || k.State != 1 {
		t.Errorf("%+v %v", k, err)
	}
	// A second run finds everything there.
	p, target = prepare(t, b, to, nil)
	if n := run(t, p, b, target, false); n != 0 || len(p.Removed)+len(p.Kept) != 0 {
		t.Errorf("again: %d written, %+v", n, p)
	}
}

// dying breaks off after some transactions, as a killed process does.
type dying struct {
	*store.Restorer
	left int
}

var errKilled = errors.New("killed")

func (d *dying) Put(ctx context.Context, r []record.Raw) error {
	if d.left--; d.left < 0 {
		return errKilled
	}
	return d.Restorer.Put(ctx, r)
}

func (d *dying) Finish(ctx context.Context, in json.RawMessage) error {
	if d.left--; d.left < 0 {
		return errKilled
	}
	return d.Restorer.Finish(ctx, in)
}

func TestAKilledRestoreKeepsTheStoreClosedAndGoesOn(t *testing.T) {
	_, s := fill(t, 250)
	b := take(t, s)
	_, other := fill(t, 1)
	for left := range 4 { // 3 batches and the end
		to := etcd(t)
		p, target := prepare(t, b, to, nil)
		if _, err := p.Run(t.Context(), reader(t, b), codec(t, 1), &dying{target, left}, false); !errors.Is(err, errKilled) {
			t.Fatalf("after %d: %v", left, err)
		}
		if err := store.NewPlain(to).Whole(t.Context()); fault.KindOf(err) != fault.NotReady || fault.HintOf(err) == "" {
			t.Errorf("after %d the store is open: %v", left, err)
		}
		if _, err := backup.Prepare(t.Context(), reader(t, take(t, other)), codec(t, 1), store.NewRestorer(to), nil); fault.KindOf(err) != fault.Conflict {
			t.Errorf("after %d another backup: %v", left, err)
		}
		p, target = prepare(t, b, to, nil)
		if run(t, p, b, target, false); !p.Begun || len(paths(t, to)) != 256 || store.NewPlain(to).Whole(t.Context()) != nil {
			t.Errorf("after %d: begun %v, %d records", left, p.Begun, len(paths(t, to)))
		}
	}
}

func TestNothingRemovedComesBackInPassing(t *testing.T) {
	c, s := fill(t, 5)
	b := take(t, s)
	for _, path := range []string{keyPath(0), "iam/policies/ServiceId-1/p1"} {
		if err := s.Commit(t.Context(), record.Change{Path: path, Rev: revOf(t, s, path)}); err != nil {
			t.Fatal(err)
		}
	}
	put(t, s, keyPath(1), key{State: 5})
	put(t, s, keyPath(2), key{State: 2, Version: map[string]any{"blob": []byte("newer")}})
	p, target := prepare(t, b, c, nil)
	var removed []string
	for _, r := range p.Removed {
		removed = append(removed, r.Path)
	}
	if !slices.Equal(removed, []string{"iam/policies/ServiceId-1/p1", keyPath(0), keyPath(1)}) || !slices.Equal(p.Kept, []string{keyPath(2)}) {
		t.Fatalf("removed %v, kept %v", removed, p.Kept)
	}
	if n := run(t, p, b, target, false); n != 0 {
		t.Errorf("%d records written without --revive", n)
	}
	p, target = prepare(t, b, c, nil)
	if n := run(t, p, b, target, true); n != 3 {
		t.Errorf("%d records revived", n)
	}
	var k key
	if _, err := open(t, c).Get(t.Context(), keyPath(1), &k); err != nil || k.State != 1 {
		t.Errorf("%+v %v", k, err)
	}
}

func TestAuditLogTellsWhatWasRemoved(t *testing.T) {
	_, s := fill(t, 3)
	b := take(t, s)
	for _, name := range []string{"orders", "ServiceId-1"} { // a service ID by its name, and by its id
		to := etcd(t)
		p, target := prepare(t, b, to, map[string]string{"key-0001": "purged", name: "deleted"})
		run(t, p, b, target, false)
		got := paths(t, to)
		for _, gone := range []string{keyPath(1), "iam/names/orders", "iam/serviceids/ServiceId-1", "iam/policies/ServiceId-1/p1"} {
			if slices.Contains(got, gone) {
				t.Errorf("%s deleted: %s came back", name, gone)
			}
		}
		if !slices.Contains(got, keyPath(0)) || len(p.Removed) != 4 {
			t.Errorf("%v, removed %v", got, p.Removed)
		}
	}
}

func TestRestoreRefuses(t *testing.T) {
	_, s := fill(t, 3)
	b := take(t, s)
	foreign, _ := fill(t, 1)
	if _, err := foreign.Put(t.Context(), "/kmsctl/v1/plain/install", `{"id":"i2","serial":"s2"}`); err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Prepare(t.Context(), reader(t, b), codec(t, 1), store.NewRestorer(foreign), nil); fault.KindOf(err) != fault.Conflict {
		t.Errorf("another installation's store: %v", err)
	}
	to := etcd(t)
	if _, err := backup.Prepare(t.Context(), reader(t, b), codec(t, 2), store.NewRestorer(to), nil); fault.KindOf(err) != fault.BadContent {
		t.Errorf("another HSM's key: %v", err)
	}
	if err := reader(t, b).Header.Same("s2"); fault.KindOf(err) != fault.BadContent || fault.HintOf(err) == "" {
		t.Errorf("another token: %v", err)
	}
	if got := paths(t, to); len(got) != 0 {
		t.Errorf("written: %v", got)
	}
}

// TestEveryChangeOfABackupIsSeen flips, cuts and moves: by the one who has
// the HSM each is refused, and what breaks the form is refused by anybody.
func TestEveryChangeOfABackupIsSeen(t *testing.T) {
	_, s := fill(t, 2)
	good := take(t, s)
	to := store.NewRestorer(etcd(t))
	lines := bytes.SplitAfter(good, []byte("\n"))
	lines = lines[:len(lines)-1]
	bad := map[string][]byte{
		"empty": {}, "cut in a line": good[:len(good)-10], "more behind": append(bytes.Clone(good), "{}\n"...),
		"end missing":    bytes.Join(lines[:len(lines)-1], nil),
		"record missing": bytes.Join(slices.Delete(slices.Clone(lines), 2, 3), nil),
		"record doubled": bytes.Join(slices.Insert(slices.Clone(lines), 2, lines[2]), nil),
		"record moved":   bytes.Replace(good, []byte("key-0000"), []byte("key-0009"), 1),
		"other version":  bytes.Replace(good, []byte(`"version":1`), []byte(`"version":2`), 1),
		"other time":     bytes.Replace(good, []byte(`"createdAt":"2`), []byte(`"createdAt":"1`), 1),
	}
	for name, b := range bad {
		_, _, err := backup.Check(bytes.NewReader(b))
		if fault.KindOf(err) != fault.BadContent || fault.HintOf(err) == "" {
			t.Errorf("check, %s: %v", name, err)
		}
	}
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 1
		r, err := backup.NewReader(bytes.NewReader(b))
		if err == nil {
			_, err = backup.Prepare(t.Context(), r, codec(t, 1), to, nil)
		}
		if err == nil {
			t.Fatalf("byte %d flipped (%q): not seen", i, good[max(0, i-10):i+1])
		}
	}
}
