// Package push brings an archive's images into a registry and its charts into
// a chart repository. It decides what has to be sent, sends it once, and says
// what it did. It declares what it needs of a registry and of a chart
// repository, and imports neither.
//
// What it promises: nothing is unpacked to disk and memory is bounded; a tag
// is written only when all its layers are there, and read back; a second run
// sends nothing; one image that fails does not stop the others.
package push

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/output"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Blobs is the part of a registry that keeps layers.
type Blobs interface {
	HasBlob(ctx context.Context, repo, digest string) (bool, error)
	Mount(ctx context.Context, repo, digest, from string) (bool, error)
	PutBlob(ctx context.Context, repo, digest string, size int64, open func(from int64) (io.Reader, error), sent func(int64)) error
	Stream(ctx context.Context, repo string) Upload
	ReadBlob(ctx context.Context, repo, digest string, limit int64) ([]byte, error)
}

// Upload is a blob whose digest is known at its end. Write sends one chunk.
type Upload interface {
	io.Writer
	Commit(digest string) error
	Cancel()
}

// Manifests is the part of a registry that names images.
type Manifests interface {
	Manifest(ctx context.Context, repo, ref string) (mediaType string, body []byte, ok bool, err error)
	ManifestDigest(ctx context.Context, repo, ref string) (string, error)
	PutManifest(ctx context.Context, repo, ref, mediaType string, body []byte) error
	HasTags(ctx context.Context, repo string) (bool, error)
	Scope(repos ...string)
}

// Registry is where images go.
type Registry interface {
	Blobs
	Manifests
}

// Charts is where charts go.
type Charts interface {
	Check(ctx context.Context, c *chart.Chart, pkg []byte) (chart.Result, error)
	Put(ctx context.Context, c *chart.Chart, pkg []byte) (chart.Result, error)
	Location(c *chart.Chart) string
}

// Options say what goes where.
type Options struct {
	Archive  *archive.Archive
	Registry Registry
	Host     string
	// Repository gives the repository in the registry of an image's name in
	// the manifest; RegistryValue is what registry-keys get.
	Repository    func(name string) string
	RegistryValue string
	Charts        Charts // nil: charts are left
	Jobs          int
	DryRun        bool
	Compression   string // of layers that stand raw: gzip, zstd or none
	Staging       string // repository for layers whose own is known late
	Known         Known  // layers of earlier runs; may be nil
	Limits        archive.Limits
	Progress      *output.Progress
}

// The words for what was done with an object.
const (
	Pushed    = "pushed"
	Present   = "present"
	WouldPush = "would push"
	Failed    = "failed"
)

// Object is one image, list or chart and what was done with it.
type Object struct {
	Kind   string `json:"kind"` // image, list or chart
	Name   string `json:"name"` // in the archive
	Target string `json:"target"`
	Digest string `json:"digest,omitempty"`
	// Chart and Version are a chart's own words for itself.
	Chart   string `json:"chart,omitempty"`
	Version string `json:"version,omitempty"`
	Status  string `json:"status"`
	Error   string `json:"error,omitempty"`
}

// Report is what a load did.
type Report struct {
	Archive      string   `json:"archive"`
	DryRun       bool     `json:"dryRun"`
	Objects      []Object `json:"objects"`
	BytesSent    int64    `json:"bytesSent"` // with dryRun: that would be
	BlobsSent    int      `json:"blobsSent"`
	BlobsMounted int      `json:"blobsMounted"`
	BlobsPresent int      `json:"blobsPresent"`
	Warnings     []string `json:"warnings"`
}

// load is one run.
type load struct {
	Options
	mu     sync.Mutex
	report Report
	errs   []error
	blobs  map[string]*blobState
	slots  chan struct{} // one for each upload at the same time
	// refs are the repositories of images by their names in the manifest, for
	// the charts' values.
	names []string
}

// blobState is what is known of one blob in this run.
type blobState struct {
	mu    sync.Mutex // held while one goroutine brings it somewhere
	repos []string
}

// Load runs. The report is there also when an error is.
func Load(ctx context.Context, o Options) (*Report, error) {
	if o.DryRun {
		o.Registry = rehearse(o.Registry)
		if o.Known != nil {
			o.Known = recalled{o.Known}
		}
	}
	l := &load{Options: o, blobs: map[string]*blobState{}, slots: make(chan struct{}, max(o.Jobs, 1))}
	l.report = Report{Archive: o.Archive.Name, DryRun: o.DryRun, Objects: []Object{}, Warnings: []string{}}
	var err error
	if o.Archive.Index != nil {
		err = l.native(ctx)
	} else {
		err = l.foreign(ctx)
	}
	slices.SortStableFunc(l.report.Objects, func(a, b Object) int {
		if a.Kind != b.Kind {
			return strings.Compare(b.Kind, a.Kind) // lists and images before charts
		}
		return strings.Compare(a.Target, b.Target)
	})
	return &l.report, l.outcome(ctx, err)
}

