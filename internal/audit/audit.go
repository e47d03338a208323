// Package audit is the log of who did what to which key, in a form that
// cannot be changed quietly: every line names the hash of the line before it,
// and the head of the chain is signed by a key in the HSM and kept in the
// store as well.
//
// A line is one JSON object. Kinds: "open" begins a process's part and names
// the public key, "event" is a call, "head" signs everything before it,
// "recovery" says that a torn last line was closed.
package audit

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Names of the files in the log's folder.
const (
	FileName = "audit.log"
	KeyName  = "public-key.pem"
)

// Event is what happened. No field ever holds a secret.
type Event struct {
	Action        string `json:"action"`  // as in kms.secrets.wrap
	Outcome       string `json:"outcome"` // success or failure
	Status        int    `json:"status"`  // HTTP status of the reply
	Principal     string `json:"principal"`
	Instance      string `json:"instance,omitempty"`
	Key           string `json:"key,omitempty"`
	CorrelationID string `json:"correlationId,omitempty"`
	Remote        string `json:"remote,omitempty"`
	Detail        string `json:"detail,omitempty"` // reason code of a failure
}

// Head is the last signed state of a chain.
type Head struct {
	Chain     string `json:"chain"`
	Seq       uint64 `json:"seq"`  // of the line that carries the signature
	Prev      string `json:"prev"` // hash of the line before it
	Signature []byte `json:"signature"`
}

// line is one line of the log.
type line struct {
	Seq       uint64    `json:"seq"`
	Time      time.Time `json:"time"`
	Chain     string    `json:"chain"`
	Prev      string    `json:"prev"` // hex SHA-256 of the line before, without its line break
	Kind      string    `json:"kind"`
	Event     *Event    `json:"event,omitempty"`
	PublicKey []byte    `json:"publicKey,omitempty"` // PKIX DER
	Signature []byte    `json:"signature,omitempty"` // ECDSA-P256-SHA-256 in ASN.1 DER, or RSA PKCS #1 v1.5 with SHA-256
	Torn      int       `json:"torn,omitempty"`      // bytes of the torn line that was closed
}

// Config of a Log. Sign signs with the HSM's key of which PublicKey is the
// PKIX DER. SaveHead, when given, keeps each signed head elsewhere too.
type Config struct {
	Sign      func(ctx context.Context, message []byte) ([]byte, error)
	PublicKey []byte
	SaveHead  func(ctx context.Context, h Head) error
	Now       func() time.Time
}

// signEvery is how often the head is signed while events flow.
const signEvery = time.Second

// Log writes one chain. Safe for concurrent use.
type Log struct {
	cfg   Config
	chain string
	file  *os.File

	mu      sync.Mutex
	pending []*request
	seq     uint64
	prev    string
	signed  uint64 // seq of the last signed head
	broken  error

	wake   chan struct{}
	stop   chan struct{}
	done   chan struct{}
	closed bool
}

type request struct {
	event Event
	done  chan error
}

// Open continues the log in dir, or begins it. A torn last line, which a
// crash leaves, is closed by a recovery line; what stands before it must be
// whole, else fault.BadContent.
func Open(dir string, cfg Config) (*Log, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.New(fault.Other, "make folder", dir, err)
	}
	path := filepath.Join(dir, FileName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fault.New(fault.Other, "open audit log", path, err)
	}
	l, err := begin(f, cfg)
	if err != nil {
		f.Close()
		return nil, err
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: cfg.PublicKey})
	if err := os.WriteFile(filepath.Join(dir, KeyName), block, 0o644); err != nil {
		f.Close()
		return nil, fault.New(fault.Other, "write", filepath.Join(dir, KeyName), err)
	}
	go l.run()
	return l, nil
}

