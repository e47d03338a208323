package push

import (
	"context"
	"errors"
	"io"
	"path"
	"slices"
	"sync"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// native loads an archive of ours: its index says what it holds, so that only
// what the registry lacks is read.
func (l *load) native(ctx context.Context) error {
	m, err := l.Archive.Manifest()
	if err != nil {
		return err
	}
	if err := archive.CheckMembers(m, l.Archive.Index.Members); err != nil {
		return err
	}
	repos, err := l.place(m)
	if err != nil {
		return err
	}
	if err := l.base(ctx, repos); err != nil {
		return err
	}
	if err := l.nativeImages(ctx, m); err != nil {
		return err
	}
	l.lists(ctx, m)
	if l.Charts == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	for _, c := range m.Charts {
		pkg, err := l.Archive.Member(c.Archive)
		if err != nil {
			l.done(Object{Kind: "chart", Name: path.Base(c.Archive), Target: path.Base(c.Archive)}, err)
			continue
		}
		l.chart(ctx, c, pkg)
	}
	return nil
}

// nativeImages brings the images, side by side. When the registry is gone,
// there is no sense in trying the rest.
func (l *load) nativeImages(parent context.Context, m ppa.Manifest) error {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	var wg sync.WaitGroup
	gate := make(chan struct{}, 4*max(l.Jobs, 1)) // images at the same time; their uploads have slots of their own
	for _, entry := range m.Images {
		n := slices.IndexFunc(l.Archive.Index.Images, func(i archive.IndexImage) bool {
			return i.Member == entry.Archive && archive.Named(i.Refs, entry.Ref())
		})
		if n < 0 {
			if entry.Archive != "" {
				l.done(Object{Kind: "image", Name: entry.Ref(), Target: l.target(l.Repository(entry.Name), entry.Tag)}, fault.Newf(fault.BadContent, "", "", "the index does not have it in member %q", entry.Archive).
					WithHint("the archive was changed; run `kmsctl archive verify`"))
			}
			continue
		}
		gate <- struct{}{}
		wg.Go(func() {
			defer func() { <-gate }()
			if err := l.nativeImage(ctx, entry, l.Archive.Index.Images[n]); fault.KindOf(err) == fault.Unreachable {
				cancel(err)
			}
		})
	}
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil && parent.Err() == nil {
		return cause
	}
	return nil
}

func (l *load) nativeImage(ctx context.Context, entry ppa.Image, i archive.IndexImage) error {
	repo := l.Repository(entry.Name)
	o := Object{Kind: "image", Name: entry.Ref(), Target: l.target(repo, entry.Tag), Digest: i.Manifest.Digest, Status: Pushed}
	have, err := l.Registry.ManifestDigest(ctx, repo, entry.Tag)
	if err == nil && have == i.Manifest.Digest {
		o.Status = Present
		l.done(o, nil)
		return nil
	}
	if err == nil {
		err = l.nativeBlobs(ctx, repo, i)
	}
	if err == nil {
		err = l.nativeManifest(ctx, repo, entry.Tag, i)
	}
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause // why the others were given up
	}
	l.done(o, err)
	if err != nil {
		return about(err, "push image", o.Target)
	}
	return nil
}

func sizeOf(all []archive.Descriptor) (n int64) {
	for _, d := range all {
		n += d.Size
	}
	return n
}

// nativeBlobs brings an image's blobs, side by side.
func (l *load) nativeBlobs(ctx context.Context, repo string, i archive.IndexImage) error {
	all := []archive.Descriptor{i.Config}
	for _, y := range i.Layers {
		all = append(all, y.Descriptor)
	}
	bar := l.Progress.Begin(i.Refs[0], sizeOf(all))
	defer bar.End()
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for n, d := range all {
		wg.Go(func() {
			left := d.Size
			errs[n] = l.bring(ctx, repo, d, func(from int64) (io.Reader, error) { return l.Archive.Blob(d.Digest, from) }, func(n int64) {
				left -= n
				bar.Add(n)
			})
			bar.Add(left) // it was there, or was mounted
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *load) nativeManifest(ctx context.Context, repo, tag string, i archive.IndexImage) error {
	r, err := l.Archive.Blob(i.Manifest.Digest, 0)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if archive.DigestOf(b) != i.Manifest.Digest {
		return damagedBlob(i.Manifest.Digest)
	}
	return l.Registry.PutManifest(ctx, repo, tag, i.Manifest.MediaType, b)
}

// base sees to it, for a delta, that the site has what the delta lacks, before
// anything is changed.
func (l *load) base(ctx context.Context, repos []string) error {
	if l.Archive.Index.Base == "" {
		return nil
	}
	held := map[string]bool{}
	for _, b := range l.Archive.Index.Blobs {
		held[b.Digest] = true
	}
	for _, i := range l.Archive.Index.Images {
		for _, y := range i.Layers {
			if held[y.Digest] {
				continue
			}
			held[y.Digest] = true // look once
			s := l.state(y.Digest)
			for _, repo := range repos {
				has, err := l.Registry.HasBlob(ctx, repo, y.Digest)
				if err != nil {
					return about(err, "look for layers in", l.Host)
				}
				if has {
					s.repos = append(s.repos, repo)
				}
			}
			if len(s.repos) == 0 {
				return fault.Newf(fault.Conflict, "load delta", l.Archive.Name, "the registry has no layer %s, which the delta leaves out", y.Digest).
					WithHint("load the archive that the delta was made against first (its index is %s), or the whole new one", l.Archive.Index.Base)
			}
		}
	}
	return nil
}
