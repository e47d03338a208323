package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

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
	if err := s.Shrink(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), record.Change{Path: "after", Value: 1}); err != nil || s.Full() {
		t.Errorf("afterwards: %v, full: %v", err, s.Full())
	}
}
