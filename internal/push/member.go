package push

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"sync"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// memberRun is one member of images on its way.
type memberRun struct {
	s      *stream
	name   string
	repo   string // where its layers are uploaded
	wanted map[string]bool
	jobs   sync.WaitGroup
}

func (r *memberRun) key(path string) string { return r.name + "\x00" + path }

func (r *memberRun) wait() { r.jobs.Wait() }

// fail gives the pass up when there is no sense in going on: the registry is
// gone, or the person stopped.
func (r *memberRun) fail(err error) {
	switch fault.KindOf(err) {
	case fault.Unreachable, fault.Stopped:
		r.s.cancel(about(err, "push layers of", r.name))
	default:
	}
}

// finish names the images of a member, when their layers are there.
func (r *memberRun) finish(got *archive.Images, entries []ppa.Image) {
	for _, e := range entries {
		r.s.mu.Lock()
		named := r.s.named[e.Ref()]
		r.s.mu.Unlock()
		if named {
			continue // an earlier pass did it
		}
		err := r.entry(got, e)
		if errors.Is(err, errLater) {
			continue
		}
		r.s.mu.Lock()
		r.s.named[e.Ref()] = true
		r.s.mu.Unlock()
		if err != nil {
			r.s.done(Object{Kind: "image", Name: e.Ref(), Target: r.s.target(r.s.Repository(e.Name), e.Tag)}, err)
		}
	}
}

// errLater says that a layer is read in the next pass.
var errLater = errors.New("a layer has to be read once more")

func (r *memberRun) entry(got *archive.Images, e ppa.Image) error {
	repo := r.s.Repository(e.Name)
	if n := got.ListOf(e); n >= 0 {
		return r.list(got, got.Lists[n], repo, e)
	}
	img, err := archive.Pick(got, e)
	if err == nil {
		err = archive.CheckPlatform(e, img.Platform)
	}
	if err != nil {
		return err
	}
	body, kind, err := r.image(img, repo)
	if err != nil {
		return err
	}
	o, err := r.s.put(e, "image", repo, kind, body)
	if err != nil {
		return err
	}
	r.s.mu.Lock()
	r.s.loaded = append(r.s.loaded, markedImage{Name: e.Name, Tag: e.Tag, Digest: o.Digest, Config: archive.DigestOf(img.Config), DiffIDs: diffIDs(img)})
	r.s.mu.Unlock()
	r.s.done(o, nil)
	return nil
}

// put gives a manifest its tag, unless the registry has it there already.
func (s *stream) put(e ppa.Image, what, repo, kind string, body []byte) (Object, error) {
	o := Object{Kind: what, Name: e.Ref(), Target: s.target(repo, e.Tag), Digest: archive.DigestOf(body), Status: Pushed}
	have, err := s.Registry.ManifestDigest(s.ctx, repo, e.Tag)
	if err == nil && have == o.Digest {
		o.Status = Present
		return o, nil
	}
	if err == nil {
		err = s.Registry.PutManifest(s.ctx, repo, e.Tag, kind, body)
	}
	return o, err
}

func diffIDs(img archive.Image) []string {
	out := []string{}
	for _, l := range img.Layers {
		out = append(out, l.DiffID)
	}
	return out
}

// image brings an image's layers and configuration into a repository and gives
// its manifest.
func (r *memberRun) image(img archive.Image, repo string) (body []byte, kind string, err error) {
	var layers []archive.Descriptor
	same := img.Manifest != nil
	for _, l := range img.Layers {
		out, err := r.layerFor(l, repo)
		if err != nil {
			return nil, "", err
		}
		same = same && out.Digest == l.Digest
		layers = append(layers, archive.Descriptor{MediaType: out.MediaType, Size: out.Size, Digest: out.Digest})
	}
	config := archive.Descriptor{MediaType: archive.TypeConfig, Size: int64(len(img.Config)), Digest: archive.DigestOf(img.Config)}
	if err := r.s.bring(r.s.ctx, repo, config, func(from int64) (io.Reader, error) { return bytes.NewReader(img.Config[from:]), nil }, nil); err != nil {
		return nil, "", err
	}
	if same {
		return img.Manifest, img.ManifestType, nil
	}
	kind, body = archive.Manifest(config, layers)
	return body, kind, nil
}

// layerFor gives what a layer became, in the repository that needs it.
func (r *memberRun) layerFor(l archive.Layer, repo string) (Layer, error) {
	r.s.mu.Lock()
	job := r.s.layers[r.key(l.Path)]
	r.s.mu.Unlock()
	if job == nil {
		return Layer{}, fault.Newf(fault.BadContent, "", "", "layer %q is not in member %q", l.Path, r.name)
	}
	if job.err != nil {
		return Layer{}, job.err
	}
	if job.missed {
		return Layer{}, errLater
	}
	if job.out.DiffID != "" && job.out.DiffID != l.DiffID {
		return Layer{}, fault.Newf(fault.BadContent, "", "", "layer %q of member %q does not have the diff ID %s that its image names", l.Path, r.name, l.DiffID).
			WithHint("the archive was damaged or changed; run `kmsctl archive verify`")
	}
	if repo == r.repo {
		return job.out, nil
	}
	b := r.s.state(job.out.Digest)
	b.mu.Lock()
	defer b.mu.Unlock()
	ok, err := r.s.have(r.s.ctx, b, repo, job.out.Digest)
	if err != nil {
		return Layer{}, err
	}
	if !ok {
		return Layer{}, fault.Newf(fault.Other, "", "", "the registry does not mount layer %s from %q to %q", job.out.Digest, r.repo, repo).
			WithHint("let both repositories stand in one project, by --namespace or --map")
	}
	return job.out, nil
}

// list brings a multi-architecture list and its images under one name.
func (r *memberRun) list(got *archive.Images, l archive.List, repo string, e ppa.Image) error {
	var entries []listEntry
	same := true
	for _, img := range got.Images {
		if img.Manifest == nil || !slices.Contains(l.Manifests, archive.DigestOf(img.Manifest)) {
			continue
		}
		body, kind, err := r.image(img, repo)
		if err != nil {
			return err
		}
		d := archive.Descriptor{MediaType: kind, Size: int64(len(body)), Digest: archive.DigestOf(body)}
		same = same && bytes.Equal(body, img.Manifest)
		entries = append(entries, listEntry{d, img.Platform})
		if err := r.s.Registry.PutManifest(r.s.ctx, repo, d.Digest, kind, body); err != nil {
			return err
		}
	}
	if len(entries) == 0 {
		return fault.Newf(fault.BadContent, "", "", "the list names no image that is in member %q", r.name)
	}
	kind, body := l.MediaType, l.Raw
	if !same || len(entries) != len(l.Manifests) {
		var err error
		kind = archive.TypeList
		if body, err = json.MarshalIndent(manifestList{2, kind, entries}, "", "   "); err != nil {
			return err
		}
	}
	o, err := r.s.put(e, "list", repo, kind, body)
	if err != nil {
		return err
	}
	r.s.mu.Lock()
	r.s.loaded = append(r.s.loaded, markedImage{Name: e.Name, Tag: e.Tag, Digest: o.Digest})
	r.s.mu.Unlock()
	r.s.done(o, nil)
	return nil
}
