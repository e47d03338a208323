package connector

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

// move is how a client that has a successor knows which of the two a call is
// for. Versions of the master keys from first on are the successor's; 0: none
// is yet, 1: all are.
type move struct {
	next   *Client
	serial string // of its token
	first  atomic.Uint32
	over   atomic.Bool   // nothing that was taken over is missing: the successor does alone
	newest atomic.Uint32 // version that this process knows of; 0: it was not told
	sha1   atomic.Bool   // the two tokens share OAEP over SHA-1 only
	follow atomic.Pointer[func(context.Context) error]
}

// Succeed makes next the HSM to which the keys of c can move: another token,
// with master keys of its own. It belongs to c, and ends with it. Nothing goes
// to it before Moved says so.
func (c *Client) Succeed(next *Client, serial string) {
	c.move.next, c.move.serial = next, serial
	c.move.first.Store(0)
	c.move.over.Store(false)
}

// Next is the successor, or nil.
func (c *Client) Next() *Client { return c.move.next }

// Moved says which token makes what is new, since which version of the master
// keys, and which the newest is. At the end of a move all versions are of the
// successor. An older view of the store still names what the other made, and
// that one still opens it while it is there.
func (c *Client) Moved(serial string, since, newest uint16) {
	began := c.move.first.Load() != 0
	switch {
	case serial != c.move.serial:
		c.move.first.Store(0)
	case !began:
		c.move.first.Store(uint32(since))
	}
	c.move.over.Store(serial == c.move.serial && since <= hsm.FirstMaster)
	c.move.newest.Store(uint32(newest))
}

// Follow has f say Moved anew when a call meets what is newer than the newest
// version: another process began to move the keys, or went on with it.
func (c *Client) Follow(f func(ctx context.Context) error) { c.move.follow.Store(&f) }

// Maker makes what is new.
func (c *Client) Maker() *Client {
	if c.move.next != nil && c.move.first.Load() != 0 {
		return c.move.next
	}
	return c
}

// find is holder, after this process learnt of the version.
func (c *Client) find(ctx context.Context, version uint16) (*Client, error) {
	if newest := c.move.newest.Load(); newest != 0 && uint32(version) > newest {
		if f := c.move.follow.Load(); f != nil {
			if err := (*f)(ctx); err != nil {
				return nil, err
			}
		}
	}
	return c.holder(version), nil
}

// holder has the master keys of a version.
func (c *Client) holder(version uint16) *Client {
	if first := c.move.first.Load(); first != 0 && uint32(version) >= first {
		return c.Maker()
	}
	return c
}

// forKey makes a call where the key of a blob is. One that stays in a token is
// looked for in both.
func forKey[R any](ctx context.Context, c *Client, blob []byte, f func(c *Client) (R, error)) (R, error) {
	if hsm.HeldID(blob) == nil {
		return forVersion(ctx, c, hsm.VersionOf(blob, nil), f)
	}
	m := c.Maker()
	r, err := f(m)
	if m != c && fault.KindOf(err) == fault.NotFound {
		if old, oerr := f(c); oerr == nil {
			return old, nil
		}
	}
	return r, err
}

// forVersion makes a call where the master keys of a version are.
func forVersion[R any](ctx context.Context, c *Client, version uint16, f func(c *Client) (R, error)) (R, error) {
	h, err := c.find(ctx, version)
	if err != nil {
		var none R
		return none, err
	}
	return f(h)
}

// both makes a call on both tokens while keys are in both.
func (c *Client) both(f func(c *Client) error) error {
	err := f(c.Maker())
	if c.Maker() != c && !c.move.over.Load() {
		err = errors.Join(err, f(c))
	}
	return err
}

// Carry takes the root key of a blob over to the successor, whose master keys
// are open. The key is wrapped under the successor's public key all the way.
func (c *Client) Carry(ctx context.Context, blob []byte) (out hsm.NewKey, err error) {
	sha1 := c.move.sha1.Load()
	if out, err = c.carry(ctx, blob, sha1); err != nil && !sha1 && ctx.Err() == nil && fault.KindOf(err) != fault.Denied {
		if out, err = c.carry(ctx, blob, true); err == nil { // OAEP over SHA-1 is all that some tokens know
			c.move.sha1.Store(true)
		}
	}
	return out, err
}

func (c *Client) carry(ctx context.Context, blob []byte, sha1 bool) (hsm.NewKey, error) {
	next := c.move.next
	public, err := data(call(Only(ctx), next, "make a pair to take keys", pairCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.Bytes, error) {
		return r.CarryKey(ctx, &wire.CarryKeyRequest{})
	}))
	if err != nil {
		return hsm.NewKey{}, err
	}
	given, err := call(ctx, c, "give a root key", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.Carried, error) {
		return r.GiveKey(ctx, &wire.GiveKeyRequest{Blob: blob, Public: public, Sha1: sha1})
	})
	if err != nil {
		return hsm.NewKey{}, err
	}
	return newKey(call(Only(ctx), next, "take a root key", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.NewKey, error) {
		return r.TakeKey(ctx, &wire.TakeKeyRequest{Carried: given, Public: public})
	}))
}
