package push_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	helmchart "helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/repo"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/internal/push"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// target joins push and image as the app does.
type target struct{ *image.Registry }

func (r target) Stream(ctx context.Context, repo string) push.Upload {
	return streamed{r.NewWriter(ctx, repo)}
}

type streamed struct{ *image.Writer }

func (s streamed) Write(p []byte) (int, error) {
	n, err := s.Writer.Write(p)
	if errors.Is(err, image.ErrLost) {
		err = push.ErrLost
	}
	return n, err
}

// site is a registry and a chart repository.
type site struct {
	host, charts string
	sessions     image.Sessions
	known        push.Known
}

func newSite(t *testing.T) *site {
	t.Helper()
	return &site{host: testkit.Registry(t, t.TempDir()), charts: t.TempDir()}
}

type option func(*push.Options)

// load loads an archive; in is a file, or a stream when stdin.
func (s *site) load(t *testing.T, b []byte, stdin bool, opts ...option) (*push.Report, error) {
	t.Helper()
	var a *archive.Archive
	var err error
	if stdin {
		a, err = archive.Open("-", bytes.NewReader(b))
	} else {
		p := filepath.Join(t.TempDir(), "a.tar.gz")
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		a, err = archive.Open(p, nil)
	}
	if err != nil {
		return &push.Report{}, err
	}
	defer a.Close()
	r, err := image.Dial(t.Context(), image.Options{Host: s.host, Chunk: 1 << 20, Sessions: s.sessions})
	if err != nil {
		return &push.Report{}, err
	}
	o := push.Options{Archive: a, Registry: target{r}, Host: s.host, Repository: func(n string) string { return "site/" + n }, RegistryValue: s.host + "/site",
		Charts: &chart.Dir{Path: s.charts, Now: time.Now}, Jobs: 4, Compression: "gzip", Limits: archive.DefaultLimits, Known: s.known}
	for _, f := range opts {
		f(&o)
	}
	return push.Load(t.Context(), o)
}

