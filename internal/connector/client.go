// Package connector reaches the HSM through kms-connector, which alone holds
// the PKCS#11 library, the PIN and the sessions. Embedded, it starts the
// connector as a child and replaces it when it dies or hangs; in a pod it
// dials the unix socket of the sidecar. It never logs in by itself: after a
// replacement it runs the hook given to Reopen, which keeps the ledger of
// logins.
package connector

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Deadlines of calls, waiting included.
const (
	quickCall = 10 * time.Second
	slowCall  = 60 * time.Second // makes or tests keys
	pairCall  = 3 * time.Minute  // makes an RSA pair
	openCall  = 2 * time.Minute  // the whole of the hook
	patience  = 3 * time.Second  // of a call, with a sidecar that is being started again
	startWait = 30 * time.Second // for a sidecar to appear
	beat      = time.Second      // between two looks at a connector that is well
	hungBeats = 3                // beyond the longest call of the library, without an answer: it is replaced
)

// Client is one HSM. Safe for concurrent use; Close ends it.
type Client struct {
	life  context.Context
	end   context.CancelFunc
	tasks sync.WaitGroup
	start *starter // nil when the connector is not our child

	mu      sync.Mutex
	now     *link
	changed chan struct{} // closed when now changes
	failed  error         // why there is no link
	hook    func(context.Context) error
	running bool      // the hook, at this moment
	openErr error     // of its last run
	opens   uint64    // runs that succeeded
	openAt  time.Time // not before this time
	pause   time.Duration

	opening singleflight.Group

	peers []*Client     // further members, when c is the head of a group
	apart bool          // other processes use tokens of their own; see Apart
	turn  atomic.Uint32 // of the member that is asked next
	away  atomic.Bool   // a member that is asked last
	move  move          // to another HSM
}

// link is one way to one running connector.
type link struct {
	conn   *grpc.ClientConn
	rpc    wire.ConnectorClient
	proc   *process // nil when dialled
	socket string   // when dialled

	workMu sync.Mutex
	work   *work
}

func newClient(ctx context.Context) *Client {
	c := &Client{changed: make(chan struct{})}
	c.life, c.end = context.WithCancel(context.WithoutCancel(ctx))
	return c
}

// Dial reaches a connector on a unix socket. It waits until one answers, or
// ctx ends.
func Dial(ctx context.Context, socket string) (*Client, error) {
	c, err := dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	if err := c.now.await(ctx); err != nil {
		c.Close()
		var f *fault.Error
		if errors.As(err, &f) && f.Object == "" {
			f.Object = socket
		}
		return nil, err
	}
	c.tasks.Go(c.watch)
	return c, nil
}

func dial(ctx context.Context, socket string) (*Client, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second,
			Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}}))
	if err != nil {
		return nil, fault.New(fault.Usage, "dial HSM connector", socket, err)
	}
	c := newClient(ctx)
	c.now = &link{conn: conn, rpc: wire.NewConnectorClient(conn), socket: socket}
	return c, nil
}

// await waits until a sidecar that starts beside us answers; its own faults
// (no library, no token) end the wait.
func (l *link) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	for {
		_, err := l.rpc.Describe(ctx, &wire.DescribeRequest{})
		if !broken(ctx, err) {
			return toFault("dial HSM connector", err)
		}
		if !rest(ctx) {
			return toFault("dial HSM connector", err)
		}
	}
}

// Close ends the connector that Start started, and lets go of one that Dial
// reached.
func (c *Client) Close() {
	for _, p := range c.peers {
		p.Close()
	}
	if c.move.next != nil {
		c.move.next.Close()
	}
	c.end()
	c.tasks.Wait()
	c.mu.Lock()
	l := c.now
	c.now = nil
	c.mu.Unlock()
	if l != nil {
		l.close()
	}
	if c.start != nil {
		c.start.pin.Zero()
	}
}

func (l *link) close() {
	_ = l.conn.Close()
	l.workMu.Lock()
	if l.work != nil {
		l.work.close()
	}
	l.workMu.Unlock()
	if l.proc != nil {
		l.proc.stop()
	}
}

