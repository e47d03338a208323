package kms_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func nothing(context.Context) error { return nil }

// cut is a store that is away after some more changes.
type cut struct {
	kms.Store
	left int
}

var errCut = errors.New("cut short")

func (c *cut) Commit(ctx context.Context, changes ...record.Change) error {
	if c.left == 0 {
		return errCut
	}
	c.left--
	return c.Store.Commit(ctx, changes...)
}

// paths are the records whose path or body names something.
func (w *world) paths(t *testing.T, what string) []string {
	t.Helper()
	res, err := w.etcd.Get(t.Context(), "/kmsctl/v1/rec/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, kv := range res.Kvs {
		if strings.Contains(string(kv.Key), what) || strings.Contains(string(kv.Value), what) {
			out = append(out, string(kv.Key))
		}
	}
	return out
}

// furnish gives an instance everything that can be left in it without a key.
func (w *world) furnish(t *testing.T, instance string) {
	t.Helper()
	ctx := t.Context()
	for i := range 3 {
		if err := w.CreateRing(ctx, instance, fmt.Sprintf("ring-%d", i), "me"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.CreateImportToken(ctx, instance, kmsapi.ImportTokenRequest{}); err != nil {
		t.Fatal(err)
	}
	on := true
	if err := w.SetInstancePolicies(ctx, instance, "", "me", []kmsapi.InstancePolicy{{Type: kmsapi.PolicyDualAuthDelete, Data: kmsapi.PolicyData{Enabled: &on}}}); err != nil {
		t.Fatal(err)
	}
	var many []record.Change // more than one transaction takes, as older versions have left them
	for i := range 250 {
		many = append(many, record.Change{Path: fmt.Sprintf("registrations/%s/gone.%d", instance, i), Value: kmsapi.Registration{KeyID: "gone"}})
	}
	for part := range slices.Chunk(many, 100) {
		if err := w.store.Commit(ctx, part...); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDeleteInstanceLeavesNothing: with an instance goes all that is in it; at
// whatever change the deletion is cut short, the instance is not there any
// more, and a second deletion ends the first.
func TestDeleteInstanceLeavesNothing(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	for n := 0; ; n++ {
		id := w.newInstance(t, fmt.Sprint("instance ", n))
		w.furnish(t, id)
		before := len(w.paths(t, id))
		half := kms.New(&cut{w.store, n}, w.token, w.token, func() time.Time { return w.now }, kms.DefaultWindows())
		err := half.DeleteInstance(ctx, id, nothing)
		_, gone := w.Instance(ctx, id)
		if (n > 0) != (reason(gone) == kmsapi.InstanceNotFound) {
			t.Fatalf("after %d changes: %v", n, gone)
		}
		if err == nil {
			if left := w.paths(t, id); len(left) != 0 || n < 6 {
				t.Errorf("%d changes, left: %v", n, left)
			}
			return
		}
		if !errors.Is(err, errCut) {
			t.Fatal(err)
		}
		if _, err := w.CreateKey(ctx, id, "default", "me", kmsapi.CreateKey{Name: "late"}); n > 0 && reason(err) != kmsapi.InstanceNotFound {
			t.Errorf("a key in what is being deleted: %v", err)
		} else if n == 0 {
			continue // nothing was begun
		}
		if err := w.DeleteInstance(ctx, id, nothing); err != nil || len(w.paths(t, id)) != 0 {
			t.Errorf("cut after %d changes: %v, left of %d: %v", n, err, before, w.paths(t, id))
		}
		w.newInstance(t, fmt.Sprint("instance ", n)) // its name is free again
	}
}

// TestDeleteInstanceOrCreateKey: of a deletion and a creation at the same time
// one wins; no key is left in an instance that is gone.
func TestDeleteInstanceOrCreateKey(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	won := map[bool]int{}
	for i := range 20 {
		id := w.newInstance(t, fmt.Sprint("instance ", i))
		deleted := make(chan error, 1)
		go func() { deleted <- w.DeleteInstance(ctx, id, nothing) }()
		_, created := w.CreateKey(ctx, id, "default", "me", kmsapi.CreateKey{Name: "root"})
		err := <-deleted
		if (err == nil) == (created == nil) {
			t.Fatalf("both or none: delete %v, create %v", err, created)
		}
		if err != nil && fault.KindOf(err) != fault.Conflict {
			t.Fatal(err)
		}
		if left := w.paths(t, id); err == nil && len(left) != 0 {
			t.Fatalf("left: %v", left)
		}
		if _, gone := w.Instance(ctx, id); (gone == nil) != (created == nil) {
			t.Fatalf("instance: %v, key: %v", gone, created)
		}
		won[created == nil]++
	}
	t.Logf("the key won %d times, the deletion %d times", won[true], won[false])
}

// TestPurgeOfManyRecords: a key of more versions and registrations than one
// transaction takes is purged whole, also when that was cut short.
func TestPurgeOfManyRecords(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	for n := 0; ; n++ {
		k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root", Aliases: []string{fmt.Sprint("alias-", n)}})
		for range 2 {
			var many []record.Change
			for i := range 100 {
				id := fmt.Sprintf("%d-%d", len(w.paths(t, k.ID)), i)
				many = append(many, record.Change{Path: "versions/" + w.instance + "/" + k.ID + "/" + id, Value: map[string]string{"id": id}})
			}
			if err := w.store.Commit(ctx, many...); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := w.Delete(ctx, w.instance, k.ID, "me", false); err != nil {
			t.Fatal(err)
		}
		w.now = w.now.Add(kms.DefaultWindows().PurgeMin)
		half := kms.New(&cut{w.store, n}, w.token, w.token, func() time.Time { return w.now }, kms.DefaultWindows())
		_, err := half.Purge(ctx, w.instance, k.ID)
		whole := err == nil
		if !whole {
			if !errors.Is(err, errCut) {
				t.Fatal(err)
			}
			if _, err := w.Purge(ctx, w.instance, k.ID); err != nil {
				t.Fatalf("cut after %d changes: %v", n, err)
			}
		}
		if left := w.paths(t, k.ID); len(left) != 0 {
			t.Fatalf("cut after %d changes, left: %v", n, left)
		}
		if whole {
			return
		}
	}
}
