package archive

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/pkg/ppa"
)

const (
	maxSmall      = 32 << 20 // bytes of small files of one image's tar that are kept
	maxSmallFile  = 4 << 20  // a JSON file larger than this is no JSON file
	maxSmallBlob  = 256 << 10
	dockerJSON    = "manifest.json"
	ociIndexJSON  = "index.json"
	blobFolder    = "blobs/sha256/"
	annotationRef = "org.opencontainers.image.ref.name"
	annotationCtr = "io.containerd.image.name"
)

// LayerFunc is called once for every file of an image's tar that may be a
// layer, with its bytes as they stand there. declared is the digest that the
// file's name promises, or "".
type LayerFunc func(path string, size int64, declared string, r io.Reader) error

// Image is an image as it stands in a tar.
type Image struct {
	Refs     []string
	Platform ppa.Platform
	Config   []byte
	Layers   []Layer
	// Manifest is the image's own manifest, where the tar has one (OCI layout);
	// a docker-save tar has none.
	Manifest     []byte
	ManifestType string
}

// Layer is a layer in an image's tar: the path that LayerFunc was called with,
// and what the image says of it. Digest and MediaType are "" for docker-save.
type Layer struct {
	Path, DiffID      string
	Digest, MediaType string
}

// List is a multi-architecture list in an OCI layout, Images its members by
// the digest of their manifests.
type List struct {
	Refs      []string
	Raw       []byte
	MediaType string
	Manifests []string
}

// Images are the contents of an image's tar.
type Images struct {
	Images []Image
	Lists  []List
}

// imageTar is what is remembered of a tar while it streams by.
type imageTar struct {
	small map[string][]byte
	kept  int64
	big   map[string]bool // given to the LayerFunc
	links map[string]string
	layer LayerFunc
}

// ReadImages reads the tar of one or several images, packed or not:
// docker-save of old and new, or an OCI layout. Files that may be layers go to
// layer as they come; small ones, which only the manifest at the end tells
// apart, after it.
func ReadImages(r io.Reader, what string, lim Limits, layer LayerFunc) (*Images, error) {
	in, err := Unpack(r)
	if err != nil {
		return nil, err
	}
	t := &imageTar{small: map[string][]byte{}, big: map[string]bool{}, links: map[string]string{}, layer: layer}
	if err := walkTar(in, what, lim, true, t.take); err != nil {
		return nil, err
	}
	out, err := t.images()
	if err != nil {
		return nil, badContent(fmt.Errorf("%s: %w", what, err)).WithHint("the image was not written whole, or by a tool that is not known; get the archive again from its maker")
	}
	return out, t.smallLayers(out)
}

func (t *imageTar) take(f file, r io.Reader) error {
	if f.link != "" {
		t.links[f.name] = f.link
		return nil
	}
	if limit := keepUpTo(f.name); f.size <= limit && t.kept+f.size <= maxSmall {
		b := make([]byte, f.size)
		if _, err := io.ReadFull(r, b); err != nil {
			return cutOff(err)
		}
		t.small[f.name] = b
		t.kept += f.size
		return nil
	}
	t.big[f.name] = true
	return t.layer(f.name, f.size, declared(f.name), r)
}

// keepUpTo is up to which size a file is kept until its role is known.
func keepUpTo(name string) int64 {
	base := path.Base(name)
	switch {
	case strings.HasSuffix(base, ".json"), base == "json", base == "VERSION", base == "repositories", base == "oci-layout":
		return maxSmallFile
	case strings.HasPrefix(name, blobFolder):
		return maxSmallBlob
	case !strings.HasSuffix(base, ".tar") && !strings.HasSuffix(base, ".gz") && isHexName(base):
		return maxSmallBlob // a configuration without .json, as some builders name it
	}
	return 4 << 10 // an empty layer
}

func isHexName(base string) bool { return isHex(strings.TrimPrefix(base, "sha256:")) }

func declared(name string) string {
	if h, ok := strings.CutPrefix(name, blobFolder); ok && isHex(h) {
		return "sha256:" + h
	}
	return ""
}

// resolve follows the links of a docker-save tar, which stand for layers that
// two images share.
func (t *imageTar) resolve(name string) (string, error) {
	name = path.Clean(name)
	for range 16 {
		next, ok := t.links[name]
		if !ok {
			return name, nil
		}
		name = next
	}
	return "", fmt.Errorf("%q is a link that does not end", name)
}