func (s *site) ref(t *testing.T, image string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(s.host+"/site/"+image, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// holds checks that the registry has an image, whole, with the configuration
// of want.
func (s *site) holds(t *testing.T, ref string, want testkit.Image) {
	t.Helper()
	img, err := remote.Image(s.ref(t, ref))
	if err != nil {
		t.Fatal(err)
	}
	s.same(t, img, ref, want)
}

func (s *site) same(t *testing.T, img v1.Image, ref string, want testkit.Image) {
	t.Helper()
	if err := validate.Image(img); err != nil {
		t.Errorf("%s: %v", ref, err)
	}
	c, err := img.RawConfigFile()
	if err != nil || !bytes.Equal(c, want.Config()) {
		t.Errorf("%s has configuration %s, %v", ref, c, err)
	}
}

func (s *site) missing(t *testing.T, ref string) {
	t.Helper()
	if _, err := remote.Head(s.ref(t, ref)); err == nil {
		t.Errorf("%s is in the registry", ref)
	}
}

func statuses(r *push.Report) string {
	var all []string
	for _, o := range r.Objects {
		all = append(all, o.Kind+" "+o.Name+" "+o.Status)
	}
	slices.Sort(all)
	return strings.Join(all, "\n")
}

// ours repacks the sample images as an archive of ours.
func ours(t *testing.T) []byte {
	t.Helper()
	b := archive.Build{Manifest: ppa.Manifest{Charts: []ppa.Chart{{Archive: "charts/app-1.0.0.tgz", RepositoryKeys: []string{"app.image.repository"}}}},
		Files: []archive.File{{Name: "charts/app-1.0.0.tgz", Data: testkit.ChartTgz("app", "1.0.0", "org/one")}}}
	for n, img := range testkit.Images() {
		member := fmt.Sprintf("images/%d.tar", n)
		i := archive.NewImage{Refs: []string{img.Ref}, Platform: ppa.Platform{OS: "linux", Architecture: "amd64"}, Config: img.Config()}
		for _, l := range img.Layers {
			bl := archive.BytesBlob(archive.TypeLayer, testkit.Gzip(l))
			bl.DiffID = archive.DigestOf(l)
			i.Layers = append(i.Layers, bl)
		}
		nm, tag := ppa.SplitRef(img.Ref)
		b.Manifest.Images = append(b.Manifest.Images, ppa.Image{Name: nm, Tag: tag, Archive: member})
		b.Members = append(b.Members, archive.ImageMember{Name: member, Images: []archive.NewImage{i}})
	}
	var out bytes.Buffer
	if _, err := archive.Write(&out, b); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestLoad loads every good shape of archive into a real registry, reads all
// back by another library, and loads again: nothing is sent.
func TestLoad(t *testing.T) {
	want := testkit.Images()
	all := map[string][]byte{"ours": ours(t)}
	for _, n := range []string{"good", "manifest-last", "both", "spec-only", "batch", "plain-tar", "oci"} {
		all[n] = testkit.Archives()[n]
	}
	for name, b := range all {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			first, err := s.load(t, b, false)
			if err != nil {
				t.Fatal(err)
			}
			if got := statuses(first); got != "chart app-1.0.0.tgz pushed\nimage org/one:1.0 pushed\nimage org/two:1.0 pushed" {
				t.Errorf("first load: %s", got)
			}
			s.holds(t, "org/one:1.0", want[0])
			s.holds(t, "org/two:1.0", want[1])
			s.chart(t)
			second, err := s.load(t, b, false)
			if err != nil || second.BytesSent != 0 || second.BlobsSent != 0 {
				t.Errorf("second load sent %d bytes, %d blobs: %v", second.BytesSent, second.BlobsSent, err)
			}
			if got := statuses(second); got != "chart app-1.0.0.tgz present\nimage org/one:1.0 present\nimage org/two:1.0 present" {
				t.Errorf("second load: %s", got)
			}
		})
	}
}

// chart reads the chart from the folder by Helm's own code.
func (s *site) chart(t *testing.T) {
	t.Helper()
	index, err := repo.LoadIndexFile(filepath.Join(s.charts, "index.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	v, err := index.Get("app", "1.0.0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := loader.Load(filepath.Join(s.charts, v.URLs[0]))
	if err != nil {
		t.Fatal(err)
	}
	raw := string(c.Raw[slices.IndexFunc(c.Raw, func(f *helmchart.File) bool { return f.Name == "values.yaml" })].Data)
	if want := "repository: \"" + s.host + "/site/org/one\" # kept"; !strings.Contains(raw, want) || !strings.Contains(raw, "# where the image is") {
		t.Errorf("values are %s, want %s and the comments", raw, want)
	}
}

// TestChart: a chart read straight from the archive has the bytes that a load
// puts into the repository, whatever the archive's shape.
func TestChart(t *testing.T) {
	all := map[string][]byte{"ours": ours(t)}
	for _, n := range []string{"good", "manifest-last", "spec-only"} {
		all[n] = testkit.Archives()[n]
	}
	for name, b := range all {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			if _, err := s.load(t, b, false); err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(filepath.Join(s.charts, "app-1.0.0.tgz"))
			if err != nil {
				t.Fatal(err)
			}
			p := filepath.Join(t.TempDir(), "a.tar.gz")
			if err := os.WriteFile(p, b, 0o600); err != nil {
				t.Fatal(err)
			}
			a, err := archive.Open(p, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			o := push.Options{Archive: a, Host: s.host, Repository: func(n string) string { return "site/" + n }, RegistryValue: s.host + "/site", Limits: archive.DefaultLimits}
			if got, err := push.Chart(t.Context(), o, "app", ""); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, want %d as loaded: %v", len(got), len(want), err)
			}
			o.Host = ""
			if got, err := push.Chart(t.Context(), o, "app", "1.0.0"); err != nil || !bytes.Equal(got, testkit.ChartTgz("app", "1.0.0", "org/one")) {
				t.Errorf("without a registry it is not the archive's own: %v", err)
			}
			if _, err := push.Chart(t.Context(), o, "app", "2.0.0"); fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "its charts are: app 1.0.0") {
				t.Errorf("another version: %v", err)
			}
		})
	}
	a, err := archive.Open("-", bytes.NewReader(all["good"]))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := push.Chart(t.Context(), push.Options{Archive: a}, "app", ""); fault.KindOf(err) != fault.Usage {
		t.Errorf("from standard input: %v", err)
	}
}

func TestStandardInput(t *testing.T) {
	want := testkit.Images()
	for name, b := range map[string][]byte{"ours": ours(t), "good": testkit.Archives()["good"], "batch": testkit.Archives()["batch"]} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			if _, err := s.load(t, b, true); err != nil {
				t.Fatal(err)
			}
			s.holds(t, "org/one:1.0", want[0])
			s.holds(t, "org/two:1.0", want[1])
		})
	}
	for _, name := range []string{"manifest-last", "spec-only", "sample-images-first"} { // nobody knows where the first image goes
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			_, err := s.load(t, testkit.Archives()[name], true)
			if fault.KindOf(err) != fault.Usage || !strings.Contains(fault.HintOf(err), "--staging-repository") {
				t.Errorf("got %v, hint %q", err, fault.HintOf(err))
			}
			if repos, err := remote.Catalog(t.Context(), s.ref(t, "x").Context().Registry); err != nil || len(repos) > 0 {
				t.Errorf("something was sent: %q, %v", repos, err)
			}
			if _, err := s.load(t, testkit.Archives()[name], true, func(o *push.Options) { o.Staging = "site/staging" }); err != nil {
				t.Fatal(err)
			}
			s.holds(t, "org/one:1.0", want[0])
			s.holds(t, "org/two:1.0", want[1])
		})
	}
}

