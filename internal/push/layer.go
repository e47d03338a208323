package push

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// chunkSize is how much of a layer is read at once; partSize how much of an
// upload whose end is not known is sent at once, and held until the registry
// has it.
const (
	chunkSize = 512 << 10
	partSize  = 5 << 20
)

// pool bounds the memory of what is read and not yet done with.
type pool struct{ free chan []byte }

func newPool(n int) *pool {
	p := &pool{free: make(chan []byte, n)}
	for range n {
		p.free <- nil
	}
	return p
}

func (p *pool) get() []byte {
	b := <-p.free
	if b == nil {
		b = make([]byte, chunkSize)
	}
	return b
}

func (p *pool) put(b []byte) { p.free <- b[:cap(b)] }

// layerJob is one layer on its way: read by the walk, worked on by a goroutine
// of its own.
type layerJob struct {
	r        *memberRun
	path     string
	size     int64
	declared string
	key      string // how it begins: what tells twins
	chunks   chan []byte
	ready    chan struct{}
	out      Layer
	missed   bool
	passed   bool // it went through as it stands
	err      error
}

// kinds of layers by their first bytes.
func mediaTypeOf(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return archive.TypeLayer
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return archive.TypeLayerZstd
	}
	return archive.TypeLayerRaw
}

// layer reads one layer and hands it to its goroutine; it returns when all is
// read, not when all is done.
func (r *memberRun) layer(path string, size int64, declared string, in io.Reader) error {
	if r.s.again && !r.wanted[r.key(path)] {
		return nil
	}
	j := &layerJob{r: r, path: path, size: size, declared: declared, chunks: make(chan []byte, 4), ready: make(chan struct{})}
	r.s.mu.Lock()
	r.s.layers[r.key(path)] = j
	r.s.mu.Unlock()
	first := r.s.pool.get()
	n, err := io.ReadFull(in, first)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		r.s.pool.put(first)
		return err
	}
	first = first[:n]
	sum := sha256.Sum256(first)
	j.key = fmt.Sprintf("%d-%s-%s", size, hex.EncodeToString(sum[:]), r.s.Compression)
	work := j.choose(mediaTypeOf(first))
	r.s.workers <- struct{}{}
	r.s.pending.Add(1)
	r.jobs.Go(func() {
		defer r.s.pending.Done()
		defer func() { <-r.s.workers }()
		defer close(j.ready)
		if j.err = work(); j.err != nil {
			r.fail(j.err)
		}
		for b := range j.chunks { // what is left when the work failed
			r.s.pool.put(b)
		}
	})
	defer close(j.chunks)
	for j.chunks <- first; n == chunkSize; {
		b := r.s.pool.get()
		if n, err = io.ReadFull(in, b); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			r.s.pool.put(b)
			return err
		}
		j.chunks <- b[:n]
	}
	return nil
}

// choose decides what is to be done with a layer, from how it begins.
func (j *layerJob) choose(mediaType string) func() error {
	s := j.r.s
	if twin := s.twins[j.key]; twin != nil && !s.again && !s.guessedWrong(j.key) {
		return func() error { return j.twin(twin) }
	}
	s.twins[j.key] = j
	switch {
	case mediaType != archive.TypeLayerRaw:
		return func() error { return j.through(mediaType) }
	case s.Compression == "none":
		return func() error { return j.through(archive.TypeLayerRaw) }
	}
	return j.compress
}

// each gives the layer's chunks to f, all of them unless f fails.
func (j *layerJob) each(f func(b []byte) error) error {
	for b := range j.chunks {
		err := f(b)
		j.r.s.pool.put(b)
		if err != nil {
			return err
		}
	}
	return nil
}

