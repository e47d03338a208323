// Package ask puts questions to the person at the terminal. It opens the
// terminal itself, so that standard input and output stay free for data, and
// says so when there is none. The prompt library lives here alone.
package ask

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/AlecAivazis/survey/v2"
	"github.com/AlecAivazis/survey/v2/terminal"
	"golang.org/x/term"

	"github.com/kmsctl/kmsctl/internal/pattern"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// ErrNoTerminal says that there is nobody to ask.
var ErrNoTerminal = errors.New("there is no terminal to ask on")

// ErrStopped says that the person pressed Ctrl-C or Ctrl-D, or that a signal
// asks us to end.
var ErrStopped = errors.New("stopped at a question")

// ErrBack says that the person wants the question before this one.
var ErrBack = errors.New("back to the question before")

// Back is what a person types, or chooses, to go back. No HSM takes a
// password of one character, so it works at a password as well.
const Back = "<"

const backOption = Back + " back"

// Question is one question.
type Question struct {
	Title   string
	Help    string             // shown on ?
	Default string             // taken on Enter
	Options []string           // one of these; none: a free text
	Back    bool               // there is a question before this one
	Check   func(string) error // asks again until it is content; nil takes everything
}

// Terminal asks on the controlling terminal. Close it. Not safe for
// concurrent use.
type Terminal struct {
	tty  *os.File
	in   *keys
	dumb bool // no cursor movement: a serial console, a screen reader
}

// Open opens the controlling terminal; ErrNoTerminal when there is none.
func Open() (*Terminal, error) {
	f, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, ErrNoTerminal
	}
	if !term.IsTerminal(int(f.Fd())) {
		_ = f.Close() // nothing was written
		return nil, ErrNoTerminal
	}
	in := &keys{File: f, stop: make(chan os.Signal, 1)}
	signal.Notify(in.stop, os.Interrupt, syscall.SIGTERM)
	return &Terminal{tty: f, in: in, dumb: os.Getenv("TERM") == "dumb" || os.Getenv("TERM") == ""}, nil
}

// Close gives the terminal back.
func (t *Terminal) Close() error {
	signal.Stop(t.in.stop)
	return t.tty.Close()
}

// Ask gives the answer to a question: one of its options, or a text without
// white space around it.
func (t *Terminal) Ask(q Question) (string, error) {
	for {
		answer, err := t.once(q)
		if err != nil {
			return "", err
		}
		answer = strings.TrimSpace(answer)
		if q.Back && (answer == Back || answer == backOption) {
			return "", ErrBack
		}
		if q.Check != nil {
			if err := q.Check(answer); err != nil {
				t.say("  %v", err)
				continue
			}
		}
		return answer, nil
	}
}

func (t *Terminal) once(q Question) (string, error) {
	if t.dumb {
		return t.plain(q)
	}
	var answer string
	var p survey.Prompt = &survey.Input{Message: q.Title, Help: q.help(), Default: q.Default}
	if len(q.Options) > 0 {
		s := &survey.Select{Message: q.Title, Help: q.help(), Options: q.options()}
		if slices.Contains(q.Options, q.Default) {
			s.Default = q.Default
		}
		p = s
	}
	restore, err := t.raw()
	if err != nil {
		return "", err
	}
	defer restore()
	out := crlf{t.tty}
	err = survey.AskOne(p, &answer, survey.WithStdio(t.in, out, out))
	switch {
	case errors.Is(err, terminal.InterruptErr), errors.Is(err, io.EOF):
		return "", ErrStopped
	case err != nil:
		return "", fmt.Errorf("ask %q: %w", q.Title, err)
	}
	return answer, nil
}

func (q Question) options() []string {
	if q.Back {
		return append(slices.Clone(q.Options), backOption)
	}
	return q.Options
}

func (q Question) help() string {
	if q.Back && q.Help != "" {
		return q.Help + " (" + Back + " goes back)"
	}
	return q.Help
}

// plain asks without moving the cursor: options by their name or number.
func (t *Terminal) plain(q Question) (string, error) {
	for {
		for i, o := range q.Options {
			t.say("  %d) %s", i+1, o)
		}
		title := q.Title
		if q.Default != "" {
			title += " (" + q.Default + ")"
		}
		b, err := t.line(title, true)
		answer := strings.TrimSpace(string(b))
		switch {
		case err != nil:
			return "", err
		case answer == "?" && q.Help != "":
			t.say("  %s", q.help())
			continue
		case answer == "":
			answer = q.Default
		}
		if len(q.Options) == 0 || (q.Back && answer == Back) || slices.Contains(q.Options, answer) {
			return answer, nil
		}
		for i, o := range q.Options {
			if answer == fmt.Sprint(i+1) {
				return o, nil
			}
		}
		t.say("  answer with one of the names or numbers")
	}
}

