// Package backup copies the KMS's data out of its store and back, record by
// record. A copy is taken at one revision of the store, and every record in
// it keeps its proof of origin, so that a copy holds nothing that the service
// did not write; the last line proves that nothing was left out. Who encrypts
// the copy (internal/seal) and where it lies is the caller's affair.
//
// A copy is lines of JSON: a Header, one record a line, and an end with the
// number of records, what the copy lacks, and a seal over every line before.
package backup

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
)

// Format and Version head every copy.
const (
	Format  = "kmsctl-backup"
	Version = 1
)

// Folders of the store that a copy treats in its own way.
const (
	keysDir  = "keys/"
	auditDir = "audit/" // heads of log files that are not in the copy
	sealPath = "backup" // where the seal of a copy would lie; never stored
)

// Header is the first line.
type Header struct {
	Format    string          `json:"format"`
	Version   int             `json:"version"`
	CreatedAt time.Time       `json:"createdAt"`
	Revision  int64           `json:"revision"` // of the store
	Install   json.RawMessage `json:"install"`  // the installation's plain record: its secrets open in its HSM alone
}

// Summary says what a copy holds and what it lacks.
type Summary struct {
	Records   int      `json:"records"`
	Keys      int      `json:"keys"`
	Instances int      `json:"instances"`
	Lacks     []string `json:"lacks"`
}

// end is the last line: a record of sealed.
type end struct {
	Seal []byte `json:"seal"`
}

// sealed is what the service vouches for: the digest of every line before,
// and what they hold.
type sealed struct {
	SHA256 string `json:"sha256"`
	Summary
}

// row is one line: exactly one of its parts is there.
type row struct {
	Header *Header     `json:"header,omitempty"`
	Record *record.Raw `json:"record,omitempty"`
	End    *end        `json:"end,omitempty"`
}

// Source is a store that gives all its records at one revision.
type Source interface {
	Dump(ctx context.Context, begin func(rev int64) error, each func(record.Raw) error) error
}

// Encoder proves where a copy comes from; record.Codec is one.
type Encoder interface {
	Encode(path string, v any) ([]byte, error)
}

// Write copies src to w. head's revision is filled in.
func Write(ctx context.Context, w io.Writer, src Source, enc Encoder, head Header) (Summary, error) {
	bw := bufio.NewWriterSize(w, 64<<10)
	out := writer{sum: sha256.New(), w: bw}
	count := counter{}
	err := src.Dump(ctx, func(rev int64) error {
		head.Format, head.Version, head.Revision = Format, Version, rev
		return out.put(row{Header: &head})
	}, func(r record.Raw) error {
		if strings.HasPrefix(r.Path, auditDir) || strings.HasPrefix(r.Path, record.RestoredDir) { // for this store's own log
			return nil
		}
		count.add(r)
		return out.put(row{Record: &r})
	})
	if err != nil {
		return Summary{}, err
	}
	s := count.summary()
	seal, err := enc.Encode(sealPath, sealed{hex.EncodeToString(out.sum.Sum(nil)), s})
	if err != nil {
		return s, err
	}
	return s, errors.Join(out.put(row{End: &end{seal}}), bw.Flush())
}

type writer struct {
	sum hash.Hash
	w   io.Writer
}

func (o *writer) put(r row) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	o.sum.Write(b)
	_, err = o.w.Write(b)
	return err
}

// counter makes a Summary of the records it sees.
type counter struct {
	s     Summary
	token []string // keys that live in the token alone
}

func (c *counter) add(r record.Raw) {
	c.s.Records++
	switch {
	case strings.HasPrefix(r.Path, "instances/"):
		c.s.Instances++
	case strings.HasPrefix(r.Path, keysDir):
		c.s.Keys++
		if inToken(r) {
			c.token = append(c.token, strings.TrimPrefix(r.Path, keysDir))
		}
	}
}

func (c *counter) summary() Summary {
	c.s.Lacks = []string{
		"the HSM's master keys, without which no copy opens: back the token up by its vendor's means (SoftHSM: the folder softhsm of the data folder)",
		"the audit log's files and their heads",
		"TLS certificates and keys, and the two files of `kmsctl render`",
	}
	for _, k := range c.token {
		c.s.Lacks = append(c.s.Lacks, "the material of key "+k+": it was placed in the token")
	}
	return c.s
}

// keyView is what a copy must understand of a key's record.
type keyView struct {
	State   int `json:"state"`
	Version struct {
		Blob []byte `json:"blob"`
	} `json:"version"`
}

func view(r record.Raw) (k keyView, ok bool) {
	return k, strings.HasPrefix(r.Path, keysDir) && json.Unmarshal(record.Body(r.Value), &k) == nil
}

const stateDestroyed = 5

// inToken says whether a key's material is not in its record, although it was
// not destroyed: it stays in the token.
func inToken(r record.Raw) bool {
	k, ok := view(r)
	return ok && k.State != stateDestroyed && hsm.InToken(k.Version.Blob)
}

