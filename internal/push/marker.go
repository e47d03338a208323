package push

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// A marker tells a later load, on whatever host, that an archive of another
// maker is in the registry already, so that one SHA-256 of the file is all that
// it costs. It is an artifact beside the images, tagged by the archive's digest.
//
// Who can write the registry can write a marker; so it is believed only with a
// code over it by a key that is made from all the archive's bytes, which its
// digest does not give away: only who has the archive can have made it. And
// each manifest that it names must be under its tag now, with the
// configuration that the archive declares.
const (
	markerName    = "kmsctl-loaded"
	markerKey     = "kmsctl load marker 1"
	markerLimit   = 4 << 20
	markerVersion = 1
)

// markedImage is an image that was loaded.
type markedImage struct {
	Name    string   `json:"name"`
	Tag     string   `json:"tag"`
	Digest  string   `json:"digest"`
	Config  string   `json:"config,omitempty"`
	DiffIDs []string `json:"diffIDs,omitempty"`
}

// marker is the artifact's content. The manifests and charts are in it so that
// a later load needs nothing of the archive but its digest.
type marker struct {
	Version     int               `json:"version"`
	Compression string            `json:"compression"`
	Images      []markedImage     `json:"images"`
	Manifests   map[string][]byte `json:"manifests"`
	Charts      map[string][]byte `json:"charts"`
}

type sealedMarker struct {
	Body []byte `json:"body"`
	Code []byte `json:"code"`
}

func markerTag(archiveDigest string) string { return strings.Replace(archiveDigest, ":", "-", 1) }

func code(key, body []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(body) // a hash never fails
	return h.Sum(nil)
}

// mark writes the marker of what was just loaded. That it cannot be written
// costs the next load some time and is no fault of this one.
func (s *stream) mark(ctx context.Context) {
	m := marker{Version: markerVersion, Compression: s.Compression, Images: s.loaded, Manifests: s.manifest, Charts: s.charts}
	body, err := json.Marshal(m)
	if err != nil || len(body) > markerLimit/2 {
		return
	}
	d := digest(s.tap)
	s.tap.Write([]byte(markerKey))
	b, err := json.Marshal(sealedMarker{body, code(s.tap.Sum(nil), body)})
	if err != nil {
		return
	}
	repo := s.Repository(markerName)
	blob := archive.BytesBlob(archive.TypeConfig, b)
	if err := s.Registry.PutBlob(ctx, repo, blob.Digest, blob.Size, func(from int64) (io.Reader, error) { return strings.NewReader(string(b[from:])), nil }, nil); err != nil {
		return
	}
	_ = s.Registry.PutManifest(ctx, repo, markerTag(d), archive.TypeManifest, archive.Schema2(blob.Descriptor, nil)) // as above
}

// marked says whether a marker vouches for the whole archive; then the charts
// are put and all is done.
func (s *stream) marked(ctx context.Context) (bool, error) {
	repo := s.Repository(markerName)
	any, err := s.Registry.HasTags(ctx, repo)
	if !any || err != nil {
		return false, nil //nolint:nilerr // without a marker the archive is read
	}
	d, key, err := s.Archive.Fingerprint(ctx, markerKey)
	if err != nil {
		return false, err
	}
	m, ok := s.readMarker(ctx, repo, d, key)
	if !ok {
		return false, nil
	}
	objects, ok := s.allThere(ctx, m)
	if !ok {
		return false, nil
	}
	manifest, err := m.manifest()
	if err != nil {
		return false, nil //nolint:nilerr // then the archive is read
	}
	if err := s.take(manifest); err != nil {
		return false, err
	}
	for _, o := range objects {
		s.done(o, nil)
	}
	s.lists(ctx, manifest)
	if s.Charts != nil {
		for _, c := range manifest.Charts {
			if pkg, ok := m.Charts[c.Archive]; ok {
				s.chart(ctx, c, pkg)
			}
		}
	}
	return true, nil
}

func (m *marker) manifest() (ppa.Manifest, error) {
	var found archive.Manifests
	for name, b := range m.Manifests {
		if err := found.Take(archive.RoleOf(name), b); err != nil {
			return ppa.Manifest{}, err
		}
	}
	out, err := found.Merged()
	if err == nil && archive.Unplaced(out) {
		err = fmt.Errorf("the manifest names no members")
	}
	return out, err
}

func (s *stream) readMarker(ctx context.Context, repo, d string, key []byte) (*marker, bool) {
	_, body, ok, err := s.Registry.Manifest(ctx, repo, markerTag(d))
	if err != nil || !ok {
		return nil, false
	}
	var doc struct{ Config archive.Descriptor }
	if json.Unmarshal(body, &doc) != nil || doc.Config.Size > markerLimit {
		return nil, false
	}
	b, err := s.Registry.ReadBlob(ctx, repo, doc.Config.Digest, markerLimit)
	if err != nil {
		return nil, false
	}
	m, ok := openMarker(b, key)
	if !ok {
		s.warn("a marker in the registry says that this archive is loaded, and was not made from it: it is not believed")
		return nil, false
	}
	return m, m.Version == markerVersion && m.Compression == s.Compression
}

// openMarker reads a marker that was made with that key; of another, nothing is
// read but the code.
func openMarker(b, key []byte) (*marker, bool) {
	var sealed sealedMarker
	if json.Unmarshal(b, &sealed) != nil || !hmac.Equal(sealed.Code, code(key, sealed.Body)) {
		return nil, false
	}
	m := &marker{}
	return m, json.Unmarshal(sealed.Body, m) == nil
}

// allThere looks whether every image of a marker is under its tag.
func (s *stream) allThere(ctx context.Context, m *marker) ([]Object, bool) {
	var objects []Object
	for _, i := range m.Images {
		repo := s.Repository(i.Name)
		_, body, ok, err := s.Registry.Manifest(ctx, repo, i.Tag)
		if err != nil || !ok || archive.DigestOf(body) != i.Digest {
			return nil, false
		}
		var doc struct {
			Config archive.Descriptor
			Layers []archive.Descriptor
		}
		kind := "list"
		if i.Config != "" {
			kind = "image"
			if json.Unmarshal(body, &doc) != nil || doc.Config.Digest != i.Config || len(doc.Layers) != len(i.DiffIDs) {
				return nil, false
			}
		}
		objects = append(objects, Object{Kind: kind, Name: i.Name + ":" + i.Tag, Target: s.target(repo, i.Tag), Digest: i.Digest, Status: string(chart.Present)})
	}
	return objects, true
}
