package server

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/token"
)

// device keeps one open token for all calls. A token that is lost is closed
// when its last call is done, and opened anew by the next one: a handle never
// outlives its token. It does not log in; the KMS does, by its ledger.
type device struct {
	open func() (*token.Token, error)
	log  *slog.Logger

	mu    sync.RWMutex // held for reading by each call
	tok   *token.Token
	err   error
	next  time.Time // no attempt to open before it
	pause time.Duration
}

// Pauses between attempts to open a token that is away.
const (
	firstPause = 100 * time.Millisecond
	maxPause   = wire.LongestPause
)

// take gives the open token; give it back by done.
func (d *device) take() (t *token.Token, done func(), err error) {
	d.mu.RLock()
	if d.tok != nil {
		return d.tok, d.mu.RUnlock, nil
	}
	d.mu.RUnlock()
	d.mu.Lock()
	if d.tok == nil {
		d.tryOpen()
	}
	err = d.err
	d.mu.Unlock()
	if err != nil {
		return nil, nil, err
	}
	return d.take()
}

func (d *device) tryOpen() {
	if time.Now().Before(d.next) {
		return
	}
	d.tok, d.err = d.open()
	if d.err != nil {
		d.pause = min(max(2*d.pause, firstPause), maxPause)
		d.next = time.Now().Add(d.pause/2 + rand.N(d.pause/2)) //nolint:gosec // jitter is no secret
		d.log.Warn("the token does not open", "error", d.err)
		return
	}
	d.pause, d.next = 0, time.Time{}
	d.log.Info("the token is open")
}

// lost closes t when the calls on it are done, unless that happened already.
func (d *device) lost(t *token.Token, why error) {
	go func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.tok != t {
			return
		}
		d.log.Warn("the token is lost and is opened again", "error", why)
		t.Close()
		d.tok, d.err = nil, nil
	}()
}

func (d *device) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.tok != nil {
		d.tok.Close()
	}
	d.tok, d.err = nil, fault.Newf(fault.Stopped, "use the token", "", "the connector is ending")
	d.next = time.Now().Add(time.Hour)
}

// opener opens the token of the configuration; a SoftHSM token is made first
// when it is not there.
func opener(c Config, pin func() (secret.Value, error)) func() (*token.Token, error) {
	return func() (*token.Token, error) {
		if c.SoftHSMDir != "" {
			p, err := pin()
			if err != nil {
				return nil, err
			}
			defer p.Zero()
			if err := token.MakeSoftToken(c.SoftHSMDir, c.Token.Module, c.Token.Label, p); err != nil {
				return nil, err
			}
		}
		return token.Open(c.Token)
	}
}

// watchdog ends a process in which a call of the library does not return:
// such a call cannot be cancelled.
type watchdog struct {
	limit time.Duration
	hung  func(since time.Duration)

	mu    sync.Mutex
	next  uint64
	calls map[uint64]time.Time // since when each is watched
}

// enter watches a call from now on, or from later on when it may take longer.
func (w *watchdog) enter(longer time.Duration) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	w.calls[w.next] = time.Now().Add(longer)
	return w.next
}

func (w *watchdog) leave(id uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.calls, id)
}

func (w *watchdog) run(ctx context.Context) {
	tick := time.NewTicker(w.limit / 8)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if d := w.longest(now); d > w.limit {
				w.hung(d)
			}
		}
	}
}

func (w *watchdog) longest(now time.Time) (d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range w.calls {
		d = max(d, now.Sub(t))
	}
	return d
}
