package pack

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Repack makes an archive of ours of any other: the same manifests, charts and
// images, every layer compressed once.
type Repack struct {
	Limits archive.Limits
	Batch  bool   // all images in one member, each layer once
	Temp   string // folder for layers on their way, since the index comes first
	Level  int    // of gzip

	spool *os.File
	at    int64
	known map[string]archive.Blob // layers by what they are in the source: their digest there
}

// Build reads an archive and says what the new one is to hold; call Close when
// it is written.
func (p *Repack) Build(ctx context.Context, a *archive.Archive) (archive.Build, error) {
	if a.Index != nil && a.Index.Base != "" {
		return archive.Build{}, fault.Newf(fault.Usage, "repack archive", a.Name, "it is a delta, which lacks layers").WithHint("give the whole new archive")
	}
	if a.Index != nil {
		return fromOurs(a, p.Batch)
	}
	p.known = map[string]archive.Blob{}
	f, err := os.CreateTemp(p.Temp, ".layers-")
	if err != nil {
		return archive.Build{}, fault.New(fault.Other, "keep layers in", p.Temp, err)
	}
	p.spool = f
	if err := os.Remove(f.Name()); err != nil { // it lives as long as it is open
		return archive.Build{}, fault.New(fault.Other, "keep layers in", p.Temp, err)
	}
	return p.foreign(ctx, a)
}

// Close frees the layers.
func (p *Repack) Close() {
	if p.spool != nil {
		_ = p.spool.Close() // nobody reads it any more
	}
}

// foreign reads an archive of another maker.
func (p *Repack) foreign(ctx context.Context, a *archive.Archive) (b archive.Build, err error) {
	var found archive.Manifests
	var members []archive.IndexMember
	tars := map[string]*archive.Images{}
	layers := map[string]map[string]archive.Blob{}
	err = a.Walk(ctx, p.Limits, nil, func(name string, size int64, r io.Reader) error {
		members = append(members, archive.IndexMember{Name: name, Size: size})
		switch role := archive.RoleOf(name); role {
		case archive.ManifestJSON, archive.ManifestYAML:
			data, err := archive.ReadSmall(name, size, r)
			if err != nil {
				return err
			}
			return found.Take(role, data)
		case archive.ChartPackage:
			data, err := archive.ReadSmall(name, size, r)
			b.Files = append(b.Files, archive.File{Name: name, Data: data})
			return err
		case archive.ImageTar:
			layers[name] = map[string]archive.Blob{}
			got, err := archive.ReadImages(r, name, p.Limits, func(path string, _ int64, declared string, in io.Reader) error {
				bl, err := p.layer(in, declared)
				layers[name][path] = bl
				return err
			})
			tars[name] = got
			return err
		case archive.Other:
		}
		return nil
	})
	if err != nil {
		return b, err
	}
	m, err := found.Merged()
	if err != nil {
		return b, err
	}
	if err := archive.CheckMembers(m, members); err != nil {
		return b, err
	}
	return b, p.assemble(&b, m, tars, layers)
}

// assemble names the images as the manifest does.
func (p *Repack) assemble(b *archive.Build, m ppa.Manifest, tars map[string]*archive.Images, layers map[string]map[string]archive.Blob) error {
	out := m
	out.Images = nil
	var lists []ppa.Image // last, as they are when the archive is read again
	done := map[string]bool{}
	add := func(e ppa.Image, img archive.Image, member string) error {
		n, err := newImage(e, img, layers[member])
		if err != nil {
			return err
		}
		e.Archive = p.member(e)
		out.Images, done[e.Ref()] = append(out.Images, e), true
		b.Members = appendImage(b.Members, e.Archive, n)
		return nil
	}
	for _, e := range m.Images {
		if l, member, ok := findList(e, tars); ok {
			var imgs []archive.Image
			if e, imgs = split(e, l, tars[member]); len(imgs) == 0 {
				return fault.Newf(fault.BadContent, "repack list", e.Ref(), "it names no image that is in member %q", member)
			}
			lists = append(lists, e)
			for n, r := range e.References {
				if done[r.Ref()] {
					return fault.Newf(fault.BadContent, "repack list", e.Ref(), "its image for %s would be called %q, as another is", r.Platform, r.Ref())
				}
				if err := add(ppa.Image{Name: r.Name, Tag: r.Tag}, imgs[n], member); err != nil {
					return err
				}
			}
			continue
		}
		refs := []ppa.Image{e}
		if e.IsList() {
			lists = append(lists, e)
			refs = nil
			for _, r := range e.References {
				refs = append(refs, ppa.Image{Name: r.Name, Tag: r.Tag})
			}
		}
		for _, r := range refs {
			if done[r.Ref()] {
				continue
			}
			img, member, err := p.find(r, tars)
			if err != nil {
				return err
			}
			if err := add(r, img, member); err != nil {
				return err
			}
		}
	}
	out.Images = append(out.Images, lists...)
	b.Manifest = out
	return nil
}

