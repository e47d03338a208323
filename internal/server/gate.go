package server

import (
	"fmt"
	"net/http"
	"sync/atomic"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Gate answers before there is a Server: it lives, and it says why it is not
// ready. So a pod whose HSM, password or storage is not right stays up and
// can be asked, instead of starting again and again.
type Gate struct {
	inner  atomic.Pointer[Server]
	reason atomic.Pointer[string]
}

// NewGate makes a closed gate.
func NewGate(reason string) *Gate {
	g := &Gate{}
	g.Shut(reason)
	return g
}

// Shut notes why there is no server yet.
func (g *Gate) Shut(reason string) { g.reason.Store(&reason) }

// Open lets every request through to s from now on.
func (g *Gate) Open(s *Server) { g.inner.Store(s) }

// ServeHTTP is the server behind the gate, or a refusal to try again later.
func (g *Gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s := g.inner.Load(); s != nil {
		s.ServeHTTP(w, r)
		return
	}
	switch r.URL.Path {
	case "/livez":
		fmt.Fprintln(w, "ok")
	case "/readyz":
		writeJSON(w, http.StatusServiceUnavailable, kmsapi.Health{Reasons: []string{*g.reason.Load()}})
	default:
		w.Header().Set("Retry-After", "5")
		writeError(w, kmsapi.Unavailable, "Request could not be served", "")
	}
}