// Reopen sets what logs in and opens the master keys again (kms.Unlock) when
// the connector lost them: it was replaced, or its HSM went away and came
// back. Calls made meanwhile wait for it; ctx of the hook marks the calls
// that belong to it. Without a hook such calls fail with fault.NotReady.
func (c *Client) Reopen(hook func(ctx context.Context) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hook = hook
}

// seen is how often the hook has succeeded; see reopen.
func (c *Client) seen() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.opens
}

func (c *Client) hasHook() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hook != nil
}

type insideHook struct{}

// Pauses between two runs of the hook that failed. After a refusal by the
// HSM or the ledger nothing gets better by itself quickly.
const (
	firstPause  = 100 * time.Millisecond
	deniedPause = 15 * time.Second
)

// reopen runs the hook, once for all who ask at the same time, and not at all
// when it succeeded since the caller saw seen.
func (c *Client) reopen(ctx context.Context, seen uint64) error {
	c.mu.Lock()
	hook, err, early := c.hook, c.openErr, time.Now().Before(c.openAt) && !c.running
	c.mu.Unlock()
	if hook == nil {
		return errNoHook
	}
	if early {
		return err
	}
	done := c.opening.DoChan("", func() (any, error) {
		c.mu.Lock()
		c.running = c.opens == seen
		run := c.running
		c.mu.Unlock()
		if !run {
			return nil, nil // it succeeded a moment ago
		}
		ctx, cancel := context.WithTimeout(Only(c.life), openCall)
		defer cancel()
		err := hook(ctx)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.openErr, c.running = err, false
		switch {
		case err == nil:
			c.openAt, c.pause = time.Time{}, 0
			c.opens++
			c.away.Store(false)
		case fault.KindOf(err) == fault.Denied:
			c.openAt = time.Now().Add(deniedPause)
		default:
			c.pause = min(max(2*c.pause, firstPause), wire.LongestPause)
			c.openAt = time.Now().Add(c.pause)
		}
		return nil, err
	})
	select {
	case r := <-done:
		return r.Err
	case <-ctx.Done():
		return late(ctx)
	}
}

var errNoHook = fault.Newf(fault.NotReady, "use the HSM", "", "it is not logged in")

func late(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fault.New(fault.Stopped, "wait for the HSM", "", ctx.Err())
	}
	return fault.Newf(fault.Unreachable, "wait for the HSM", "", "it did not come back in time").WithHint("look at the HSM and at the connector's log")
}

// link gives the running connector, and waits for one that is being replaced.
func (c *Client) link(ctx context.Context, not *link) (*link, error) {
	for {
		c.mu.Lock()
		l, changed, failed := c.now, c.changed, c.failed
		c.mu.Unlock()
		if l != nil && (l != not || l.proc == nil) {
			return l, nil
		}
		select {
		case <-changed:
		case <-c.life.Done():
			return nil, fault.Newf(fault.Stopped, "use the HSM", "", "the connector is closed")
		case <-ctx.Done():
			if failed != nil {
				return nil, failed
			}
			return nil, late(ctx)
		}
	}
}

func (c *Client) setLink(l *link, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.failed = l, err
	close(c.changed)
	c.changed = make(chan struct{})
}

// call makes one call. It is made once more when the connector died under it
// or lost its login; all calls but Login can be repeated without harm.
func call[R any](ctx context.Context, c *Client, op string, limit time.Duration, f func(context.Context, wire.ConnectorClient) (R, error)) (R, error) {
	return callOn(ctx, c, op, limit, func(ctx context.Context, l *link) (R, error) { return f(ctx, l.rpc) })
}

func callOn[R any](ctx context.Context, c *Client, op string, limit time.Duration, f func(context.Context, *link) (R, error)) (R, error) {
	members := c.order(ctx)
	last := members[len(members)-1]
	for _, m := range members[:len(members)-1] {
		r, err := once(ctx, m, op, f)
		if err == nil || !elsewhere(err) || ctx.Err() != nil {
			return r, err
		}
		m.away.Store(true)
	}
	return callMember(ctx, last, op, limit, f)
}

