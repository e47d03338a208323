// Package fault is the one error type of kmsctl: what failed, on which object,
// why, and what the person can do next. It owns the kinds; the numbers of the
// exit codes live in internal/cli, the HTTP statuses in internal/server.
package fault

import (
	"errors"
	"fmt"
	"slices"
)

// Kind says what sort of failure it was. Scripts decide by it, so a new kind
// needs a line in the README and an exit code.
type Kind int

// The kinds, in the order of their exit codes (see internal/cli).
const (
	Other       Kind = iota // no better word: a bug, a full disk
	Usage                   // wrong flag, argument or setting
	Partial                 // some objects done, some failed
	Denied                  // registry, cluster, KMS or HSM refused us
	NotFound                // the named thing does not exist
	BadContent              // verification failed
	NotReady                // a check failed, or a status is not healthy
	Unreachable             // no answer, or too late
	Conflict                // exists already, or is held by another
	Stopped                 // the person stopped it
)

var names = [...]string{"other", "usage", "partial", "denied", "not-found", "bad-content", "not-ready", "unreachable", "conflict", "stopped"}

// Kinds lists every kind, for tables that must be complete.
func Kinds() []Kind {
	all := make([]Kind, len(names))
	for i := range all {
		all[i] = Kind(i)
	}
	return all
}

// String is the kind's name as it appears in JSON.
func (k Kind) String() string {
	if k < 0 || int(k) >= len(names) {
		return names[Other]
	}
	return names[k]
}

// KindNamed is the kind of a name that String gave; Other for any other name.
func KindNamed(name string) Kind { return Kind(max(slices.Index(names[:], name), 0)) }

// Error is a failure that a person reads. Op and Object say what was tried on
// what ("push image", "reg.example/kms:1"), Err is the cause, Hint the next
// step. Reason is an API reason code of pkg/kmsapi, where there is one.
type Error struct {
	Kind   Kind
	Op     string
	Object string
	Err    error
	Hint   string
	Reason string
}

// Error prints `op "object": cause`.
func (e *Error) Error() string {
	s := e.Op
	if e.Object != "" {
		if s != "" {
			s += " "
		}
		s += fmt.Sprintf("%q", e.Object)
	}
	if e.Err != nil {
		if s != "" {
			s += ": "
		}
		s += e.Err.Error()
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// WithHint sets the next step and returns the same error.
func (e *Error) WithHint(format string, a ...any) *Error {
	e.Hint = fmt.Sprintf(format, a...)
	return e
}

// WithReason sets the API reason code and returns the same error.
func (e *Error) WithReason(code string) *Error {
	e.Reason = code
	return e
}

// New makes an error of a kind: what was tried, on what, and why it failed.
func New(k Kind, op, object string, err error) *Error {
	return &Error{Kind: k, Op: op, Object: object, Err: err}
}

// Newf is New with the cause as a format.
func Newf(k Kind, op, object, format string, a ...any) *Error {
	return New(k, op, object, fmt.Errorf(format, a...))
}

// Usagef is a wrong flag, argument or setting.
func Usagef(format string, a ...any) *Error {
	return &Error{Kind: Usage, Err: fmt.Errorf(format, a...)}
}

// KindOf finds the kind of the outermost fault in err; joined errors give the
// first one's kind. An error without a fault is Other.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Other
}

// HintOf finds the outermost hint in err, or "".
func HintOf(err error) string {
	for err != nil {
		var e *Error
		if !errors.As(err, &e) {
			return ""
		}
		if e.Hint != "" {
			return e.Hint
		}
		err = e.Err
	}
	return ""
}

// ObjectOf finds the outermost object in err, or "".
func ObjectOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		if e.Object == "" && e.Err != nil {
			return ObjectOf(e.Err)
		}
		return e.Object
	}
	return ""
}
