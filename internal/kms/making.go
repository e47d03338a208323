package kms

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"time"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
)

// What is to stay in the token is announced before it is made there, at
// making/<id>. The transaction that brings its name into the store ends the
// announcement. One that is still there after a while is of a process that was
// killed in between: what it made has no name, and is destroyed. So nothing is
// touched that a record names, nor what nobody announced.
type making struct {
	Blob []byte    `json:"blob"` // names what is made, for Destroy
	At   time.Time `json:"at"`
	Over bool      `json:"over,omitempty"` // it is being destroyed
}

const (
	makingDir = "making/"
	// makingTime is longer than anybody waits for a key.
	makingTime = 15 * time.Minute
)

// announce gives the CKA_ID of what is to be made, and the change that ends
// the announcement.
func (s *Service) announce(ctx context.Context, blobOf func(id []byte) []byte) (id []byte, end record.Change, err error) {
	id = make([]byte, hsm.IDLen)
	if _, err := rand.Read(id); err != nil {
		return nil, end, err
	}
	m := making{Blob: blobOf(id), At: s.stamp()}
	end.Path = makingDir + hex.EncodeToString(id)
	if err := s.store.Commit(ctx, record.Change{Path: end.Path, Value: m}); err != nil {
		return nil, end, err
	}
	end.Rev, err = s.store.Get(ctx, end.Path, &m)
	return id, end, err
}

// dropUnfinished destroys what was announced, and has no name after a while.
func (s *Service) dropUnfinished(ctx context.Context) error {
	type old struct {
		making
		path string
		rev  int64
	}
	var all []old
	err := s.store.List(ctx, makingDir, func(m record.Meta, decode func(any) error) error {
		o := old{path: m.Path, rev: m.Rev}
		if err := decode(&o.making); err != nil {
			return err
		}
		if o.Over || s.Time().After(o.At.Add(makingTime)) {
			all = append(all, o)
		}
		return nil
	})
	errs := []error{err}
	for _, o := range all {
		errs = append(errs, s.dropMade(ctx, o.making, o.path, o.rev))
	}
	return errors.Join(errs...)
}

// dropMade first takes the announcement away from whoever may still be at it:
// from then on his own transaction fails.
func (s *Service) dropMade(ctx context.Context, m making, path string, rev int64) error {
	if !m.Over {
		m.Over = true
		if err := s.store.Commit(ctx, record.Change{Path: path, Value: m, Rev: rev}); err != nil {
			return ignoreConflict(err)
		}
		var err error
		if rev, err = s.store.Get(ctx, path, &m); err != nil {
			return ignoreConflict(err)
		}
	}
	if err := s.destroy(ctx, [][]byte{m.Blob}); err != nil {
		return err
	}
	return ignoreConflict(s.store.Commit(ctx, record.Change{Path: path, Rev: rev}))
}

// ignoreConflict is for what another replica did just now, or the maker.
func ignoreConflict(err error) error {
	if errors.Is(err, record.ErrConflict) || errors.Is(err, record.ErrNotFound) {
		return nil
	}
	return err
}
