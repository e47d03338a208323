// Package audit is the log of who did what to which key, in a form that
// cannot be changed quietly: every line names the hash of the line before it,
// and the head of the chain is signed by a key in the HSM and kept in the
// store as well.
//
// A line is one JSON object. Kinds: "open" begins a process's part and names
// the public key, "event" is a call, "head" signs everything before it,
// "recovery" says that a torn last line was closed, "gap" that calls went by
// unwritten while the disk was full, "missing" that the log ended earlier than
// the store's head when it was opened.
//
// The chain goes on over files: audit.log is written, and when it is large it
// becomes audit-<number of its first line>.log. Nothing here deletes one.
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
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/file"
)

// Names of the files in the log's folder.
const (
	FileName = "audit.log"
	KeyName  = "public-key.pem"
)

// DefaultMaxBytes is the size at which a file is closed and the next begun.
const DefaultMaxBytes = 64 << 20

// Policy says what happens to calls that cannot be written down.
type Policy string

// Refuse: a call that cannot be written down is not answered, and none is
// begun while the log knows that it cannot write. GoOn: it is answered, and
// the log says later how many went by.
const (
	Refuse Policy = "refuse"
	GoOn   Policy = "go-on"
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
	Expected      bool   `json:"-"`                // see Log.Expect
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
	Lost      uint64    `json:"lost,omitempty"`      // calls that went by unwritten
	Missing   *Head     `json:"missing,omitempty"`   // what the store knew and the files had not
}

// Config of a Log. Sign signs with the HSM's key of which PublicKey is the
// PKIX DER. SaveHead, when given, keeps each signed head elsewhere too, and
// Known is the one that was kept last.
type Config struct {
	Sign      func(ctx context.Context, message []byte) ([]byte, error)
	PublicKey []byte
	SaveHead  func(ctx context.Context, h Head) error
	Known     *Head
	Now       func() time.Time
	MaxBytes  int64     // 0: DefaultMaxBytes
	WhenFull  Policy    // empty: Refuse
	Mirror    io.Writer // gets every line that was written, too
}

// signEvery is how often the head is signed while events flow, and how soon a
// log that could not write tries again.
const signEvery = time.Second

// While the HSM signs nothing is written, so it is not waited for long, and
// not asked again soon when it did not.
const (
	signMost  = 2 * time.Second
	signPause = 15 * time.Second
)

// Log writes one chain. Safe for concurrent use.
type Log struct {
	cfg   Config
	dir   string
	chain string

	writing sync.Mutex // held by the one who writes: a leader, or the ticker

	// Only who writes uses these.
	file  *os.File
	size  int64        // of file; every byte of it is on disk
	first uint64       // number of the file's first line
	lost  uint64       // calls that went by since the last line
	text  bytes.Buffer // of the batch that is written

	noSign time.Time     // the HSM is not asked before
	synced time.Duration // what writing it took

	mu      sync.Mutex
	pending []*request
	seq     uint64
	prev    string
	signed  uint64 // seq of the last signed head
	failed  error  // why the last write failed; nil when it did not

	led    bool // somebody leads
	closed bool
	busy   sync.WaitGroup // calls under way

	coming atomic.Int64  // calls that will be appended soon
	wake   chan struct{} // nobody is coming any more
	stop   chan struct{}
	done   chan struct{}

	stats Stats
}

// Stats counts what a log did since it was opened.
type Stats struct {
	Lines, Lost, Failures, Files atomic.Uint64
}

// Stats gives the log's own counters.
func (l *Log) Stats() *Stats { return &l.stats }

type request struct {
	event Event
	done  chan outcome
}

// outcome is what became of a request; or lead, when it is its turn to write
// for all that wait.
type outcome struct {
	err  error
	lead bool
}

// Open continues the log in dir, or begins it. A torn last line, which a
// crash leaves, is closed by a recovery line; what stands before it must be
// whole, else fault.BadContent.
func Open(dir string, cfg Config) (*Log, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.New(fault.Other, "make folder", dir, err)
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = DefaultMaxBytes
	}
	path := filepath.Join(dir, FileName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fault.New(fault.Other, "open audit log", path, err)
	}
	l, err := begin(dir, f, cfg)
	if err != nil {
		f.Close()
		return nil, err
	}
	if err := keepKey(filepath.Join(dir, KeyName), cfg.PublicKey); err != nil {
		f.Close()
		return nil, err
	}
	go l.run()
	return l, nil
}

