package kms_test

import (
	"context"
	"encoding/json"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// writes counts the transactions of a store.
type writes struct {
	kms.Store
	n atomic.Int64
}

func (w *writes) Commit(ctx context.Context, changes ...record.Change) error {
	w.n.Add(1)
	return w.Store.Commit(ctx, changes...)
}

// replica is one more process on the same store and token, which counts.
func (w *world) replica(st kms.Store, limit uint64, suite uint8) (*kms.Service, *kms.Uses) {
	s, u := kms.New(st, w.token, w.token, func() time.Time { return w.now }, kms.DefaultWindows()), kms.NewUses(limit)
	u.Saw(suite)
	s.Count(u)
	return s, u
}

// counted is what the store says of a key's versions.
func (w *world) counted(t *testing.T, instance, key string) map[string]uint64 {
	t.Helper()
	var r struct {
		Versions map[string]uint64 `json:"versions"`
	}
	if _, err := w.store.Get(t.Context(), "uses/"+instance+"/"+key, &r); err != nil {
		t.Fatal(err)
	}
	return r.Versions
}

// TestWrapsAreCountedAheadInGrowingBlocks: the count is never too low, and
// almost no wrap writes.
func TestWrapsAreCountedAheadInGrowingBlocks(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	st := &writes{Store: w.store}
	s, _ := w.replica(st, kms.DefaultUses, hsm.SuiteGCM)
	for i := range uint64(64 + 128 + 256 + 1) {
		if _, err := s.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{}); err != nil {
			t.Fatal(err)
		}
		if n := w.counted(t, w.instance, k.ID)[k.KeyVersion.ID]; n <= i {
			t.Fatalf("%d counted after %d wraps", n, i+1)
		}
	}
	if n, c := st.n.Load(), w.counted(t, w.instance, k.ID)[k.KeyVersion.ID]; n != 4 || c != 64+128+256+512 {
		t.Errorf("%d writes, %d counted", n, c)
	}
	got, err := s.Key(t.Context(), w.instance, k.ID, false)
	if err != nil || got.KeyVersion.Encryptions == nil || *got.KeyVersion.Encryptions != 960 {
		t.Errorf("%+v %v", got.KeyVersion, err)
	}
}

// TestReplicasShareOneLimit: three processes wrap at the same time, each is
// killed and started again and again; together they never pass the limit, and
// what was left over at a kill counts as used.
func TestReplicasShareOneLimit(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	const limit, life = 3000, 100 // 100 wraps take blocks of 64 and 128
	var done atomic.Int64
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for {
				s, _ := w.replica(w.store, limit, hsm.SuiteGCMToken)
				for range life {
					_, err := s.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{})
					if reason(err) == kmsapi.UsedUp {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					done.Add(1)
				}
			}
		})
	}
	all.Wait()
	if n := w.counted(t, w.instance, k.ID)[k.KeyVersion.ID]; n != limit || done.Load() > limit || done.Load() < limit/2 {
		t.Errorf("%d wraps, %d counted", done.Load(), n)
	}
}

// TestAKeyThatIsUsedUp refuses to wrap and says what helps; it unwraps all
// the same, and wraps again after a rotation.
func TestAKeyThatIsUsedUp(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	s, u := w.replica(w.store, 3, hsm.SuiteGCM)
	ctx := t.Context()
	first, err := s.Wrap(ctx, w.instance, k.ID, kmsapi.WrapRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.Wrap(ctx, w.instance, k.ID, kmsapi.WrapRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	_, err = s.Wrap(ctx, w.instance, k.ID, kmsapi.WrapRequest{})
	if reason(err) != kmsapi.UsedUp || fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "kmsctl keys rotate "+k.ID) {
		t.Errorf("%v (%s)", err, fault.HintOf(err))
	}
	if _, err := s.Rewrap(ctx, w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: first.Ciphertext}); reason(err) != kmsapi.UsedUp {
		t.Errorf("rewrap: %v", err)
	}
	if keys, share := u.Near(); keys != 1 || share != 1 {
		t.Errorf("%d keys are near, at %g", keys, share)
	}
	back, err := s.Unwrap(ctx, w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: first.Ciphertext})
	if err != nil || back.Plaintext != first.Plaintext {
		t.Errorf("unwrap: %v", err)
	}
	w.now = w.now.Add(2 * time.Hour)
	if err := s.Rotate(ctx, w.instance, k.ID, kmsapi.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	if keys, _ := u.Near(); keys != 0 {
		t.Errorf("%d keys are near after the rotation", keys)
	}
	for i := range 3 { // with each of the first it is wrapped anew, too
		back, err := s.Unwrap(ctx, w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: first.Ciphertext})
		if err != nil || back.Ciphertext == "" || back.RewrappedKeyVersion == nil {
			t.Errorf("%d: %+v %v", i, back, err)
		}
	}
	back, err = s.Unwrap(ctx, w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: first.Ciphertext})
	if err != nil || back.Plaintext != first.Plaintext || back.Ciphertext != "" || back.RewrappedKeyVersion != nil {
		t.Errorf("%+v %v", back, err)
	}
	versions, _, err := s.Versions(ctx, w.instance, k.ID, 10, 0, false)
	if err != nil || len(versions) != 2 || *versions[0].Encryptions != 3 || *versions[1].Encryptions != 3 {
		t.Errorf("%+v %v", versions, err)
	}
}

