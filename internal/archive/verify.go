package archive

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Content is what an archive holds, as inspect shows it.
type Content struct {
	Manifest ppa.Manifest
	Members  []IndexMember // Digest is "" where it was not computed
	Images   []ContentImage
	Lists    []List
}

// ContentImage is an image and the member that holds it.
type ContentImage struct {
	Image
	Member string
	Size   int64 // of the layers, as they stand in the archive
}

// Role of a member.
type Role int

// The roles.
const (
	Other Role = iota
	ManifestJSON
	ManifestYAML
	ChartPackage
	ImageTar
	OurIndex
)

// RoleOf tells a member's role by its name; a manifest may name images and
// charts in other places, so ask Content for those.
func RoleOf(name string) Role {
	switch {
	case name == ppa.JSONName:
		return ManifestJSON
	case name == ppa.YAMLName:
		return ManifestYAML
	case name == IndexName:
		return OurIndex
	case strings.HasPrefix(name, "images/"):
		return ImageTar
	case strings.HasPrefix(name, "charts/"):
		return ChartPackage
	}
	return Other
}

// ReadSmall reads a member that must be small.
func ReadSmall(name string, size int64, r io.Reader) ([]byte, error) {
	if size > maxSmall {
		return nil, badContent(fmt.Errorf("%q has %d bytes, too many for what it is", name, size)).WithHint(notOurs)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, cutOff(err)
	}
	return b, nil
}

// Manifests gathers an archive's manifests while it streams by.
type Manifests struct{ json, yaml *ppa.Manifest }

// Take reads a manifest member.
func (m *Manifests) Take(role Role, b []byte) error {
	parse, to := ppa.ParseJSON, &m.json
	if role == ManifestYAML {
		parse, to = ppa.ParseYAML, &m.yaml
	}
	got, err := parse(b)
	if err != nil {
		return badContent(err).WithHint("the manifest is not well-formed; get the archive again from its maker")
	}
	*to = &got
	return nil
}

// Any says whether one was there.
func (m *Manifests) Any() bool { return m.json != nil || m.yaml != nil }

// Merged joins what was there.
func (m *Manifests) Merged() (ppa.Manifest, error) {
	out, err := ppa.Merge(m.json, m.yaml)
	if err != nil {
		return out, badContent(err).WithHint("the manifests of the archive are not there or disagree; get it again from its maker")
	}
	return out, nil
}

// Head reads the manifests up to the first image, or to the end when none
// comes before it. early says that reading stopped at the first image, so that
// one more pass may read images in the light of the manifest.
func (a *Archive) Head(ctx context.Context, lim Limits) (m ppa.Manifest, early bool, err error) {
	if a.Index != nil {
		m, err := a.Manifest()
		return m, true, err
	}
	var found Manifests
	err = a.Walk(ctx, lim, nil, func(name string, size int64, r io.Reader) error {
		switch role := RoleOf(name); role {
		case ManifestJSON, ManifestYAML:
			b, err := ReadSmall(name, size, r)
			if err != nil {
				return err
			}
			return found.Take(role, b)
		case ImageTar:
			if found.Any() {
				early = true
				return ErrStop
			}
		case Other, ChartPackage, OurIndex:
		}
		return nil
	})
	if err != nil {
		return m, early, err
	}
	m, err = found.Merged()
	return m, early, named(a.Name, err)
}

// Inspect reads what an archive holds: from the index of one of ours, else by
// reading it all.
func (a *Archive) Inspect(ctx context.Context, lim Limits) (*Content, error) {
	if a.Index == nil {
		return a.read(ctx, lim, false, nil)
	}
	m, err := a.Manifest()
	if err != nil {
		return nil, err
	}
	c := &Content{Manifest: m, Members: a.Index.Members, Images: a.indexImages()}
	return c, nil
}

// indexImages are the images as the index has them.
func (a *Archive) indexImages() (all []ContentImage) {
	for _, i := range a.Index.Images {
		o, arch, _ := strings.Cut(i.Platform, "/")
		ci := ContentImage{Member: i.Member, Image: Image{Refs: i.Refs, Platform: ppa.Platform{OS: o, Architecture: arch}}}
		for _, l := range i.Layers {
			ci.Size += l.Size
			ci.Layers = append(ci.Layers, Layer{DiffID: l.DiffID, Digest: l.Digest, MediaType: l.MediaType})
		}
		all = append(all, ci)
	}
	return all
}

