package pack

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Registry is what pulling an image needs of a registry.
type Registry interface {
	Manifest(ctx context.Context, repo, ref string) (mediaType string, body []byte, ok bool, err error)
	OpenBlob(ctx context.Context, repo, digest string) (io.ReadCloser, error)
}

// store is where one image's manifests and blobs are: a repository of a
// registry, or a folder with an OCI layout.
type store interface {
	top(ctx context.Context) ([]byte, error)
	manifest(ctx context.Context, digest string) ([]byte, error)
	blob(ctx context.Context, digest string) (io.ReadCloser, error)
}

// repository is an image in a registry, by tag or digest.
type repository struct {
	Registry
	repo, ref string
}

func (r repository) top(ctx context.Context) ([]byte, error) { return r.manifest(ctx, r.ref) }

func (r repository) manifest(ctx context.Context, ref string) ([]byte, error) {
	_, b, ok, err := r.Manifest(ctx, r.repo, ref)
	if err == nil && !ok {
		err = fault.New(fault.NotFound, "", "", errors.New("the registry does not have it")).WithHint("check the reference")
	}
	return b, err
}

func (r repository) blob(ctx context.Context, digest string) (io.ReadCloser, error) {
	return r.OpenBlob(ctx, r.repo, digest)
}

// layout is a folder with an OCI layout.
type layout string

func isLayout(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "index.json"))
	return err == nil
}

func (l layout) top(context.Context) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(string(l), "index.json"))
	return b, reason(err)
}

func (l layout) manifest(ctx context.Context, digest string) ([]byte, error) {
	r, err := l.blob(ctx, digest)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, maxManifest))
}

func (l layout) blob(_ context.Context, digest string) (io.ReadCloser, error) {
	f, err := os.Open(filepath.Join(string(l), "blobs", "sha256", strings.TrimPrefix(digest, "sha256:")))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Newf(fault.BadContent, "", "", "blob %s is not in it", digest).WithHint("the layout is not whole: write it again")
	}
	return f, reason(err)
}

const maxManifest = 8 << 20

// ociDescriptor and ociManifest are as much of OCI's words as choosing needs.
type ociDescriptor struct {
	archive.Descriptor
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    *ppa.Platform     `json:"platform,omitempty"`
}

type ociManifest struct {
	MediaType string          `json:"mediaType"`
	Config    ociDescriptor   `json:"config"`
	Layers    []ociDescriptor `json:"layers"`
	Manifests []ociDescriptor `json:"manifests"`
}

const refName = "org.opencontainers.image.ref.name"

// choose follows lists down to the image of a platform.
func choose(ctx context.Context, s store, ref string, want ppa.Platform) (raw []byte, m ociManifest, err error) {
	if raw, err = s.top(ctx); err != nil {
		return nil, m, err
	}
	const deep = 4
	for range deep {
		m = ociManifest{}
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, m, fault.Newf(fault.BadContent, "", "", "its manifest cannot be read: %w", err)
		}
		if m.Config.Digest != "" {
			return raw, m, nil
		}
		d, err := pick(m.Manifests, ref, want)
		if err != nil {
			return nil, m, err
		}
		if raw, err = s.manifest(ctx, d.Digest); err != nil {
			return nil, m, err
		}
		if archive.DigestOf(raw) != d.Digest {
			return nil, m, fault.Newf(fault.BadContent, "", "", "manifest %s has another digest", d.Digest)
		}
	}
	return nil, m, fault.New(fault.BadContent, "", "", errors.New("lists stand in lists without end"))
}

// pick takes of a list the only image, the one of that name, or the one of the
// platform.
func pick(all []ociDescriptor, ref string, want ppa.Platform) (ociDescriptor, error) {
	all = slices.DeleteFunc(slices.Clone(all), func(d ociDescriptor) bool { // attestations
		return !archive.IsDigest(d.Digest) || (d.Platform != nil && d.Platform.Architecture == "unknown")
	})
	_, tag := ppa.SplitRef(ref)
	for _, fits := range []func(ociDescriptor) bool{
		func(ociDescriptor) bool { return len(all) == 1 },
		func(d ociDescriptor) bool { return d.Platform != nil && *d.Platform == want },
		func(d ociDescriptor) bool { return d.Annotations[refName] == ref },
		func(d ociDescriptor) bool { return d.Annotations[refName] == tag },
	} {
		if n := slices.IndexFunc(all, fits); n >= 0 {
			return all[n], nil
		}
	}
	return ociDescriptor{}, fault.Newf(fault.NotFound, "", "", "of its %d images none is for %s", len(all), want).WithHint("name another by --architectures")
}

