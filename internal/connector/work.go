package connector

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
)

// workMax bounds the requests that are under way on a link; others wait here
// until their deadline.
const workMax = 1024

// work is an open connection for wraps and unwraps, see wire.Frame. One of
// those who wait for a reply reads for all; so a single caller needs no other
// goroutine.
type work struct {
	conn *wire.Conn
	out  *wire.Writer
	in   *wire.Reader
	turn chan struct{} // who takes it out reads, and puts it back
	room chan struct{}
	over chan struct{} // closed when the connection has ended
	proc *process      // of a connection that cannot be opened anew; else nil

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan wire.Frame // nil when it has ended
	err     error                      // why
	closing bool                       // by us
}

// openWork opens the connection of a link, or gives the one that is open.
func (l *link) openWork(ctx context.Context) (*work, error) {
	l.workMu.Lock()
	defer l.workMu.Unlock()
	if l.work != nil && !l.work.ended() {
		return l.work, nil
	}
	conn, err := l.dialWork(ctx)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	w := &work{conn: conn, out: wire.NewWriter(conn), in: wire.NewReader(conn), turn: make(chan struct{}, 1), room: make(chan struct{}, workMax),
		over: make(chan struct{}), proc: l.proc, waiting: map[uint64]chan wire.Frame{}}
	w.turn <- struct{}{}
	l.work = w
	return w, nil
}

// lookUp is how late at most who reads notices that nobody waits for him any
// more.
const lookUp = 50 * time.Millisecond

// dialWork gives the way that a child inherited, once, or dials a sidecar.
func (l *link) dialWork(ctx context.Context) (*wire.Conn, error) {
	if l.proc != nil {
		if l.work != nil {
			return nil, errors.New("its socket pair is closed")
		}
		return l.proc.work, nil
	}
	var d net.Dialer
	raw, err := d.DialContext(ctx, "unix", l.socket)
	if err != nil {
		return nil, err
	}
	conn, err := wire.FromNet(raw)
	if err != nil {
		return nil, err
	}
	err = conn.LookUp(lookUp)
	if err == nil {
		_, err = io.WriteString(conn, wire.Hello)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

func (w *work) ended() bool {
	select {
	case <-w.over:
		return true
	default:
		return false
	}
}

// read takes replies for all, until there is one for him who reads, or ctx
// ends. When the connection ends, everybody who waits is told so.
func (w *work) read(ctx context.Context, mine <-chan wire.Frame) {
	defer func() { w.turn <- struct{}{} }()
	for len(mine) == 0 && ctx.Err() == nil && !w.ended() {
		frames, err := w.in.Next()
		if err != nil && !errors.Is(err, wire.ErrNothing) {
			w.end(err)
			return
		}
		w.mu.Lock()
		for _, f := range frames {
			if c := w.waiting[f.ID()]; c != nil {
				delete(w.waiting, f.ID())
				c <- f // it has room for one
			}
		}
		w.mu.Unlock()
	}
}

// end lets all who wait go. A child that lives on without its connection is
// ended, to be replaced.
func (w *work) end(err error) {
	_ = w.conn.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting == nil {
		return
	}
	w.waiting, w.err = nil, err
	close(w.over)
	if w.proc != nil && !w.closing {
		w.proc.kill()
	}
}

func (w *work) close() {
	w.mu.Lock()
	w.closing = true
	w.mu.Unlock()
	_ = w.conn.Close()
}

// replies are channels with room for one, buffers are for one request.
var (
	replies = sync.Pool{New: func() any { return make(chan wire.Frame, 1) }}
	buffers = sync.Pool{New: func() any { return new([]byte) }}
)

// do makes one request and waits for its reply.
func (w *work) do(ctx context.Context, op *wire.Op) (*wire.Op, error) {
	select {
	case w.room <- struct{}{}:
		defer func() { <-w.room }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if end, ok := ctx.Deadline(); ok {
		op.WithinMs = uint32(max(time.Until(end).Milliseconds(), 1))
	}
	reply := replies.Get().(chan wire.Frame)
	id, err := w.expect(reply)
	if err != nil {
		return nil, err
	}
	if err := w.send(id, op); err != nil {
		w.forget(id)
		return nil, err
	}
	for {
		select {
		case f := <-reply:
			replies.Put(reply) // empty again: it is answered once
			return opened(f)
		case <-ctx.Done():
			w.forget(id)
			return nil, status.FromContextError(ctx.Err()).Err()
		case <-w.over:
			return nil, workEnded(w.err)
		case <-w.turn:
			w.read(ctx, reply)
		}
	}
}

func (w *work) expect(reply chan wire.Frame) (uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting == nil {
		return 0, workEnded(w.err)
	}
	w.next++
	w.waiting[w.next] = reply
	return w.next, nil
}

func (w *work) forget(id uint64) {
	w.mu.Lock()
	delete(w.waiting, id)
	w.mu.Unlock()
}

func (w *work) send(id uint64, op *wire.Op) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	b, err := wire.AppendFrame((*buf)[:0], id, op)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	*buf = b
	err = w.out.Add(b, len(w.room) > 1)
	clear(b)
	if err != nil {
		w.end(err)
		return workEnded(err)
	}
	return nil
}

// workEnded is a broken way, whatever ended it.
func workEnded(err error) error {
	return status.Error(codes.Unavailable, "the connection ended: "+err.Error())
}

// opened decodes a reply, and brings a fault into the form that a call's has.
func opened(frame wire.Frame) (*wire.Op, error) {
	op, err := frame.Op()
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	f := op.GetFault()
	if f == nil {
		return op, nil
	}
	s, err := status.New(codes.Code(op.Code), f.Cause).WithDetails(f)
	if err != nil {
		return nil, status.Error(codes.Code(op.Code), f.Cause)
	}
	return nil, s.Err()
}