// Verify reads everything and checks every digest: of blobs by their names, of
// layers by the diff IDs that the images' configurations name, of all members
// by the index of one of ours. charts, when it is there, looks at each packed
// chart.
func (a *Archive) Verify(ctx context.Context, lim Limits, charts func(name string, pkg []byte) error) (*Content, error) {
	if a.Index != nil {
		for _, b := range a.Index.Blobs {
			if err := a.verifyBlob(ctx, b); err != nil {
				return nil, err
			}
		}
	}
	return a.read(ctx, lim, true, charts)
}

func (a *Archive) verifyBlob(ctx context.Context, b IndexBlob) error {
	h := sha256.New()
	if _, err := io.Copy(h, stopped{ctx, openStored(a.in, a.base+b.Offset, b.Size, 0)}); err != nil {
		return named(a.Name, err)
	}
	if sum(h) != b.Digest {
		return named(a.Name, damaged("a blob does not have the digest %s that the index has", b.Digest))
	}
	return nil
}

// reading is one pass over an archive for Inspect and Verify.
type reading struct {
	a       *Archive
	lim     Limits
	check   bool
	charts  func(name string, pkg []byte) error
	layers  *Budget // of what compressed layers unpack to
	found   Manifests
	tars    map[string]*Images // what each member was found to hold
	content Content
}

func (a *Archive) read(ctx context.Context, lim Limits, check bool, charts func(name string, pkg []byte) error) (*Content, error) {
	v := &reading{a: a, lim: lim, check: check, charts: charts, layers: lim.Budget(), tars: map[string]*Images{}}
	if err := a.Walk(ctx, lim, nil, v.member); err != nil {
		return nil, err
	}
	err := v.finish()
	return &v.content, named(a.Name, err)
}

func (v *reading) member(name string, size int64, r io.Reader) error {
	h := sha256.New()
	in := r
	if v.check {
		in = io.TeeReader(r, h)
	}
	if err := v.sortIn(name, size, in); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return cutOff(err)
	}
	m := IndexMember{Name: name, Size: size}
	if v.check {
		m.Digest = sum(h)
	}
	v.content.Members = append(v.content.Members, m)
	return nil
}

func (v *reading) sortIn(name string, size int64, r io.Reader) error {
	switch role := RoleOf(name); role {
	case ManifestJSON, ManifestYAML:
		b, err := ReadSmall(name, size, r)
		if err != nil {
			return err
		}
		return v.found.Take(role, b)
	case ImageTar:
		return v.images(name, r)
	case OurIndex:
		if v.a.Seekable() {
			return nil
		}
		b, err := ReadSmall(name, size, r)
		if err != nil {
			return err
		}
		return RefuseDelta(b)
	case ChartPackage:
		if v.charts == nil {
			return nil
		}
		b, err := ReadSmall(name, size, r)
		if err != nil {
			return err
		}
		return v.charts(name, b)
	case Other:
	}
	return nil
}

type seenLayer struct {
	size           int64
	digest, diffID string
}

func (v *reading) images(name string, r io.Reader) error {
	if v.a.Index != nil && v.a.Index.Base != "" {
		return nil // a delta's images need the layers of its base
	}
	layers := map[string]seenLayer{}
	got, err := ReadImages(r, name, v.lim, func(p string, size int64, declared string, r io.Reader) error {
		l := seenLayer{size: size}
		if v.check {
			var err error
			if l.digest, l.diffID, err = hashLayer(r, v.layers); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if declared != "" && l.digest != declared {
				return badContent(fmt.Errorf("%s: %q does not have the digest that its name says", name, p)).WithHint(copyAgain)
			}
		}
		layers[p] = l
		return nil
	})
	if err != nil {
		return err
	}
	for _, i := range got.Images {
		ci := ContentImage{Image: i, Member: name}
		for _, l := range i.Layers {
			was := layers[l.Path]
			ci.Size += was.size
			if v.check && was.diffID != l.DiffID {
				return badContent(fmt.Errorf("%s: layer %q of image %q does not have the diff ID %s", name, l.Path, i.Refs, l.DiffID)).WithHint(copyAgain)
			}
		}
		v.content.Images = append(v.content.Images, ci)
	}
	v.content.Lists = append(v.content.Lists, got.Lists...)
	v.tars[name] = got
	return nil
}