// findList looks for a list in an OCI layout that the manifest means.
func findList(e ppa.Image, tars map[string]*archive.Images) (archive.List, string, bool) {
	got := tars[e.Archive]
	if got == nil {
		return archive.List{}, "", false
	}
	n := got.ListOf(e)
	if n < 0 {
		return archive.List{}, "", false
	}
	return got.Lists[n], e.Archive, true
}

// split makes of a list in one member what an archive of ours has: the list by
// name alone, and each of its images under a name and in a member of its own.
func split(e ppa.Image, l archive.List, from *archive.Images) (ppa.Image, []archive.Image) {
	var imgs []archive.Image
	e.Archive, e.References = "", nil
	for _, i := range from.Images {
		if i.Manifest != nil && slices.Contains(l.Manifests, archive.DigestOf(i.Manifest)) {
			imgs = append(imgs, i)
			e.References = append(e.References, ppa.Reference{Name: e.Name + "-" + i.Platform.Architecture, Tag: e.Tag, Platform: i.Platform})
		}
	}
	return e, imgs
}

// member is the name of an image's member in the new archive.
func (p *Repack) member(i ppa.Image) string {
	if p.Batch {
		return "images/all.tar"
	}
	return "images/" + strings.NewReplacer("/", "-", ":", "-").Replace(i.Ref()) + ".tar"
}

func appendImage(all []archive.ImageMember, member string, i archive.NewImage) []archive.ImageMember {
	for n := range all {
		if all[n].Name == member {
			all[n].Images = append(all[n].Images, i)
			return all
		}
	}
	return append(all, archive.ImageMember{Name: member, Images: []archive.NewImage{i}})
}

// find looks for the image that the manifest means.
func (p *Repack) find(e ppa.Image, tars map[string]*archive.Images) (archive.Image, string, error) {
	for _, member := range sortedKeys(tars) {
		got := tars[member]
		called := slices.ContainsFunc(got.Images, func(i archive.Image) bool { return archive.Named(i.Refs, e.Ref()) })
		if e.Archive == member || (e.Archive == "" && called) {
			i, err := archive.Pick(got, e)
			if err == nil {
				err = archive.CheckPlatform(e, i.Platform)
			}
			return i, member, err
		}
	}
	return archive.Image{}, "", fault.Newf(fault.BadContent, "find image", e.Ref(), "it is in no member").WithHint("the manifest and the images disagree; get the archive again from its maker")
}

func sortedKeys[T any](m map[string]T) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func newImage(e ppa.Image, img archive.Image, layers map[string]archive.Blob) (archive.NewImage, error) {
	n := archive.NewImage{Refs: []string{e.Ref()}, Platform: img.Platform, Config: img.Config}
	same := img.Manifest != nil
	for _, l := range img.Layers {
		bl := layers[l.Path]
		if bl.DiffID != l.DiffID {
			return n, fault.Newf(fault.BadContent, "read image", e.Ref(), "layer %q does not have the diff ID %s", l.Path, l.DiffID).WithHint("the archive was damaged or changed; run `kmsctl archive verify`")
		}
		same = same && bl.Digest == l.Digest
		n.Layers = append(n.Layers, bl)
	}
	if same {
		n.Manifest, n.ManifestType = img.Manifest, img.ManifestType
	}
	return n, nil
}

// layer keeps one layer, compressed, and gives it as a blob.
func (p *Repack) layer(in io.Reader, declared string) (archive.Blob, error) {
	br := bufio.NewReaderSize(in, 256<<10)
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return archive.Blob{}, err
	}
	start := p.at
	source, stored, diff := sha256.New(), sha256.New(), sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(&offsetWriter{p}, stored), 1<<20)
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		err = through(br, out, diff)
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		// Registries and runtimes of the age of these archives know gzip alone.
		err = recompress(io.TeeReader(br, source), out, diff, p.Level)
	default:
		err = compress(br, out, diff, p.Level)
	}
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		return archive.Blob{}, err
	}
	bl := archive.Blob{Descriptor: archive.Descriptor{MediaType: archive.TypeLayer, Size: p.at - start, Digest: hexSum(stored)}, DiffID: hexSum(diff)}
	if was, ok := p.known[bl.DiffID]; ok { // a twin: its room is used again
		p.at = start
		return was, nil
	}
	if declared != "" && declared != bl.Digest && declared != bl.DiffID && declared != hexSum(source) {
		return archive.Blob{}, fault.Newf(fault.BadContent, "read layer", declared, "it does not have the digest that its name says")
	}
	bl.Open = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(p.spool, start, bl.Size)), nil }
	p.known[bl.DiffID] = bl
	return bl, nil
}

// offsetWriter writes at the spool's end.
type offsetWriter struct{ p *Repack }