func callMember[R any](ctx context.Context, c *Client, op string, limit time.Duration, f func(context.Context, *link) (R, error)) (R, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	inside, began := ctx.Value(insideHook{}) != nil, time.Now()
	var none R
	var old *link
	for try := 0; ; try++ {
		l, err := c.link(ctx, old)
		if err != nil {
			return none, err
		}
		seen := c.seen()
		r, err := f(ctx, l)
		again := try < 2 && op != opLogin && ctx.Err() == nil
		switch {
		case err == nil:
			return r, nil
		case notOpen(err) && again && !inside && c.hasHook():
			if err := c.reopen(ctx, seen); err != nil {
				return none, err
			}
		case broken(ctx, err) && again && l.proc != nil:
			old = l
		case broken(ctx, err) && op != opLogin && l.proc == nil && time.Since(began) < patience && rest(ctx):
			try-- // the sidecar is being started again
		default:
			return none, toFault(op, err)
		}
	}
}

// rest pauses before a sidecar is tried again.
func rest(ctx context.Context) bool {
	select {
	case <-time.After(beat / 10):
		return true
	case <-ctx.Done():
		return false
	}
}

// watch looks at the connector each second, and more often at one that is not
// well: one whose HSM was away is opened again without waiting for a request,
// one that hangs is replaced.
func (c *Client) watch() {
	answered := time.Now()
	for next := beat; ; {
		select {
		case <-c.life.Done():
			return
		case <-time.After(next):
		}
		c.mu.Lock()
		l, hook, seen := c.now, c.hook, c.opens
		c.mu.Unlock()
		next = wire.LongestPause
		if l == nil {
			answered = time.Now()
			continue
		}
		ctx, cancel := context.WithTimeout(c.life, 2*beat)
		d, err := l.rpc.Describe(ctx, &wire.DescribeRequest{})
		cancel()
		if err == nil || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			answered = time.Now()
		}
		switch {
		case err == nil && (!d.LoggedIn || c.away.Load()) && hook != nil:
			_ = c.reopen(c.life, seen) // who calls meanwhile gets the error
		case err == nil:
			next = beat
		case l.proc != nil && time.Since(answered) > c.start.callTimeout+hungBeats*beat:
			fmt.Fprintln(c.start.stderr, "kmsctl: the HSM connector hangs; it is replaced")
			l.proc.kill()
			answered = time.Now()
		}
	}
}

const opLogin = "log in to token"

// Describe tells which token it is. It needs no login.
func (c *Client) Describe(ctx context.Context) (hsm.TokenInfo, error) {
	d, err := call(Only(ctx), c, "describe token", quickCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.DescribeReply, error) {
		return r.Describe(ctx, &wire.DescribeRequest{})
	})
	if err != nil {
		return hsm.TokenInfo{}, err
	}
	return tokenInfo(d), nil
}

func tokenInfo(d *wire.DescribeReply) hsm.TokenInfo {
	return hsm.TokenInfo{Module: d.Module, Library: d.Library, Slot: d.Slot, Label: d.Label, Serial: d.Serial, Manufacturer: d.Manufacturer, Model: d.Model,
		Firmware: d.Firmware, PINCountLow: d.PinCountLow, PINFinalTry: d.PinFinalTry, PINLocked: d.PinLocked, LoggedIn: d.LoggedIn}
}

// Fingerprint gives argon2id(PIN, salt): the ledger of logins compares it.
func (c *Client) Fingerprint(ctx context.Context, salt []byte) ([]byte, error) {
	return data(call(Only(ctx), c, "fingerprint the PIN", quickCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.Bytes, error) {
		return r.Fingerprint(ctx, &wire.FingerprintRequest{Salt: salt})
	}))
}

// Login logs in. It is never repeated.
func (c *Client) Login(ctx context.Context) error {
	_, err := call(Only(ctx), c, opLogin, slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.LoginReply, error) {
		return r.Login(ctx, &wire.LoginRequest{})
	})
	return err
}

