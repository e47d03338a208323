package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
)

// TestWhatIsDeletedLeavesTheHistoryAndTheFile by itself, soon after.
func TestWhatIsDeletedLeavesTheHistoryAndTheFile(t *testing.T) {
	dir := t.TempDir()
	_, c := member(t, dir)
	s := open(t, c)
	const secret = "wrapped-blob-that-must-go"
	if err := s.Commit(t.Context(), record.Change{Path: "keys/i/k", Value: map[string]string{"blob": secret}}); err != nil {
		t.Fatal(err)
	}
	rev, err := s.Get(t.Context(), "keys/i/k", &map[string]string{})
	if err != nil {
		t.Fatal(err)
	}
	db := filepath.Join(dir, "member", "snap", "db")
	holds := func() bool {
		b, err := os.ReadFile(db)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(b, []byte(secret))
	}
	for until := time.Now().Add(10 * time.Second); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the record never reached the file: the test shows nothing")
		}
	}
	if err := s.Commit(t.Context(), record.Change{Path: "keys/i/k", Rev: rev}); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(20 * time.Second); holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the deleted record is still in the file")
		}
	}
	if _, err := c.Get(t.Context(), "/kmsctl/v1/rec/keys/i/k", clientv3.WithRev(rev)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("the deleted record is still in the history: %v", err)
	}
	if err := s.Commit(t.Context(), record.Change{Path: "x", Value: 1}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestFullStore: a write is refused with a hint, reads go on, and after a
// deletion the store takes writes again by itself.
func TestFullStore(t *testing.T) {
	store.SetQuota(t, 4<<20)
	_, c := member(t, t.TempDir())
	s := open(t, c)
	big := strings.Repeat("x", 200<<10)
	var err error
	n := 0
	for ; n < 100 && err == nil; n++ {
		err = s.Commit(t.Context(), record.Change{Path: fmt.Sprintf("big/%03d", n), Value: big})
	}
	if fault.KindOf(err) != fault.Unreachable || !strings.Contains(err.Error(), "it is full") || fault.HintOf(err) == "" || !s.Full() {
		t.Fatalf("after %d records: %v", n, err)
	}
	var v string
	if _, err := s.Get(t.Context(), "big/000", &v); err != nil || len(v) != len(big) {
		t.Fatalf("read: %v", err)
	}
	var gone []record.Change
	for i := range n - 2 { // etcd measures its file now and then: much more than the quota can be in it
		path := fmt.Sprintf("big/%03d", i)
		rev, err := s.Get(t.Context(), path, &v)
		if err != nil {
			t.Fatal(err)
		}
		gone = append(gone, record.Change{Path: path, Rev: rev})
	}
	if err := s.Commit(t.Context(), gone...); err != nil {
		t.Fatalf("delete from a full store: %v", err)
	}
	if _, err := s.Shrink(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), record.Change{Path: "after", Value: 1}); err != nil || s.Full() {
		t.Errorf("afterwards: %v, full: %v", err, s.Full())
	}
}

// TestFullStoreOfThree: each member says that it has no room; with one away the
// others still make room of what is deleted, and what no deletion can cure a
// larger volume does.
func TestFullStoreOfThree(t *testing.T) {
	store.SetQuota(t, 4<<20)
	configs, endpoints, file := trio(t)
	members := begin(t, configs...)
	s := open(t, dial(t, endpoints, file))
	big := strings.Repeat("x", 200<<10)
	fill := func(from int) (n int) {
		t.Helper()
		var err error
		for n = from; n < from+100 && err == nil; n++ {
			err = s.Commit(t.Context(), record.Change{Path: fmt.Sprintf("big/%03d", n), Value: big})
		}
		if !strings.Contains(fmt.Sprint(err), "it is full") || !strings.Contains(fault.HintOf(err), "larger volume") {
			t.Fatalf("after %d records: %v, hint %q", n, err, fault.HintOf(err))
		}
		return n
	}
	full := func(st cluster.Store) bool {
		return slices.ContainsFunc(st.Members, func(m cluster.StoreMember) bool {
			return slices.Contains(m.Alarms, cluster.NoSpace) && m.Quota == 4<<20
		})
	}
	n := fill(0)
	until(t, configs[0], "full", full)

	members[2].Close()
	var gone []record.Change
	for i := range n - 2 {
		path := fmt.Sprintf("big/%03d", i)
		var v string
		rev, err := s.Get(t.Context(), path, &v)
		if err != nil {
			t.Fatal(err)
		}
		gone = append(gone, record.Change{Path: path, Rev: rev})
	}
	if err := s.Commit(t.Context(), gone...); err != nil {
		t.Fatalf("delete from a full store: %v", err)
	}
	if away, err := s.Shrink(t.Context()); err != nil || !slices.Equal(away, endpoints[2:]) {
		t.Fatalf("with one away: %v %v", away, err)
	}
	if err := s.Commit(t.Context(), record.Change{Path: "after", Value: 1}); err != nil || s.Full() {
		t.Errorf("afterwards: %v, full: %v", err, s.Full())
	}
	until(t, configs[0], "with room", func(st cluster.Store) bool { return !full(st) })

	members[2] = begin(t, configs[2])[0]
	fill(1000)
	store.SetQuota(t, 64<<20)
	for i := range members {
		members[i].Close()
		members[i] = begin(t, configs[i])[0]
	}
	if _, err := s.Shrink(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), record.Change{Path: "larger", Value: 1}); err != nil || s.Full() {
		t.Errorf("with more room: %v, full: %v", err, s.Full())
	}
	until(t, configs[0], "with more room", func(st cluster.Store) bool { return !full(st) && st.Members[0].Quota == 64<<20 })
}

// TestFullStoreStartsAgain: with more room it takes the first write; with no
// more it says what it needs.
func TestFullStoreStartsAgain(t *testing.T) {
	store.SetQuota(t, 4<<20)
	dir := t.TempDir()
	m, c := member(t, dir)
	big := strings.Repeat("x", 200<<10)
	for i := range 100 { // the alarm comes after the first write that is refused
		if _, err := c.Put(t.Context(), fmt.Sprint("big/", i), big); err != nil && i > 0 {
			if all, err := c.AlarmList(t.Context()); err != nil || len(all.Alarms) == 1 {
				break
			}
		}
	}
	m.Close()
	store.SetQuota(t, 1<<20) // how much is in the file beyond the other quota depends on when etcd measures it
	m, c = member(t, dir)
	_, err := store.NewPlain(c).Put(t.Context(), "logins/x", 1, 0)
	if !strings.Contains(fmt.Sprint(err), "it is full") || !strings.Contains(fault.HintOf(err), "larger volume") {
		t.Errorf("with no more room: %v, hint %q", err, fault.HintOf(err))
	}
	m.Close()
	store.SetQuota(t, 64<<20)
	_, c = member(t, dir)
	if _, err := store.NewPlain(c).Put(t.Context(), "logins/x", 1, 0); err != nil {
		t.Errorf("with more room: %v", err)
	}
}

func TestQuotaOfAVolume(t *testing.T) {
	for _, c := range []struct{ volume, quota int64 }{{0, 8 << 30}, {100 << 30, 8 << 30}, {2 << 30, 768 << 20}, {1 << 30, 256 << 20}, {300 << 20, 64 << 20}} {
		if got := store.QuotaOf(c.volume); got != c.quota {
			t.Errorf("a volume of %d holds %d, want %d", c.volume, got, c.quota)
		}
	}
}
