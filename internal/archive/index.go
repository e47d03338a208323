package archive

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Names of what stands first in an archive of ours.
const (
	IndexName     = "kmsctl-index.json"
	SignatureName = "kmsctl-index.json.minisig"
)

// indexFormat changes when a reader of before could read wrongly.
const indexFormat = "kmsctl-archive/1"

// Index says what an archive of ours holds and where. It has the digest of
// every member and every blob, so that a signature over it is one over all.
type Index struct {
	Format  string        `json:"format"`
	Base    string        `json:"base,omitempty"` // a delta: digest of the index of the archive that has the rest
	Members []IndexMember `json:"members"`
	Images  []IndexImage  `json:"images"`
	Blobs   []IndexBlob   `json:"blobs"`
}

// IndexMember is a member of the archive. Offsets count from the end of the
// index and its signature, since the index cannot know its own length.
type IndexMember struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	Digest string `json:"digest"`
	Offset int64  `json:"offset"` // of the gzip member that its tar header starts
}

// IndexImage is one image.
type IndexImage struct {
	Refs     []string     `json:"refs"`
	Member   string       `json:"member"`
	Platform string       `json:"platform"`
	Manifest Descriptor   `json:"manifest"`
	Config   Descriptor   `json:"config"`
	Layers   []IndexLayer `json:"layers"`
}

// IndexLayer is a layer; DiffID is the digest of what it unpacks to.
type IndexLayer struct {
	Descriptor
	DiffID string `json:"diffID"`
}

// IndexBlob says where a blob stands.
type IndexBlob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
	Offset int64  `json:"offset"` // of the gzip member that holds exactly it
}

// Encode is the index as it stands in the archive.
func (x *Index) Encode() []byte {
	b, err := json.MarshalIndent(x, "", " ")
	if err != nil {
		panic(err) // plain values only
	}
	return append(b, '\n')
}

// parseIndex reads and checks an index: whatever passes can be used without
// looking back.
func parseIndex(b []byte) (*Index, error) {
	x := &Index{}
	if err := json.Unmarshal(b, x); err != nil {
		return nil, fmt.Errorf("%s: %w", IndexName, err)
	}
	if x.Format != indexFormat {
		return nil, fmt.Errorf("%s: format %q is not known to this version", IndexName, x.Format)
	}
	members, blobs := map[string]bool{}, map[string]int64{}
	var errs []error
	fail := func(format string, a ...any) { errs = append(errs, fmt.Errorf(IndexName+": "+format, a...)) }
	for _, m := range x.Members {
		if members[m.Name] || m.Size < 0 || m.Offset < 0 || !IsDigest(m.Digest) {
			fail("member %q is not well-formed", m.Name)
		}
		members[m.Name] = true
	}
	for _, b := range x.Blobs {
		if _, twice := blobs[b.Digest]; twice || b.Size < 0 || b.Offset < 0 || !IsDigest(b.Digest) {
			fail("blob %q is not well-formed", b.Digest)
		}
		blobs[b.Digest] = b.Size
	}
	named := map[string]bool{}
	for _, i := range x.Images {
		for _, ref := range i.Refs {
			if at := i.Member + " " + ref; named[at] {
				fail("two images of member %q are %q", i.Member, ref)
			} else {
				named[at] = true
			}
		}
		if len(i.Refs) == 0 || !members[i.Member] {
			fail("image %q names a member that is not there", i.Refs)
		}
		all := []Descriptor{i.Manifest, i.Config}
		for _, l := range i.Layers {
			all = append(all, l.Descriptor)
			if !IsDigest(l.DiffID) {
				fail("image %q has a layer without a diff ID", i.Refs)
			}
		}
		for _, d := range all {
			size, there := blobs[d.Digest]
			if (!there && x.Base == "") || (there && size != d.Size) || !IsDigest(d.Digest) {
				fail("image %q names blob %q that is not there", i.Refs, d.Digest)
			}
		}
	}
	return x, errors.Join(errs...)
}

// Schema2 is the canonical manifest of an image: the same configuration and
// layers always give the same bytes.
func Schema2(config Descriptor, layers []Descriptor) []byte {
	config.MediaType = TypeConfig
	if layers == nil {
		layers = []Descriptor{}
	}
	b, err := json.MarshalIndent(struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        Descriptor   `json:"config"`
		Layers        []Descriptor `json:"layers"`
	}{2, TypeManifest, config, layers}, "", "   ")
	if err != nil {
		panic(err) // plain values only
	}
	return b
}

// Manifest is the canonical manifest of an image: schema 2, or OCI's where a
// layer is of a kind that schema 2 does not know.
func Manifest(config Descriptor, layers []Descriptor) (mediaType string, body []byte) {
	oci := false
	for _, l := range layers {
		oci = oci || l.MediaType == TypeLayerZstd
	}
	if !oci {
		return TypeManifest, Schema2(config, layers)
	}
	kinds := map[string]string{TypeLayer: "application/vnd.oci.image.layer.v1.tar+gzip", TypeLayerRaw: "application/vnd.oci.image.layer.v1.tar", TypeLayerZstd: "application/vnd.oci.image.layer.v1.tar+zstd"}
	config.MediaType = "application/vnd.oci.image.config.v1+json"
	for n := range layers {
		layers[n].MediaType = kinds[layers[n].MediaType]
	}
	b, err := json.MarshalIndent(struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        Descriptor   `json:"config"`
		Layers        []Descriptor `json:"layers"`
	}{2, TypeOCI, config, layers}, "", "   ")
	if err != nil {
		panic(err) // plain values only
	}
	return TypeOCI, b
}
