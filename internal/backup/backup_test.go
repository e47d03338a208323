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

	"github.com/google/go-cmp/cmp"

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

// moment is when a restore ends.
var moment = time.Date(2026, 11, 25, 16, 0, 0, 0, time.UTC)

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
		if !strings.HasPrefix(r.Path, record.RestoredDir) { // what a restore adds of itself
			all = append(all, r.Path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// begin closes a store and plans a restore into it.
func begin(t *testing.T, b []byte, to backup.Target, choice backup.Choice, later map[string]string) *backup.Plan {
	t.Helper()
	p, err := backup.Begin(t.Context(), reader(t, b), to, choice)
	if err == nil {
		err = p.Read(t.Context(), reader(t, b), codec(t, 1), later)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func run(t *testing.T, p *backup.Plan, b []byte) int {
	t.Helper()
	n, err := p.Run(t.Context(), reader(t, b), codec(t, 1), "me", moment)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// refused is the error of Begin or, with the store undone, of Read.
func refused(t *testing.T, r *backup.Reader, again []byte, c store.EtcdClient, dec backup.Decoder) error {
	t.Helper()
	to := store.NewRestorer(c)
	p, err := backup.Begin(t.Context(), r, to, backup.Ask)
	if err != nil {
		return err
	}
	err = p.Read(t.Context(), reader(t, again), dec, nil)
	if uerr := to.Undo(t.Context()); uerr != nil {
		t.Error(uerr)
	}
	return err
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
	p := begin(t, b, store.NewRestorer(to), backup.Ask, nil)
	if n := run(t, p, b); n != 256 || len(p.Removed) != 0 {
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
	p = begin(t, b, store.NewRestorer(to), backup.Ask, nil)
	if n := run(t, p, b); n != 0 || len(p.Removed)+len(p.Kept) != 0 {
		t.Errorf("again: %d written, %+v", n, p)
	}
}

// dying breaks off after some transactions, as a killed process does.
type dying struct {
	*store.Restorer
	left int
}

var errKilled = errors.New("killed")

func (d *dying) Put(ctx context.Context, r []record.Swap) error {
	if d.left--; d.left < 0 {
		return errKilled
	}
	return d.Restorer.Put(ctx, r)
}

func (d *dying) Finish(ctx context.Context, in json.RawMessage, note record.Raw) error {
	if d.left--; d.left < 0 {
		return errKilled
	}
	return d.Restorer.Finish(ctx, in, note)
}

func TestAKilledRestoreKeepsTheStoreClosedAndGoesOn(t *testing.T) {
	_, s := fill(t, 250)
	b := take(t, s)
	_, other := fill(t, 1)
	for left := range 7 { // 6 batches and the end
		to := etcd(t)
		p := begin(t, b, &dying{store.NewRestorer(to), left}, backup.Ask, nil)
		if _, err := p.Run(t.Context(), reader(t, b), codec(t, 1), "me", moment); !errors.Is(err, errKilled) {
			t.Fatalf("after %d: %v", left, err)
		}
		if err := store.NewPlain(to).Whole(t.Context()); fault.KindOf(err) != fault.NotReady || fault.HintOf(err) == "" {
			t.Errorf("after %d the store is open: %v", left, err)
		}
		if _, err := backup.Begin(t.Context(), reader(t, take(t, other)), store.NewRestorer(to), backup.Ask); fault.KindOf(err) != fault.Conflict {
			t.Errorf("after %d another backup: %v", left, err)
		}
		p = begin(t, b, store.NewRestorer(to), backup.Ask, nil)
		if run(t, p, b); !p.Begun || len(paths(t, to)) != 256 || store.NewPlain(to).Whole(t.Context()) != nil {
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
	to := store.NewRestorer(c)
	p := begin(t, b, to, backup.Ask, nil)
	var removed []string
	for _, r := range p.Removed {
		removed = append(removed, r.Path)
	}
	if !slices.Equal(removed, []string{"iam/policies/ServiceId-1/p1", keyPath(0), keyPath(1)}) || !slices.Equal(p.Kept, []string{keyPath(2)}) {
		t.Fatalf("removed %v, kept %v", removed, p.Kept)
	}
	if !p.Undecided() || to.Undo(t.Context()) != nil {
		t.Error("nobody was asked")
	}
	p = begin(t, b, to, backup.LeaveOut, nil)
	if n := run(t, p, b); n != 0 || p.Undecided() {
		t.Errorf("%d records written with --leave-out", n)
	}
	p = begin(t, b, to, backup.Revive, nil)
	if n := run(t, p, b); n != 3 || p.Undecided() {
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
		p := begin(t, b, store.NewRestorer(to), backup.LeaveOut, map[string]string{"key-0001": "purged", name: "deleted"})
		run(t, p, b)
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
	foreign, used := fill(t, 1)
	put(t, used, "instances/other", map[string]string{"id": "other"})
	if _, err := foreign.Put(t.Context(), "/kmsctl/v1/plain/install", `{"id":"i2","serial":"s2"}`); err != nil {
		t.Fatal(err)
	}
	if err := refused(t, reader(t, b), b, foreign, codec(t, 1)); fault.KindOf(err) != fault.Conflict {
		t.Errorf("another installation's store: %v", err)
	}
	to := etcd(t)
	if err := refused(t, reader(t, b), b, to, codec(t, 2)); fault.KindOf(err) != fault.BadContent {
		t.Errorf("another HSM's key: %v", err)
	}
	if err := reader(t, b).Header.Same("s2"); fault.KindOf(err) != fault.BadContent || fault.HintOf(err) == "" {
		t.Errorf("another token: %v", err)
	}
	if got := paths(t, to); len(got) != 0 {
		t.Errorf("written: %v", got)
	}
}

// content is all that a store holds, with the installation and the mark.
func content(t *testing.T, c store.EtcdClient) map[string]string {
	t.Helper()
	all := map[string]string{}
	in, mark, err := store.NewRestorer(c).Present(t.Context(), func(r record.Raw) error {
		all[r.Path] = string(r.Value)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	all["(install)"], all["(marked)"] = string(in), fmt.Sprint(mark != nil)
	return all
}

// unusedStore is another installation, which has what its start makes.
func unusedStore(t *testing.T) store.EtcdClient {
	t.Helper()
	c := etcd(t)
	if _, err := store.NewPlain(c).Put(t.Context(), "install", json.RawMessage(`{"id":"i2","serial":"s1"}`), 0); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), c, codec(t, 2))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	put(t, s, "iam/apikeys/first", map[string]any{"id": "first", "admin": true})
	put(t, s, "audit/embedded", map[string]int{"seq": 3})
	return c
}

// usedStore is a newer state of the copy's own installation: some keys are
// gone, one was destroyed, one is newer.
func usedStore(t *testing.T) (c store.EtcdClient, b []byte) {
	t.Helper()
	c, s := fill(t, 120)
	b = take(t, s)
	for i := range 60 {
		if err := s.Commit(t.Context(), record.Change{Path: keyPath(i), Rev: revOf(t, s, keyPath(i))}); err != nil {
			t.Fatal(err)
		}
	}
	put(t, s, keyPath(60), key{State: 5})
	put(t, s, keyPath(61), key{State: 2})
	return c, b
}

func TestAnUnusedInstallationIsReplaced(t *testing.T) {
	_, s := fill(t, 3)
	b := take(t, s)
	to := unusedStore(t)
	p := begin(t, b, store.NewRestorer(to), backup.Ask, nil)
	if n := run(t, p, b); n != 9 || p.Replaced != "i2" || len(p.Kept)+len(p.Removed) != 0 {
		t.Errorf("%d written, %+v", n, p)
	}
	got := content(t, to)
	if got["(install)"] != install || got["iam/apikeys/first"] != "" || got["audit/embedded"] != "" || got[keyPath(2)] == "" {
		t.Errorf("%v", got)
	}
	var head struct{ Seq int }
	if _, err := store.NewPlain(to).Get(t.Context(), "heads/embedded", &head); err != nil || head.Seq != 3 {
		t.Errorf("the head of the audit log is lost: %+v %v", head, err)
	}
	open(t, to) // every record is authentic
}

// TestUndo: wherever a restore was killed, undoing it leaves what was there
// before.
func TestUndo(t *testing.T) {
	_, s := fill(t, 120)
	all := take(t, s)
	for name, fresh := range map[string]func() (store.EtcdClient, []byte){
		"empty":  func() (store.EtcdClient, []byte) { return etcd(t), all },
		"unused": func() (store.EtcdClient, []byte) { return unusedStore(t), all },
		"used":   func() (store.EtcdClient, []byte) { return usedStore(t) },
	} {
		c, b := fresh()
		before := content(t, c)
		for left := range 4 { // batches and the end
			p := begin(t, b, &dying{store.NewRestorer(c), left}, backup.Revive, nil)
			if n, err := p.Run(t.Context(), reader(t, b), codec(t, 1), "me", moment); err == nil {
				t.Logf("%s: %d batches are all, %d records", name, left, n)
				break
			}
			during := content(t, c)
			if during["(marked)"] != "true" || during["(install)"] != "" || (left > 0 && len(during) == len(before)) {
				t.Errorf("%s: after %d nothing is under way", name, left)
			}
			if err := store.NewRestorer(c).Undo(t.Context()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, content(t, c)); diff != "" {
				t.Errorf("%s: after %d: %s", name, left, diff)
			}
		}
		if err := store.NewRestorer(etcd(t)).Undo(t.Context()); !errors.Is(err, record.ErrNotFound) {
			t.Errorf("nothing to undo: %v", err)
		}
	}
}

// TestARestoreThatWasTakenOverStops: of two commands for one store the later
// one counts, and a restore that is being undone does not go on.
func TestARestoreThatWasTakenOverStops(t *testing.T) {
	_, s := fill(t, 3)
	b := take(t, s)
	c := etcd(t)
	first := begin(t, b, store.NewRestorer(c), backup.Ask, nil)
	second := begin(t, b, store.NewRestorer(c), backup.Revive, nil)
	if _, err := first.Run(t.Context(), reader(t, b), codec(t, 1), "me", moment); fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
		t.Errorf("the first run: %v", err)
	}
	if !second.Begun || !second.Revive {
		t.Errorf("%+v", second)
	}
	if _, err := backup.Begin(t.Context(), reader(t, b), store.NewRestorer(c), backup.LeaveOut); fault.KindOf(err) != fault.Conflict {
		t.Errorf("begun with --revive, now --leave-out: %v", err)
	}
	to := store.NewRestorer(c)
	_, m, err := to.Present(t.Context(), func(record.Raw) error { return nil })
	if err == nil {
		m.Undo = true // as an undoing that was killed leaves it
		err = to.Mark(t.Context(), *m)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Run(t.Context(), reader(t, b), codec(t, 1), "me", moment); fault.KindOf(err) != fault.Conflict {
		t.Errorf("the second run: %v", err)
	}
	if _, err := backup.Begin(t.Context(), reader(t, b), to, backup.Ask); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a new run: %v", err)
	}
	if err := to.Undo(t.Context()); err != nil || len(content(t, c)) != 2 {
		t.Errorf("%v, left: %v", err, content(t, c))
	}
}

// TestARestoreKeepsEverybodyOut: who has the store open, in this process or in
// another, is told that it comes to its end; nobody writes; no installation is
// made meanwhile.
func TestARestoreKeepsEverybodyOut(t *testing.T) {
	c, s := fill(t, 3)
	b := take(t, s)
	replica := open(t, c)
	p := begin(t, b, store.NewRestorer(c), backup.LeaveOut, nil)
	for _, s := range []*store.Store{s, replica} {
		select {
		case <-s.Ended():
		case <-t.Context().Done():
			t.Fatal("a replica was told nothing")
		}
		if err := s.Commit(t.Context(), record.Change{Path: "instances/late", Value: 1}); fault.KindOf(err) != fault.NotReady {
			t.Errorf("a late write: %v", err)
		}
	}
	if _, err := store.NewPlain(c).Put(t.Context(), "install", json.RawMessage(`{"id":"i3"}`), 0); fault.KindOf(err) != fault.NotReady {
		t.Errorf("a new installation: %v", err)
	}
	run(t, p, b)
	if err := s.Commit(t.Context(), record.Change{Path: "instances/late", Value: 1}); fault.KindOf(err) != fault.NotReady {
		t.Errorf("a late write, after the end: %v", err)
	}
	back := open(t, c)
	put(t, back, "instances/new", map[string]string{"id": "new"})
	if got := content(t, c); got["(install)"] != install || got["instances/late"] != "" {
		t.Errorf("%v", got)
	}
}

// TestEveryChangeOfABackupIsSeen flips, cuts and moves: by the one who has
// the HSM each is refused, and what breaks the form is refused by anybody.
func TestEveryChangeOfABackupIsSeen(t *testing.T) {
	_, s := fill(t, 2)
	good := take(t, s)
	to := etcd(t)
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
			err = refused(t, r, b, to, codec(t, 1))
		}
		if err == nil {
			t.Fatalf("byte %d flipped (%q): not seen", i, good[max(0, i-10):i+1])
		}
	}
}