func begin(f *os.File, cfg Config) (*Log, error) {
	end, torn, err := tail(f)
	if err != nil {
		return nil, fault.New(fault.BadContent, "read audit log", f.Name(), err).WithHint("see `kmsctl audit verify`; move the file away to begin a new one, and keep it")
	}
	id := make([]byte, 8)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	l := &Log{cfg: cfg, chain: hex.EncodeToString(id), file: f, seq: end.seq, prev: end.hash,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	var b bytes.Buffer
	switch {
	case torn > 0:
		b.WriteByte('\n') // the torn bytes become a line of their own, which the next one counts
		l.add(&b, line{Kind: "recovery", Torn: torn})
	case torn < 0:
		b.WriteByte('\n') // only the line break was lost
	}
	l.add(&b, line{Kind: "open", PublicKey: cfg.PublicKey})
	if err := l.write(&b); err != nil {
		return nil, err
	}
	return l, l.signHead(context.Background())
}

type endpoint struct {
	seq  uint64
	hash string
}

// tail finds the last whole line and the length of a torn one after it; -1
// when nothing but the last line break is missing.
func tail(r io.ReadSeeker) (endpoint, int, error) {
	var end endpoint
	size, err := r.Seek(0, io.SeekEnd)
	if err != nil || size == 0 {
		return end, 0, err
	}
	b := make([]byte, min(size, 1<<20))
	if _, err := r.Seek(size-int64(len(b)), io.SeekStart); err != nil {
		return end, 0, err
	}
	if _, err := io.ReadFull(r, b); err != nil {
		return end, 0, err
	}
	last := bytes.LastIndexByte(b, '\n')
	torn := len(b) - last - 1
	var whole line
	if torn > 0 && json.Unmarshal(b[last+1:], &whole) == nil {
		return endpoint{whole.Seq, hashOf(b[last+1:])}, -1, nil
	}
	if last < 0 {
		return end, torn, nil // the very first line is torn
	}
	text := b[:last]
	text = text[bytes.LastIndexByte(text, '\n')+1:]
	if err := json.Unmarshal(text, &whole); err != nil {
		return end, 0, fmt.Errorf("last line: %w", err)
	}
	return endpoint{whole.Seq, hashOf(text)}, torn, nil
}

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// add appends ln to b as the chain's next line. The lock is held, or the log
// is not shared yet.
func (l *Log) add(b *bytes.Buffer, ln line) {
	ln.Seq, ln.Time, ln.Chain, ln.Prev = l.seq+1, l.cfg.Now().UTC(), l.chain, l.prev
	l.append(b, ln)
}

func (l *Log) append(b *bytes.Buffer, ln line) {
	text, err := json.Marshal(ln)
	if err != nil {
		panic(err) // strings, numbers and bytes always marshal
	}
	l.seq, l.prev = ln.Seq, hashOf(text)
	b.Write(text)
	b.WriteByte('\n')
}

func (l *Log) write(b *bytes.Buffer) error {
	if _, err := l.file.Write(b.Bytes()); err != nil {
		return fault.New(fault.Other, "write audit log", l.file.Name(), err)
	}
	if err := l.file.Sync(); err != nil {
		return fault.New(fault.Other, "sync audit log", l.file.Name(), err)
	}
	return nil
}

// Append writes e and returns when it is on disk. Calls that come together
// share one fsync. After a failed write every call fails: a chain with a hole
// is none.
func (l *Log) Append(ctx context.Context, e Event) error {
	r := &request{event: e, done: make(chan error, 1)}
	l.mu.Lock()
	if l.closed || l.broken != nil {
		err := l.broken
		l.mu.Unlock()
		if err == nil {
			err = errors.New("audit log is closed")
		}
		return err
	}
	l.pending = append(l.pending, r)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run is the only writer.
func (l *Log) run() {
	defer close(l.done)
	tick := time.NewTicker(signEvery)
	defer tick.Stop()
	for {
		select {
		case <-l.wake:
			l.flush()
		case <-tick.C:
			_ = l.signHead(context.Background()) // tried again at the next tick; Verify reports how far signatures reach
		case <-l.stop:
			l.flush()
			return
		}
	}
}

func (l *Log) flush() {
	l.mu.Lock()
	batch := l.pending
	l.pending = nil
	if len(batch) == 0 {
		l.mu.Unlock()
		return
	}
	var b bytes.Buffer
	for _, r := range batch {
		l.add(&b, line{Kind: "event", Event: &r.event})
	}
	l.mu.Unlock()
	err := l.write(&b)
	if err != nil {
		l.mu.Lock()
		l.broken = err
		l.mu.Unlock()
	}
	for _, r := range batch {
		r.done <- err
	}
}

// headMessage is what a signature covers: the signing line itself without its
// signature, and so, by the hash in it, everything before.
func headMessage(ln line) []byte {
	ln.Signature = nil
	text, err := json.Marshal(ln)
	if err != nil {
		panic(err) // strings, numbers and bytes always marshal
	}
	return append([]byte("kmsctl audit head\x00"), text...)
}

// signHead writes a head line when there is anything new. Only run and begin
// and Close call it, so that nothing is written between signing and writing.
func (l *Log) signHead(ctx context.Context) error {
	l.mu.Lock()
	head := line{Seq: l.seq + 1, Time: l.cfg.Now().UTC(), Chain: l.chain, Prev: l.prev, Kind: "head"}
	fresh := l.seq != l.signed
	l.mu.Unlock()
	if !fresh {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	sig, err := l.cfg.Sign(ctx, headMessage(head))
	if err != nil {
		return fmt.Errorf("sign the audit log's head: %w", err)
	}
	var b bytes.Buffer
	l.mu.Lock()
	head.Signature = sig
	l.append(&b, head)
	l.signed = l.seq
	l.mu.Unlock()
	if err := l.write(&b); err != nil {
		return err
	}
	if l.cfg.SaveHead == nil {
		return nil
	}
	return l.cfg.SaveHead(ctx, Head{l.chain, head.Seq, head.Prev, sig})
}

// Close writes what is pending, signs the head and closes the file.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	close(l.stop)
	<-l.done
	return errors.Join(l.signHead(context.Background()), l.file.Close())
}