// TestTwoParts: what only the manifest behind the images names is said, not
// left out; packed again, all is loaded.
func TestTwoParts(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	_, err := s.load(t, testkit.Archives()["two-parts"], false)
	if fault.KindOf(err) != fault.BadContent || !strings.Contains(err.Error(), `"org/two:1.0"`) || !strings.Contains(fault.HintOf(err), "archive repack") {
		t.Errorf("got %v, hint %q", err, fault.HintOf(err))
	}
}

// TestOwnReference: an image that a spec names as its own only reference is an
// image, and no list of one.
func TestOwnReference(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, want := range []string{push.Pushed, push.Present} {
		r, err := s.load(t, testkit.Archives()["spec-self"], false)
		if err != nil || len(r.Objects) != 1 || r.Objects[0].Kind != "image" || r.Objects[0].Status != want {
			t.Errorf("%+v, %v", r.Objects, err)
		}
	}
	s.holds(t, "org/one:1.0", testkit.Images()[0])
	if d, err := remote.Head(s.ref(t, "org/one:1.0")); err != nil || !d.MediaType.IsImage() {
		t.Errorf("%+v, %v", d, err)
	}
}

// TestOursIsTheSameBothWays: an archive of ours gives the same manifests by
// its index and as a stream.
func TestOursIsTheSameBothWays(t *testing.T) {
	t.Parallel()
	s, b := newSite(t), ours(t)
	if _, err := s.load(t, b, true); err != nil {
		t.Fatal(err)
	}
	r, err := s.load(t, b, false)
	if err != nil || r.BytesSent != 0 || strings.Contains(statuses(r), "pushed") {
		t.Errorf("%s, %d bytes sent, %v", statuses(r), r.BytesSent, err)
	}
}

func TestMultiArchitecture(t *testing.T) {
	t.Parallel()
	for name, stdin := range map[string]bool{"multi-arch": false, "oci-list": false, "list-last": true} {
		s := newSite(t)
		if _, err := s.load(t, testkit.Archives()[name], stdin); err != nil {
			t.Fatal(name, err)
		}
		x, err := remote.Index(s.ref(t, "org/multi:1.0"))
		if err != nil {
			t.Fatal(name, err)
		}
		if err := validate.Index(x); err != nil {
			t.Error(name, err)
		}
		m, err := x.IndexManifest()
		if err != nil || len(m.Manifests) != 2 || m.Manifests[0].Platform.Architecture != "amd64" || m.Manifests[1].Platform.Architecture != "ppc64le" {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
		again, err := s.load(t, testkit.Archives()[name], false)
		if err != nil || strings.Contains(statuses(again), push.Pushed) {
			t.Errorf("%s: again: %s, %v", name, statuses(again), err)
		}
	}
}

// TestListOfPlatforms: a manifest that says nothing of platforms makes the same
// list each time, by what the images say; one that says something else is refused.
func TestListOfPlatforms(t *testing.T) {
	t.Parallel()
	with := func(amd, ppc string) []byte {
		return testkit.Gzip(testkit.Tar(
			testkit.Entry{Name: "manifest.json", Data: []byte(`{"images":[{"image":"org/a","tag":"1","archive":"images/a.tar"},{"image":"org/b","tag":"1","archive":"images/b.tar"}]}`)},
			testkit.Entry{Name: "manifest.yaml", Data: []byte("images: [{image: 'org/multi:1.0', references: [{repository: 'org/a:1'" + amd + "}, {repository: 'org/b:1'" + ppc + "}]}]")},
			testkit.Entry{Name: "images/a.tar", Data: testkit.DockerSave(testkit.Image{Ref: "org/a:1", Layers: testkit.Images()[0].Layers})},
			testkit.Entry{Name: "images/b.tar", Data: testkit.DockerSave(testkit.Image{Ref: "org/b:1", Arch: "ppc64le", Layers: testkit.Images()[1].Layers})}))
	}
	s := newSite(t)
	for _, stdin := range []bool{true, false, false} { // the last one by its marker
		if _, err := s.load(t, with("", ""), stdin); err != nil {
			t.Fatal(err)
		}
		x, err := remote.Index(s.ref(t, "org/multi:1.0"))
		if err != nil {
			t.Fatal(err)
		}
		m, err := x.IndexManifest()
		if err != nil || len(m.Manifests) != 2 || m.Manifests[0].Platform.String() != "linux/amd64" || m.Manifests[1].Platform.String() != "linux/ppc64le" {
			t.Errorf("%+v, %v", m, err)
		}
	}
	s = newSite(t)
	_, err := s.load(t, with(", platform: {architecture: s390x}", ""), false)
	if fault.KindOf(err) != fault.Partial || !strings.Contains(fmt.Sprint(err), "org/a:1 is for s390x, as the manifest says, and for amd64") {
		t.Errorf("got %v", err)
	}
	s.missing(t, "org/multi:1.0")
}

func TestCompression(t *testing.T) {
	t.Parallel()
	want := testkit.Images()
	for _, c := range []string{"none", "zstd"} {
		s := newSite(t)
		if _, err := s.load(t, testkit.Archives()["good"], false, func(o *push.Options) { o.Compression = c }); err != nil {
			t.Fatal(c, err)
		}
		img, err := remote.Image(s.ref(t, "org/one:1.0"))
		if err != nil {
			t.Fatal(err)
		}
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		if d := "sha256:" + testkit.Hex(want[0].Layers[0]); c == "none" {
			if m.Layers[0].Digest.String() != d || string(m.Layers[0].MediaType) != archive.TypeLayerRaw {
				t.Errorf("layer %+v, want %s as it is", m.Layers[0], d)
			}
		} else if got := string(m.Layers[0].MediaType); got != "application/vnd.oci.image.layer.v1.tar+zstd" {
			t.Errorf("media type %s", got)
		}
	}
}

// TestBig sends a layer that does not fit into one part.
func TestBig(t *testing.T) {
	t.Parallel()
	for _, stdin := range []bool{false, true} {
		s := newSite(t)
		r, err := s.load(t, testkit.Archives()["big"], stdin)
		if err != nil {
			t.Fatal(err)
		}
		img, err := remote.Image(s.ref(t, "org/two:1.0"))
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(img); err != nil {
			t.Error(err)
		}
		if r.BytesSent < 7<<20 {
			t.Errorf("sent %d bytes", r.BytesSent)
		}
	}
}

// TestBad: no image under its name that is not whole, and the right kind.
func TestBad(t *testing.T) {
	for name, b := range testkit.Archives() {
		if !strings.HasPrefix(name, "bad-") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			_, err := s.load(t, b, false)
			if k := fault.KindOf(err); k != fault.BadContent && k != fault.Partial {
				t.Errorf("kind %v: %v", k, err)
			}
			if fault.HintOf(err) == "" {
				t.Errorf("no hint: %v", err)
			}
			for n, ref := range []string{"org/one:1.0", "org/two:1.0"} {
				if _, err := remote.Head(s.ref(t, ref)); err == nil && name != "bad-other-name" {
					s.holds(t, ref, testkit.Images()[n])
				}
			}
		})
	}
}

