package archive

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Blob is content to be written, opened as often as needed.
type Blob struct {
	Descriptor
	DiffID string // of a layer
	Open   func() (io.ReadCloser, error)
}

// BytesBlob is a blob from memory.
func BytesBlob(mediaType string, b []byte) Blob {
	return Blob{Descriptor: Descriptor{MediaType: mediaType, Size: int64(len(b)), Digest: DigestOf(b)},
		Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
}

// NewImage is an image to be written.
type NewImage struct {
	Refs     []string
	Platform ppa.Platform
	Config   []byte
	Layers   []Blob
	// Manifest is the image's own; nil asks for the canonical schema 2.
	Manifest     []byte
	ManifestType string
}

// Digest is the digest of the image's manifest, which names the image.
func (i NewImage) Digest() string { return i.manifest().Digest }

func (i NewImage) manifest() Blob {
	if i.Manifest != nil {
		return BytesBlob(i.ManifestType, i.Manifest)
	}
	var layers []Descriptor
	for _, l := range i.Layers {
		layers = append(layers, l.Descriptor)
	}
	return BytesBlob(TypeManifest, Schema2(BytesBlob(TypeConfig, i.Config).Descriptor, layers))
}

// File is a small member.
type File struct {
	Name string
	Data []byte
}

// Build says what an archive is to hold. Images of one Member stand in it
// together, each layer once (IBM's --batch-images).
type Build struct {
	Manifest ppa.Manifest
	Files    []File // charts, and what else is to be carried
	Members  []ImageMember
	// Base, for a delta, is the digest of the index of the archive that has
	// the blobs for which Has says true.
	Base string
	Has  func(digest string) bool
	Sign func(index []byte) ([]byte, error)
}

// ImageMember is a member with one or several images.
type ImageMember struct {
	Name   string
	Images []NewImage
}

// piece is a run of bytes: literal, or a blob's.
type piece struct {
	data []byte
	blob *Blob
}

func (p piece) size() int64 {
	if p.blob != nil {
		return p.blob.Size
	}
	return int64(len(p.data))
}

// member is a member as pieces, each of which becomes a gzip member.
type member struct {
	name   string
	pieces []piece
}

func (m member) size() (n int64) {
	for _, p := range m.pieces {
		n += p.size()
	}
	return n
}

// Write writes an archive of ours to w and gives its index's digest. Blobs are
// read twice: for the digests that the index needs, then to be written. The
// same input gives the same bytes.
func Write(w io.Writer, b Build) (string, error) {
	members, x, err := b.plan()
	if err != nil {
		return "", err
	}
	index := x.Encode()
	front := []File{{IndexName, index}}
	if b.Sign != nil {
		sig, err := b.Sign(index)
		if err != nil {
			return "", err
		}
		front = append(front, File{SignatureName, sig})
	}
	for _, f := range front {
		if err := writePiece(w, piece{data: slices.Concat(tarHeader(f.Name, int64(len(f.Data))), f.Data, padding(int64(len(f.Data))))}); err != nil {
			return "", err
		}
	}
	for _, m := range members {
		size := m.size()
		if err := writePiece(w, head(m, size)); err != nil {
			return "", err
		}
		for _, p := range m.pieces[boolInt(single(m)):] {
			if err := writePiece(w, p); err != nil {
				return "", fmt.Errorf("write member %q: %w", m.name, err)
			}
		}
		if pad := padding(size); !single(m) && len(pad) > 0 {
			if err := writePiece(w, piece{data: pad}); err != nil {
				return "", err
			}
		}
	}
	return DigestOf(index), writePiece(w, piece{data: make([]byte, 1024)})
}

// single says whether a member is one literal, which then shares its header's
// piece.
func single(m member) bool { return len(m.pieces) == 1 && m.pieces[0].blob == nil }

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// head is the piece that starts a member.
func head(m member, size int64) piece {
	h := tarHeader(m.name, size)
	if single(m) {
		h = slices.Concat(h, m.pieces[0].data, padding(size))
	}
	return piece{data: h}
}

func writePiece(w io.Writer, p piece) error {
	if p.blob == nil {
		return writeStored(w, bytes.NewReader(p.data), int64(len(p.data)))
	}
	r, err := p.blob.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	return writeStored(w, r, p.blob.Size)
}

// plan lays the members out and hashes them.
func (b *Build) plan() ([]member, *Index, error) {
	members := []member{{ppa.JSONName, []piece{{data: b.Manifest.JSON()}}}, {ppa.YAMLName, []piece{{data: b.Manifest.YAML()}}}}
	for _, f := range b.Files {
		members = append(members, member{f.Name, []piece{{data: f.Data}}})
	}
	x := &Index{Format: indexFormat, Base: b.Base}
	for _, im := range b.Members {
		m, images := im.layOut(b.Has)
		members = append(members, m)
		x.Images = append(x.Images, images...)
	}
	at, known := int64(0), map[string]bool{}
	for _, m := range members {
		digest, err := hashMember(m)
		if err != nil {
			return nil, nil, err
		}
		size := m.size()
		x.Members = append(x.Members, IndexMember{Name: m.name, Size: size, Digest: digest, Offset: at})
		at += storedSize(head(m, size).size())
		if single(m) {
			continue
		}
		for _, p := range m.pieces {
			if p.blob != nil && !known[p.blob.Digest] {
				known[p.blob.Digest] = true
				x.Blobs = append(x.Blobs, IndexBlob{p.blob.Digest, p.blob.Size, at})
			}
			at += storedSize(p.size())
		}
		if pad := padding(size); len(pad) > 0 {
			at += storedSize(int64(len(pad)))
		}
	}
	return members, x, nil
}

// layOut makes the docker-save tar of a member: its manifest first, then each
// blob once, under names that docker 25 and later write too.
func (im ImageMember) layOut(has func(string) bool) (member, []IndexImage) {
	type entry struct {
		Config   string   `json:"Config"`
		RepoTags []string `json:"RepoTags"`
		Layers   []string `json:"Layers"`
	}
	var list []entry
	var index []IndexImage
	var blobs []Blob
	for _, i := range im.Images {
		config, manifest := BytesBlob(TypeConfig, i.Config), i.manifest()
		x := IndexImage{Refs: i.Refs, Member: im.Name, Platform: i.Platform.String(), Manifest: manifest.Descriptor, Config: config.Descriptor}
		e := entry{Config: blobPath(config.Digest), RepoTags: i.Refs, Layers: []string{}}
		blobs = append(blobs, config, manifest)
		for _, l := range i.Layers {
			e.Layers = append(e.Layers, blobPath(l.Digest))
			x.Layers = append(x.Layers, IndexLayer{l.Descriptor, l.DiffID})
			blobs = append(blobs, l)
		}
		list, index = append(list, e), append(index, x)
	}
	js, err := json.Marshal(list)
	if err != nil {
		panic(err) // plain strings only
	}
	m := member{name: im.Name, pieces: []piece{{data: slices.Concat(tarHeader(dockerJSON, int64(len(js))), js, padding(int64(len(js))))}}}
	seen := map[string]bool{}
	for n := range blobs {
		bl := &blobs[n]
		if seen[bl.Digest] || (has != nil && has(bl.Digest)) {
			continue
		}
		seen[bl.Digest] = true
		m.pieces = append(m.pieces, piece{data: tarHeader(blobPath(bl.Digest), bl.Size)}, piece{blob: bl})
		if pad := padding(bl.Size); len(pad) > 0 {
			m.pieces = append(m.pieces, piece{data: pad})
		}
	}
	m.pieces = append(m.pieces, piece{data: make([]byte, 1024)})
	return m, index
}

func blobPath(digest string) string { return blobFolder + strings.TrimPrefix(digest, "sha256:") }

// hashMember gives a member's digest, and checks its blobs' on the way.
func hashMember(m member) (string, error) {
	all := sha256.New()
	for _, p := range m.pieces {
		if p.blob == nil {
			all.Write(p.data) // a hash never fails
			continue
		}
		if err := hashBlob(p.blob, all); err != nil {
			return "", err
		}
	}
	return sum(all), nil
}

func hashBlob(b *Blob, all io.Writer) error {
	r, err := b.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	one := sha256.New()
	n, err := io.CopyBuffer(io.MultiWriter(all, one), r, make([]byte, 1<<20))
	if err != nil {
		return err
	}
	if n != b.Size || sum(one) != b.Digest {
		return fault.Newf(fault.BadContent, "read blob", b.Digest, "it has %d bytes of digest %s, not %d", n, sum(one), b.Size)
	}
	return nil
}

func sum(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// tarHeader is a tar header, the same for the same name and size.
func tarHeader(name string, size int64) []byte {
	var b bytes.Buffer
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)}
	if err := tar.NewWriter(&b).WriteHeader(h); err != nil {
		panic(err) // names are ours and sizes are not negative
	}
	return b.Bytes()
}

// padding fills the last block of a file of n bytes.
func padding(n int64) []byte { return make([]byte, (512-n%512)%512) }