// OpenMaster finds a version of the master keys, or makes it when create is
// set.
func (c *Client) OpenMaster(ctx context.Context, ids hsm.MasterIDs, create bool) (hsm.Master, error) {
	m, err := call(Only(ctx), c, "open master keys", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.OpenMasterReply, error) {
		q := masterRequest(ids)
		q.Create = create
		return r.OpenMaster(ctx, q)
	})
	if err != nil {
		return hsm.Master{}, err
	}
	return hsm.Master{WrapKCV: m.WrapKcv, SealKCV: m.SealKcv, PublicKey: m.PublicKey, Suite: uint8(m.Suite), WrapWay: m.WrapWay, Notes: m.Notes}, nil
}

func masterRequest(ids hsm.MasterIDs) *wire.OpenMasterRequest {
	return &wire.OpenMasterRequest{Install: ids.Install, WrapId: ids.Wrap, SealId: ids.Seal, SignId: ids.Sign, Version: uint32(ids.Version), Spare: ids.Spare}
}

// DestroyMaster destroys a version of the master keys in this member's token:
// what they made is lost.
func (c *Client) DestroyMaster(ctx context.Context, ids hsm.MasterIDs) error {
	_, err := call(Only(ctx), c, "destroy master keys", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.DestroyMasterReply, error) {
		return r.DestroyMaster(ctx, masterRequest(ids))
	})
	return err
}

// Rewrap takes the root key of a blob over to the master keys of today.
func (c *Client) Rewrap(ctx context.Context, blob []byte) (hsm.NewKey, error) {
	m := c.Maker()
	if c.holder(hsm.VersionOf(blob, nil)) != m {
		return c.Carry(ctx, blob)
	}
	return newKey(call(ctx, m, "rewrap root key", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.NewKey, error) {
		return r.Rewrap(ctx, &wire.Bytes{Data: blob})
	}))
}

// Reseal does the same with what Seal made. Between two HSMs the text passes
// through this process, as it does when it is used.
func (c *Client) Reseal(ctx context.Context, sealed, aad []byte) ([]byte, error) {
	m := c.Maker()
	if c.holder(hsm.VersionOf(nil, sealed)) != m {
		text, err := c.Unseal(ctx, sealed, aad)
		if err != nil {
			return nil, err
		}
		defer clear(text)
		return m.Seal(ctx, text, aad)
	}
	return data(call(ctx, m, "reseal", quickCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.Bytes, error) {
		return r.Reseal(ctx, &wire.UnsealRequest{Sealed: sealed, Aad: aad})
	}))
}

// CreateRootKey makes a root key in the token and wraps it out.
func (c *Client) CreateRootKey(ctx context.Context) (hsm.NewKey, error) {
	return newKey(call(ctx, c.Maker(), "create root key", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.NewKey, error) {
		return r.CreateRootKey(ctx, &wire.CreateRootKeyRequest{})
	}))
}

// ImportRootKey brings material of 16, 24 or 32 bytes into the token.
func (c *Client) ImportRootKey(ctx context.Context, material secret.Value) (hsm.NewKey, error) {
	return newKey(call(ctx, c.Maker(), "import root key", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.NewKey, error) {
		return r.ImportRootKey(ctx, &wire.Bytes{Data: material.Reveal()})
	}))
}

// CreatePlacedKey makes a root key that stays in the token under a CKA_ID.
func (c *Client) CreatePlacedKey(ctx context.Context, id []byte) (hsm.NewKey, error) {
	return c.place(ctx, id, nil)
}

// ImportPlacedKey brings material in that stays in the token.
func (c *Client) ImportPlacedKey(ctx context.Context, id []byte, material secret.Value) (hsm.NewKey, error) {
	return c.place(ctx, id, material.Reveal())
}

func (c *Client) place(ctx context.Context, id, material []byte) (hsm.NewKey, error) {
	m := c.Maker()
	if err := c.mayPlace(m); err != nil {
		return hsm.NewKey{}, err
	}
	q := &wire.PlaceRootKeyRequest{Id: id, Material: material}
	return newKey(call(ctx, m, opPlace, slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.NewKey, error) { return r.PlaceRootKey(ctx, q) }))
}

const opPlace = "keep a root key in the token"

func (c *Client) mayPlace(maker *Client) error {
	if !c.several(maker) {
		return nil
	}
	return fault.Newf(fault.NotReady, opPlace, "", "there are several HSMs, and such a key would be in one of them only").
		WithHint("use an instance with placement %s", hsm.PlacementWrapped)
}