// flat is --map '{flat}'.
func flat(o *push.Options) {
	o.Repository = func(n string) string { return "site/" + strings.ReplaceAll(n, "/", "-") }
}

// TestFallTogether: a rule by which one image would overwrite another is
// refused before anything is sent.
func TestFallTogether(t *testing.T) {
	t.Parallel()
	img := testkit.Images()
	foreign := testkit.Gzip(testkit.Tar(
		testkit.Entry{Name: "manifest.json", Data: []byte(`{"images":[{"image":"a/b-c","tag":"1.0","archive":"images/a.tar"},{"image":"a-b/c","tag":"1.0","archive":"images/b.tar"}]}`)},
		testkit.Entry{Name: "images/a.tar", Data: testkit.DockerSave(testkit.Image{Ref: "a/b-c:1.0", Layers: img[0].Layers})},
		testkit.Entry{Name: "images/b.tar", Data: testkit.DockerSave(testkit.Image{Ref: "a-b/c:1.0", Layers: img[1].Layers})}))
	s := newSite(t)
	for _, stdin := range []bool{false, true} {
		_, err := s.load(t, foreign, stdin, flat)
		if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), `"a/b-c:1.0" and "a-b/c:1.0"`) || !strings.Contains(fault.HintOf(err), "--map") {
			t.Errorf("%v, hint %q", err, fault.HintOf(err))
		}
	}
	last := func(o *push.Options) { o.Repository = func(n string) string { return "site/one" } }
	if _, err := s.load(t, ours(t), false, last); fault.KindOf(err) != fault.Usage {
		t.Errorf("an archive of ours: %v", err)
	}
	if repos, err := remote.Catalog(t.Context(), s.ref(t, "x").Context().Registry); err != nil || len(repos) > 0 {
		t.Errorf("something was sent: %q, %v", repos, err)
	}
	if _, err := s.load(t, foreign, true); err != nil {
		t.Errorf("by a rule that keeps the names: %v", err)
	}
}

// TestFarFromRegistryKeys: a chart with registry keys is warned about where no
// value of them leads to the images.
func TestFarFromRegistryKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for warned, rule := range map[bool]option{false: func(*push.Options) {}, true: flat} {
		r, err := s.load(t, testkit.Archives()["both"], false, rule)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(r.Warnings, "\n"); warned != strings.Contains(got, "chart app: its registry keys (global.registry) get "+s.host+"/site, behind which org/one is not found: --map puts it at "+s.host+"/site/org-one") {
			t.Errorf("warned %v: %s", warned, got)
		}
	}
}

