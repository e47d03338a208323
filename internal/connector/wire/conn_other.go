//go:build !unix

package wire

import (
	"errors"
	"net"
	"os"
	"time"
)

// Conn is there for the compiler: kms-connector runs on Linux only.
type Conn struct{ net.Conn }

var errUnix = errors.New("kms-connector runs on Linux only; reach one by its API")

// ErrNothing never comes.
var ErrNothing = os.ErrDeadlineExceeded

// NewConn fails.
func NewConn(*os.File) (*Conn, error) { return nil, errUnix }

// FromNet fails.
func FromNet(net.Conn) (*Conn, error) { return nil, errUnix }

// LookUp is never called.
func (*Conn) LookUp(time.Duration) error { return errUnix }

// Try is never called.
func (*Conn) Try([]byte) (int, error) { return 0, errUnix }