// NewImportPair makes an RSA pair under which material travels. Where there
// are several tokens its private half is sealed, since one of them only could
// hold it under the CKA_ID.
func (c *Client) NewImportPair(ctx context.Context, id, aad []byte) (hsm.ImportPair, error) {
	m := c.Maker()
	q := &wire.NewImportPairRequest{Aad: aad}
	if !c.several(m) {
		q.Id = id
	}
	p, err := call(ctx, m, "make an import pair", pairCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.ImportPair, error) {
		return r.NewImportPair(ctx, q)
	})
	return hsm.ImportPair{Held: p.GetHeld(), Sealed: p.GetSealed(), Public: p.GetPublic()}, err
}

// ImportSent brings in material that travelled under an import pair, and gives
// its bits. What is wrong with the material is one of hsm.Refusals.
func (c *Client) ImportSent(ctx context.Context, p hsm.ImportPair, aad []byte, m hsm.Sent, place []byte) (hsm.NewKey, int, error) {
	from, err := c.find(ctx, hsm.VersionOf(nil, p.Sealed))
	if err != nil {
		return hsm.NewKey{}, 0, err
	}
	if from != c.Maker() && p.Sealed != nil {
		if p.Sealed, err = c.Reseal(ctx, p.Sealed, aad); err != nil {
			return hsm.NewKey{}, 0, err
		}
	}
	maker := c.Maker() // a pair that the other token held is gone with it
	q := &wire.ImportSentRequest{Pair: &wire.ImportPair{Held: p.Held, Sealed: p.Sealed}, Aad: aad, Sha1: m.SHA1, Material: m.Material, Nonce: m.Nonce, Iv: m.IV, Want: m.Want, Place: place}
	if len(place) > 0 {
		if err := c.mayPlace(maker); err != nil {
			return hsm.NewKey{}, 0, err
		}
	}
	r, err := call(ctx, maker, "import root key", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.ImportSentReply, error) {
		return r.ImportSent(ctx, q)
	})
	if err != nil {
		return hsm.NewKey{}, 0, err
	}
	if i := int(r.Refused); i > 0 {
		return hsm.NewKey{}, 0, hsm.Refusals[min(i, len(hsm.Refusals))-1]
	}
	return hsm.NewKey{Blob: r.Key.GetBlob(), KCV: r.Key.GetKcv()}, int(r.Bits), nil
}

func newKey(k *wire.NewKey, err error) (hsm.NewKey, error) {
	if err != nil {
		return hsm.NewKey{}, err
	}
	return hsm.NewKey{Blob: k.Blob, KCV: k.Kcv}, nil
}

func (c *Client) wrap(ctx context.Context, q *wire.WrapRequest) (*wire.WrapReply, hsm.Sealed, error) {
	op, err := c.do(ctx, "wrap", q.Blob, func() *wire.Op { return &wire.Op{Body: &wire.Op_Wrap{Wrap: q}} })
	if err != nil {
		return nil, hsm.Sealed{}, err
	}
	w := op.GetWrapped()
	return w, hsm.Sealed{Suite: uint8(w.Sealed.GetSuite()), IV: w.Sealed.GetIv(), Ciphertext: w.Sealed.GetCiphertext()}, nil
}

// do makes one request on the connection for them.
func (c *Client) do(ctx context.Context, what string, blob []byte, op func() *wire.Op) (*wire.Op, error) {
	return forKey(ctx, c, blob, func(c *Client) (*wire.Op, error) {
		return callOn(ctx, c, what, quickCall, func(ctx context.Context, l *link) (*wire.Op, error) {
			w, err := l.openWork(ctx)
			if err != nil {
				return nil, err
			}
			return w.do(ctx, op())
		})
	})
}

// Wrap encrypts plaintext under the root key in blob.
func (c *Client) Wrap(ctx context.Context, blob, plaintext, aad []byte) (hsm.Sealed, error) {
	_, s, err := c.wrap(ctx, &wire.WrapRequest{Blob: blob, Plaintext: plaintext, Aad: aad})
	return s, err
}

