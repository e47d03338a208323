package testkit

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Pty drives a program on a pseudo-terminal, as a person at a screen does:
// it reads what is shown, types, and answers where the cursor is.
type Pty struct {
	tb     testing.TB
	cmd    *exec.Cmd
	master *os.File
	ended  chan struct{}

	mu    sync.Mutex
	more  *sync.Cond
	shown []byte // since the start, without escape sequences
	seen  int    // where the last Expect ended
}

const ptyPatience = 30 * time.Second

// StartPty starts cmd with a new controlling terminal. Its standard streams
// stay what cmd says; those that cmd leaves open are the terminal.
func StartPty(tb testing.TB, cmd *exec.Cmd) *Pty {
	tb.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		tb.Fatal(err)
	}
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		tb.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		tb.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer slave.Close()
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 200}); err != nil {
		tb.Fatal(err)
	}
	if cmd.Stdin == nil {
		cmd.Stdin = slave
	}
	if cmd.Stdout == nil {
		cmd.Stdout = slave
	}
	if cmd.Stderr == nil {
		cmd.Stderr = slave
	}
	cmd.ExtraFiles = []*os.File{slave}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 3}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	p := &Pty{tb: tb, cmd: cmd, master: master, ended: make(chan struct{})}
	p.more = sync.NewCond(&p.mu)
	go p.read()
	tb.Cleanup(func() {
		_ = cmd.Process.Kill() // it has ended already, if the test was kind
		<-p.ended
		_ = master.Close() // nothing of it is kept
	})
	return p
}

var (
	escape = regexp.MustCompile("\x1b(\\[[0-9;?]*[A-Za-z]|[78])")
	where  = []byte("\x1b[6n")
	corner = []byte("\x1b[999;999f")
)

func (p *Pty) read() {
	defer close(p.ended)
	b := make([]byte, 4096)
	atCorner := false
	for {
		n, err := p.master.Read(b)
		if err != nil { // EIO: the program has closed the terminal
			p.mu.Lock()
			p.shown = append(p.shown, "\n[ended]\n"...)
			p.more.Broadcast()
			p.mu.Unlock()
			return
		}
		for range bytes.Count(b[:n], where) {
			at := "\x1b[5;1R"
			if atCorner = bytes.Contains(b[:n], corner) || atCorner; atCorner {
				at, atCorner = "\x1b[24;200R", false
			}
			_, _ = p.master.WriteString(at) // the reads above see the end
		}
		p.mu.Lock()
		p.shown = append(p.shown, escape.ReplaceAll(b[:n], nil)...)
		p.more.Broadcast()
		p.mu.Unlock()
	}
}

// Expect waits until text is shown after what the last Expect saw.
func (p *Pty) Expect(text string) {
	p.tb.Helper()
	late := time.AfterFunc(ptyPatience, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.more.Broadcast()
	})
	defer late.Stop()
	deadline := time.Now().Add(ptyPatience)
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if i := bytes.Index(p.shown[p.seen:], []byte(text)); i >= 0 {
			p.seen += i + len(text)
			return
		}
		if bytes.HasSuffix(p.shown, []byte("\n[ended]\n")) || !time.Now().Before(deadline) {
			p.tb.Fatalf("never shown: %q; on the screen:\n%s", text, p.shown[p.seen:])
		}
		p.more.Wait()
	}
}

// Type types text.
func (p *Pty) Type(text string) {
	p.tb.Helper()
	if _, err := p.master.WriteString(text); err != nil {
		p.tb.Fatal(err)
	}
}

// Answer expects a question, then types the answer and Enter.
func (p *Pty) Answer(question, answer string) {
	p.tb.Helper()
	p.Expect(question)
	p.Type(answer + "\r")
}

// Wait waits for the end and gives the exit code.
func (p *Pty) Wait() int {
	p.tb.Helper()
	<-p.ended
	_ = p.cmd.Wait() // the code says it
	return p.cmd.ProcessState.ExitCode()
}

// Screen is everything that was shown.
func (p *Pty) Screen() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.ReplaceAll(string(p.shown), "\r", "")
}
