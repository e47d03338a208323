package servecmd

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// startWait is how long a call waits for another process that holds the data
// folder and does not answer: it is starting, or ending.
const startWait = 10 * time.Second

// serveOneCall answers on the folder's socket for calls until who started this
// process closes its end, or says where the KMS answers already. What fails is
// told there, too.
func serveOneCall(ctx context.Context, a *app.App, e *Embedded) error {
	reply := os.NewFile(app.CallReplyDescriptor, "reply")
	say := func(r app.CallReply) error {
		defer reply.Close()
		return json.NewEncoder(reply).Encode(r)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel()
		_, _ = io.Copy(io.Discard, os.NewFile(app.CallEndDescriptor, "end")) // it only ends
	}()
	unlock, socket, err := takeOrFind(ctx, e.Data)
	if err != nil {
		return say(app.Failed(err))
	}
	if socket != "" {
		return say(app.CallReply{Socket: socket})
	}
	defer unlock()
	if e.SecretFile == "" {
		if e, err = e.recall(); err == nil && e == nil {
			err = fault.Newf(fault.Unreachable, "start the embedded KMS", "", "none was started here yet").WithHint("start it with `kmsctl serve`")
		}
		if err != nil {
			return say(app.Failed(err))
		}
	}
	quiet := slog.New(slog.DiscardHandler)
	r, err := e.Start(ctx, a, quiet, io.Discard, func(string, ...string) {})
	if err != nil {
		return say(app.Failed(err))
	}
	defer r.Close()
	socket = filepath.Join(e.Data, app.CallSocket)
	l, err := LocalListener(ctx, socket)
	if err != nil {
		return say(app.Failed(err))
	}
	if err := say(app.CallReply{Socket: socket}); err != nil {
		return err
	}
	return ServeAll(ctx, r.Gate, quiet, r.Died, Listener{l, true})
}

// takeOrFind takes the data folder, or finds the socket of who serves it.
func takeOrFind(ctx context.Context, data string) (unlock func(), socket string, err error) {
	for until := time.Now().Add(startWait); ; {
		var d net.Dialer
		if c, err := d.DialContext(ctx, "unix", app.SocketPath(data)); err == nil {
			return nil, app.SocketPath(data), c.Close()
		}
		unlock, err := LockData(data)
		if err == nil || fault.KindOf(err) != fault.Conflict || time.Now().After(until) {
			return unlock, "", err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, "", ctx.Err()
		}
	}
}
