package push

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"sync"

	"github.com/kmsctl/kmsctl/internal/archive"
)

// ErrLost is what an upload answers when the registry has lost it.
var ErrLost = errors.New("the registry lost the upload")

// sink takes a layer's bytes as they come. What fits into one part is held, so
// that a registry that has it need not get it; more is sent part by part, one
// on its way while the next is filled.
type sink struct {
	j      *layerJob
	sum    hash.Hash
	n      int64
	part   []byte
	upload Upload
	way    chan error // of the part on its way
}

func (j *layerJob) newSink() *sink { return &sink{j: j, sum: sha256.New()} }

func (s *sink) Write(p []byte) (int, error) {
	s.sum.Write(p) // a hash never fails
	s.n += int64(len(p))
	total := len(p)
	for len(p) > 0 {
		if s.part == nil {
			s.part = s.newPart()
		}
		k := min(partSize-len(s.part), len(p))
		s.part, p = append(s.part, p[:k]...), p[k:]
		if len(s.part) == partSize {
			if err := s.send(); err != nil {
				return 0, err
			}
		}
	}
	return total, nil
}

// parts are kept between layers: a load of a hundred layers should not leave a
// hundred parts to the collector.
var parts = sync.Pool{New: func() any { b := make([]byte, 0, partSize); return &b }}

func (s *sink) newPart() []byte {
	if s.j.size < partSize/8 { // compressed it stays under that, or nearly
		return make([]byte, 0, s.j.size+4<<10)
	}
	return *parts.Get().(*[]byte) // the pool holds nothing else
}

func free(part []byte) {
	if cap(part) == partSize {
		part = part[:0]
		parts.Put(&part)
	}
}

// send waits for the part on its way and sends the full one.
func (s *sink) send() error {
	if err := s.arrived(); err != nil {
		return err
	}
	if s.upload == nil {
		s.upload = s.j.r.s.Registry.Stream(s.j.r.s.ctx, s.j.r.repo)
	}
	full, way := s.part, make(chan error, 1)
	s.part, s.way = nil, way
	go func() {
		_, err := s.upload.Write(full)
		free(full)
		way <- err
	}()
	return nil
}

// arrived waits for the part on its way.
func (s *sink) arrived() error {
	if s.way == nil {
		return nil
	}
	err := <-s.way
	s.way = nil
	return err
}

// finish closes the upload under its digest, unless the registry has it.
func (s *sink) finish(out *Layer) error {
	out.Digest, out.Size = digest(s.sum), s.n
	defer func() {
		free(s.part)
		s.part = nil
	}()
	l := s.j.r.s.load
	if s.upload == nil {
		return l.bring(s.j.r.s.ctx, s.j.r.repo, archive.Descriptor{Size: s.n, Digest: out.Digest},
			func(from int64) (io.Reader, error) { return bytes.NewReader(s.part[from:]), nil }, nil)
	}
	if err := s.arrived(); err != nil {
		return err
	}
	b := l.state(out.Digest)
	b.mu.Lock()
	defer b.mu.Unlock()
	ok, err := l.have(s.j.r.s.ctx, b, s.j.r.repo, out.Digest)
	if err != nil {
		return err
	}
	if ok {
		s.upload.Cancel()
		return nil
	}
	if len(s.part) > 0 {
		if _, err := s.upload.Write(s.part); err != nil {
			return err
		}
	}
	if err := s.upload.Commit(out.Digest); err != nil {
		return err
	}
	b.repos = append(b.repos, s.j.r.repo)
	l.count(&l.report.BlobsSent, s.n)
	return nil
}

// cancel gives the upload up.
func (s *sink) cancel() {
	_ = s.arrived() // it failed anyway
	if s.upload != nil {
		s.upload.Cancel()
	}
}
