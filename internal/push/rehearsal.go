package push

import (
	"context"
	"io"
	"sync"

	"github.com/kmsctl/kmsctl/internal/archive"
)

// rehearsal is the registry of a dry run: it takes everything and sends
// nothing. What was put is there for the rest of the run; for what was not, the
// real registry is asked.
type rehearsal struct {
	Registry
	mu        sync.Mutex
	blobs     map[inRepo]func(from int64) (io.Reader, error) // nil: of an upload whose content is gone
	manifests map[inRepo]heldManifest
}

// inRepo names a blob or a manifest: what is a digest or a tag.
type inRepo struct{ repo, what string }

type heldManifest struct {
	mediaType string
	body      []byte
}

func rehearse(r Registry) *rehearsal {
	return &rehearsal{Registry: r, blobs: map[inRepo]func(int64) (io.Reader, error){}, manifests: map[inRepo]heldManifest{}}
}

func (r *rehearsal) blob(repo, digest string) (open func(int64) (io.Reader, error), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	open, ok = r.blobs[inRepo{repo, digest}]
	return open, ok
}

func (r *rehearsal) keep(repo, digest string, open func(int64) (io.Reader, error)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[inRepo{repo, digest}] = open
}

func (r *rehearsal) manifest(repo, ref string) (m heldManifest, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, ok = r.manifests[inRepo{repo, ref}]
	return m, ok
}

func (r *rehearsal) HasBlob(ctx context.Context, repo, digest string) (bool, error) {
	if _, ok := r.blob(repo, digest); ok {
		return true, nil
	}
	return r.Registry.HasBlob(ctx, repo, digest)
}

func (r *rehearsal) Mount(_ context.Context, repo, digest, from string) (bool, error) {
	open, _ := r.blob(from, digest)
	r.keep(repo, digest, open)
	return true, nil
}

func (r *rehearsal) PutBlob(_ context.Context, repo, digest string, size int64, open func(int64) (io.Reader, error), sent func(int64)) error {
	r.keep(repo, digest, open)
	if sent != nil {
		sent(size)
	}
	return nil
}

func (r *rehearsal) Stream(_ context.Context, repo string) Upload {
	return rehearsedUpload{r, repo}
}

func (r *rehearsal) ReadBlob(ctx context.Context, repo, digest string, limit int64) ([]byte, error) {
	open, _ := r.blob(repo, digest)
	if open == nil {
		return r.Registry.ReadBlob(ctx, repo, digest, limit)
	}
	in, err := open(0)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(in, limit))
}

func (r *rehearsal) Manifest(ctx context.Context, repo, ref string) (string, []byte, bool, error) {
	if m, ok := r.manifest(repo, ref); ok {
		return m.mediaType, m.body, true, nil
	}
	return r.Registry.Manifest(ctx, repo, ref)
}

func (r *rehearsal) ManifestDigest(ctx context.Context, repo, ref string) (string, error) {
	if m, ok := r.manifest(repo, ref); ok {
		return archive.DigestOf(m.body), nil
	}
	return r.Registry.ManifestDigest(ctx, repo, ref)
}

func (r *rehearsal) PutManifest(_ context.Context, repo, ref, mediaType string, body []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifests[inRepo{repo, ref}] = heldManifest{mediaType, body}
	return nil
}

// rehearsedUpload drops what it is given.
type rehearsedUpload struct {
	r    *rehearsal
	repo string
}

func (u rehearsedUpload) Write(p []byte) (int, error) { return len(p), nil }
func (u rehearsedUpload) Cancel()                     {}

func (u rehearsedUpload) Commit(digest string) error {
	u.r.keep(u.repo, digest, nil)
	return nil
}

// recalled lets a dry run read what earlier runs remember, and adds nothing.
type recalled struct{ Known }

func (recalled) Save(string, Layer) {}