// Resign lets another key of an HSM sign from now on: the log names it in its
// chain, as an opening does, behind what the key before signed.
func (l *Log) Resign(ctx context.Context, sign func(ctx context.Context, message []byte) ([]byte, error), public []byte) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if bytes.Equal(public, l.cfg.PublicKey) {
		return nil
	}
	if err := keepKey(filepath.Join(l.dir, KeyName), public); err != nil {
		return err
	}
	var b bytes.Buffer
	l.mu.Lock()
	seq, prev := l.seq, l.prev
	l.gap(&b)
	l.add(&b, line{Kind: "open", PublicKey: public})
	l.mu.Unlock()
	err := l.write(&b)
	l.settle(err, seq, prev)
	if err != nil {
		return err
	}
	l.cfg.Sign, l.cfg.PublicKey = sign, public
	return l.signHead(ctx, false)
}

// PublicKey is the key that signs now.
func (l *Log) PublicKey() []byte {
	l.writing.Lock()
	defer l.writing.Unlock()
	return l.cfg.PublicKey
}

// keepKey writes the public key beside the log, behind those that signed
// earlier parts of it.
func keepKey(path string, der []byte) error {
	have, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fault.New(fault.Other, "read", path, err)
	}
	keys, _ := ParsePublicKeys(have) // what is no key is written anew
	if n := len(keys); n > 0 && bytes.Equal(keys[n-1], der) {
		return nil
	}
	var out []byte
	for _, k := range append(keys, der) {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: k})...)
	}
	if err := file.Write(path, out, 0o644); err != nil {
		return fault.New(fault.Other, "write", path, err)
	}
	return nil
}

func begin(dir string, f *os.File, cfg Config) (*Log, error) {
	end, torn, err := lastLine(dir, f)
	if err != nil {
		return nil, fault.New(fault.BadContent, "read audit log", f.Name(), err).WithHint("see `kmsctl audit verify`; move the file away to begin a new one, and keep it")
	}
	id := make([]byte, 8)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	l := &Log{cfg: cfg, dir: dir, chain: hex.EncodeToString(id), file: f, seq: end.seq, prev: end.hash, first: end.seq + 1,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	if l.size, err = f.Seek(0, io.SeekEnd); err != nil {
		return nil, fault.New(fault.Other, "read audit log", f.Name(), err)
	}
	if n, ok := firstNumber(f); ok {
		l.first = n
	}
	var b bytes.Buffer
	switch {
	case torn > 0:
		b.WriteByte('\n') // the torn bytes become a line of their own, which the next one counts
		l.add(&b, line{Kind: "recovery", Torn: torn})
	case torn < 0:
		b.WriteByte('\n') // only the line break was lost
	}
	l.add(&b, line{Kind: "open", PublicKey: cfg.PublicKey})
	if cfg.Known != nil && cfg.Known.Seq > end.seq {
		l.add(&b, line{Kind: "missing", Missing: cfg.Known})
	}
	if err := l.write(&b); err != nil {
		return nil, err
	}
	return l, l.signHead(context.Background(), false)
}

// lastLine finds the end of the log: in f, or where f is empty in the file
// that was closed last.
func lastLine(dir string, f *os.File) (endpoint, int, error) {
	end, torn, err := tail(f)
	if err != nil || end.seq > 0 || torn != 0 {
		return end, torn, err
	}
	closed, err := closedFiles(dir)
	if err != nil || len(closed) == 0 {
		return end, 0, err
	}
	last, err := os.Open(closed[len(closed)-1])
	if err != nil {
		return end, 0, err
	}
	defer last.Close()
	end, torn, err = tail(last)
	if err == nil && torn != 0 {
		err = fmt.Errorf("%q is torn", last.Name())
	}
	return end, 0, err
}

// closedFiles lists the files that are not written any more, in their order.
func closedFiles(dir string) ([]string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "audit-*.log"))
	slices.Sort(found) // the numbers have as many digits each
	return found, err
}

