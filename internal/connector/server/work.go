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

// Work answers batches of wraps and unwraps. A batch is shared among as many
// sessions as the token has; replies go out as they come, those that wait
// while a message is sent together in the next one.
func (s *Server) Work(stream wire.Connector_WorkServer) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	out := make(chan []*wire.Op, cap(s.slots))
	in := make(chan part, cap(s.slots))
	var sending, working sync.WaitGroup
	sending.Go(func() {
		defer cancel()
		sendReplies(stream, out)
	})
	for range cap(s.slots) { // they stay, so that their stacks have grown once
		working.Go(func() {
			for p := range in {
				s.part(ctx, p, out)
			}
		})
	}
	for {
		b, err := stream.Recv()
		if err != nil {
			close(in)
			working.Wait()
			close(out)
			sending.Wait()
			return nil // the client is gone: nobody reads a status
		}
		got := time.Now()
		for _, ops := range split(b.Ops, s.ways()) {
			in <- part{got, ops} // when all are busy, the client's queue fills
		}
	}
}

// ways says among how many sessions a batch is shared: a token that answers
// from this machine's own memory keeps no more of them busy than there are
// processors, and each part costs a message; a token on the network keeps all.
func (s *Server) ways() int {
	if time.Duration(s.opTime.Load()) < localOp {
		return min(runtime.GOMAXPROCS(0), cap(s.slots))
	}
	return cap(s.slots)
}

// localOp is more than an operation in software takes, and less than a round
// trip on a network.
const localOp = 150 * time.Microsecond

// part is a share of a batch.
type part struct {
	got time.Time
	ops []*wire.Op
}

func sendReplies(stream wire.Connector_WorkServer, out <-chan []*wire.Op) {
	dead := false
	for first := range out {
		// Parts of one batch lie side by side in memory: none is appended to.
		b := &wire.Batch{Ops: append(make([]*wire.Op, 0, 2*len(first)), first...)}
		runtime.Gosched() // parts that are nearly done come along
	more:
		for len(b.Ops) < maxReplies {
			select {
			case next, open := <-out:
				if !open {
					break more
				}
				b.Ops = append(b.Ops, next...)
			default:
				break more
			}
		}
		// After an error the rest is drained, so that no part waits for ever.
		dead = dead || stream.Send(b) != nil
	}
}

// maxReplies bounds one message.
const maxReplies = 256

// split shares ops among at most n parts of about one size.
func split(ops []*wire.Op, n int) (parts [][]*wire.Op) {
	size := (len(ops) + n - 1) / n
	for len(ops) > 0 {
		k := min(size, len(ops))
		parts, ops = append(parts, ops[:k]), ops[k:]
	}
	return parts
}

// part works on some requests one after the other, with one session's turn.
func (s *Server) part(ctx context.Context, p part, out chan<- []*wire.Op) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return
	}
	began := time.Now()
	for _, op := range p.ops {
		s.answer(p.got, op)
	}
	each := time.Since(began) / time.Duration(len(p.ops))
	s.opTime.Store((7*s.opTime.Load() + int64(each)) / 8)
	out <- p.ops
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