// TestCut: what lacks its end sends nothing, wherever it was cut.
func TestCut(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	sent := s.sends(t)
	for _, name := range []string{"good", "manifest-last"} {
		whole := testkit.Archives()[name]
		for n := len(whole) - 1; n > 8; n -= len(whole)/12 + 1 {
			for binary.LittleEndian.Uint32(whole[n-4:n])%512 == 0 {
				n-- // by chance it looks like an end
			}
			if _, err := s.load(t, whole[:n], false); fault.KindOf(err) != fault.BadContent || !strings.Contains(fault.HintOf(err), "copy it again") {
				t.Errorf("%s, %d of %d bytes: %v, hint %q", name, n, len(whole), err, fault.HintOf(err))
			}
		}
	}
	if sent.Load() > 0 {
		t.Errorf("%d things were sent", sent.Load())
	}
}

// TestTwins has two layers of one size that begin alike and differ at the end.
func TestTwins(t *testing.T) {
	t.Parallel()
	l := testkit.LayerTar(1, 1<<20)
	other := bytes.Clone(l)
	other[len(other)-3000] ^= 1
	img := testkit.Image{Ref: "org/one:1.0", Layers: [][]byte{l, other}}
	b := testkit.Gzip(testkit.Tar(testkit.Entry{Name: "manifest.json", Data: []byte(`{"images":[{"image":"org/one","tag":"1.0","archive":"images/a.tar"}]}`)},
		testkit.Entry{Name: "images/a.tar", Data: testkit.DockerSave(img)}))
	s := newSite(t)
	if _, err := s.load(t, b, false); err != nil {
		t.Fatal(err)
	}
	s.holds(t, "org/one:1.0", img)
	// A stream goes by once: it is said, and the next run guesses nothing.
	s = newSite(t)
	s.known = &memory{all: map[string]push.Layer{}}
	if _, err := s.load(t, b, true); fault.KindOf(err) != fault.Partial || !strings.Contains(fault.HintOf(err), "run the same command again") || !strings.Contains(fault.HintOf(err), "as a file") {
		t.Errorf("from a stream: %v, hint %q", err, fault.HintOf(err))
	}
	s.missing(t, "org/one:1.0")
	for range 2 {
		if _, err := s.load(t, b, true); err != nil {
			t.Fatal("again: ", err)
		}
		s.holds(t, "org/one:1.0", img)
	}
}

// TestTwoOfOneName: an image that is there twice, and not the same, is refused
// before anything is sent where the manifest or the index shows it, and has no
// tag where only its member does.
func TestTwoOfOneName(t *testing.T) {
	t.Parallel()
	one, other := testkit.Images()[0], testkit.Images()[1]
	other.Ref = one.Ref
	a, b := testkit.Entry{Name: "images/a.tar", Data: testkit.DockerSave(one)}, testkit.Entry{Name: "images/b.tar", Data: testkit.DockerSave(other)}
	both := testkit.Entry{Name: "images/a.tar", Data: testkit.DockerSave(one, testkit.Image{Ref: "x.example/org/one:1.0", Layers: other.Layers[1:]})}
	manifest := func(text string) testkit.Entry { return testkit.Entry{Name: "manifest.json", Data: []byte(text)} }
	inA, inB := `{"image":"org/one","tag":"1.0","archive":"images/a.tar"}`, `{"image":"org/one","tag":"1.0","archive":"images/b.tar"}`
	spec := testkit.Entry{Name: "manifest.yaml", Data: []byte("images: [{image: 'org/one:1.0'}]")}
	specB := testkit.Entry{Name: "manifest.yaml", Data: []byte("images: [{image: 'org/one:1.0', archive: images/b.tar}]")}
	for name, c := range map[string]struct {
		b     []byte
		stdin bool
		sends bool
		want  string
	}{
		"the manifest, a stream":          {testkit.Tar(manifest(`{"images":[`+inA+`,`+inB+`]}`), a, b), true, false, `stands in "images/a.tar" and in "images/b.tar"`},
		"two manifests, a stream":         {testkit.Tar(manifest(`{"images":[`+inA+`]}`), specB, a, b), true, false, `manifest.yaml in "images/b.tar"`},
		"two manifests, one of them late": {testkit.Tar(manifest(`{"images":[`+inA+`]}`), a, b, specB), true, true, `manifest.yaml in "images/b.tar"`},
		"a spec alone":                    {testkit.Tar(spec, a, b), false, false, `stands in "images/a.tar" and in "images/b.tar", and is not the same there`},
		"one member":                      {testkit.Tar(manifest(`{"images":[`+inA+`]}`), both), false, true, `holds two images of that name, and they are not the same`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			sent := s.sends(t)
			_, err := s.load(t, c.b, c.stdin)
			if fault.KindOf(err) != fault.BadContent || !strings.Contains(fmt.Sprint(err), c.want) || fault.HintOf(err) == "" {
				t.Errorf("%v, hint %q", err, fault.HintOf(err))
			}
			if !c.sends && sent.Load() > 0 {
				t.Errorf("%d things were sent", sent.Load())
			}
		})
	}
}