func digest(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// twin hashes a layer that begins as one before; if it is the same, nothing
// has to be compressed or sent.
func (j *layerJob) twin(first *layerJob) error {
	h := sha256.New()
	if err := j.each(func(b []byte) error { h.Write(b); return nil }); err != nil {
		return err
	}
	<-first.ready
	if first.err != nil {
		return first.err
	}
	if first.missed || digest(h) != first.raw() {
		j.wrong()
		return nil
	}
	return j.reuse(first.out)
}

// raw is the digest of the layer's bytes as they stand in the archive.
func (j *layerJob) raw() string {
	if j.passed {
		return j.out.Digest
	}
	return j.out.DiffID
}

// miss leaves a layer to the next pass.
func (j *layerJob) miss() {
	j.missed = true
	j.r.s.mu.Lock()
	defer j.r.s.mu.Unlock()
	j.r.s.missed[j.r.key(j.path)] = true
}

// wrong leaves a layer that is not what its beginning promised to the next pass.
// Of a stream there is none: the next run is told to guess nothing of it.
func (j *layerJob) wrong() {
	j.miss()
	if s := j.r.s; s.Known != nil && !s.Archive.Seekable() {
		s.Known.Save(j.key, Layer{})
	}
}

// guessedWrong says whether an earlier run was wrong about a layer that begins so.
func (s *stream) guessedWrong(key string) bool {
	if s.Known == nil {
		return false
	}
	l, ok := s.Known.Load(key)
	return ok && l.Digest == ""
}

// reuse takes a layer that is in the registry already.
func (j *layerJob) reuse(l Layer) error {
	b := j.r.s.state(l.Digest)
	b.mu.Lock()
	defer b.mu.Unlock()
	ok, err := j.r.s.have(j.r.s.ctx, b, j.r.repo, l.Digest)
	if err != nil {
		return err
	}
	if !ok {
		j.wrong()
		return nil
	}
	j.out = l
	return nil
}

var gzipWriters = sync.Pool{New: func() any {
	w, err := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	if err != nil {
		panic(err) // the level is a constant
	}
	return w
}}

// compress hashes and compresses a raw layer and sends it, all in one go. What
// an earlier run made of a layer that begins so is asked for first.
func (j *layerJob) compress() error {
	if known, ok := j.known(); ok {
		return j.recall(known)
	}
	raw := sha256.New()
	sink := j.newSink()
	var z io.WriteCloser
	j.out.MediaType = archive.TypeLayer
	if j.r.s.Compression == "zstd" {
		j.out.MediaType = archive.TypeLayerZstd
		e, err := zstd.NewWriter(sink, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
		if err != nil {
			return err
		}
		z = e
	} else {
		g := gzipWriters.Get().(*gzip.Writer) // the pool holds nothing else
		defer gzipWriters.Put(g)
		g.Reset(sink)
		z = g
	}
	err := j.each(func(b []byte) error {
		raw.Write(b)
		_, err := z.Write(b)
		return err
	})
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		return j.broke(sink, err)
	}
	j.out.DiffID = digest(raw)
	if err := sink.finish(&j.out); err != nil {
		return j.broke(sink, err)
	}
	if j.r.s.Known != nil && !j.r.s.guessedWrong(j.key) {
		j.r.s.Known.Save(j.key, j.out)
	}
	return nil
}

// broke gives an upload up. One that the registry lost is tried once more in
// the next pass.
func (j *layerJob) broke(s *sink, err error) error {
	s.cancel()
	if errors.Is(err, ErrLost) {
		j.miss()
		return nil
	}
	return err
}

// known is what an earlier run made of a layer that begins so, when the
// registry still has it.
func (j *layerJob) known() (Layer, bool) {
	if j.r.s.Known == nil || j.r.s.again {
		return Layer{}, false
	}
	l, ok := j.r.s.Known.Load(j.key)
	if !ok || l.Digest == "" {
		return Layer{}, false
	}
	b := j.r.s.state(l.Digest)
	b.mu.Lock()
	defer b.mu.Unlock()
	has, err := j.r.s.have(j.r.s.ctx, b, j.r.repo, l.Digest)
	return l, err == nil && has
}

// recall hashes a layer that should be one of an earlier run.
func (j *layerJob) recall(l Layer) error {
	h := sha256.New()
	if err := j.each(func(b []byte) error { h.Write(b); return nil }); err != nil {
		return err
	}
	if digest(h) != l.DiffID {
		j.wrong()
		return nil
	}
	j.out = l
	return nil
}

// through sends a layer as it stands. One whose name does not promise its
// digest is unpacked on the way, so that its diff ID is known.
func (j *layerJob) through(mediaType string) error {
	j.passed = true
	j.out.MediaType = mediaType
	if j.declared != "" {
		if ok, err := j.skip(); ok || err != nil {
			return err
		}
	}
	sink := j.newSink()
	check := newUnpacker(mediaType, j.declared, j.r.s.unpacks)
	err := j.each(func(b []byte) error {
		if err := check.write(b); err != nil {
			return err
		}
		_, err := sink.Write(b)
		return err
	})
	diffID, cerr := check.finish()
	if err == nil {
		err = cerr
	}
	if err != nil {
		return j.broke(sink, err)
	}
	j.out.DiffID = diffID
	if got := digest(sink.sum); j.declared != "" && got != j.declared {
		sink.cancel()
		return fault.Newf(fault.BadContent, "", "", "layer %q of member %q does not have the digest that its name says", j.path, j.r.name).
			WithHint("the archive was damaged or changed; run `kmsctl archive verify`")
	}
	if err := sink.finish(&j.out); err != nil {
		return j.broke(sink, err)
	}
	if mediaType == archive.TypeLayerRaw {
		j.out.DiffID = j.out.Digest
	}
	return nil
}

// skip drops a layer that the registry has by the digest in its name.
func (j *layerJob) skip() (bool, error) {
	b := j.r.s.state(j.declared)
	b.mu.Lock()
	ok, err := j.r.s.have(j.r.s.ctx, b, j.r.repo, j.declared)
	b.mu.Unlock()
	if !ok || err != nil {
		return false, err
	}
	j.out.Digest, j.out.Size = j.declared, j.size
	return true, j.each(func([]byte) error { return nil })
}

// unpacker hashes what a compressed layer unpacks to.
type unpacker struct {
	w    *io.PipeWriter
	done chan struct{}
	sum  string
	err  error
}

func newUnpacker(mediaType, declared string, most *archive.Budget) *unpacker {
	u := &unpacker{done: make(chan struct{})}
	if declared != "" || mediaType == archive.TypeLayerRaw {
		close(u.done)
		return u
	}
	pr, pw := io.Pipe()
	u.w = pw
	go func() {
		defer close(u.done)
		h := sha256.New()
		in, err := archive.Unpack(pr)
		if err == nil {
			_, err = io.CopyBuffer(h, most.Reader(in), make([]byte, 256<<10))
		}
		if err != nil {
			u.err = fault.Newf(fault.BadContent, "", "", "a compressed layer cannot be unpacked: %w", err)
		}
		u.sum = digest(h)
		_ = pr.CloseWithError(u.err) // so that a writer does not wait
	}()
	return u
}

func (u *unpacker) write(b []byte) error {
	if u.w == nil {
		return nil
	}
	_, err := u.w.Write(b)
	return err
}

func (u *unpacker) finish() (string, error) {
	if u.w != nil {
		_ = u.w.Close() // a pipe's close does not fail
	}
	<-u.done
	return u.sum, u.err
}