// Decoder checks a record's proof of origin; record.Codec is one.
type Decoder interface {
	Decode(path string, b []byte, v any) error
}

// Reader reads a copy from its begin to its end.
type Reader struct {
	Header Header
	id     string // of the copy
	r      *bufio.Reader
	sum    hash.Hash
	line   int
}

// maxLine bounds a line: a record of etcd's largest size, in base64.
const maxLine = 8 << 20

// NewReader reads the header.
func NewReader(r io.Reader) (*Reader, error) {
	o := &Reader{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	first, _, err := o.next()
	if err != nil {
		return nil, err
	}
	if first.Header == nil || first.Header.Format != Format {
		return nil, broken("it does not begin as a backup does")
	}
	if first.Header.Version != Version {
		return nil, fault.Newf(fault.BadContent, "read backup", "", "its version is %d, this program reads %d", first.Header.Version, Version).WithHint("use the kmsctl that wrote it")
	}
	// The header names the store, its revision and the time, and the copy's
	// seal covers it.
	o.Header, o.id = *first.Header, hex.EncodeToString(o.sum.Sum(nil))
	return o, nil
}

func broken(format string, a ...any) error {
	return fault.Newf(fault.BadContent, "read backup", "", format, a...).WithHint("the file is cut off, damaged, or no backup: use another copy")
}

// next gives a line's content, and the digest of the lines before it.
func (o *Reader) next() (row, []byte, error) {
	before := o.sum.Sum(nil)
	o.line++
	var b []byte
	for {
		part, err := o.r.ReadSlice('\n')
		b = append(b, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			if errors.Is(err, io.EOF) {
				err = errors.New("the end is missing")
			}
			return row{}, nil, broken("line %d: %v", o.line, err)
		}
		if len(b) > maxLine {
			return row{}, nil, broken("line %d is too long", o.line)
		}
	}
	o.sum.Write(b)
	var r row
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return row{}, nil, broken("line %d: %v", o.line, err)
	}
	// The end is not covered by its own digest: it has one spelling.
	if r.End != nil {
		if again, err := json.Marshal(r); err != nil || !bytes.Equal(append(again, '\n'), b) {
			return row{}, nil, broken("line %d is not in the form that is written", o.line)
		}
	}
	return r, before, nil
}

// Each calls f for every record, and then checks that all were there. dec
// checks each record's origin and the copy's seal; without it, only what
// needs no HSM is checked: form, digest and number.
func (o *Reader) Each(dec Decoder, f func(record.Raw) error) (Summary, error) {
	count := counter{}
	for {
		r, before, err := o.next()
		if err != nil {
			return Summary{}, err
		}
		switch {
		case r.End != nil:
			return o.end(dec, r.End, before, count.summary())
		case r.Record == nil:
			return Summary{}, broken("line %d is neither a record nor the end", o.line)
		}
		if dec != nil {
			var body json.RawMessage
			if err := dec.Decode(r.Record.Path, r.Record.Value, &body); err != nil {
				return Summary{}, fault.New(fault.BadContent, "read backup, record", r.Record.Path, err).WithHint("somebody changed the backup, or its HSM is another one; nothing was written")
			}
		}
		count.add(*r.Record)
		if err := f(*r.Record); err != nil {
			return Summary{}, err
		}
	}
}

func (o *Reader) end(dec Decoder, e *end, digest []byte, seen Summary) (Summary, error) {
	var s sealed
	if dec != nil {
		if err := dec.Decode(sealPath, e.Seal, &s); err != nil {
			return s.Summary, broken("its seal: %v", err)
		}
	} else if err := json.Unmarshal(record.Body(e.Seal), &s); err != nil {
		return s.Summary, broken("its seal: %v", err)
	}
	if s.SHA256 != hex.EncodeToString(digest) {
		return s.Summary, broken("its content is not what was sealed")
	}
	if seen.Records != s.Records || seen.Keys != s.Keys || seen.Instances != s.Instances {
		return s.Summary, broken("it holds %d records, and its end says %d", seen.Records, s.Records)
	}
	if _, err := o.r.ReadByte(); !errors.Is(err, io.EOF) {
		return s.Summary, broken("something follows its end")
	}
	return s.Summary, nil
}

// Check reads a whole copy and says what is in it, as far as that can be
// known without its HSM.
func Check(r io.Reader) (Header, Summary, error) {
	o, err := NewReader(r)
	if err != nil {
		return Header{}, Summary{}, err
	}
	s, err := o.Each(nil, func(record.Raw) error { return nil })
	return o.Header, s, err
}

// installOf reads an installation's record as far as a restore needs it.
func installOf(raw json.RawMessage) (id, serial string, err error) {
	var in struct{ ID, Serial string }
	if err := json.Unmarshal(raw, &in); err != nil || in.ID == "" {
		return "", "", fmt.Errorf("read the installation's record: %w", errors.Join(err, errors.New("it has no id")))
	}
	return in.ID, in.Serial, nil
}