// TestForgedMarker puts a marker for an archive that was never loaded: it
// names images that are there, but was not made from the archive.
func TestForgedMarker(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	b := testkit.Archives()["good"]
	if _, err := s.load(t, b, false); err != nil {
		t.Fatal(err)
	}
	// Another image under the name, and the marker's body changed to suit it.
	repo := s.ref(t, "kmsctl-loaded:sha256-"+testkit.Hex(b))
	img, err := remote.Image(repo)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	var sealed struct{ Body, Code []byte }
	if err := json.Unmarshal(raw, &sealed); err != nil {
		t.Fatal(err)
	}
	two, err := remote.Image(s.ref(t, "org/two:1.0"))
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(s.ref(t, "org/one:1.0"), two); err != nil {
		t.Fatal(err)
	}
	one := digestIn(t, sealed.Body, "org/one")
	d, err := two.Digest()
	if err != nil {
		t.Fatal(err)
	}
	sealed.Body = bytes.ReplaceAll(sealed.Body, []byte(one), []byte(d.String()))
	forged, err := json.Marshal(sealed)
	if err != nil {
		t.Fatal(err)
	}
	r, err := image.Dial(t.Context(), image.Options{Host: s.host})
	if err != nil {
		t.Fatal(err)
	}
	blob := archive.BytesBlob(archive.TypeConfig, forged)
	if err := r.PutBytes(t.Context(), "site/kmsctl-loaded", blob.Digest, forged); err != nil {
		t.Fatal(err)
	}
	if err := r.PutManifest(t.Context(), "site/kmsctl-loaded", "sha256-"+testkit.Hex(b), archive.TypeManifest, archive.Schema2(blob.Descriptor, nil)); err != nil {
		t.Fatal(err)
	}
	report, err := s.load(t, b, false)
	if err != nil || !strings.Contains(strings.Join(report.Warnings, "\n"), "not believed") {
		t.Errorf("warnings %q, %v", report.Warnings, err)
	}
	s.holds(t, "org/one:1.0", testkit.Images()[0])
}

func digestIn(t *testing.T, body []byte, name string) string {
	t.Helper()
	var m struct {
		Images []struct{ Name, Digest string }
	}
	if err := json.Unmarshal(body, &m); err != nil {
		t.Fatal(err)
	}
	for _, i := range m.Images {
		if i.Name == name {
			return i.Digest
		}
	}
	t.Fatalf("no %s in %s", name, body)
	return ""
}

// TestChangedTag: somebody else wrote another image under a tag; a second load
// puts the right one back, marker or not.
func TestChangedTag(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{"ours": ours(t), "good": testkit.Archives()["good"]} {
		s := newSite(t)
		if _, err := s.load(t, b, false); err != nil {
			t.Fatal(name, err)
		}
		two, err := remote.Image(s.ref(t, "org/two:1.0"))
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(s.ref(t, "org/one:1.0"), two); err != nil {
			t.Fatal(err)
		}
		r, err := s.load(t, b, false)
		if err != nil || r.BytesSent != 0 && name == "ours" {
			t.Errorf("%s: %d bytes sent, %v", name, r.BytesSent, err)
		}
		s.holds(t, "org/one:1.0", testkit.Images()[0])
	}
}

// TestDryRun foretells to the byte and the digest what a load does then, and
// changes nothing.
func TestDryRun(t *testing.T) {
	t.Parallel()
	archives := testkit.Archives()
	for name, b := range map[string][]byte{"ours": ours(t), "good": archives["good"], "multi-arch": archives["multi-arch"], "oci-list": archives["oci-list"]} {
		for _, stdin := range []bool{false, true} {
			if stdin && name != "good" {
				continue
			}
			s := newSite(t)
			sent := s.sends(t)
			told, err := s.load(t, b, stdin, func(o *push.Options) { o.DryRun = true })
			if err != nil || strings.Contains(statuses(told), push.Pushed) || told.BytesSent == 0 {
				t.Errorf("%s: %s, %d bytes, %v", name, statuses(told), told.BytesSent, err)
			}
			if n := sent.Load(); n > 0 {
				t.Errorf("%s: a dry run sent %d requests that change the registry", name, n)
			}
			if _, err := os.Stat(filepath.Join(s.charts, "index.yaml")); err == nil {
				t.Errorf("%s: a dry run wrote the chart repository", name)
			}
			did, err := s.load(t, b, stdin)
			if err != nil {
				t.Fatal(err)
			}
			for i := range told.Objects {
				if told.Objects[i].Status != push.WouldPush {
					t.Errorf("%s: %s %s, want %s", name, told.Objects[i].Target, told.Objects[i].Status, push.WouldPush)
				}
				told.Objects[i].Status = push.Pushed
			}
			told.DryRun, told.Archive = false, did.Archive
			if !reflect.DeepEqual(told, did) {
				t.Errorf("%s: foretold\n%+v, did\n%+v", name, told, did)
			}
			again, err := s.load(t, b, stdin, func(o *push.Options) { o.DryRun = true })
			if err != nil || again.BytesSent != 0 || strings.Contains(statuses(again), push.WouldPush) {
				t.Errorf("%s: with all there: %s, %d bytes, %v", name, statuses(again), again.BytesSent, err)
			}
		}
	}
}