// Files lists the files of the log at path in their order: of a folder every
// file of its log, else path itself.
func Files(path string) ([]string, error) {
	st, err := os.Stat(path)
	if err != nil || !st.IsDir() {
		return []string{path}, err
	}
	all, err := closedFiles(path)
	current := filepath.Join(path, FileName)
	if _, serr := os.Stat(current); serr == nil || len(all) == 0 {
		all = append(all, current)
	}
	return all, err
}

// firstNumber reads the number of a file's first line.
func firstNumber(f io.ReaderAt) (uint64, bool) {
	b := make([]byte, 64<<10)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, false
	}
	text, _, whole := bytes.Cut(b[:n], []byte{'\n'})
	var ln line
	if !whole || json.Unmarshal(text, &ln) != nil {
		return 0, false
	}
	return ln.Seq, true
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
	from := b.Len()
	if err := json.NewEncoder(b).Encode(&ln); err != nil { // with a line break
		panic(err) // strings, numbers and bytes always marshal
	}
	l.seq, l.prev = ln.Seq, hashOf(b.Bytes()[from:b.Len()-1])
}

// write puts b on disk, or leaves the file as it was.
func (l *Log) write(b *bytes.Buffer) error {
	_, err := l.file.Write(b.Bytes())
	if err == nil {
		err = l.file.Sync()
	}
	if err != nil {
		l.stats.Failures.Add(1)
		// What was half-written must not stay: a later line would follow it.
		if terr := l.file.Truncate(l.size); terr != nil {
			err = errors.Join(err, terr)
		}
		return fault.New(fault.Other, "write audit log", l.file.Name(), err).WithHint("is the disk full? The log goes on by itself when it can write again")
	}
	l.size += int64(b.Len())
	l.stats.Lines.Add(uint64(bytes.Count(b.Bytes(), []byte{'\n'})))
	if l.cfg.Mirror != nil {
		_, _ = l.cfg.Mirror.Write(b.Bytes()) // the file is the log; its copy is a convenience
	}
	return nil
}

// rotate closes a file that is large, with a signed head at its end where the
// HSM answers, and begins the next one. When it cannot, the file grows on.
func (l *Log) rotate() {
	if l.size < l.cfg.MaxBytes {
		return
	}
	_ = l.signHead(context.Background(), false) // the next head covers these lines too
	next, err := os.OpenFile(filepath.Join(l.dir, FileName+".new"), os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		l.stats.Failures.Add(1)
		return
	}
	current, closed := filepath.Join(l.dir, FileName), filepath.Join(l.dir, fmt.Sprintf("audit-%020d.log", l.first))
	if err := os.Rename(current, closed); err != nil {
		l.stats.Failures.Add(1)
		_ = errors.Join(next.Close(), os.Remove(next.Name())) // an empty file
		return
	}
	// Killed here, Open finds no audit.log and goes on from the closed file.
	if err := os.Rename(next.Name(), current); err != nil {
		l.stats.Failures.Add(1)
		_ = errors.Join(next.Close(), os.Rename(closed, current)) // the open file is written on, whatever its name
		return
	}
	_ = l.file.Close() // every byte is synced
	l.file, l.size, l.first = next, 0, l.seq+1
	l.stats.Files.Add(1)
	if d, err := os.Open(l.dir); err == nil {
		_ = d.Sync() // a lost rename is what Open expects anyway
		_ = d.Close()
	}
}

// Ready is nil when the next call can be written down, as far as is known.
func (l *Log) Ready() error {
	if l.cfg.WhenFull == GoOn {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failed
}

// Append writes e and returns when it is on disk. Calls that come together
// share one fsync: one of them writes for all, so that a call which is alone
// wakes nobody. When the disk is full, Config.WhenFull decides. What was begun
// is ended, whatever becomes of ctx.
func (l *Log) Append(ctx context.Context, e Event) error {
	if err := ctx.Err(); err != nil {
		l.arrived(e)
		return err
	}
	r := &request{event: e, done: make(chan outcome, 2)}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		l.arrived(e)
		return errors.New("audit log is closed")
	}
	l.busy.Add(1)
	defer l.busy.Done()
	l.pending = append(l.pending, r)
	lead := !l.led
	l.led = true
	l.mu.Unlock()
	l.arrived(e)
	for {
		if lead {
			l.lead()
		}
		o := <-r.done
		if !o.lead {
			return o.err
		}
		lead = true
	}
}