// hashLayer gives the digest of a layer as it stands there, and of what it
// unpacks to.
func hashLayer(r io.Reader, most *Budget) (digest, diffID string, err error) {
	raw, unpacked := sha256.New(), sha256.New()
	br := bufio.NewReaderSize(io.TeeReader(r, raw), 256<<10)
	in, err := Unpack(br)
	if err != nil {
		return "", "", err
	}
	if _, err := io.CopyBuffer(unpacked, most.Reader(in), make([]byte, 256<<10)); err != nil {
		return "", "", cutOff(err)
	}
	if _, err := io.Copy(io.Discard, br); err != nil {
		return "", "", cutOff(err)
	}
	return sum(raw), sum(unpacked), nil
}

func (v *reading) finish() error {
	m, err := v.found.Merged()
	if err != nil {
		return err
	}
	v.content.Manifest = m
	if v.a.Index != nil && v.a.Index.Base != "" {
		v.content.Images = v.a.indexImages()
	}
	if err := CheckMembers(m, v.content.Members); err != nil {
		return err
	}
	if !v.check {
		return nil
	}
	if err := v.agree(); err != nil || v.a.Index == nil {
		return err
	}
	for _, want := range v.a.Index.Members {
		n := slices.IndexFunc(v.content.Members, func(m IndexMember) bool { return m.Name == want.Name })
		if n < 0 || v.content.Members[n].Size != want.Size || v.content.Members[n].Digest != want.Digest {
			return damaged("%q does not have the digest that the index has", want.Name)
		}
	}
	return nil
}

// agree looks for each image of the manifest where it should stand.
func (v *reading) agree() error {
	m, err := Assign(v.content.Manifest, v.content.Images)
	if err != nil {
		return err
	}
	for _, e := range m.Images {
		got := v.tars[e.Archive]
		if got == nil || got.ListOf(e) >= 0 {
			continue
		}
		img, err := Pick(got, e)
		if err == nil {
			err = CheckPlatform(e, img.Platform)
		}
		if err != nil {
			return fault.New(fault.BadContent, "find image "+e.Ref()+" in archive", v.a.Name, err).WithHint("%s", fault.HintOf(err))
		}
	}
	return nil
}

// CheckMembers says which members the manifest names that are not there.
func CheckMembers(m ppa.Manifest, members []IndexMember) error {
	images, charts := Missing(m, members)
	var errs []error
	for _, i := range images {
		errs = append(errs, fmt.Errorf("image %q: %w", i.Ref(), NoMember(i.Archive)))
	}
	for _, c := range charts {
		errs = append(errs, fmt.Errorf("chart %q is missing", path.Base(c.Archive)))
	}
	if len(errs) == 0 {
		return nil
	}
	return badContent(errors.Join(errs...)).WithHint(lacking)
}

const lacking = "the manifest names what the archive does not hold; get the archive again from its maker"

// NoMember is the fault of a member that the manifest names and that is missing.
func NoMember(name string) error {
	return fault.Newf(fault.BadContent, "", "", "its member %q is missing", name).WithHint(lacking)
}

// Missing are the images and charts whose members are not there.
func Missing(m ppa.Manifest, members []IndexMember) (images []ppa.Image, charts []ppa.Chart) {
	has := func(name string) bool {
		return slices.ContainsFunc(members, func(m IndexMember) bool { return m.Name == name })
	}
	for _, i := range m.Images {
		if i.Archive != "" && !has(i.Archive) {
			images = append(images, i)
		}
	}
	for _, c := range m.Charts {
		if !has(c.Archive) {
			charts = append(charts, c)
		}
	}
	return images, charts
}

// RefuseDelta says, of the index that comes first on a stream, when it is of a
// delta: what a delta leaves out can be told by its index alone, and to look
// the rest up the archive must be read from there.
func RefuseDelta(index []byte) error {
	x, err := parseIndex(index)
	if err != nil || x.Base == "" {
		return nil //nolint:nilerr // a stream is read without its index
	}
	return fault.Usagef("a delta cannot be read from standard input").WithHint("give it as a file; load can keep it on disk for a while, by --spool-dir")
}
