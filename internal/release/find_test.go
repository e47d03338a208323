package release_test

import (
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	helmregistry "helm.sh/helm/v3/pkg/registry"
	"helm.sh/helm/v3/pkg/repo"

	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/templates"
)

// packed writes the chart in two versions, with Helm's own code.
func packed(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, v := range []string{"1.0.0", "1.1.0"} {
		c, err := loader.LoadDir("../../templates/" + templates.ChartName)
		if err != nil {
			t.Fatal(err)
		}
		c.Metadata.Version = v
		if out[v], err = chartutil.Save(c, dir); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func index(t *testing.T, dir string) {
	t.Helper()
	i, err := repo.IndexDirectory(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	i.SortEntries()
	if err := i.WriteFile(filepath.Join(dir, "index.yaml"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestFind gets the chart from every kind of repository, the newest and a
// named version, and says what is wrong when it cannot.
func TestFind(t *testing.T) {
	dir := t.TempDir()
	files := packed(t, dir)
	index(t, dir)
	web := httptest.NewServer(httpDir(dir))
	t.Cleanup(web.Close)
	oci := httptest.NewServer(registry.New(registry.Logger(log.New(testWriter{t}, "", 0))))
	t.Cleanup(oci.Close)
	host := strings.TrimPrefix(oci.URL, "http://")
	c, err := helmregistry.NewClient(helmregistry.ClientOptPlainHTTP())
	if err != nil {
		t.Fatal(err)
	}
	for v, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Push(b, host+"/charts/"+templates.ChartName+":"+v); err != nil {
			t.Fatal(err)
		}
	}
	source := func(r string) release.Source {
		s := release.Source{Repo: r, Get: (&chart.HTTP{URL: r, Client: web.Client()}).Get}
		if host, ok := release.IsOCI(r); ok {
			var err error
			if s.Registry, err = image.Dial(t.Context(), image.Options{Host: host, Tries: 1}); err != nil {
				t.Fatal(err)
			}
		}
		return s
	}
	for _, r := range []string{dir, web.URL, "oci://" + host + "/charts", "oci://" + host + "/charts/" + templates.ChartName} {
		for version, want := range map[string]string{"": "1.1.0", "1.0.0": "1.0.0"} {
			got, err := release.Find(t.Context(), source(r), templates.ChartName, version)
			if err != nil {
				t.Errorf("%s %q: %v", r, version, err)
				continue
			}
			if got.Version() != want || got.Name() != templates.ChartName {
				t.Errorf("%s %q: %s %s", r, version, got.Name(), got.Version())
			}
		}
		if _, err := release.Find(t.Context(), source(r), templates.ChartName, "9.9.9"); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), "kmsctl load") {
			t.Errorf("%s: %v (%v)", r, err, fault.KindOf(err))
		}
	}
	gone := source("oci://" + host + "/charts")
	oci.Close()
	if _, err := release.Find(t.Context(), gone, templates.ChartName, "1.0.0"); fault.KindOf(err) != fault.Unreachable {
		t.Errorf("%v", err)
	}
}

// TestLoadFile reads a packed chart, and refuses half of one.
func TestLoadFile(t *testing.T) {
	dir := t.TempDir()
	f := packed(t, dir)["1.0.0"]
	if c, err := release.LoadFile(f); err != nil || c.Version() != "1.0.0" {
		t.Errorf("%v", err)
	}
	b, err := os.ReadFile(f)
	if err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(dir, "half.tgz")
	if err := os.WriteFile(half, b[:len(b)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := release.LoadFile(half); fault.KindOf(err) != fault.BadContent {
		t.Errorf("%v", err)
	}
	if _, err := release.LoadFile(filepath.Join(dir, "none.tgz")); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
}
