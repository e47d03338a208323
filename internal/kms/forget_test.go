package kms_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// forgotten takes the blobs that an HSM is to forget.
type forgotten chan string

func (f forgotten) Evict(_ context.Context, blob []byte) error {
	f <- string(blob)
	return nil
}

// TestAnotherReplicaForgets: what one replica rotates, disables, deletes and
// purges, the HSM of the other holds no more; what it only renames stays.
func TestAnotherReplicaForgets(t *testing.T) {
	w := newWorld(t)
	codec, err := record.NewCodec(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	other, err := store.Open(t.Context(), w.etcd, codec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.Close)
	gone := make(forgotten, 16)
	f := kms.NewForgetting(other, gone)
	other.Tell(f.Changed)
	go f.Work(t.Context())

	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	blob := func() string {
		t.Helper()
		var r struct {
			Version struct {
				Blob []byte `json:"blob"`
			} `json:"version"`
		}
		if _, err := w.store.Get(t.Context(), "keys/"+w.instance+"/"+k.ID, &r); err != nil || len(r.Version.Blob) == 0 {
			t.Fatalf("%+v %v", r, err)
		}
		return string(r.Version.Blob)
	}
	first := blob()
	step := func(what string, do func() error, want ...string) {
		t.Helper()
		w.now = w.now.Add(5 * time.Hour)
		if err := do(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for _, b := range want {
			if got := <-gone; got != b {
				t.Errorf("%s: %x is forgotten, not %x", what, got, b)
			}
		}
	}
	ctx := t.Context()
	step("rename", func() error {
		_, err := w.Patch(ctx, w.instance, k.ID, kmsapi.PatchKey{KeyRingID: "default"})
		return err
	})
	step("rotate", func() error { return w.Rotate(ctx, w.instance, k.ID, kmsapi.RotateRequest{}) }, first)
	second := blob()
	step("disable", func() error { return w.Disable(ctx, w.instance, k.ID) }, second, first)
	step("enable", func() error { return w.Enable(ctx, w.instance, k.ID) })
	step("delete", func() error {
		_, err := w.Delete(ctx, w.instance, k.ID, "me", false)
		return err
	}, second, first)
	step("purge", func() error {
		_, err := w.Purge(ctx, w.instance, k.ID)
		return err
	}, second, first)
}