func (t *imageTar) file(name string) ([]byte, error) {
	name, err := t.resolve(name)
	if err != nil {
		return nil, err
	}
	b, ok := t.small[name]
	if !ok {
		return nil, fmt.Errorf("%q is not in it", name)
	}
	if d := declared(name); d != "" && DigestOf(b) != d {
		return nil, fmt.Errorf("%q does not have the digest that its name says", name)
	}
	return b, nil
}

func (t *imageTar) images() (*Images, error) {
	docker, isDocker := t.small[dockerJSON]
	index, isOCI := t.small[ociIndexJSON]
	out := &Images{}
	var err error
	switch {
	case isDocker:
		err = t.dockerSave(docker, out)
		if err == nil && isOCI {
			// docker 25 and later write both; the layout's manifests are kept
			// where they say more.
			t.adopt(index, out)
		}
	case isOCI:
		err = t.layout(index, nil, out, 0)
	default:
		err = errors.New("it has neither a manifest.json nor an index.json")
	}
	if err == nil && len(out.Images) == 0 {
		err = errors.New("it holds no image")
	}
	return out, err
}

type configFile struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	RootFS       struct {
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// platformOf reads what a configuration says of the platform and the layers.
func platformOf(config []byte) (ppa.Platform, []string, error) {
	var c configFile
	if err := json.Unmarshal(config, &c); err != nil {
		return ppa.Platform{}, nil, fmt.Errorf("read the image's configuration: %w", err)
	}
	for _, d := range c.RootFS.DiffIDs {
		if !IsDigest(d) {
			return ppa.Platform{}, nil, fmt.Errorf("the image's configuration has %q as a diff ID", d)
		}
	}
	if c.OS == "" {
		c.OS = "linux"
	}
	return ppa.Platform{OS: c.OS, Architecture: c.Architecture}, c.RootFS.DiffIDs, nil
}

func (t *imageTar) dockerSave(manifest []byte, out *Images) error {
	var list []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(manifest, &list); err != nil {
		return fmt.Errorf("read its manifest.json: %w", err)
	}
	for _, m := range list {
		img := Image{Refs: m.RepoTags}
		var err error
		if img.Config, err = t.file(m.Config); err != nil {
			return fmt.Errorf("configuration of image %q: %w", m.RepoTags, err)
		}
		if h := strings.TrimSuffix(path.Base(m.Config), ".json"); isHex(h) && DigestOf(img.Config) != "sha256:"+h {
			return fmt.Errorf("configuration %q does not have the digest that its name says", m.Config)
		}
		var diffs []string
		if img.Platform, diffs, err = platformOf(img.Config); err != nil {
			return err
		}
		if len(diffs) != len(m.Layers) {
			return fmt.Errorf("image %q has %d layers, its configuration names %d", m.RepoTags, len(m.Layers), len(diffs))
		}
		for n, p := range m.Layers {
			if p, err = t.layerPath(p); err != nil {
				return fmt.Errorf("layer of image %q: %w", m.RepoTags, err)
			}
			img.Layers = append(img.Layers, Layer{Path: p, DiffID: diffs[n]})
		}
		out.Images = append(out.Images, img)
	}
	return nil
}

// layerPath finds a layer's file, which may be a link.
func (t *imageTar) layerPath(p string) (string, error) {
	p, err := t.resolve(p)
	if err != nil {
		return "", err
	}
	if _, small := t.small[p]; !small && !t.big[p] {
		return "", fmt.Errorf("%q is not in it", p)
	}
	return p, nil
}

type ociDescriptor struct {
	Descriptor
	Annotations map[string]string `json:"annotations"`
	Platform    *ppa.Platform     `json:"platform"`
}

type ociManifest struct {
	MediaType string          `json:"mediaType"`
	Config    ociDescriptor   `json:"config"`
	Layers    []ociDescriptor `json:"layers"`
	Manifests []ociDescriptor `json:"manifests"`
}

func refOf(d ociDescriptor) []string {
	for _, k := range []string{annotationCtr, annotationRef} {
		if v := d.Annotations[k]; v != "" {
			return []string{v}
		}
	}
	return nil
}

// layout reads the manifests of an OCI layout, lists in lists included.
func (t *imageTar) layout(index []byte, refs []string, out *Images, depth int) error {
	var x ociManifest
	if err := json.Unmarshal(index, &x); err != nil {
		return fmt.Errorf("read its index.json: %w", err)
	}
	if depth > 4 {
		return errors.New("lists stand in lists without end")
	}
	for _, d := range x.Manifests {
		names := refOf(d)
		if names == nil {
			names = refs
		}
		b, err := t.blob(d.Digest)
		if err != nil {
			if depth > 0 {
				continue // a list may name platforms that were not saved
			}
			return err
		}
		var m ociManifest
		if err := json.Unmarshal(b, &m); err != nil {
			return fmt.Errorf("read manifest %s: %w", d.Digest, err)
		}
		kind := d.MediaType
		if kind == "" {
			kind = m.MediaType
		}
		if len(m.Manifests) > 0 {
			l := List{Refs: names, Raw: b, MediaType: kind}
			for _, c := range m.Manifests {
				l.Manifests = append(l.Manifests, c.Digest)
			}
			out.Lists = append(out.Lists, l)
			if err := t.layout(b, nil, out, depth+1); err != nil {
				return err
			}
			continue
		}
		if err := t.layoutImage(m, b, kind, names, out); err != nil {
			return err
		}
	}
	return nil
}

func (t *imageTar) layoutImage(m ociManifest, raw []byte, kind string, refs []string, out *Images) error {
	if kind == "" {
		kind = TypeOCI
	}
	img := Image{Refs: refs, Manifest: raw, ManifestType: kind}
	var err error
	if img.Config, err = t.blob(m.Config.Digest); err != nil {
		return err
	}
	var diffs []string
	if img.Platform, diffs, err = platformOf(img.Config); err != nil {
		return err
	}
	if len(diffs) != len(m.Layers) {
		if len(diffs) == 0 {
			return nil // an attestation or another artifact, not an image
		}
		return fmt.Errorf("manifest %s has %d layers, its configuration names %d", DigestOf(raw), len(m.Layers), len(diffs))
	}
	for n, l := range m.Layers {
		h, ok := strings.CutPrefix(l.Digest, "sha256:")
		if !ok || !isHex(h) {
			return fmt.Errorf("manifest %s names a layer %q", DigestOf(raw), l.Digest)
		}
		p, err := t.layerPath(blobFolder + h)
		if err != nil {
			return err
		}
		img.Layers = append(img.Layers, Layer{Path: p, DiffID: diffs[n], Digest: l.Digest, MediaType: l.MediaType})
	}
	out.Images = append(out.Images, img)
	return nil
}

// adopt takes from the OCI layout what docker-save does not say: manifests
// whose layers stand compressed, and lists.
func (t *imageTar) adopt(index []byte, out *Images) {
	var oci Images
	if err := t.layout(index, nil, &oci, 0); err != nil {
		return // docker-save's own manifest is whole; the layout beside it is an extra
	}
	for n := range out.Images {
		img := &out.Images[n]
		i := slices.IndexFunc(oci.Images, func(o Image) bool { return bytes.Equal(o.Config, img.Config) })
		if i < 0 || !slices.ContainsFunc(oci.Images[i].Layers, func(l Layer) bool { return l.Digest != l.DiffID }) {
			continue
		}
		img.Layers, img.Manifest, img.ManifestType = oci.Images[i].Layers, oci.Images[i].Manifest, oci.Images[i].ManifestType
	}
}

func (t *imageTar) blob(digest string) ([]byte, error) {
	h, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || !isHex(h) {
		return nil, fmt.Errorf("%q is not a digest", digest)
	}
	return t.file(blobFolder + h)
}

// smallLayers gives the layers that were kept to the LayerFunc.
func (t *imageTar) smallLayers(out *Images) error {
	done := map[string]bool{}
	for _, img := range out.Images {
		for _, l := range img.Layers {
			b, small := t.small[l.Path]
			if !small || done[l.Path] {
				continue
			}
			done[l.Path] = true
			if err := t.layer(l.Path, int64(len(b)), declared(l.Path), bytes.NewReader(b)); err != nil {
				return err
			}
		}
	}
	return nil
}
