// Package secret holds values that must not be printed: PINs, passwords, API
// keys, key material. Whatever prints, marshals or logs a Value shows REDACTED.
package secret

import (
	"crypto/subtle"
	"fmt"
	"log/slog"
)

const redacted = "REDACTED"

// Value is a secret byte string. The zero Value is empty. Copies share their
// bytes, so Zero clears all of them. Not safe for use during Zero.
type Value struct{ b []byte }

// New takes b over: the caller must not use b afterwards.
func New(b []byte) Value { return Value{b} }

// Reveal gives the bytes themselves, not a copy; they die with Zero.
func (v Value) Reveal() []byte { return v.b }

// Empty says whether there is nothing.
func (v Value) Empty() bool { return len(v.b) == 0 }

// Equal compares in constant time.
func (v Value) Equal(o Value) bool { return subtle.ConstantTimeCompare(v.b, o.b) == 1 }

// Zero overwrites the bytes.
func (v Value) Zero() { clear(v.b) }

// String is REDACTED.
func (Value) String() string { return redacted }

// GoString is REDACTED.
func (Value) GoString() string { return redacted }

// Format prints REDACTED whatever the verb.
func (Value) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// MarshalJSON is "REDACTED".
func (Value) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText is REDACTED.
func (Value) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue is REDACTED.
func (Value) LogValue() slog.Value { return slog.StringValue(redacted) }
