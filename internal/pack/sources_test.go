package pack_test

import (
	"bytes"
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/internal/pack"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// breakingRegistry is a registry that breaks every answer with a layer after
// 256 KiB, while it breaks at all.
func breakingRegistry(t *testing.T) (host string, breaks *atomic.Bool, broken *atomic.Int32) {
	t.Helper()
	breaks, broken = &atomic.Bool{}, &atomic.Int32{}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if breaks.Load() && r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:") {
			w = &short{ResponseWriter: w, left: 256 << 10, broken: broken}
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String(), breaks, broken
}

// short breaks the connection after some bytes.
type short struct {
	http.ResponseWriter
	left   int
	broken *atomic.Int32
}

func (s *short) Write(p []byte) (int, error) {
	n, err := s.ResponseWriter.Write(p[:min(len(p), s.left)])
	if s.left -= n; s.left == 0 {
		s.broken.Add(1)
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// layouts writes the two images of the testkit as folders with an OCI layout.
func layouts(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, i := range testkit.Images() {
		dir := t.TempDir()
		c := exec.Command("tar", "-x", "-C", dir)
		c.Stdin = bytes.NewReader(testkit.OCILayout("", i))
		if b, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		out[i.Ref] = dir
	}
	return out
}

// build makes an archive of sources.
func build(t *testing.T, s *pack.Sources) ([]byte, error) {
	t.Helper()
	s.Getenv = func(string) string { return "" }
	s.Open = func(ctx context.Context, host string, _ pack.Login) (pack.Registry, error) {
		return image.Dial(ctx, image.Options{Host: host})
	}
	p := &pack.Repack{Limits: archive.DefaultLimits, Temp: t.TempDir(), Level: 1}
	defer p.Close()
	b, err := s.Build(t.Context(), p)
	if err != nil {
		return nil, err
	}
	return write(t, b), nil
}

// push brings an image into a registry as it stands in its layout.
func push(t *testing.T, host, dir, ref string) {
	t.Helper()
	c := exec.Command("skopeo", "copy", "-q", "--insecure-policy", "--dest-tls-verify=false", "--preserve-digests", "oci:"+dir, "docker://"+host+"/"+ref)
	if b, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
}

// TestPullOverBreaks: a registry whose connections break gives the same archive
// as one that is well, and as the folders that were pushed there.
func TestPullOverBreaks(t *testing.T) {
	host, breaks, broken := breakingRegistry(t)
	var local, remote []pack.ImageSource
	for ref, dir := range layouts(t) {
		push(t, host, dir, ref)
		local = append(local, pack.ImageSource{Ref: ref, From: dir})
		remote = append(remote, pack.ImageSource{Ref: ref, From: "docker://" + host + "/" + ref})
	}
	want, err := build(t, &pack.Sources{Images: local})
	if err != nil {
		t.Fatal(err)
	}
	breaks.Store(true)
	got, err := build(t, &pack.Sources{Images: remote})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the archive that was pulled is another than the one of the folders")
	}
	if broken.Load() < 4 {
		t.Errorf("%d connections broke: is a layer larger than one?", broken.Load())
	}
}

// TestDelta: a delta has only the layers that the base lacks, and says of which
// base it is.
func TestDelta(t *testing.T) {
	dirs := layouts(t)
	one, err := build(t, &pack.Sources{Images: []pack.ImageSource{{Ref: "org/one:1.0", From: dirs["org/one:1.0"]}}})
	if err != nil {
		t.Fatal(err)
	}
	both, err := build(t, &pack.Sources{Images: []pack.ImageSource{{Ref: "org/one:1.0", From: dirs["org/one:1.0"]}, {Ref: "org/two:1.0", From: dirs["org/two:1.0"]}}})
	if err != nil {
		t.Fatal(err)
	}
	b, err := pack.Delta(open(t, one), open(t, both))
	if err != nil {
		t.Fatal(err)
	}
	delta := open(t, write(t, b))
	layers := map[string]bool{}
	for _, i := range open(t, both).Index.Images {
		for _, l := range i.Layers {
			layers[l.Digest] = true
		}
	}
	held := 0
	for _, bl := range delta.Index.Blobs {
		if layers[bl.Digest] {
			held++
		}
	}
	if held != 1 { // the second layer of the second image; the first is both's
		t.Errorf("the delta has %d layers of %d", held, len(layers))
	}
	if delta.Index.Base != archive.DigestOf(open(t, one).Raw) {
		t.Errorf("it names the base %s", delta.Index.Base)
	}
	for name, pair := range map[string][2][]byte{"of a foreign archive": {testkit.Archives()["good"], both}, "of a delta": {one, write(t, b)}} {
		if _, err := pack.Delta(open(t, pair[0]), open(t, pair[1])); fault.KindOf(err) != fault.Usage || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSources holds what is wrong with sources to its kind and its words.
func TestSources(t *testing.T) {
	dirs := layouts(t)
	host, _, _ := breakingRegistry(t)
	empty, text := t.TempDir(), filepath.Join(t.TempDir(), "x.tar")
	if err := os.WriteFile(text, []byte("no tar"), 0o600); err != nil {
		t.Fatal(err)
	}
	multi := t.TempDir()
	c := exec.Command("tar", "-x", "-C", multi)
	c.Stdin = bytes.NewReader(testkit.OCILayout("org/multi:1.0", testkit.Image{Ref: "a", Arch: "ppc64le", Layers: [][]byte{testkit.LayerTar(1, 10)}}, testkit.Image{Ref: "b", Arch: "s390x", Layers: [][]byte{testkit.LayerTar(2, 10)}}))
	if b, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	spec := func(s string) string {
		p := filepath.Join(t.TempDir(), "manifest.yaml")
		if err := os.WriteFile(p, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	for name, c := range map[string]struct {
		s    pack.Sources
		kind fault.Kind
		text string
	}{
		"no file":           {pack.Sources{Images: []pack.ImageSource{{Ref: "a:1", From: "nowhere.tar"}}}, fault.NotFound, `"nowhere.tar"`},
		"an empty folder":   {pack.Sources{Images: []pack.ImageSource{{Ref: "a:1", From: empty}}}, fault.Usage, "neither a file nor a folder"},
		"no tar":            {pack.Sources{Images: []pack.ImageSource{{Ref: "a:1", From: text}}}, fault.BadContent, ""},
		"not there":         {pack.Sources{Images: []pack.ImageSource{{Ref: "a:1", From: "docker://" + host + "/a:1"}}}, fault.NotFound, "does not have it"},
		"no registry":       {pack.Sources{Images: []pack.ImageSource{{Ref: "a:1", From: "docker://org/a:1"}}}, fault.Usage, "names no registry"},
		"a variable left":   {pack.Sources{Fallback: host, Images: []pack.ImageSource{{Ref: "a:1", From: "docker://${X}/a:1"}}}, fault.Usage, "is not HOST/REPOSITORY:TAG"},
		"no such platform":  {pack.Sources{Images: []pack.ImageSource{{Ref: "a:1", From: multi}}}, fault.NotFound, "linux/amd64"},
		"another platform":  {pack.Sources{Architectures: []string{"s390x"}, Images: []pack.ImageSource{{Ref: "a:1", From: multi}}}, 0, ""},
		"no chart":          {pack.Sources{Charts: []string{"nowhere"}}, fault.NotFound, `"nowhere"`},
		"no spec":           {pack.Sources{Spec: "nowhere.yaml"}, fault.NotFound, `"nowhere.yaml"`},
		"no spec but text":  {pack.Sources{Spec: spec("images: 7")}, fault.BadContent, "read spec"},
		"only other images": {pack.Sources{Spec: spec("images: [{image: 'a:1', references: [{repository: 'a-s390x:1', platform: {architecture: s390x}}]}]"), Architectures: []string{"amd64"}}, 0, ""},
		"given by a file": {pack.Sources{Spec: spec("images: [{image: 'org/one:1.0', references: [{repository: 'org/one:1.0', pull-repository: 'nowhere.example/x'}]}]"),
			Images: []pack.ImageSource{{Ref: "org/one:1.0", From: dirs["org/one:1.0"]}}}, 0, ""},
	} {
		b, err := build(t, &c.s)
		if err == nil && c.kind == 0 {
			if _, err := open(t, b).Verify(t.Context(), archive.DefaultLimits, nil); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err == nil || fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.text) || fault.HintOf(err) == "" {
			t.Errorf("%s: kind %v, %v, hint %q", name, fault.KindOf(err), err, fault.HintOf(err))
		}
	}
}

func TestParseImageSource(t *testing.T) {
	got, err := pack.ParseImageSource("org/app:1.0=docker://r:5000/x@sha256:0=1")
	if err != nil || got.Ref != "org/app:1.0" || got.From != "docker://r:5000/x@sha256:0=1" {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "org/app:1.0", "org/app=x", "=x", "org/app:1.0=", ":1=x"} {
		if _, err := pack.ParseImageSource(bad); fault.KindOf(err) != fault.Usage || fault.HintOf(err) == "" {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestBill lists charts, images and their layers, and the same of a repack of
// what has one.
func TestBill(t *testing.T) {
	b, err := repack(t, testkit.Archives()["good"], false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pack.ReadSBOM(t.Context(), open(t, b), archive.DefaultLimits); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
		t.Errorf("an archive without one: %v", err)
	}
	p := &pack.Repack{Limits: archive.DefaultLimits, Temp: t.TempDir(), Level: 1}
	defer p.Close()
	built, err := p.Build(t.Context(), open(t, testkit.Archives()["good"]))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "own.tar.gz")
	w, err := pack.WriteFile(file, built)
	if err != nil {
		t.Fatal(err)
	}
	a, err := archive.Open(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	bill, err := pack.ReadSBOM(t.Context(), a, archive.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range bill.Components() {
		if c.Kind != "file" {
			got = append(got, c.Kind+" "+c.Name+" "+c.Version)
		}
	}
	if d := cmp.Diff([]string{"application app 1.0.0", "container org/one 1.0", "container org/two 1.0"}, got); d != "" {
		t.Error(d)
	}
	if st, err := os.Stat(file); err != nil || st.Size() != w.Size || w.File != file {
		t.Errorf("%+v, %v", w, err)
	}
}
