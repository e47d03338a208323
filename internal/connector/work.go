package connector

import (
	"context"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
)

// workMax bounds one message: what waits while a message is sent goes
// together into the next one.
const workMax = 64

// work is an open stream of wraps and unwraps.
type work struct {
	stream wire.Connector_WorkClient
	cancel context.CancelFunc
	queue  chan *wire.Op
	over   chan struct{} // closed when the stream has ended

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan *wire.Op
	err     error
}

// openWork opens a stream on a link, or gives the one that is open.
func (l *link) openWork(ctx context.Context) (*work, error) {
	l.workMu.Lock()
	defer l.workMu.Unlock()
	if l.work != nil && !l.work.ended() {
		return l.work, nil
	}
	sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stream, err := l.rpc.Work(sctx)
	if err != nil {
		cancel()
		return nil, err
	}
	w := &work{stream: stream, cancel: cancel, queue: make(chan *wire.Op, 4*workMax), over: make(chan struct{}), waiting: map[uint64]chan *wire.Op{}}
	go w.send()
	go w.receive()
	l.work = w
	return w, nil
}

func (w *work) ended() bool {
	select {
	case <-w.over:
		return true
	default:
		return false
	}
}

// send puts together what is there.
func (w *work) send() {
	for {
		b := &wire.Batch{}
		select {
		case op := <-w.queue:
			b.Ops = append(b.Ops, op)
		case <-w.over:
			return
		}
		runtime.Gosched() // callers that are ready put theirs in too
	more:
		for len(b.Ops) < workMax {
			select {
			case op := <-w.queue:
				b.Ops = append(b.Ops, op)
			default:
				break more
			}
		}
		if err := w.stream.Send(b); err != nil {
			w.cancel() // receive hears the cause
			return
		}
	}
}

// receive hands the replies out; when the stream ends, everybody who waits is
// told so.
func (w *work) receive() {
	for {
		b, err := w.stream.Recv()
		if err != nil {
			w.end(err)
			return
		}
		w.mu.Lock()
		for _, op := range b.Ops {
			if c := w.waiting[op.Id]; c != nil {
				delete(w.waiting, op.Id)
				c <- op // it has room for one
			}
		}
		w.mu.Unlock()
	}
}

func (w *work) end(err error) {
	w.cancel()
	w.mu.Lock()
	w.err = err
	w.waiting = nil
	w.mu.Unlock()
	close(w.over)
}

// replies are channels with room for one.
var replies = sync.Pool{New: func() any { return make(chan *wire.Op, 1) }}

// do makes one request and waits for its reply.
func (w *work) do(ctx context.Context, op *wire.Op) (*wire.Op, error) {
	if end, ok := ctx.Deadline(); ok {
		op.WithinMs = uint32(max(time.Until(end).Milliseconds(), 1))
	}
	reply := replies.Get().(chan *wire.Op)
	w.mu.Lock()
	if w.waiting == nil {
		defer w.mu.Unlock()
		return nil, streamEnded(w.err)
	}
	w.next++
	op.Id = w.next
	w.waiting[op.Id] = reply
	w.mu.Unlock()
	select {
	case w.queue <- op:
	case <-ctx.Done():
		return nil, w.forget(ctx, op)
	case <-w.over:
		return nil, streamEnded(w.err)
	}
	select {
	case r := <-reply:
		replies.Put(reply) // empty again: it is answered once
		return r, opError(r)
	case <-ctx.Done():
		return nil, w.forget(ctx, op)
	case <-w.over:
		return nil, streamEnded(w.err)
	}
}

func (w *work) forget(ctx context.Context, op *wire.Op) error {
	w.mu.Lock()
	delete(w.waiting, op.Id)
	w.mu.Unlock()
	return status.FromContextError(ctx.Err()).Err()
}

// streamEnded is a broken way, whatever ended the stream: EOF and our own
// cancel too.
func streamEnded(err error) error {
	return status.Error(codes.Unavailable, "the stream ended: "+status.Convert(err).Message())
}

// opError brings a fault into the form that a call's has.
func opError(op *wire.Op) error {
	f := op.GetFault()
	if f == nil {
		return nil
	}
	s, err := status.New(codes.Code(op.Code), f.Cause).WithDetails(f)
	if err != nil {
		return status.Error(codes.Code(op.Code), f.Cause)
	}
	return s.Err()
}
