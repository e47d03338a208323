package pack_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pack"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// open opens an archive that stands in memory.
func open(t *testing.T, b []byte) *archive.Archive {
	t.Helper()
	name := filepath.Join(t.TempDir(), "a.tar.gz")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := archive.Open(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

func write(t *testing.T, b archive.Build) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := archive.Write(&out, b); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// repack makes an archive of ours of one of the testkit's.
func repack(t *testing.T, b []byte, batch bool) ([]byte, error) {
	t.Helper()
	p := &pack.Repack{Limits: archive.DefaultLimits, Batch: batch, Temp: t.TempDir(), Level: 1}
	defer p.Close()
	built, err := p.Build(t.Context(), open(t, b))
	if err != nil {
		return nil, err
	}
	return write(t, built), nil
}

// configs are the images of an archive by all their names, told by their
// configurations, and the lists, told by their references.
func configs(t *testing.T, b []byte) map[string]string {
	t.Helper()
	c, err := open(t, b).Verify(t.Context(), archive.DefaultLimits, nil)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, i := range c.Images {
		for _, r := range i.Refs {
			all[r] = archive.DigestOf(i.Config)
		}
	}
	for _, i := range c.Manifest.Images {
		if i.IsList() {
			var refs []string
			for _, r := range i.References {
				refs = append(refs, r.Ref()+" "+r.Platform.String())
			}
			all[i.Ref()] = strings.Join(refs, ", ")
		}
	}
	return all
}

func config(i testkit.Image) string { return archive.DigestOf(i.Config()) }

// TestRepack makes an archive of ours of every good one of other makers: the
// same images under the same names, which stand in the manifest.json with
// their members, and lists in the manifest.yaml alone.
func TestRepack(t *testing.T) {
	img := testkit.Images()
	arches := []testkit.Image{{Ref: "org/multi-amd64:1.0", Arch: "amd64", Layers: img[0].Layers}, {Ref: "org/multi-ppc64le:1.0", Arch: "ppc64le", Layers: [][]byte{testkit.LayerTar(9, 5000)}}}
	two := map[string]string{"org/one:1.0": config(img[0]), "org/two:1.0": config(img[1])}
	list := map[string]string{"org/multi:1.0": "org/multi-amd64:1.0 linux/amd64, org/multi-ppc64le:1.0 linux/ppc64le",
		"org/multi-amd64:1.0": config(arches[0]), "org/multi-ppc64le:1.0": config(arches[1])}
	for name, want := range map[string]map[string]string{
		"good": two, "manifest-last": two, "both": two, "spec-only": two, "two-parts": two, "batch": two, "plain-tar": two, "oci": two, "sample-images-first": two,
		"spec-self": {"org/one:1.0": config(img[0])}, "multi-arch": list, "list-last": list, "sample-by-spec": list, "oci-list": list, "sample-chart-only": {}, "no-images": {},
	} {
		for _, batch := range []bool{false, true} {
			b, err := repack(t, testkit.Archives()[name], batch)
			if err != nil {
				t.Errorf("%s, batch %v: %v", name, batch, err)
				continue
			}
			if d := cmp.Diff(want, configs(t, b)); d != "" {
				t.Errorf("%s, batch %v: %s", name, batch, d)
			}
			js, err := open(t, b).Member("manifest.json")
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(js), `"archive": ""`) {
				t.Errorf("%s, batch %v: an image without a member in %s", name, batch, js)
			}
			again, err := repack(t, b, batch)
			if err != nil || !bytes.Equal(again, b) {
				t.Errorf("%s, batch %v: packed again it is another (%v)", name, batch, err)
			}
		}
	}
}

// TestRepackBad refuses every bad archive, and leaves nothing behind.
func TestRepackBad(t *testing.T) {
	for name, b := range testkit.Archives() {
		if !strings.HasPrefix(name, "bad-") {
			continue
		}
		dir := t.TempDir()
		p := &pack.Repack{Limits: archive.DefaultLimits, Temp: dir, Level: 1}
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		a, err := archive.Open(file, nil)
		if err == nil {
			_, err = p.Build(t.Context(), a)
			a.Close()
		}
		p.Close()
		if fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s: %v", name, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left %v, %v", name, left, err)
		}
	}
}