// member is what becomes a member of the archive on its way to Repack.
type member struct {
	size  int64
	write func(w io.Writer) error
}

type layoutFile struct {
	name string
	size int64
	open func() (io.ReadCloser, error)
}

// pulled is an image as a tar of an OCI layout with that image alone.
func pulled(ctx context.Context, s store, ref string, want ppa.Platform) (member, error) {
	raw, m, err := choose(ctx, s, ref, want)
	if err != nil {
		return member{}, err
	}
	top := ociDescriptor{Descriptor: archive.Descriptor{MediaType: m.MediaType, Size: int64(len(raw)), Digest: archive.DigestOf(raw)}, Annotations: map[string]string{refName: ref}}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []ociDescriptor{top}})
	if err != nil {
		return member{}, err
	}
	held := func(name string, b []byte) layoutFile {
		return layoutFile{name, int64(len(b)), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
	}
	files := []layoutFile{held("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)), held("index.json", index), held(blobName(top.Digest), raw)}
	seen := map[string]bool{}
	for _, d := range append([]ociDescriptor{m.Config}, m.Layers...) {
		if !archive.IsDigest(d.Digest) || d.Size < 0 {
			return member{}, fault.Newf(fault.BadContent, "", "", "its manifest names a blob %q", d.Digest)
		}
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		files = append(files, layoutFile{blobName(d.Digest), d.Size, func() (io.ReadCloser, error) { return s.blob(ctx, d.Digest) }})
	}
	return tarOf(files), nil
}

func blobName(digest string) string { return "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:") }

// tarOf is a tar whose size is known before it is written.
func tarOf(files []layoutFile) member {
	const block, end = 512, 1024
	m := member{size: end}
	for _, f := range files {
		m.size += block + (f.size+block-1)/block*block
	}
	m.write = func(w io.Writer) error {
		tw := tar.NewWriter(w)
		for _, f := range files {
			if err := f.to(tw); err != nil {
				return err
			}
		}
		return tw.Close()
	}
	return m
}

func (f layoutFile) to(tw *tar.Writer) error {
	// GNU's format has one header whatever the size.
	if err := tw.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: f.size, Format: tar.FormatGNU}); err != nil {
		return err
	}
	r, err := f.open()
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := io.Copy(tw, io.LimitReader(r, f.size))
	if err == nil { // who gives it says at its end whether it was whole
		var more int64
		more, err = io.CopyN(io.Discard, r, 1)
		n += more
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err == nil && n != f.size {
		err = fault.Newf(fault.BadContent, "read blob", filepath.Base(f.name), "it has not the %d bytes that its manifest says", f.size)
	}
	return err
}

// splitSource cuts HOST/REPO:TAG or HOST/REPO@DIGEST; fallback is the host of
// a reference that names none.
func splitSource(ref, fallback string) (host, repo, tag string, err error) {
	host, rest, _ := strings.Cut(ref, "/")
	if !strings.ContainsAny(host, ".:") && host != "localhost" {
		host, rest = fallback, ref
	}
	if host == "" {
		return "", "", "", fault.Usagef("%q names no registry", ref).WithHint("give the registry for such images with --registry")
	}
	if repo, tag, ok := strings.Cut(rest, "@"); ok {
		repo, _ = ppa.SplitRef(repo)
		return host, repo, tag, nil
	}
	repo, tag = ppa.SplitRef(rest)
	if repo == "" || strings.ContainsAny(ref, "{}$ ") {
		return "", "", "", fault.Usagef("%q is not HOST/REPOSITORY:TAG", ref).WithHint("as in registry.example:5000/org/app:1.0; a variable in it must be in the environment, a placeholder be replaced")
	}
	if tag == "" {
		tag = "latest"
	}
	return host, repo, tag, nil
}

// about says which image something is about, in words of its own kind.
func about(ref, from string, err error) error {
	if err == nil {
		return nil
	}
	var f *fault.Error
	if errors.As(err, &f) && f.Op == "" {
		return fault.New(f.Kind, "read image", ref, fmt.Errorf("%s: %w", from, f.Err)).WithHint("%s", f.Hint)
	}
	return fault.New(fault.KindOf(err), "read image", ref, fmt.Errorf("%s: %w", from, err)).WithHint("%s", fault.HintOf(err))
}
