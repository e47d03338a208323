package kms

import (
	"context"
	"errors"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// A store belongs to the token that its master keys are in. Clearing it gives
// it leave to begin anew on another one, once: the note of the clearing names
// the token that was cleared, and the store still belongs to that one. After
// the move it belongs to another, so that a replica that is connected to the
// old token cannot take it back.

// MovableStore is the part of a store that is there before the HSM is open.
type MovableStore interface {
	Plain
	Peek(ctx context.Context, each func(record.Raw) error) (rev int64, err error)
	Leave(ctx context.Context, install, upTo int64) error
}

// Moved says that a store left its token.
type Moved struct {
	Install  string // that the store was
	From, To string // serial numbers
	By       string // who cleared it
}

// LeaveToken empties a store that was cleared and holds nothing since, when
// none of the members is the token that it belongs to, so that the next Unlock
// begins anew. nil when nothing moves: that a store which was not cleared
// belongs elsewhere is for Unlock to say.
func LeaveToken[T Token](ctx context.Context, s MovableStore, members []T) (*Moved, error) {
	var in install
	rev, err := s.Get(ctx, "install", &in)
	if errors.Is(err, record.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	m := &Moved{Install: in.ID, From: in.Serial}
	for _, t := range members {
		info, err := t.Describe(ctx)
		if err != nil || info.Serial == in.Serial { // one that does not answer may be the store's
			return nil, nil //nolint:nilerr // Unlock meets it again, and says so
		}
		m.To = info.Serial
	}
	var last kmsapi.Cleared
	if _, err := s.Get(ctx, clearedName, &last); errors.Is(err, record.ErrNotFound) || (err == nil && last.TokenSerial != in.Serial) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	m.By = last.By
	upTo, err := s.Peek(ctx, m.mayGo)
	if err != nil {
		return nil, err
	}
	err = s.Leave(ctx, rev, upTo)
	if errors.Is(err, record.ErrConflict) {
		return nil, fault.Newf(fault.Conflict, "begin anew on token", m.To, "somebody wrote to the store at this moment").WithHint("try again")
	}
	return m, err
}

// mayGo refuses a record that anybody might miss. What a KMS that serves
// nobody writes by itself may go.
func (m *Moved) mayGo(r record.Raw) error {
	if record.WrittenUnused(r.Path, r.Value) {
		return nil
	}
	return fault.Newf(fault.BadContent, "begin anew on token", m.To, "the store was cleared on token %q, and holds something since, as %q", m.From, r.Path).
		WithHint("connect token %q again, and clear it once more with `kmsctl hsm clear`; nothing was changed", m.From)
}