// flaky stands before a registry and spoils requests.
type flaky struct {
	http.Handler
	spoil func(w http.ResponseWriter, r *http.Request, next http.Handler)
	count atomic.Int64
}

func (f *flaky) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.count.Add(1)
	f.spoil(w, r, f.Handler)
}

func (s *site) behind(t *testing.T, spoil func(w http.ResponseWriter, r *http.Request, next http.Handler)) *flaky {
	t.Helper()
	u := &url.URL{Scheme: "http", Host: s.host}
	p := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(u); r.Out.Host = r.In.Host }, ErrorLog: nil}
	f := &flaky{Handler: p, spoil: spoil}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	s.host = srv.Listener.Addr().String()
	return f
}

// sends counts what is sent to the registry.
func (s *site) sends(t *testing.T) *atomic.Int64 {
	t.Helper()
	var sent atomic.Int64
	s.behind(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			sent.Add(1)
		}
		next.ServeHTTP(w, r)
	})
	return &sent
}

// TestPassingFaults answers the first try of everything with 429, 503 or a cut
// connection: the load goes through.
func TestPassingFaults(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{"ours": ours(t), "good": testkit.Archives()["good"]} {
		s := newSite(t)
		var mu sync.Mutex
		seen := map[string]int{}
		s.behind(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			mu.Lock()
			key := r.Method + " " + strings.Split(r.URL.Path, "/uploads/")[0]
			seen[key]++
			n, kind := seen[key], len(seen)%3
			mu.Unlock()
			if n > 1 || r.URL.Path == "/v2/" {
				next.ServeHTTP(w, r)
				return
			}
			switch kind {
			case 0:
				w.Header().Set("Retry-After", "0")
				w.WriteHeader(http.StatusTooManyRequests)
			case 1:
				w.WriteHeader(http.StatusServiceUnavailable)
			default:
				panic(http.ErrAbortHandler)
			}
		})
		if _, err := s.load(t, b, false); err != nil {
			t.Fatal(name, err)
		}
		s.holds(t, "org/one:1.0", testkit.Images()[0])
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]fault.Kind{401: fault.Denied, 403: fault.Denied, 404: fault.NotFound, 413: fault.Other} {
		for name, b := range map[string][]byte{"ours": ours(t), "good": testkit.Archives()["good"]} {
			s := newSite(t)
			f := s.behind(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if r.Method == http.MethodPost {
					w.WriteHeader(status)
					return
				}
				next.ServeHTTP(w, r)
			})
			_, err := s.load(t, b, false, func(o *push.Options) { o.Charts = nil })
			if fault.KindOf(err) != want || !strings.Contains(fmt.Sprint(err), fmt.Sprint(status)) || fault.HintOf(err) == "" {
				t.Errorf("%s, %d: kind %v, %v, hint %q", name, status, fault.KindOf(err), err, fault.HintOf(err))
			}
			if n := f.count.Load(); n > 60 {
				t.Errorf("%s, %d: %d requests for what was refused", name, status, n)
			}
		}
	}
}

// TestPartial: one image is refused, the other is loaded; the error says both.
func TestPartial(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{"ours": ours(t), "good": testkit.Archives()["good"]} {
		s := newSite(t)
		s.behind(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if r.Method != http.MethodGet && strings.Contains(r.URL.Path, "org/two") {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			next.ServeHTTP(w, r)
		})
		r, err := s.load(t, b, false)
		if fault.KindOf(err) != fault.Partial || !strings.Contains(fmt.Sprint(err), "2 of 3 objects are loaded") || !strings.Contains(fmt.Sprint(err), "org/two:1.0") {
			t.Errorf("%s: %v\n%s", name, err, statuses(r))
		}
		if !strings.HasPrefix(fault.HintOf(err), "this user may not do that; ask for push rights") {
			t.Errorf("%s: hint %q, which does not say what to do", name, fault.HintOf(err))
		}
		s.holds(t, "org/one:1.0", testkit.Images()[0])
	}
}

