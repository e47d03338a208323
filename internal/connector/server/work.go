package server

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/token"
)

// serveWork answers the wraps and unwraps of one connection until it ends, or
// ctx does. What has come is shared among as many sessions as the token keeps
// busy; replies go out as they come.
func (s *Server) serveWork(ctx context.Context, c *wire.Conn) {
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, c.Stop)()
	out, in := wire.NewWriter(c), make(chan part)
	var working sync.WaitGroup
	for range cap(s.slots) { // they stay, so that their stacks have grown once
		working.Go(func() {
			for p := range in {
				s.part(ctx, p, out)
			}
		})
	}
	yielded := time.Now()
	for frames := wire.NewReader(c); ; {
		if now := time.Now(); now.Sub(yielded) > yieldEvery {
			runtime.Gosched()
			yielded = now
		}
		got, err := frames.Next()
		if err != nil {
			break // the client is gone, or we are to end
		}
		s.share(ctx, got, in, out)
	}
	close(in)
	working.Wait()
}

// yieldEvery is less than the 10 ms after which the scheduler takes a
// goroutine that never gave way for one that computes: it would take the
// processor from each read as soon as that waits, and wake two threads for
// every request.
const yieldEvery = 5 * time.Millisecond

// share hands frames out. When all are busy it waits, the socket fills, and
// the client keeps its requests. With a token that answers from this
// machine's own memory, the goroutine that read does one share itself:
// handing it over would take as long.
func (s *Server) share(ctx context.Context, frames []wire.Frame, in chan<- part, out *wire.Writer) {
	now := time.Now()
	local := time.Duration(s.opTime.Load()) < localOp
	shares := split(frames, s.ways(local, len(frames)))
	var mine []wire.Frame
	if local {
		mine, shares = shares[0], shares[1:]
	}
	for _, fs := range shares {
		in <- part{now, fs}
	}
	if local {
		s.part(ctx, part{now, mine}, out)
	}
}

// ways says among how many sessions n requests are shared. A token that
// answers from this machine's own memory keeps no more of them busy than there
// are processors, and to wake a thread for a few requests costs more than they
// do; a token on the network keeps all.
func (s *Server) ways(local bool, n int) int {
	if local {
		return min(runtime.GOMAXPROCS(0), cap(s.slots), (n+worthWaking-1)/worthWaking)
	}
	return cap(s.slots)
}

// worthWaking is how many local requests are worth another thread: tried.
const worthWaking = 16

// localOp is more than an operation in software takes, and less than a round
// trip on a network.
const localOp = 150 * time.Microsecond

// part is a share of what came at once.
type part struct {
	got    time.Time
	frames []wire.Frame
}

// split shares frames among at most n parts of about one size.
func split(frames []wire.Frame, n int) (parts [][]wire.Frame) {
	size := (len(frames) + n - 1) / n
	for len(frames) > 0 {
		k := min(size, len(frames))
		parts, frames = append(parts, frames[:k]), frames[k:]
	}
	return parts
}

// part works on some requests one after the other, with one session's turn.
func (s *Server) part(ctx context.Context, p part, out *wire.Writer) {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return
	}
	began := time.Now()
	b := make([]byte, 0, 256*len(p.frames))
	for _, f := range p.frames {
		op, err := f.Op()
		if err != nil {
			refuse(op, wireError(fault.New(fault.Usage, "read a request", "", err)))
		} else {
			s.answer(p.got, op)
		}
		if b, err = wire.AppendFrame(b, f.ID(), op); err != nil {
			s.dev.log.Error("a reply cannot be sent", "error", err)
		}
	}
	each := time.Since(began) / time.Duration(len(p.frames))
	s.opTime.Store((7*s.opTime.Load() + int64(each)) / 8)
	<-s.slots
	_ = out.Add(b, false) // its error ends the connection
	clear(b)
}

// refuse turns a request into the reply of its fault.
func refuse(op *wire.Op, err error) {
	st := status.Convert(err)
	f := &wire.Fault{Kind: fault.Other.String(), Cause: st.Message()}
	for _, d := range st.Details() {
		if w, ok := d.(*wire.Fault); ok {
			f = w
		}
	}
	op.Code, op.Body = uint32(st.Code()), &wire.Op_Fault{Fault: f}
}

// answer turns a request into its reply.
func (s *Server) answer(got time.Time, op *wire.Op) {
	if op.WithinMs > 0 && time.Since(got) > time.Duration(op.WithinMs)*time.Millisecond {
		refuse(op, status.FromContextError(context.DeadlineExceeded).Err())
		return
	}
	switch q := op.Body.(type) {
	case *wire.Op_Wrap:
		r, err := s.wrap(q.Wrap)
		if err != nil {
			refuse(op, err)
			return
		}
		op.Body = &wire.Op_Wrapped{Wrapped: r}
	case *wire.Op_Unwrap:
		r, err := s.unwrap(q.Unwrap)
		if err != nil {
			refuse(op, err)
			return
		}
		op.Body = &wire.Op_Unwrapped{Unwrapped: r}
	default:
		refuse(op, status.Error(codes.Unimplemented, "no such request"))
	}
}

func (s *Server) wrap(q *wire.WrapRequest) (*wire.WrapReply, error) {
	if err := checkRandom(q.Random); err != nil {
		return nil, err
	}
	return direct(s, func(t *token.Token) (*wire.WrapReply, error) { return wrapOn(t, q) })
}

func (s *Server) unwrap(q *wire.UnwrapRequest) (*wire.Bytes, error) {
	c, err := sealed(q.Sealed)
	if err != nil {
		return nil, wireError(err)
	}
	return direct(s, func(t *token.Token) (*wire.Bytes, error) { return asBytes(t.Unwrap(q.Blob, c, q.Aad)) })
}

var errBusy = fault.New(fault.Unreachable, "use the token", "", errors.New("too many calls wait for it")).
	WithHint("try again later, or raise --sessions where the token allows")
