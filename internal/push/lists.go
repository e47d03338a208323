package push

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

func damagedBlob(digest string) error {
	return fault.Newf(fault.BadContent, "read blob", digest, "it does not have that digest").WithHint("the archive was damaged or changed; run `kmsctl archive verify`")
}

// lists makes the multi-architecture lists that a manifest.yaml names: one
// under the plain name, of the references that are there. IBM's loader makes
// them after the push too.
func (l *load) lists(ctx context.Context, m ppa.Manifest) {
	own := map[string]bool{}
	for _, i := range m.Images {
		own[i.Ref()] = own[i.Ref()] || i.Archive != ""
	}
	for _, i := range m.Images {
		if !i.IsList() || own[i.Ref()] || ctx.Err() != nil {
			continue
		}
		repo := l.Repository(i.Name)
		o := Object{Kind: "list", Name: i.Ref(), Target: l.target(repo, i.Tag), Status: Pushed}
		body, err := l.list(ctx, repo, i)
		if err == nil {
			o.Digest = archive.DigestOf(body)
			var have string
			if have, err = l.Registry.ManifestDigest(ctx, repo, i.Tag); have == o.Digest {
				o.Status = Present
			} else if err == nil {
				err = l.Registry.PutManifest(ctx, repo, i.Tag, archive.TypeList, body)
			}
		}
		l.done(o, err)
	}
}

type listEntry struct {
	archive.Descriptor
	Platform ppa.Platform `json:"platform"`
}

// list puts a list together; the references' manifests are brought into the
// list's repository, since a list names manifests of its own repository.
func (l *load) list(ctx context.Context, repo string, i ppa.Image) ([]byte, error) {
	var entries []listEntry
	for _, r := range i.References {
		from := l.Repository(r.Name)
		kind, body, ok, err := l.Registry.Manifest(ctx, from, r.Tag)
		if err != nil {
			return nil, err
		}
		if !ok {
			l.warn("list %s: its reference %s was not in the archive", i.Ref(), r.Ref())
			continue
		}
		d := archive.Descriptor{MediaType: kind, Size: int64(len(body)), Digest: archive.DigestOf(body)}
		if from != repo {
			if err := l.copyImage(ctx, from, repo, d, body); err != nil {
				return nil, err
			}
		}
		p, err := l.platform(ctx, from, body)
		if err != nil {
			return nil, err
		}
		if p.Architecture == "" {
			p = r.Platform
		}
		if said := r.Platform.Architecture; said != "" && said != p.Architecture {
			return nil, fault.Newf(fault.BadContent, "make list", i.Ref(), "its reference %s is for %s, as the manifest says, and for %s, as the image itself does", r.Ref(), said, p.Architecture).
				WithHint("the manifest and the images disagree; get the archive again from its maker")
		}
		entries = append(entries, listEntry{d, p})
	}
	if len(entries) == 0 {
		return nil, fault.Newf(fault.BadContent, "make list", i.Ref(), "none of its references is in the archive")
	}
	return json.MarshalIndent(manifestList{2, archive.TypeList, entries}, "", "   ")
}

type manifestList struct {
	SchemaVersion int         `json:"schemaVersion"`
	MediaType     string      `json:"mediaType"`
	Manifests     []listEntry `json:"manifests"`
}

// platform is what an image's configuration says that it is for; empty where
// it says nothing, and of a list, which has none.
func (l *load) platform(ctx context.Context, repo string, manifest []byte) (p ppa.Platform, err error) {
	var m struct {
		Config archive.Descriptor `json:"config"`
	}
	if err := json.Unmarshal(manifest, &m); err != nil {
		return p, fmt.Errorf("read a manifest of %q: %w", repo, err)
	}
	if m.Config.Digest == "" {
		return p, nil
	}
	const most = 4 << 20
	b, err := l.Registry.ReadBlob(ctx, repo, m.Config.Digest, most)
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return p, fmt.Errorf("read configuration %s: %w", m.Config.Digest, err)
	}
	if p.OS == "" {
		p.OS = "linux"
	}
	return p, nil
}

// copyImage mounts an image's blobs into another repository and writes its
// manifest there by digest.
func (l *load) copyImage(ctx context.Context, from, to string, d archive.Descriptor, body []byte) error {
	var m struct {
		Config archive.Descriptor   `json:"config"`
		Layers []archive.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return fmt.Errorf("read manifest %s: %w", d.Digest, err)
	}
	for _, b := range append([]archive.Descriptor{m.Config}, m.Layers...) {
		s := l.state(b.Digest)
		s.mu.Lock()
		s.repos = append(s.repos, from)
		ok, err := l.have(ctx, s, to, b.Digest)
		s.mu.Unlock()
		if err != nil {
			return err
		}
		if !ok {
			return fault.Newf(fault.Other, "mount blob", b.Digest, "registry %q does not mount from %q to %q", l.Host, from, to).
				WithHint("name both repositories in one project, by --namespace or --map")
		}
	}
	return l.Registry.PutManifest(ctx, to, d.Digest, d.MediaType, body)
}