func (w *offsetWriter) Write(b []byte) (int, error) {
	n, err := w.p.spool.WriteAt(b, w.p.at)
	w.p.at += int64(n)
	if err != nil {
		err = fault.New(fault.Other, "keep layers in", w.p.Temp, err).WithHint("is there room for the images' layers?")
	}
	return n, err
}

func compress(in io.Reader, out io.Writer, diff hash.Hash, level int) error {
	z, err := gzip.NewWriterLevel(out, level)
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(io.MultiWriter(z, diff), onlyReader{in}, make([]byte, 256<<10)); err != nil {
		return err
	}
	return z.Close()
}

// recompress unpacks a layer and compresses it by gzip.
func recompress(in io.Reader, out io.Writer, diff hash.Hash, level int) error {
	raw := bufio.NewReaderSize(in, 256<<10)
	u, err := archive.Unpack(raw)
	if err != nil {
		return err
	}
	if err := compress(u, out, diff, level); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, raw) // what is behind it counts for the digest
	return err
}

// through keeps a layer as it stands and hashes what it unpacks to.
func through(in io.Reader, out io.Writer, diff hash.Hash) error {
	tee := bufio.NewReaderSize(io.TeeReader(in, out), 256<<10)
	u, err := archive.Unpack(tee)
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(diff, onlyReader{u}, make([]byte, 256<<10)); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, tee)
	return err
}

type onlyReader struct{ io.Reader }

func hexSum(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// fromOurs takes an archive of ours as it is: its blobs stay where they are.
func fromOurs(a *archive.Archive, batch bool) (b archive.Build, err error) {
	if b.Manifest, err = a.Manifest(); err != nil {
		return b, err
	}
	for _, m := range a.Index.Members {
		if m.Name == ppa.JSONName || m.Name == ppa.YAMLName || archive.RoleOf(m.Name) == archive.ImageTar {
			continue
		}
		data, err := a.Member(m.Name)
		if err != nil {
			return b, err
		}
		b.Files = append(b.Files, archive.File{Name: m.Name, Data: data})
	}
	b.Base = a.Index.Base
	r := Repack{Batch: batch}
	for _, i := range a.Index.Images {
		n, err := oursImage(a, i)
		if err != nil {
			return b, err
		}
		member := i.Member
		if batch {
			member = r.member(ppa.Image{})
		}
		b.Members = appendImage(b.Members, member, n)
		for k := range b.Manifest.Images {
			if b.Manifest.Images[k].Archive == i.Member {
				b.Manifest.Images[k].Archive = member
			}
		}
	}
	return b, nil
}

func oursImage(a *archive.Archive, i archive.IndexImage) (archive.NewImage, error) {
	o, arch, _ := strings.Cut(i.Platform, "/")
	n := archive.NewImage{Refs: i.Refs, Platform: ppa.Platform{OS: o, Architecture: arch}, ManifestType: i.Manifest.MediaType}
	var err error
	if n.Config, err = readBlob(a, i.Config.Digest); err != nil {
		return n, err
	}
	if n.Manifest, err = readBlob(a, i.Manifest.Digest); err != nil {
		return n, err
	}
	for _, l := range i.Layers {
		n.Layers = append(n.Layers, archive.Blob{Descriptor: l.Descriptor, DiffID: l.DiffID, Open: func() (io.ReadCloser, error) {
			r, err := a.Blob(l.Digest, 0)
			return io.NopCloser(r), err
		}})
	}
	return n, nil
}

func readBlob(a *archive.Archive, digest string) ([]byte, error) {
	r, err := a.Blob(digest, 0)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	if err == nil && archive.DigestOf(b) != digest {
		err = fmt.Errorf("blob %s does not have that digest", digest)
	}
	return b, err
}

// Delta makes an archive that holds of an archive only what a base lacks. Both
// are of ours.
func Delta(base, a *archive.Archive) (archive.Build, error) {
	for _, x := range []*archive.Archive{base, a} {
		if x.Index == nil {
			return archive.Build{}, fault.Newf(fault.Usage, "compare archive", x.Name, "it is not one of kmsctl's own").WithHint("make one of it first: kmsctl archive repack %s --output-file NEW", x.Name)
		}
		if x.Index.Base != "" {
			return archive.Build{}, fault.Newf(fault.Usage, "compare archive", x.Name, "it is a delta itself").WithHint("give the whole archives")
		}
	}
	b, err := fromOurs(a, false)
	if err != nil {
		return b, err
	}
	have := map[string]bool{}
	for _, bl := range base.Index.Blobs {
		have[bl.Digest] = true
	}
	b.Base = archive.DigestOf(base.Raw)
	// Configurations and manifests are small, and who reads a delta needs them.
	for _, i := range a.Index.Images {
		delete(have, i.Config.Digest)
		delete(have, i.Manifest.Digest)
	}
	b.Has = func(digest string) bool { return have[digest] }
	return b, nil
}
