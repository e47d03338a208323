// Package archive reads and writes PPA archives: a tar.gz with manifests,
// charts and images. It reads what others wrote in every variation, as a
// stream, and writes archives of our own: readable by tar, by IBM's loader and
// by docker load, with an index first by which Open finds any piece without
// reading the rest. It knows no registry: who loads gives it callbacks.
//
// What it promises: nothing is unpacked to disk; memory is bounded whatever
// the size; a name above the root, a link, a device, a name given twice, a cut
// or bytes behind the end are errors; each error is a fault of kind
// BadContent, or an error of the reader below.
package archive

import (
	"compress/flate"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Media types of what we push. Images are Docker's schema 2, since registries
// of the age of these archives know no other.
const (
	TypeManifest  = "application/vnd.docker.distribution.manifest.v2+json"
	TypeList      = "application/vnd.docker.distribution.manifest.list.v2+json"
	TypeConfig    = "application/vnd.docker.container.image.v1+json"
	TypeLayer     = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	TypeLayerRaw  = "application/vnd.docker.image.rootfs.diff.tar"
	TypeLayerZstd = "application/vnd.docker.image.rootfs.diff.tar.zstd"
	TypeOCI       = "application/vnd.oci.image.manifest.v1+json"
	TypeOCIIndex  = "application/vnd.oci.image.index.v1+json"
)

// Descriptor names a blob by its content.
type Descriptor struct {
	MediaType string `json:"mediaType,omitempty"`
	Size      int64  `json:"size"`
	Digest    string `json:"digest"`
}

// DigestOf is the digest of b.
func DigestOf(b []byte) string {
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

// IsDigest says whether s is a SHA-256 digest as registries write it.
func IsDigest(s string) bool {
	h, ok := strings.CutPrefix(s, "sha256:")
	return ok && isHex(h)
}

func isHex(s string) bool {
	if len(s) != 64 {
		return false
	}
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func badContent(err error) *fault.Error {
	return fault.New(fault.BadContent, "read archive", "", err)
}

const copyAgain = "the archive is not whole; copy it again, and compare its size and checksum with the sender's"

// cutOff turns the end of the input in the middle of something into a fault;
// other errors stay what they are.
func cutOff(err error) error {
	var f *fault.Error
	switch {
	case err == nil || errors.As(err, &f):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return badContent(errors.New("it is cut off")).WithHint(copyAgain)
	case errors.Is(err, gzip.ErrChecksum):
		return damaged("its CRC does not match")
	case errors.Is(err, gzip.ErrHeader):
		return damaged("a gzip header in it is not one")
	}
	var corrupt flate.CorruptInputError
	if errors.As(err, &corrupt) || strings.Contains(err.Error(), "corrupt") {
		return damaged("%w", err)
	}
	return err
}

// named puts the archive's name on a fault that has none yet.
func named(name string, err error) error {
	var f *fault.Error
	if err == nil || !errors.As(err, &f) || f.Object != "" || f.Op != "read archive" {
		return err
	}
	out := *f
	out.Object = name
	return &out
}

// Limits bound what an archive may ask of us.
type Limits struct {
	Unpacked int64 // bytes after unpacking, all members together; and all compressed layers
	Entries  int   // members, and files in one image's tar
}

// DefaultLimits are far above any archive that exists.
var DefaultLimits = Limits{Unpacked: 512 << 30, Entries: 200_000}

// Budget is what may still be unpacked, by several readers together.
type Budget struct {
	all  int64
	left atomic.Int64
}

// Budget begins to count what is unpacked.
func (l Limits) Budget() *Budget {
	b := &Budget{all: l.Unpacked}
	b.left.Store(l.Unpacked)
	return b
}

// Reader counts what is read of r, and fails above the limit.
func (b *Budget) Reader(r io.Reader) io.Reader { return &counted{r, b} }

type counted struct {
	r io.Reader
	b *Budget
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.b.left.Add(-int64(n)) < 0 {
		return 0, badContent(fmt.Errorf("it unpacks to more than %d bytes", c.b.all)).WithHint("if that is meant, raise --max-unpacked-size")
	}
	return n, err
}
