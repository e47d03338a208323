package kms

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"

	"github.com/kmsctl/kmsctl/internal/record"
)

// Evicter makes an HSM forget what it holds of a root key to be quicker.
type Evicter interface {
	Evict(ctx context.Context, blob []byte) error
}

// Forgetting looks after what any process of the KMS changes, so that the HSM
// of this one holds no root key that was rotated, disabled, deleted or purged
// through another. Nobody can use such a key from the moment on in which its
// record has changed; this is for the object that still lies in the token.
// What is missed here, the time limit in the token takes.
type Forgetting struct {
	store Store
	hsm   Evicter
	todo  chan changed
}

// changed is a record that got another value, or none.
type changed struct{ was, is []byte }

// behind bounds the changes that wait.
const behind = 1024

// NewForgetting makes one for a process.
func NewForgetting(st Store, h Evicter) *Forgetting {
	return &Forgetting{store: st, hsm: h, todo: make(chan changed, behind)}
}

// Changed takes a record's old value and its new one. It never blocks.
func (f *Forgetting) Changed(path string, was, is []byte) {
	if !strings.HasPrefix(path, keysDir) && !strings.HasPrefix(path, versionsDir) {
		return
	}
	select {
	case f.todo <- changed{was, is}:
	default:
	}
}

// Work forgets until ctx ends.
func (f *Forgetting) Work(ctx context.Context) {
	for {
		select {
		case c := <-f.todo:
			for _, b := range f.outOfUse(ctx, c) {
				if len(b) > 0 {
					_ = f.hsm.Evict(ctx, b) // an HSM that is away holds nothing
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

// naming is what a key's record and an older version's have in common: they
// name a blob.
type naming struct {
	Instance string         `json:"instance"`
	ID       string         `json:"id"`
	State    int            `json:"state"`
	Version  *versionRecord `json:"version"` // of a key
	Blob     []byte         `json:"blob"`    // of an older version
}

func (n naming) blob() []byte {
	if n.Version != nil {
		return n.Version.Blob
	}
	return n.Blob
}

// outOfUse are the blobs that need not be at hand any more: after a rotation
// that of the version before, and all of a key that nobody may use. To forget
// one too many costs no more than to bring it back; so a record that cannot be
// read counts as one that is gone.
func (f *Forgetting) outOfUse(ctx context.Context, c changed) (blobs [][]byte) {
	var was, now naming
	_ = json.Unmarshal(c.was, &was)
	_ = json.Unmarshal(c.is, &now)
	same, isKey, active := bytes.Equal(now.blob(), was.blob()), was.Version != nil, now.State == stateActive
	if same && (active || !isKey) {
		return nil
	}
	blobs = append(blobs, was.blob())
	if active || !isKey {
		return blobs
	}
	_ = f.store.List(ctx, versionDir(was.Instance, was.ID), func(_ record.Meta, decode func(any) error) error {
		var v versionRecord
		err := decode(&v)
		blobs = append(blobs, v.Blob)
		return err
	})
	return blobs
}
