package server

import (
	"context"
	"io"
	"net/http"
	"time"
)

// stream is an answer that is written as it is made.
type stream func(ctx context.Context, w io.Writer) error

// streamPause is how long one write of a stream may take: a whole one takes
// as long as it must.
const streamPause = time.Minute

// stream answers with st. One that fails is broken off, so that its reader
// sees it: the status has been sent already.
func (s *Server) stream(w http.ResponseWriter, r *http.Request, rt route, corr string, st stream) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	out := &patient{w: w, c: http.NewResponseController(w)}
	if err := st(r.Context(), out); err != nil {
		s.Log.Error("stream", "route", rt.name, "correlation", corr, "error", err)
		panic(http.ErrAbortHandler)
	}
}

// patient moves the connection's deadline on with each write.
type patient struct {
	w http.ResponseWriter
	c *http.ResponseController
}

func (p *patient) Write(b []byte) (int, error) {
	if err := p.c.SetWriteDeadline(time.Now().Add(streamPause)); err != nil {
		return 0, err
	}
	return p.w.Write(b)
}

func readBackup(_ context.Context, c *call) (any, error) { return stream(c.Backup), nil }
