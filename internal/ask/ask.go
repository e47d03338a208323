// Package ask puts questions to the person at the terminal. It opens the
// terminal itself, so that standard input and output stay free for data, and
// says so when there is none. The prompt library lives here alone.
package ask

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/term"

	"github.com/kmsctl/kmsctl/internal/secret"
)

// ErrNoTerminal says that there is nobody to ask.
var ErrNoTerminal = errors.New("there is no terminal to ask on")

// ErrStopped says that the person pressed Ctrl-C or Ctrl-D.
var ErrStopped = errors.New("stopped at a question")

// Terminal asks on the controlling terminal. Close it.
type Terminal struct{ tty *os.File }

// Open opens the controlling terminal; ErrNoTerminal when there is none.
func Open() (*Terminal, error) {
	f, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil || !term.IsTerminal(int(f.Fd())) {
		return nil, ErrNoTerminal
	}
	return &Terminal{f}, nil
}

// Close gives the terminal back.
func (t *Terminal) Close() error { return t.tty.Close() }

// Password asks for a secret without showing it.
func (t *Terminal) Password(question string) (secret.Value, error) {
	fmt.Fprintf(t.tty, "%s: ", question)
	b, err := term.ReadPassword(int(t.tty.Fd()))
	fmt.Fprintln(t.tty)
	if err != nil {
		return secret.Value{}, ErrStopped
	}
	return secret.New(b), nil
}
