package connector

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/file"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Options say which connector to start and which token it serves. At most one
// of TokenLabel, TokenSerial and Slot is set.
type Options struct {
	Path        string // of kms-connector; see Find
	Module      string // PKCS#11 library
	TokenLabel  string
	TokenSerial string
	Slot        *uint64
	SoftHSMDir  string        // make the token here when there is none
	GivesKeys   bool          // root keys may leave for another token
	Sessions    int           // calls that the token works on at once; 0 leaves it to the connector
	CallTimeout time.Duration // a call of the library that takes longer ends the connector; 0 means 20 s
	PIN         secret.Value
	Stderr      io.Writer // the connector's log
	Env         []string  // added to the environment
}

// Find says where kms-connector is: KMSCTL_CONNECTOR, else beside this
// program, else in PATH.
func Find(getenv func(string) string) (string, error) {
	p, err := file.Program(getenv, "KMSCTL_CONNECTOR", "kms-connector")
	if err != nil {
		return "", fault.New(fault.NotFound, "find HSM connector", cmp.Or(p, "kms-connector"), err).
			WithHint("put kms-connector beside this program, or name it by KMSCTL_CONNECTOR")
	}
	return p, nil
}

// starter starts connectors, one after the other.
type starter struct {
	path   string
	args   []string
	env    []string
	pin    secret.Value
	stderr io.Writer

	callTimeout time.Duration // after which the connector ends itself
}

// defaultCallTimeout is longer than what a Luna client waits for its HSM.
const defaultCallTimeout = 20 * time.Second

// Start starts a connector and waits until its token is there. The connector
// lives until Close. The PIN is copied.
func Start(ctx context.Context, o Options) (*Client, error) {
	c := newClient(ctx)
	c.start = newStarter(o)
	l, err := c.start.link()
	if err != nil {
		c.Close()
		return nil, err
	}
	c.now = l
	if err := l.ready(ctx); err != nil {
		c.Close()
		return nil, err
	}
	c.tasks.Go(c.supervise)
	c.tasks.Go(c.watch)
	return c, nil
}

// ready waits for the first answer of a connector that was just started.
func (l *link) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, slowCall)
	defer cancel()
	_, err := l.rpc.Describe(ctx, &wire.DescribeRequest{})
	if !broken(ctx, err) {
		return toFault("describe token", err)
	}
	select {
	case <-l.proc.done:
		return fault.Newf(fault.Unreachable, "start HSM connector", l.proc.cmd.Path, "it ended at once: %w", l.proc.err).WithHint("what it printed says why")
	case <-time.After(time.Second):
		return toFault("describe token", err)
	}
}

func newStarter(o Options) *starter {
	s := &starter{path: o.Path, env: o.Env, callTimeout: cmp.Or(o.CallTimeout, defaultCallTimeout), stderr: o.Stderr, pin: secret.New(append([]byte(nil), o.PIN.Reveal()...))}
	if s.stderr == nil {
		s.stderr = io.Discard
	}
	s.args = []string{"--module", o.Module}
	add := func(flag, v string) {
		if v != "" {
			s.args = append(s.args, flag, v)
		}
	}
	add("--token-label", o.TokenLabel)
	add("--token-serial", o.TokenSerial)
	add("--softhsm-dir", o.SoftHSMDir)
	if o.Slot != nil {
		add("--slot", strconv.FormatUint(*o.Slot, 10))
	}
	if o.GivesKeys {
		s.args = append(s.args, "--gives-keys")
	}
	if o.Sessions > 0 {
		add("--sessions", strconv.Itoa(o.Sessions))
	}
	add("--call-timeout", s.callTimeout.String())
	return s
}

// supervise replaces a connector that ended, at once the first time and more
// slowly when it keeps ending.
func (c *Client) supervise() {
	for pause := time.Duration(0); ; {
		c.mu.Lock()
		l := c.now
		c.mu.Unlock()
		select {
		case <-c.life.Done():
			return
		case <-l.proc.done:
		}
		c.setLink(nil, fault.Newf(fault.Unreachable, "use the HSM", "", "its connector ended (%v)", l.proc.err).WithHint("its own log says why; it is started again"))
		l.close()
		if time.Since(l.proc.since) > stable {
			pause = 0
		}
		if l = c.startAgain(&pause); l == nil {
			return
		}
		seen := c.seen()
		c.setLink(l, nil)
		c.tasks.Go(func() { _ = c.reopen(c.life, seen) }) // who calls meanwhile gets the error
	}
}

const (
	stable     = 5 * time.Second // a connector that lived so long is no crash loop
	startPause = 20 * time.Millisecond
)

