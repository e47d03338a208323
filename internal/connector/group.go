package connector

import (
	"context"
	"errors"
	"time"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

// Join makes c the head of a group: each peer is a connector of its own, to a
// token with the same master keys. Calls are spread over the members that are
// well and go to another one when theirs does not answer. Each member is
// unlocked and reopened by itself: see Members and Only. The peers belong to
// c, and end with it.
func (c *Client) Join(peers ...*Client) {
	for _, p := range peers {
		p.away.Store(true) // until it is open
	}
	c.peers = append(c.peers, peers...)
}

// Apart says that other processes of the KMS use tokens of their own, with the
// same master keys: nothing is kept in c's token that theirs would lack.
func (c *Client) Apart() { c.apart = true }

// several says that there are tokens which lack what one of them keeps; maker
// makes what is new.
func (c *Client) several(maker *Client) bool { return c.apart || len(maker.peers) > 0 }

// Members are c and its peers.
func (c *Client) Members() []*Client { return append([]*Client{c}, c.peers...) }

// Only keeps the calls made with the context at the member that they are made
// on: for what logs in and opens master keys.
func Only(ctx context.Context) context.Context { return context.WithValue(ctx, insideHook{}, true) }

// DialAny reaches connectors on unix sockets, and waits until one answers.
func DialAny(ctx context.Context, sockets ...string) (*Client, error) {
	if len(sockets) == 1 {
		return Dial(ctx, sockets[0])
	}
	var all []*Client
	for _, s := range sockets {
		c, err := dial(ctx, s)
		if err != nil {
			for _, other := range all {
				other.Close()
			}
			return nil, err
		}
		all = append(all, c)
	}
	head := all[0]
	head.Join(all[1:]...)
	answers := make(chan error, len(all))
	actx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, m := range all {
		go func() { answers <- m.now.await(actx) }()
	}
	var errs []error
	for range all {
		err := <-answers
		if err == nil {
			for _, m := range all {
				m.tasks.Go(m.watch)
			}
			return head, nil
		}
		errs = append(errs, err)
	}
	head.Close()
	return nil, errors.Join(errs...)
}

// order lists the members for one call: the next in turn first, those that
// are away last.
func (c *Client) order(ctx context.Context) []*Client {
	if len(c.peers) == 0 || ctx.Value(insideHook{}) != nil {
		return []*Client{c}
	}
	all := c.Members()
	n := int(c.turn.Add(1)) % len(all)
	var well, away []*Client
	for _, m := range append(all[n:], all[:n]...) {
		if m.away.Load() {
			away = append(away, m)
		} else {
			well = append(well, m)
		}
	}
	return append(well, away...)
}

// elsewhere says that another member may do better: this one did not answer,
// or is not open.
func elsewhere(err error) bool {
	k := fault.KindOf(err)
	return k == fault.Unreachable || k == fault.NotReady
}

// firstTry is how long a member may take when there is another one.
const firstTry = 3 * time.Second

// once makes one call on a member without waiting for anything: another
// member is there to try.
func once[R any](ctx context.Context, c *Client, op string, f func(context.Context, *link) (R, error)) (R, error) {
	var none R
	c.mu.Lock()
	l, seen := c.now, c.opens
	c.mu.Unlock()
	if l == nil {
		return none, fault.Newf(fault.Unreachable, op, "", "the connector is being started again")
	}
	octx, cancel := context.WithTimeout(ctx, firstTry)
	defer cancel()
	r, err := f(octx, l)
	if err == nil {
		return r, nil
	}
	if broken(octx, err) { // also when our own Close of the way cancelled the call
		return none, fault.New(fault.Unreachable, op, "", errors.New("the connector ended during the call"))
	}
	if notOpen(err) {
		c.tasks.Go(func() { _ = c.reopen(c.life, seen) }) // who calls meanwhile uses the others
	}
	return none, toFault(op, err)
}

// Ready says what keeps all members from working; nil when one works. While
// keys are in two HSMs both are needed.
func (c *Client) Ready(ctx context.Context) error {
	return c.both(func(c *Client) error { return c.oneReady(ctx) })
}

func (c *Client) oneReady(ctx context.Context) error {
	var errs []error
	for _, m := range c.Members() {
		info, err := m.Describe(Only(ctx))
		switch {
		case err == nil && info.LoggedIn:
			return nil
		case err == nil:
			err = fault.Newf(fault.NotReady, "use token", info.Label, "it is not logged in")
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Evict makes every member forget a root key that it holds in its cache. One
// that is not open holds none.
func (c *Client) Evict(ctx context.Context, blob []byte) error {
	return c.both(func(c *Client) error { return c.evict(ctx, blob) })
}

func (c *Client) evict(ctx context.Context, blob []byte) error {
	var errs []error
	for _, m := range c.Members() {
		_, err := call(Only(ctx), m, "forget a root key", quickCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.EvictReply, error) {
			return r.Evict(ctx, &wire.Bytes{Data: blob})
		})
		if err != nil && fault.KindOf(err) != fault.NotReady && (len(c.peers) == 0 || !elsewhere(err)) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Destroy leaves nothing of a root key, or of an import pair, in the token: see
// token.Destroy. What stays in a token is made only where there is one member.
func (c *Client) Destroy(ctx context.Context, blob []byte) error {
	if hsm.HeldID(blob) == nil {
		return c.Evict(ctx, blob)
	}
	return c.both(func(c *Client) error {
		_, err := call(ctx, c, "destroy a key", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.EvictReply, error) {
			return r.DestroyRootKey(ctx, &wire.Bytes{Data: blob})
		})
		return err
	})
}