// WrapNew makes n random bytes in the token, wraps them and gives both.
func (c *Client) WrapNew(ctx context.Context, blob []byte, n int, aad []byte) ([]byte, hsm.Sealed, error) {
	w, s, err := c.wrap(ctx, &wire.WrapRequest{Blob: blob, Aad: aad, Random: uint32(n)})
	if err != nil {
		return nil, hsm.Sealed{}, err
	}
	return w.Plaintext, s, nil
}

// Unwrap opens what Wrap made.
func (c *Client) Unwrap(ctx context.Context, blob []byte, s hsm.Sealed, aad []byte) ([]byte, error) {
	q := &wire.UnwrapRequest{Blob: blob, Sealed: &wire.Sealed{Suite: uint32(s.Suite), Iv: s.IV, Ciphertext: s.Ciphertext}, Aad: aad}
	op, err := c.do(ctx, "unwrap", blob, func() *wire.Op { return &wire.Op{Body: &wire.Op_Unwrap{Unwrap: q}} })
	return data(op.GetUnwrapped(), err)
}

// Seal encrypts plaintext under the sealing key.
func (c *Client) Seal(ctx context.Context, plaintext, aad []byte) ([]byte, error) {
	return c.seal(ctx, &wire.SealRequest{Plaintext: plaintext, Aad: aad})
}

// SealRandom seals n random bytes of the token.
func (c *Client) SealRandom(ctx context.Context, n int, aad []byte) ([]byte, error) {
	return c.seal(ctx, &wire.SealRequest{Aad: aad, Random: uint32(n)})
}

func (c *Client) seal(ctx context.Context, q *wire.SealRequest) ([]byte, error) {
	return data(call(ctx, c.Maker(), "seal", quickCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.Bytes, error) { return r.Seal(ctx, q) }))
}

// Unseal opens what Seal made.
func (c *Client) Unseal(ctx context.Context, sealed, aad []byte) ([]byte, error) {
	return data(forVersion(ctx, c, hsm.VersionOf(nil, sealed), func(c *Client) (*wire.Bytes, error) {
		return call(ctx, c, "unseal", quickCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.Bytes, error) {
			return r.Unseal(ctx, &wire.UnsealRequest{Sealed: sealed, Aad: aad})
		})
	}))
}

// Sign gives the signature of message's SHA-256 by this HSM's key, which has no
// successor: who checks it knows the key.
func (c *Client) Sign(ctx context.Context, message []byte) ([]byte, error) {
	return data(call(ctx, c, "sign", quickCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.Bytes, error) {
		return r.Sign(ctx, &wire.Bytes{Data: message})
	}))
}

// Random gives n bytes of the token's generator.
func (c *Client) Random(ctx context.Context, n int) ([]byte, error) {
	return data(call(ctx, c.Maker(), "make random bytes", quickCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.Bytes, error) {
		return r.Random(ctx, &wire.RandomRequest{N: uint32(n)})
	}))
}

// Installations lists what installations of this product left in the token.
func (c *Client) Installations(ctx context.Context) ([]hsm.Installation, error) {
	r, err := call(ctx, c, "list the installations on the token", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.InstallationsReply, error) {
		return r.Installations(ctx, &wire.InstallationsRequest{})
	})
	out := []hsm.Installation{}
	for _, i := range r.GetInstallations() {
		out = append(out, hsm.Installation{ID: i.Id, Objects: i.Objects})
	}
	return out, err
}

// Clear destroys the objects of one installation in this member's token, and
// gives their number. A proof of nil asks for none: a person has named the
// installation just now.
func (c *Client) Clear(ctx context.Context, install string, proof *hsm.Proof) (int, error) {
	q := &wire.ClearRequest{Install: install}
	if proof != nil {
		q.Sealed, q.Aad = proof.Sealed, proof.AAD
	}
	r, err := call(Only(ctx), c, "clear installation", slowCall, func(ctx context.Context, r wire.ConnectorClient) (*wire.ClearReply, error) { return r.Clear(ctx, q) })
	return int(r.GetObjects()), err
}

func data(b *wire.Bytes, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return b.Data, nil
}
