package kms

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
)

// Masters are the master keys that the HSM has open, followed as any process
// changes them (Rotation). What they make is committed together with a proof
// that the installation is still the one that they are of: after a change
// nothing comes into the store any more that an older version made, so that a
// scan of the store which finds none has found all.
type Masters struct {
	plain  Plain
	unlock func(ctx context.Context) (Epoch, error)
	one    sync.Mutex
	now    atomic.Pointer[Epoch]
}

// NewMasters begins with what is open; unlock opens, on every member, what the
// installation names by now.
func NewMasters(p Plain, open Epoch, unlock func(ctx context.Context) (Epoch, error)) *Masters {
	m := &Masters{plain: p, unlock: unlock}
	m.now.Store(&open)
	return m
}

func (m *Masters) epoch() Epoch { return *m.now.Load() }

// Follow opens what the installation names by now, if that is another than
// what is open.
func (m *Masters) Follow(ctx context.Context) error {
	_, err := m.renew(ctx, m.epoch())
	return err
}

// renew opens the master keys anew if the installation is another than seen,
// and says whether it is.
func (m *Masters) renew(ctx context.Context, seen Epoch) (bool, error) {
	m.one.Lock()
	defer m.one.Unlock()
	if m.epoch() != seen {
		return true, nil
	}
	var in install
	rev, err := m.plain.Get(ctx, "install", &in)
	if err != nil || rev == seen.Rev {
		return false, err
	}
	e, err := m.unlock(ctx)
	if err != nil {
		return false, err
	}
	m.now.Store(&e)
	return true, nil
}

// Follow makes the service commit what the master keys made as they say.
// Without it they never change.
func (s *Service) Follow(m *Masters) { s.masters = m }

// making runs f, which makes something by the master keys and commits it
// with what made gives: once more when they were changed meanwhile.
func (s *Service) making(ctx context.Context, f func(e Epoch) error) error {
	if s.masters == nil {
		return f(Epoch{})
	}
	for {
		e := s.masters.epoch()
		err := f(e)
		if !errors.Is(err, record.ErrConflict) && fault.KindOf(err) != fault.Conflict {
			return err
		}
		moved, rerr := s.masters.renew(ctx, e)
		if rerr != nil {
			return rerr
		}
		if !moved {
			return err
		}
	}
}

// made goes with the changes that commit a blob or what Seal gave; a conflict
// when another version made it than that of the epoch.
func (s *Service) made(e Epoch, blob, sealed []byte) ([]record.Change, error) {
	if s.masters == nil {
		return nil, nil
	}
	if v := hsm.VersionOf(blob, sealed); v != 0 && v != e.Version {
		return nil, record.ErrConflict
	}
	return []record.Change{{Path: record.Installation, Rev: e.Rev, Same: true}}, nil
}
