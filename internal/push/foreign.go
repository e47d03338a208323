package push

import (
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"path"
	"strings"
	"sync"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// stream loads an archive of another maker in one pass: what is unpacked goes
// by once, is hashed, compressed where it stands raw, and sent, at the same
// time. Layers that turn out to need another look (a twin that was none, an
// upload that the registry lost) are read in a pass of their own, when the
// archive can be read again.
type stream struct {
	*load
	ctx    context.Context //nolint:containedctx // one pass, one context: callbacks of the archive's walk have none
	cancel context.CancelCauseFunc

	m        ppa.Manifest
	plan     map[string][]ppa.Image // by member
	planned  bool
	found    archive.Manifests
	members  []archive.IndexMember
	charts   map[string][]byte
	pool     *pool
	workers  chan struct{}
	twins    map[string]*layerJob // by how they begin
	layers   map[string]*layerJob // all, by member and path
	missed   map[string]bool      // layers for the next pass, likewise
	named    map[string]bool      // images that are done with
	again    bool                 // this is a later pass
	waiting  []func()             // images whose repository is not known yet
	pending  sync.WaitGroup
	held     []archive.ContentImage // what the members were found to hold
	loaded   []markedImage
	unpacks  *archive.Budget // of what compressed layers unpack to
	tap      hash.Hash
	manifest map[string][]byte // the manifests' own bytes
}

const maxPasses = 4

func (l *load) foreign(ctx context.Context) error {
	s := &stream{load: l, charts: map[string][]byte{}, twins: map[string]*layerJob{}, layers: map[string]*layerJob{}, named: map[string]bool{}, manifest: map[string][]byte{}}
	if l.Archive.Seekable() {
		done, err := s.marked(ctx)
		if done || err != nil {
			return err
		}
		if err := s.head(ctx); err != nil {
			return err
		}
		if err := l.Archive.Whole(ctx, l.Limits); err != nil {
			return err
		}
	}
	s.pool = newPool(16)
	s.workers = make(chan struct{}, max(min(l.Jobs, 4), 1))
	s.tap = sha256.New()
	for pass := 1; ; pass++ {
		if err := s.pass(ctx); err != nil {
			return err
		}
		if len(s.missed) == 0 {
			break
		}
		if !l.Archive.Seekable() {
			return fault.Newf(fault.Partial, "load archive", l.Archive.Name, "%d layers would have to be read once more: they begin as others and are not the same, as shows at their end alone, or the registry lost them", len(s.missed)).
				WithHint("run the same command again: it takes these layers for no others and sends only what is missing; or give the archive as a file, or --spool-dir")
		}
		if pass == maxPasses {
			return fault.Newf(fault.Other, "load archive", l.Archive.Name, "the registry lost %d layers in each of %d passes", len(s.missed), pass).WithHint("run the same command again when the registry is well")
		}
		s.again = true
	}
	return s.finish(ctx)
}

// head reads the manifests before the images, and where they do not say which
// member holds which image, looks into the members.
func (s *stream) head(ctx context.Context) error {
	m, _, err := s.Archive.Head(ctx, s.Limits)
	if err != nil {
		return err
	}
	if archive.Unplaced(m) {
		c, err := s.Archive.Inspect(ctx, s.Limits)
		if err != nil {
			return err
		}
		if m, err = archive.Assign(c.Manifest, c.Images); err != nil {
			return err
		}
	}
	return s.take(m)
}

func (s *stream) take(m ppa.Manifest) error {
	s.m, s.plan, s.planned = m, planOf(m), true
	_, err := s.place(m)
	return err
}

// planOf says which images each member holds.
func planOf(m ppa.Manifest) map[string][]ppa.Image {
	plan := map[string][]ppa.Image{}
	for _, i := range m.Images {
		if i.Archive != "" {
			plan[i.Archive] = append(plan[i.Archive], i)
		}
	}
	return plan
}

// pass reads the archive once.
func (s *stream) pass(ctx context.Context) error {
	var tap io.Writer = s.tap
	if s.again {
		tap = nil
	}
	wanted := s.missed
	s.unpacks = s.Limits.Budget()
	s.missed, s.members = map[string]bool{}, nil
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	defer s.cancel(nil)
	err := s.Archive.Walk(s.ctx, s.Limits, tap, func(name string, size int64, r io.Reader) error { return s.member(name, size, r, wanted) })
	s.pending.Wait()
	if cause := context.Cause(s.ctx); cause != nil && ctx.Err() == nil {
		return cause // why the pass was given up
	}
	return err
}

func (s *stream) member(name string, size int64, r io.Reader, wanted map[string]bool) error {
	s.members = append(s.members, archive.IndexMember{Name: name, Size: size})
	role := archive.RoleOf(name)
	if _, named := s.plan[name]; named {
		role = archive.ImageTar
	}
	for _, c := range s.m.Charts {
		if c.Archive == name {
			role = archive.ChartPackage
		}
	}
	switch role {
	case archive.ManifestJSON, archive.ManifestYAML:
		b, err := archive.ReadSmall(name, size, r)
		if err != nil {
			return err
		}
		s.manifest[name] = b
		return s.found.Take(role, b)
	case archive.ChartPackage:
		b, err := archive.ReadSmall(name, size, r)
		s.charts[name] = b
		return err
	case archive.ImageTar:
		return s.imageMember(name, size, r, wanted)
	case archive.OurIndex:
		if s.Archive.Seekable() {
			return nil
		}
		b, err := archive.ReadSmall(name, size, r)
		if err != nil {
			return err
		}
		return archive.RefuseDelta(b)
	case archive.Other:
	}
	return nil
}

// imageMember reads the tar of a member's images.
func (s *stream) imageMember(name string, size int64, r io.Reader, wanted map[string]bool) error {
	if !s.planned && s.found.Any() {
		m, err := s.found.Merged()
		if err != nil {
			return err
		}
		if !archive.Unplaced(m) {
			if err := s.take(m); err != nil {
				return err
			}
		}
	}
	if !s.planned && s.Staging == "" {
		why := "standard input has the images before the manifest"
		if s.found.Any() {
			why = "standard input has a manifest that does not say which images stand in which members"
		}
		return fault.Usagef("%s, so that nobody knows yet where they go", why).
			WithHint("give the archive as a file, or --spool-dir to keep it on disk for a while, or --staging-repository to send the layers there first")
	}
	entries := s.plan[name]
	if s.planned && len(entries) == 0 {
		s.warn("member %s is named by no manifest and was left out", name)
		return nil
	}
	if s.again && !anyOf(wanted, name) {
		return nil
	}
	run := &memberRun{s: s, name: name, repo: s.Staging, wanted: wanted}
	if s.planned {
		run.repo = s.Repository(entries[0].Name)
	}
	title := name
	if len(entries) > 0 {
		title = entries[0].Ref()
	}
	// What is read is what goes on its way: a layer is worked on as it comes.
	bar := s.Progress.Begin(title, size)
	got, err := archive.ReadImages(bar.Reader(r), name, s.Limits, run.layer)
	if err != nil {
		bar.End()
		return err
	}
	for _, i := range got.Images {
		s.held = append(s.held, archive.ContentImage{Image: i, Member: name})
	}
	s.pending.Go(func() {
		run.wait()
		bar.End()
		if s.planned {
			run.finish(got, entries)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.waiting = append(s.waiting, func() { run.finish(got, s.plan[name]) })
	})
	return nil
}

func anyOf(wanted map[string]bool, member string) bool {
	for k := range wanted {
		if strings.HasPrefix(k, member+"\x00") {
			return true
		}
	}
	return false
}

// finish does what is left when all layers are there.
func (s *stream) finish(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m, err := s.found.Merged()
	if err != nil {
		return err
	}
	if m, err = archive.Assign(m, s.held); err != nil {
		return err
	}
	if s.planned {
		if err := disagree(s.m, m); err != nil {
			return err
		}
	}
	// The second manifest may stand behind the images: it has the lists, and more keys of the charts.
	if err := s.take(m); err != nil {
		return err
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	defer s.cancel(nil)
	for _, f := range s.waiting {
		f()
	}
	if err := archive.CheckMembers(s.m, s.members); err != nil {
		if len(s.report.Objects) == 0 {
			return err
		}
		s.missing() // what is there is loaded all the same
	}
	s.lists(ctx, s.m)
	if s.Charts != nil {
		for _, c := range s.m.Charts {
			if pkg, ok := s.charts[c.Archive]; ok {
				s.chart(ctx, c, pkg)
			}
		}
	}
	if len(s.errs) == 0 {
		s.mark(ctx)
	}
	return nil
}

// missing reports what the manifest names and the archive does not hold.
func (s *stream) missing() {
	images, charts := archive.Missing(s.m, s.members)
	for _, i := range images {
		s.done(Object{Kind: "image", Name: i.Ref(), Target: s.target(s.Repository(i.Name), i.Tag)}, archive.NoMember(i.Archive))
	}
	for _, c := range charts {
		file := path.Base(c.Archive)
		s.done(Object{Kind: "chart", Name: file, Target: file}, archive.NoMember(c.Archive))
	}
}

// disagree compares the manifest that the load went by with what the whole
// archive says.
func disagree(was, is ppa.Manifest) error {
	had := archive.Placed(was)
	for _, i := range is.Images {
		if i.Archive != "" && !had[i.Ref()] {
			return fault.Newf(fault.BadContent, "read archive", "", "its manifests disagree: image %q stands in the one behind the images alone", i.Ref()).
				WithHint("load what `kmsctl archive repack` makes of it, which has both in front")
		}
		for _, w := range was.Images {
			if w.Ref() == i.Ref() && i.Archive != "" && w.Archive != "" && w.Archive != i.Archive {
				return fault.Newf(fault.BadContent, "read archive", "", "its manifests disagree: image %q stands in %q and in %q", i.Ref(), w.Archive, i.Archive)
			}
		}
	}
	return nil
}