// outcome is the run's error: partial when some objects are done.
func (l *load) outcome(ctx context.Context, err error) error {
	if err != nil {
		return err
	}
	if len(l.errs) == 0 {
		return nil
	}
	if ctx.Err() != nil {
		return l.errs[0]
	}
	done := 0
	for _, o := range l.report.Objects {
		if o.Status != Failed {
			done++
		}
	}
	if done == 0 {
		return errors.Join(distinct(l.errs)...)
	}
	return fault.New(fault.Partial, "", "", fmt.Errorf("%d of %d objects are loaded\n%w", done, len(l.report.Objects), errors.Join(distinct(l.errs)...))).
		WithHint("%s, then run the same command again: it sends only what is missing", cure(l.errs))
}

// cure is what all the errors hint at, when it is the same.
func cure(errs []error) string {
	hint := fault.HintOf(errs[0])
	if hint == "" || slices.ContainsFunc(errs, func(e error) bool { return fault.HintOf(e) != hint }) {
		return "mend the cause"
	}
	return hint
}

// distinct drops errors that say the same.
func distinct(errs []error) (out []error) {
	seen := map[string]bool{}
	for _, e := range errs {
		if !seen[e.Error()] {
			seen[e.Error()] = true
			out = append(out, e)
		}
	}
	return out
}

// done notes what became of an object.
func (l *load) done(o Object, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.DryRun && o.Status == Pushed {
		o.Status = WouldPush
	}
	if err != nil {
		o.Status, o.Error = Failed, err.Error()
		l.errs = append(l.errs, about(err, "push "+o.Kind, o.Target))
	}
	l.report.Objects = append(l.report.Objects, o)
	l.Progress.Line(o.Status, o.Target, o.Digest)
}

// about says on which object something failed.
func about(err error, op, object string) error {
	var f *fault.Error
	if errors.As(err, &f) && f.Op == "" {
		out := *f
		out.Op, out.Object = op, object
		return &out
	}
	return fault.New(fault.KindOf(err), op, object, err).WithHint("%s", fault.HintOf(err))
}

func (l *load) warn(format string, a ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := fmt.Sprintf(format, a...)
	if !slices.Contains(l.report.Warnings, w) {
		l.report.Warnings = append(l.report.Warnings, w)
	}
}

// place learns the images' names and gives their repositories in the registry.
// A rule by which one would overwrite another is refused.
func (l *load) place(m ppa.Manifest) (repos []string, err error) {
	at := map[string]ppa.Image{}
	for _, i := range m.Images {
		repo := l.Repository(i.Name)
		to := l.target(repo, i.Tag)
		if was, taken := at[to]; taken && was.Name != i.Name && (was.Archive != i.Archive || withoutHost(was.Name) != withoutHost(i.Name)) {
			return nil, fault.Usagef("images %q and %q would both be %q in the registry", was.Ref(), i.Ref(), to).
				WithHint("give another --map, one that keeps more of an image's name: {path} keeps all of it, {flat} joins its parts")
		}
		at[to] = i
		l.names = append(l.names, i.Name)
		repos = append(repos, repo)
	}
	l.Registry.Scope(repos...)
	return repos, nil
}

// target is the full name of an image in the registry.
func (l *load) target(repo, tag string) string { return l.Host + "/" + repo + ":" + tag }

// state gives the state of a blob.
func (l *load) state(digest string) *blobState {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.blobs[digest]
	if s == nil {
		s = &blobState{}
		l.blobs[digest] = s
	}
	return s
}

// count adds to the report.
func (l *load) count(to *int, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	*to++
	l.report.BytesSent += bytes
}

// have sees to it that a repository has a blob without sending it: it is there,
// or another repository's is mounted. The caller holds the blob's lock.
func (l *load) have(ctx context.Context, s *blobState, repo, digest string) (bool, error) {
	if slices.Contains(s.repos, repo) {
		return true, nil
	}
	has, err := l.Registry.HasBlob(ctx, repo, digest)
	if err != nil {
		return false, err
	}
	if has {
		s.repos = append(s.repos, repo)
		l.count(&l.report.BlobsPresent, 0)
		return true, nil
	}
	for _, from := range s.repos {
		ok, err := l.Registry.Mount(ctx, repo, digest, from)
		if err != nil {
			return false, err
		}
		if ok {
			s.repos = append(s.repos, repo)
			l.count(&l.report.BlobsMounted, 0)
			return true, nil
		}
	}
	return false, nil
}

