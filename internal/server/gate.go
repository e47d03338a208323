package server

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Gate answers before there is a Server: it lives, and it says why it is not
// ready. So a pod whose HSM, password or storage is not right stays up and
// can be asked, instead of starting again and again.
type Gate struct {
	inner  atomic.Pointer[Server]
	reason atomic.Pointer[string]
	calls  sync.RWMutex // held for reading by each call under way
}

// NewGate makes a closed gate.
func NewGate(reason string) *Gate {
	g := &Gate{}
	g.Shut(reason)
	return g
}

// Shut notes why there is no server.
func (g *Gate) Shut(reason string) { g.reason.Store(&reason) }

// Open lets every request through to s from now on.
func (g *Gate) Open(s *Server) { g.inner.Store(s) }

// Close lets nobody in from now on, and waits until the calls that are under
// way have ended, but no longer than most.
func (g *Gate) Close(reason string, most time.Duration) {
	g.Shut(reason)
	g.inner.Store(nil)
	ended := make(chan struct{})
	go func() {
		g.calls.Lock()
		defer g.calls.Unlock()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(most):
	}
}

// enter gives the server to a call; leave must follow.
func (g *Gate) enter() (s *Server, leave func()) {
	if g.inner.Load() == nil { // also while Close waits
		return nil, nil
	}
	g.calls.RLock()
	if s = g.inner.Load(); s == nil {
		g.calls.RUnlock()
		return nil, nil
	}
	return s, g.calls.RUnlock
}

// ServeHTTP is the server behind the gate, or a refusal to try again later.
func (g *Gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s, leave := g.enter(); s != nil {
		defer leave()
		s.ServeHTTP(w, r)
		return
	}
	switch r.URL.Path {
	case "/livez":
		fmt.Fprintln(w, "ok")
	case "/readyz":
		writeJSON(w, http.StatusServiceUnavailable, kmsapi.Health{Reasons: []string{*g.reason.Load()}})
	default:
		w.Header().Set("Retry-After", soon)
		writeError(w, kmsapi.Unavailable, "Request could not be served", *g.reason.Load())
	}
}