// TestAnotherProcessSeesWhatIsNearTheLimit by its sweep, once each.
func TestAnotherProcessSeesWhatIsNearTheLimit(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	busy, _ := w.replica(w.store, 256, hsm.SuiteGCM)
	other, seen := w.replica(w.store, 256, hsm.SuiteGCM)
	for range 64 + 1 { // 192 of 256 are taken
		if keys, _ := seen.Near(); keys != 0 {
			t.Fatalf("%d keys are near before anybody looked", keys)
		}
		if _, err := busy.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if _, err := other.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if keys, share := seen.Near(); keys != 1 || share != 0.75 {
			t.Errorf("%d keys are near, at %g", keys, share)
		}
	}
}

// TestSealingIsCountedToo: standard keys and import tokens are sealed by one
// key of the installation, which cannot be rotated by its instances.
func TestSealingIsCountedToo(t *testing.T) {
	w := newWorld(t)
	s, _ := w.replica(w.store, 2, hsm.SuiteGCM)
	ctx := t.Context()
	make1 := func() error {
		_, err := s.CreateKey(ctx, w.instance, "default", "me", kmsapi.CreateKey{Name: "standard", Extractable: true})
		return err
	}
	if err := make1(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateImportToken(ctx, w.instance, kmsapi.ImportTokenRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := make1(); reason(err) != kmsapi.UsedUp || !strings.Contains(fault.HintOf(err), "rotate-master") {
		t.Errorf("%v (%s)", err, fault.HintOf(err))
	}
	if got := w.counted(t, "master", "seal"); got["1"] != 2 {
		t.Errorf("%v", got)
	}
	if _, err := s.CreateKey(ctx, w.instance, "default", "me", kmsapi.CreateKey{Name: "root"}); err != nil {
		t.Errorf("a root key is not sealed: %v", err)
	}
}

// TestNothingIsCountedWithoutGCM, and nothing written.
func TestNothingIsCountedWithoutGCM(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	st := &writes{Store: w.store}
	s, u := w.replica(st, 1, hsm.SuiteCBCHMAC)
	wrap := func() error {
		_, err := s.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{})
		return err
	}
	for range 3 {
		if err := wrap(); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Key(t.Context(), w.instance, k.ID, false)
	if err != nil || got.KeyVersion.Encryptions != nil || st.n.Load() != 0 {
		t.Errorf("%+v, %d writes, %v", got.KeyVersion, st.n.Load(), err)
	}
	u.Saw(hsm.SuiteGCM) // another token of the group
	if err := wrap(); err != nil {
		t.Fatal(err)
	}
	if err := wrap(); reason(err) != kmsapi.UsedUp {
		t.Errorf("%v", err)
	}
}

// TestPurgeForgetsTheCount of the key, and nothing of another.
func TestPurgeForgetsTheCount(t *testing.T) {
	w := newWorld(t)
	s, _ := w.replica(w.store, kms.DefaultUses, hsm.SuiteGCM)
	ctx := t.Context()
	var ids []string
	for range 2 {
		k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
		if _, err := s.Wrap(ctx, w.instance, k.ID, kmsapi.WrapRequest{}); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, k.ID)
	}
	if _, err := s.Delete(ctx, w.instance, ids[0], "me", false); err != nil {
		t.Fatal(err)
	}
	w.counted(t, w.instance, ids[0]) // it can be restored: the count must still be there
	w.now = w.now.Add(5 * time.Hour)
	if _, err := s.Purge(ctx, w.instance, ids[0]); err != nil {
		t.Fatal(err)
	}
	if left := w.paths(t, ids[0]); len(left) != 0 {
		t.Errorf("%q", left)
	}
	w.counted(t, w.instance, ids[1])
}

// lost is a store that takes a change and does not say so.
type lost struct {
	kms.Store
	times atomic.Int64
}

func (l *lost) Commit(ctx context.Context, changes ...record.Change) error {
	err := l.Store.Commit(ctx, changes...)
	if l.times.Add(-1) >= 0 {
		return fault.Newf(fault.Unreachable, "write", "", "no answer")
	}
	return err
}

// TestACountWhoseAnswerIsLost is counted, and its wraps are refused.
func TestACountWhoseAnswerIsLost(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	st := &lost{Store: w.store}
	st.times.Store(1)
	s, _ := w.replica(st, kms.DefaultUses, hsm.SuiteGCM)
	if _, err := s.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{}); fault.KindOf(err) != fault.Unreachable {
		t.Errorf("%v", err)
	}
	if _, err := s.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{}); err != nil {
		t.Error(err)
	}
	if n := w.counted(t, w.instance, k.ID)[k.KeyVersion.ID]; n != 128 {
		t.Errorf("%d counted", n)
	}
}

// TestTheCountIsAuthentic: who can write to the store cannot lower it.
func TestTheCountIsAuthentic(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	s, _ := w.replica(w.store, kms.DefaultUses, hsm.SuiteGCM)
	if _, err := s.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{}); err != nil {
		t.Fatal(err)
	}
	path := "/kmsctl/v1/rec/uses/" + w.instance + "/" + k.ID
	body, err := json.Marshal(map[string]any{"versions": map[string]int{k.KeyVersion.ID: 1}})
	if err != nil {
		t.Fatal(err)
	}
	res, err := w.etcd.Put(t.Context(), path, string(append(make([]byte, 33), body...)))
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, w.store, res.Header.Revision, "uses/"+w.instance+"/")
	again, _ := w.replica(w.store, kms.DefaultUses, hsm.SuiteGCM)
	if _, err := again.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{}); fault.KindOf(err) != fault.BadContent {
		t.Errorf("%v", err)
	}
}

// waitFor waits until the view has what was written to a folder.
func waitFor(t *testing.T, st *store.Store, rev int64, dir string) {
	t.Helper()
	for st.Version(dir) < rev { // go test's own limit is the last resort
		time.Sleep(time.Millisecond)
	}
}