// Password asks for a secret without showing it. It is taken as typed: white
// space around it is for the check to refuse.
func (t *Terminal) Password(q Question) (secret.Value, error) {
	for {
		b, err := t.line(q.Title, false)
		switch {
		case err != nil:
			return secret.Value{}, err
		case string(b) == "?" && q.Help != "":
			t.say("  %s", q.help())
			continue
		case string(b) == Back && q.Back:
			return secret.Value{}, ErrBack
		}
		if q.Check != nil {
			if err := q.Check(string(b)); err != nil {
				clear(b)
				t.say("  %v", err)
				continue
			}
		}
		return secret.New(b), nil
	}
}

// Say prints a line on the terminal.
func (t *Terminal) Say(line string) { t.say("%s", line) }

func (t *Terminal) say(format string, a ...any) { fmt.Fprintf(t.tty, format+"\r\n", a...) }

// Keys that line handles itself.
const (
	ctrlC, ctrlD, ctrlU = 0x03, 0x04, 0x15
	backspace, del      = 0x08, 0x7f
)

// raw makes Ctrl-C a key, from before a question is shown until it is
// answered. In the terminal's own mode it would become a signal, which main
// catches, and the read would go on for ever.
func (t *Terminal) raw() (restore func(), err error) {
	fd := int(t.tty.Fd())
	before, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("read keys from the terminal: %w", err)
	}
	return func() { _ = term.Restore(fd, before) }, nil // the terminal may be gone
}

// crlf is the terminal in raw mode, where a line break does not go back to
// the margin by itself.
type crlf struct{ *os.File }

func (c crlf) Write(b []byte) (int, error) {
	_, err := c.File.Write(bytes.ReplaceAll(b, []byte("\n"), []byte("\r\n")))
	return len(b), err
}

// keys gives what was typed in pieces that end with a line, a Ctrl-C or the
// terminal's word on where the cursor is: the prompt library drops what it
// has read beyond those. A read of a terminal cannot be called off, so a
// signal, which main catches, ends it for us: the reads end, and one of the
// system's is left behind.
type keys struct {
	*os.File
	rest    []byte
	stop    chan os.Signal
	stopped bool
}

var pieceEnd = pattern.Lazy("[\r\n\x03]|\x1b\\[[0-9]+;[0-9]+R")

func (k *keys) Read(b []byte) (int, error) {
	if len(k.rest) == 0 {
		if err := k.more(); err != nil {
			return 0, err
		}
	}
	end := len(k.rest)
	if m := pieceEnd().FindIndex(k.rest); m != nil {
		end = m[1]
	}
	n := copy(b, k.rest[:end])
	clear(k.rest[:n]) // it may be a password
	k.rest = k.rest[n:]
	return n, nil
}

func (k *keys) more() error {
	if k.stopped {
		return io.EOF
	}
	chunk, came := make([]byte, 256), make(chan error, 1)
	n := 0
	go func() {
		var err error
		n, err = k.File.Read(chunk)
		came <- err
	}()
	select {
	case err := <-came:
		if err == nil {
			k.rest = chunk[:n]
		}
		return err
	case <-k.stop:
		k.stopped = true
		return io.EOF
	}
}

// line reads one line, shown or not.
func (t *Terminal) line(title string, echo bool) ([]byte, error) {
	restore, err := t.raw()
	if err != nil {
		return nil, err
	}
	defer restore()
	fmt.Fprintf(t.tty, "%s: ", title)
	defer fmt.Fprint(t.tty, "\r\n")
	got := make([]byte, 0, 1024) // grown never, so that no copy is left behind
	for b := make([]byte, 1); ; {
		if n, err := t.in.Read(b); n != 1 || err != nil {
			return nil, ErrStopped
		}
		switch c := b[0]; {
		case c == '\r' || c == '\n':
			return got, nil
		case c == ctrlC, c == ctrlD && len(got) == 0:
			clear(got)
			return nil, ErrStopped
		case c == ctrlU:
			if echo {
				fmt.Fprint(t.tty, strings.Repeat("\b \b", len(got)))
			}
			clear(got)
			got = got[:0]
		case c == backspace || c == del:
			if len(got) > 0 {
				got = got[:len(got)-1]
				if echo {
					fmt.Fprint(t.tty, "\b \b")
				}
			}
		case len(got) < cap(got):
			got = append(got, c)
			if echo {
				_, _ = t.tty.Write(b) // the next read says it if the terminal is gone
			}
		}
	}
}