// TestAbsentMember: what the manifest names and the archive does not hold is in
// the report as failed, beside what is loaded.
func TestAbsentMember(t *testing.T) {
	t.Parallel()
	r, err := newSite(t).load(t, testkit.Archives()["bad-absent"], false)
	if fault.KindOf(err) != fault.Partial || !strings.Contains(fmt.Sprint(err), "2 of 3 objects are loaded") {
		t.Errorf("got %v", err)
	}
	if got := statuses(r); !strings.Contains(got, "image org/two:1.0 failed") {
		t.Errorf("the report has\n%s", got)
	}
}

// TestChangedIndex: an image of the manifest that the index does not have is
// not passed over.
func TestChangedIndex(t *testing.T) {
	t.Parallel()
	b := ours(t)
	p := filepath.Join(t.TempDir(), "a.tar.gz")
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := archive.Open(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	a.Index.Images = a.Index.Images[:1]
	s := newSite(t)
	r, err := image.Dial(t.Context(), image.Options{Host: s.host})
	if err != nil {
		t.Fatal(err)
	}
	report, err := push.Load(t.Context(), push.Options{Archive: a, Registry: target{r}, Host: s.host, Repository: func(n string) string { return "site/" + n }, Jobs: 1, Limits: archive.DefaultLimits})
	if fault.KindOf(err) != fault.Partial || !strings.Contains(statuses(report), "image org/two:1.0 failed") {
		t.Errorf("got %v\n%s", err, statuses(report))
	}
}

// TestBusyRegistry: one that takes no upload is asked so often for each blob,
// not so often squared, and the rest of the images are not tried.
func TestBusyRegistry(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{"ours": ours(t), "good": testkit.Archives()["good"]} {
		s := newSite(t)
		var mu sync.Mutex
		posts := map[string]int{}
		s.behind(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if r.Method == http.MethodPost {
				mu.Lock()
				posts[r.URL.Path]++
				mu.Unlock()
				w.Header().Set("Retry-After", "0")
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			next.ServeHTTP(w, r)
		})
		_, err := s.load(t, b, false)
		if fault.KindOf(err) != fault.Unreachable || fault.HintOf(err) == "" {
			t.Errorf("%s: kind %v: %v", name, fault.KindOf(err), err)
		}
		const blobs, tries = 4, 6 // of one image at most, and of one upload
		for path, n := range posts {
			if n > blobs*tries {
				t.Errorf("%s: %d tries to begin uploads at %s", name, n, path)
			}
		}
	}
}

type memory struct {
	mu  sync.Mutex
	all map[string]push.Layer
}

func (m *memory) Load(k string) (push.Layer, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l, ok := m.all[k]
	return l, ok
}

func (m *memory) Save(k string, l push.Layer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all[k] = l
}

// TestKnownLayers: a load that broke after the layers sends none of them again.
func TestKnownLayers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.known = &memory{all: map[string]push.Layer{}}
	var refuse atomic.Bool
	refuse.Store(true)
	s.behind(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") && refuse.Load() {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
	if _, err := s.load(t, testkit.Archives()["good"], false); err == nil {
		t.Fatal("no error")
	}
	refuse.Store(false)
	r, err := s.load(t, testkit.Archives()["good"], false)
	if err != nil || r.BlobsSent != 0 {
		t.Errorf("%d blobs sent again, %v", r.BlobsSent, err)
	}
	s.holds(t, "org/two:1.0", testkit.Images()[1])
}

func TestRegistryGoes(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{"ours": ours(t), "good": testkit.Archives()["good"]} {
		s := newSite(t)
		var gone atomic.Bool
		s.behind(t, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if r.Method == http.MethodPatch || r.Method == http.MethodPut {
				gone.Store(true)
			}
			if gone.Load() {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			next.ServeHTTP(w, r)
		})
		_, err := s.load(t, b, false)
		if fault.KindOf(err) != fault.Unreachable {
			t.Errorf("%s: kind %v: %v", name, fault.KindOf(err), err)
		}
	}
}

func TestStopped(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx, cancel := context.WithCancel(t.Context())
	a, err := archive.Open("-", io.MultiReader(bytes.NewReader(testkit.Archives()["good"][:200_000]), readerFunc(func([]byte) (int, error) { cancel(); return 0, nil })))
	if err != nil {
		t.Fatal(err)
	}
	r, err := image.Dial(ctx, image.Options{Host: s.host})
	if err != nil {
		t.Fatal(err)
	}
	_, err = push.Load(ctx, push.Options{Archive: a, Registry: target{r}, Host: s.host, Repository: func(n string) string { return n }, Compression: "gzip", Jobs: 2, Limits: archive.DefaultLimits})
	if fault.KindOf(err) != fault.Stopped {
		t.Errorf("kind %v: %v", fault.KindOf(err), err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