// startAgain starts until one starts, or the client is closed.
func (c *Client) startAgain(pause *time.Duration) *link {
	for {
		select {
		case <-c.life.Done():
			return nil
		case <-time.After(*pause):
		}
		*pause = min(max(2**pause, startPause), wire.LongestPause)
		l, err := c.start.link()
		if err == nil {
			return l
		}
		c.setLink(nil, err)
	}
}

// process is one running connector.
type process struct {
	cmd   *exec.Cmd
	conn  net.Conn   // for calls
	work  *wire.Conn // for wraps and unwraps
	since time.Time
	done  chan struct{} // closed when it has ended; err says how
	err   error
}

// environ is the connector's environment: ours, since a vendor's library may
// want any of it, without kmsctl's own variables, which may be secrets.
func environ(more []string) []string {
	out := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "KMSCTL_") })
	return append(out, more...)
}

// link starts a connector whose ends of three socket pairs are its
// descriptors: 3 for calls, 5 for wraps and unwraps. 4 brings the PIN each
// time that the connector asks for it, so that neither keeps a copy between
// logins but us.
func (s *starter) link() (*link, error) {
	ours, theirs, err := socketPairs(3)
	if err != nil {
		return nil, fault.New(fault.Other, "start HSM connector", s.path, err)
	}
	calls, pins := ours[0], ours[1]
	cmd := exec.Command(s.path, append([]string{"--fd", "3", "--pin-fd", "4", "--work-fd", "5"}, s.args...)...) //nolint:noctx // it outlives the call; stop ends it
	cmd.Env = environ(s.env)
	cmd.Stderr = s.stderr
	cmd.ExtraFiles = theirs
	cmd.SysProcAttr = ownGroup()
	err = cmd.Start()
	closeAll(theirs)
	if err != nil {
		closeAll(ours)
		return nil, fault.New(fault.NotFound, "start HSM connector", s.path, err).WithHint("KMSCTL_CONNECTOR must name the program kms-connector")
	}
	p := &process{cmd: cmd, conn: calls, since: time.Now(), done: make(chan struct{})}
	go s.givePIN(pins)
	go func() {
		p.err = cmd.Wait()
		if p.err == nil {
			p.err = errors.New("exit status 0")
		}
		_ = pins.Close()
		close(p.done)
	}()
	if p.work, err = wire.FromNet(ours[2]); err == nil {
		err = p.work.LookUp(lookUp)
	}
	if err != nil {
		p.stop()
		return nil, fault.New(fault.Other, "start HSM connector", s.path, err)
	}
	var taken atomic.Bool
	conn, err := grpc.NewClient("passthrough:connector", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if taken.Swap(true) {
				return nil, errors.New("its socket pair is closed")
			}
			return calls, nil
		}))
	if err != nil {
		p.stop()
		return nil, fault.New(fault.Other, "start HSM connector", s.path, err)
	}
	return &link{conn: conn, rpc: wire.NewConnectorClient(conn), proc: p}, nil
}

// givePIN answers each byte with the PIN: its length in two bytes, then itself.
func (s *starter) givePIN(c net.Conn) {
	defer c.Close()
	for ask := make([]byte, 1); ; {
		if _, err := io.ReadFull(c, ask); err != nil {
			return
		}
		pin := s.pin.Reveal()
		out := append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(pin)), uint16(len(pin))), pin...)
		_, err := c.Write(out)
		clear(out)
		if err != nil {
			return
		}
	}
}

// stop closes the socket pair, at which the connector ends by itself, and
// kills one that does not.
func (p *process) stop() {
	_ = p.conn.Close()
	if p.work != nil {
		_ = p.work.Close()
	}
	select {
	case <-p.done:
	case <-time.After(3 * time.Second):
		p.kill()
		<-p.done
	}
}

func (p *process) kill() { _ = p.cmd.Process.Kill() } // it has ended already, else

// Pid is the process that holds the token now; 0 when it is not our child or
// is being replaced. For tests and support bundles.
func (c *Client) Pid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now == nil || c.now.proc == nil {
		return 0
	}
	return c.now.proc.cmd.Process.Pid
}

func socketPair() (net.Conn, *os.File, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	c, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	return c, theirs, nil
}

// socketPairs makes n of them: our ends, and those for a child.
func socketPairs(n int) (ours []net.Conn, theirs []*os.File, err error) {
	for range n {
		c, f, err := socketPair()
		if err != nil {
			closeAll(ours)
			closeAll(theirs)
			return nil, nil, err
		}
		ours, theirs = append(ours, c), append(theirs, f)
	}
	return ours, theirs, nil
}

func closeAll[C io.Closer](all []C) {
	for _, c := range all {
		_ = c.Close()
	}
}
