// Package record is the form in which things lie in the store, and the proof
// that nobody but the service wrote them. The store is not trusted: a record
// carries a MAC over its own path and its body, so that it can neither be
// changed nor moved to another path (another tenant, another key). What a MAC
// cannot show is that an older, once valid record was put back.
//
// Form, version 1: one byte 0x01, 32 bytes HMAC-SHA-256, then the JSON body.
package record

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Version is the first byte of every record written today.
const Version = 1

// ErrForged means that a record was not written by this service at this path.
var ErrForged = errors.New("record is not authentic")

// ErrNewer means that a record is authentic and of a version that this program
// does not know.
var ErrNewer = errors.New("record was written by a newer kmsctl")

// ErrNotFound and ErrConflict are what a store answers.
var (
	ErrNotFound = errors.New("no such record")
	ErrConflict = errors.New("record was changed by another")
)

// EndPath is where a record says that its store comes to an end: whoever sees
// it there stops working on the store.
const EndPath = "clear/begun"

// Installation is a path that stands for the plain record of the installation,
// in a change that keeps it the Same and in no other.
const Installation = "(installation)"

// Change is one step of a transaction. Rev is the revision that the record
// must have now: 0 means it must not exist. A nil Value deletes, unless the
// record must only stay the Same while the others change.
type Change struct {
	Path  string
	Value any
	Rev   int64
	Same  bool
}

// Meta is what the store knows of a record besides its body.
type Meta struct {
	Path string
	Name string // the path's last part; who keeps it keeps no copy
	Rev  int64
}

// Raw is a record as it lies in the store, for copies of the whole.
type Raw struct {
	Path  string
	Value []byte
	Rev   int64
}

// Swap is what a restore does to a record: it writes Value, or removes it when
// Value is nil. Before is what is there, nil when nothing is.
type Swap struct {
	Path          string
	Value, Before []byte
}

// RestoreMark lies in a store while a restore is under way, in the place of
// the installation's record: without that, nobody opens the store or writes
// into it.
type RestoreMark struct {
	Backup  string          `json:"backup"` // which one
	Run     string          `json:"run"`    // of a command: one that takes over stops the one before
	Revive  bool            `json:"revive"`
	Undo    bool            `json:"undo,omitempty"`    // it is being undone
	Install json.RawMessage `json:"install,omitempty"` // the installation's record before; absent: there was none
}

// Restored is what a restore leaves in the store when it is finished, for the
// audit log: whoever opens the store next writes it there.
type Restored struct {
	At       time.Time `json:"at"`
	By       string    `json:"by"`
	Backup   string    `json:"backup"`   // which one
	Made     time.Time `json:"made"`     // when the backup was made
	Revision int64     `json:"revision"` // of the store that it is a copy of
	Written  int       `json:"written"`
	Kept     int       `json:"kept"` // newer in the store than in the backup
	LeftOut  int       `json:"leftOut"`
	Revived  []string  `json:"revived"` // what had been removed since, by path
	More     int       `json:"more"`    // of those, beyond MaxRevived
	Replaced string    `json:"replaced,omitempty"`
}

// RestoredDir is where it lies; MaxRevived bounds it to what one record may be.
const (
	RestoredDir = "restored/"
	MaxRevived  = 2000
)

// Codec authenticates records under one key. Safe for concurrent use.
type Codec struct{ key [32]byte }

// NewCodec takes a 32-byte key that is rooted in the HSM.
func NewCodec(key []byte) (*Codec, error) {
	if len(key) != 32 {
		return nil, fmt.Errorf("record key has %d bytes, want 32", len(key))
	}
	c := &Codec{}
	copy(c.key[:], key)
	return c, nil
}

// Encode writes v as a record for path.
func (c *Codec) Encode(path string, v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode record %q: %w", path, err)
	}
	return c.seal(Version, path, body), nil
}

func (c *Codec) seal(version byte, path string, body []byte) []byte {
	out := make([]byte, 0, 33+len(body))
	out = append(out, version)
	out = append(out, c.mac(version, path, body)...)
	return append(out, body...)
}

// Decode checks b as the record of path and reads it into v.
func (c *Codec) Decode(path string, b []byte, v any) error {
	if err := c.Check(path, b); err != nil {
		return fmt.Errorf("record %q: %w", path, err)
	}
	if err := json.Unmarshal(b[33:], v); err != nil {
		return fmt.Errorf("record %q: %w", path, err)
	}
	return nil
}

// Check says whether b is a record that this service wrote at path. One that is
// too short, or whose MAC does not fit, is ErrForged; the MAC covers the
// version, so that nobody can pass one for another's.
func (c *Codec) Check(path string, b []byte) error {
	switch {
	case len(b) < 33 || !hmac.Equal(b[1:33], c.mac(b[0], path, b[33:])):
		return ErrForged
	case b[0] != Version:
		return ErrNewer
	}
	return nil
}

// Body is the JSON of an encoded record, unproven; nil when b is none.
func Body(b []byte) []byte {
	if len(b) < 33 || b[0] != Version {
		return nil
	}
	return b[33:]
}

// mac binds the version, the path with its length, and the body, so that no
// two different records give the same input.
func (c *Codec) mac(version byte, path string, body []byte) []byte {
	m := hmac.New(sha256.New, c.key[:])
	m.Write([]byte("kmsctl record\x00"))
	m.Write([]byte{version})
	m.Write(binary.BigEndian.AppendUint32(nil, uint32(len(path))))
	m.Write([]byte(path))
	m.Write(body)
	return m.Sum(nil)
}