// lead writes what is pending, and hands the lead to a call that came
// meanwhile.
func (l *Log) lead() {
	l.gather()
	l.writing.Lock()
	l.flush()
	l.writing.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pending) == 0 {
		l.led = false
		return
	}
	l.pending[0].done <- outcome{lead: true}
}

// run signs the head, and finds out when a full disk has room again.
func (l *Log) run() {
	defer close(l.done)
	tick := time.NewTicker(signEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.mu.Lock()
			failed := l.failed != nil
			l.mu.Unlock()
			l.writing.Lock()
			if failed || time.Now().After(l.noSign) {
				_ = l.signHead(context.Background(), failed) // tried again later; Verify reports how far signatures reach
			}
			l.writing.Unlock()
		case <-l.stop:
			return
		}
	}
}

// gather waits a moment for the calls that said they would come: the first of
// them must not pay for an fsync of its own. Who is alone never waits.
func (l *Log) gather() {
	if l.coming.Load() <= 0 {
		return
	}
	late := time.NewTimer(min(max(l.synced, gatherLeast), gatherMost))
	defer late.Stop()
	for l.coming.Load() > 0 {
		select {
		case <-l.wake: // maybe for the group before this one
		case <-late.C:
			return
		}
	}
}

// A call waits for others about as long as the disk takes to write them, and
// within these bounds.
const (
	gatherLeast = 500 * time.Microsecond
	gatherMost  = time.Millisecond
)

// Expect says that n more calls are under way, or with -1 that one will not
// come. Append counts those that come, by their event's Expected.
func (l *Log) Expect(n int) { l.coming.Add(int64(n)) }

// arrived takes that back; the last one wakes the leader who gathers.
func (l *Log) arrived(e Event) {
	if e.Expected && l.coming.Add(-1) == 0 {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

func (l *Log) flush() {
	l.rotate()
	l.mu.Lock()
	batch := l.pending
	l.pending = nil
	if len(batch) == 0 {
		l.mu.Unlock()
		return
	}
	seq, prev := l.seq, l.prev
	b := &l.text
	b.Reset()
	l.gap(b)
	for _, r := range batch {
		l.add(b, line{Kind: "event", Event: &r.event})
	}
	l.mu.Unlock()
	began := time.Now()
	err := l.write(b)
	l.synced = time.Since(began)
	l.settle(err, seq, prev)
	if err != nil && l.cfg.WhenFull == GoOn {
		l.lost += uint64(len(batch))
		l.stats.Lost.Add(uint64(len(batch)))
		err = nil
	}
	for _, r := range batch {
		r.done <- outcome{err: err}
	}
}

// gap says how many calls went by unwritten. The lock is held.
func (l *Log) gap(b *bytes.Buffer) {
	if l.lost > 0 {
		l.add(b, line{Kind: "gap", Lost: l.lost})
	}
}

// settle notes a write's outcome; after a failure the chain stands where it
// stood before.
func (l *Log) settle(err error, seq uint64, prev string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = err
	if err != nil {
		l.seq, l.prev = seq, prev
		return
	}
	l.lost = 0
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

// signHead writes a head line when there is anything new, or when it must.
// Whoever calls it writes, so that nothing is written between signing and
// writing.
func (l *Log) signHead(ctx context.Context, must bool) error {
	l.mu.Lock()
	seq, prev := l.seq, l.prev
	if seq == l.signed && !must {
		l.mu.Unlock()
		return nil
	}
	var b bytes.Buffer
	l.gap(&b)
	head := line{Seq: l.seq + 1, Time: l.cfg.Now().UTC(), Chain: l.chain, Prev: l.prev, Kind: "head"}
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, signMost)
	defer cancel()
	sig, err := l.cfg.Sign(ctx, headMessage(head))
	if err != nil {
		l.noSign = time.Now().Add(signPause)
		l.mu.Lock()
		l.seq, l.prev = seq, prev
		l.mu.Unlock()
		return fmt.Errorf("sign the audit log's head: %w", err)
	}
	l.mu.Lock()
	head.Signature = sig
	l.append(&b, head)
	l.mu.Unlock()
	err = l.write(&b)
	l.settle(err, seq, prev)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.signed = l.seq
	l.mu.Unlock()
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
	l.busy.Wait()
	return errors.Join(l.signHead(context.Background(), false), l.file.Close())
}