// bring sees to it that a repository has a blob, and sends it if it must; sent,
// which may be nil, is told how much the registry has of what is sent.
func (l *load) bring(ctx context.Context, repo string, d archive.Descriptor, open func(from int64) (io.Reader, error), sent func(int64)) error {
	s := l.state(d.Digest)
	s.mu.Lock()
	defer s.mu.Unlock()
	if ok, err := l.have(ctx, s, repo, d.Digest); ok || err != nil {
		return err
	}
	l.slots <- struct{}{}
	defer func() { <-l.slots }()
	if err := l.Registry.PutBlob(ctx, repo, d.Digest, d.Size, open, sent); err != nil {
		return err
	}
	s.repos = append(s.repos, repo)
	l.count(&l.report.BlobsSent, d.Size)
	return nil
}

// chart rewrites and puts one chart.
func (l *load) chart(ctx context.Context, in ppa.Chart, pkg []byte) {
	c, err := chart.Open(in.Archive, pkg)
	if err == nil {
		pkg, err = l.rewrite(c, in, pkg)
	}
	if err != nil {
		l.done(Object{Kind: "chart", Name: path.Base(in.Archive), Target: path.Base(in.Archive)}, err)
		return
	}
	o := Object{Kind: "chart", Name: path.Base(in.Archive), Target: l.Charts.Location(c), Digest: archive.DigestOf(pkg), Chart: c.Name, Version: c.Version}
	var result chart.Result
	if l.DryRun {
		result, err = l.Charts.Check(ctx, c, pkg)
	} else {
		result, err = l.Charts.Put(ctx, c, pkg)
	}
	o.Status = string(result)
	l.done(o, err)
}

// rewrite points the chart's values at the registry.
func (l *load) rewrite(c *chart.Chart, in ppa.Chart, pkg []byte) ([]byte, error) {
	keys := slices.Concat(in.RepositoryKeys, in.RegistryKeys)
	if len(keys) == 0 {
		return pkg, nil
	}
	values, missing, err := chart.Edit(c.Values(), keys, func(key, old string) string {
		if slices.Contains(in.RegistryKeys, key) {
			return l.RegistryValue
		}
		return l.repositoryValue(old)
	})
	if err != nil {
		return nil, fault.New(fault.BadContent, "rewrite the values of chart", c.Name, err)
	}
	if far := l.unreachable(); len(in.RegistryKeys) > 0 && far != "" {
		l.warn("chart %s: its registry keys (%s) get %s, behind which %s is not found: --map puts it at %s", c.Name, strings.Join(in.RegistryKeys, ", "), l.RegistryValue, far, l.Host+"/"+l.Repository(far))
	}
	for _, m := range missing {
		l.warn("chart %s: its values have no %s, which the manifest names", c.Name, m)
	}
	if string(values) == string(c.Values()) {
		return pkg, nil
	}
	c.SetValues(values)
	return c.Pack()
}

// unreachable is an image that a chart cannot name by the value of a registry
// key with the image's name, or the last parts of it, behind; "" when all can be.
func (l *load) unreachable() string {
	for _, name := range l.names {
		rest, ok := strings.CutPrefix(l.Host+"/"+l.Repository(name), l.RegistryValue+"/")
		if !ok || !strings.HasSuffix("/"+name, "/"+rest) {
			return name
		}
	}
	return ""
}

// repositoryValue is a repository of the values as it is called at this site.
// The image of the manifest that it means is told by its name, or by the name's
// last part; what is in no manifest gets the same prefix as those.
func (l *load) repositoryValue(old string) string {
	name, tag := ppa.SplitRef(old)
	match := ""
	for _, n := range l.names {
		if n == name || strings.HasSuffix(name, "/"+n) || (match == "" && path.Base(n) == path.Base(name)) {
			match = n
			if n == name {
				break
			}
		}
	}
	if match == "" {
		match = withoutHost(name)
	}
	out := l.Host + "/" + l.Repository(match)
	if tag != "" {
		out += ":" + tag
	}
	return out
}

// withoutHost cuts a registry's name in front, told by its dot or port.
func withoutHost(name string) string {
	host, rest, ok := strings.Cut(name, "/")
	if ok && (strings.ContainsAny(host, ".:") || host == "localhost") {
		return rest
	}
	return name
}
