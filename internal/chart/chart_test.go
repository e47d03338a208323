package chart

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/cli"
	"helm.sh/helm/v3/pkg/getter"
	"helm.sh/helm/v3/pkg/registry"
	"helm.sh/helm/v3/pkg/repo"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

func sample(t *testing.T) (*Chart, []byte) {
	t.Helper()
	c, err := Open("app.tgz", testkit.ChartTgz("app", "1.0.0+b1", "org/one"))
	if err != nil {
		t.Fatal(err)
	}
	pkg, err := c.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return c, pkg
}

func TestPackIsReproducibleAndHelmReadsIt(t *testing.T) {
	c, pkg := sample(t)
	again, err := c.Pack()
	if err != nil || !bytes.Equal(pkg, again) {
		t.Errorf("two packs differ, %v", err)
	}
	h, err := loader.LoadArchive(bytes.NewReader(pkg))
	if err != nil || h.Name() != "app" || h.Metadata.Version != "1.0.0+b1" || len(h.Templates) != 1 {
		t.Errorf("helm reads %+v, %v", h, err)
	}
}

func TestFromFS(t *testing.T) {
	c, err := FromFS(fstest.MapFS{"Chart.yaml": {Data: []byte("name: x\nversion: 1.2.3\nappVersion: 4\n")}, "templates/a.yaml": {Data: []byte("a: 1")}})
	if err != nil || c.File() != "x-1.2.3.tgz" || c.AppVersion != "4" {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := FromFS(fstest.MapFS{"values.yaml": {}}); fault.KindOf(err) != fault.BadContent {
		t.Errorf("no Chart.yaml: %v", err)
	}
}

func TestBadPackages(t *testing.T) {
	entry := func(name string) []byte {
		return testkit.Gzip(testkit.Tar(testkit.Entry{Name: "x/Chart.yaml", Data: []byte("name: x\nversion: 1.0.0")}, testkit.Entry{Name: name, Data: []byte("a")}))
	}
	for name, b := range map[string][]byte{
		"text": []byte("no"), "two folders": entry("y/a"), "above": entry("../a"), "absolute": entry("/a"), "twice": entry("x/Chart.yaml"),
		"no version": testkit.Gzip(testkit.Tar(testkit.Entry{Name: "x/Chart.yaml", Data: []byte("name: x")})),
		"slash":      testkit.Gzip(testkit.Tar(testkit.Entry{Name: "x/Chart.yaml", Data: []byte("name: ../x\nversion: 1.0.0")})),
		"cut":        testkit.ChartTgz("x", "1.0.0", "r")[:100],
	} {
		if _, err := Open(name, b); fault.KindOf(err) != fault.BadContent || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEditKeepsAllElse(t *testing.T) {
	in := `# the images
a:
  repository: org/a # plain
  tag: 1
b: {repository: 'org/b', n: 1}   # flow
c:
  repository: "org/c"
empty:
  registry: ""
none:
  registry:
ä: {repository: org/d}
`
	keys := []string{"a.repository", "b.repository", "c.repository", "empty.registry", "ä.repository", "not.there", "a"}
	out, missing, err := Edit([]byte(in), keys, func(_, old string) string { return "reg:5000/" + old })
	if err != nil {
		t.Fatal(err)
	}
	want := strings.NewReplacer("org/a #", "reg:5000/org/a #", "'org/b'", `"reg:5000/org/b"`, `"org/c"`, `"reg:5000/org/c"`, `registry: ""`, `registry: "reg:5000/"`, "org/d}", "reg:5000/org/d}").Replace(in)
	if string(out) != want {
		t.Errorf("got\n%s\nwant\n%s", out, want)
	}
	if !slices.Equal(missing, []string{"not.there", "a"}) {
		t.Errorf("missing %q", missing)
	}
	out, _, err = Edit([]byte(in), []string{"none.registry"}, func(_, _ string) string { return "reg" })
	if err != nil || !strings.Contains(string(out), "registry: reg\n") || !strings.Contains(string(out), "# the images") {
		t.Errorf("null value: %s, %v", out, err)
	}
}

// FuzzOpen reads any package without a crash; what it reads it packs, always
// into the same bytes.
func FuzzOpen(f *testing.F) {
	f.Add(testkit.ChartTgz("app", "1.0.0", "org/one"))
	f.Add(testkit.Gzip(testkit.Tar(testkit.Entry{Name: "a/Chart.yaml", Data: []byte("name: a\nversion: 1\n")})))
	f.Add([]byte("\x1f\x8b"))
	f.Fuzz(func(t *testing.T, pkg []byte) {
		c, err := Open("x.tgz", pkg)
		var own *fault.Error
		if err != nil {
			if !errors.As(err, &own) {
				t.Errorf("not our own error: %T %v", err, err)
			}
			return
		}
		one, err1 := c.Pack()
		two, err2 := c.Pack()
		if err1 != nil || err2 != nil || !slices.Equal(one, two) {
			t.Errorf("%v, %v, or packed in two ways", err1, err2)
		}
	})
}

func FuzzEdit(f *testing.F) {
	f.Add([]byte("a:\n  repository: org/a # x\n"), "a.repository", "reg:5000/org/a")
	f.Add([]byte("a: {b: 'c''d'}\n"), "a.b", "x: y")
	f.Fuzz(func(t *testing.T, in []byte, key, to string) {
		if len(to) > 100 || strings.ContainsFunc(to, func(r rune) bool { return r < ' ' || r > '~' }) {
			return
		}
		out, missing, err := Edit(in, []string{key}, func(_, _ string) string { return to })
		if err != nil || len(missing) > 0 {
			return
		}
		got := ""
		if _, missing, err := Edit(out, []string{key}, func(_, old string) string { got = old; return old }); err != nil || len(missing) > 0 || got != to {
			t.Errorf("%q became %q: value %q, want %q, %v", in, out, got, to, err)
		}
	})
}

// target is one kind of chart repository and how Helm's own code reads it.
type target struct {
	put interface {
		Put(ctx context.Context, c *Chart, pkg []byte) (Result, error)
		Check(ctx context.Context, c *Chart, pkg []byte) (Result, error)
	}
	read func(t *testing.T) []byte
}

// TestTargets is the contract of all chart repositories: a chart that was put
// is read by Helm's own code, byte for byte, and is not put twice.
func TestTargets(t *testing.T) {
	dir := t.TempDir()
	museum := &testkit.Museum{}
	srv := httptest.NewTLSServer(museum)
	t.Cleanup(srv.Close)
	icp := &testkit.Museum{Token: "t0ken"}
	icpSrv := httptest.NewTLSServer(icp)
	t.Cleanup(icpSrv.Close)
	host := testkit.Registry(t, t.TempDir())
	reg, err := image.Dial(t.Context(), image.Options{Host: host})
	if err != nil {
		t.Fatal(err)
	}
	auth := func(r *http.Request) { r.Header.Set("Authorization", "Bearer t0ken") }
	all := map[string]target{
		"folder": {&Dir{dir, time.Now}, func(t *testing.T) []byte {
			x, err := repo.LoadIndexFile(filepath.Join(dir, "index.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			v, err := x.Get("app", "1.0.0+b1")
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(dir, v.URLs[0]))
			if err != nil || v.Digest != testkit.Hex(b) {
				t.Fatal(v.Digest, err)
			}
			return b
		}},
		"oci": {&OCI{reg, host, "charts"}, func(t *testing.T) []byte {
			c, err := registry.NewClient(registry.ClientOptPlainHTTP())
			if err != nil {
				t.Fatal(err)
			}
			r, err := c.Pull(host + "/charts/app:1.0.0+b1")
			if err != nil {
				t.Fatal(err)
			}
			return r.Chart.Data
		}},
		"museum": {&Museum{HTTP{URL: srv.URL, Client: srv.Client()}}, func(t *testing.T) []byte {
			return download(t, srv, "/charts/app-1.0.0+b1.tgz", nil)
		}},
		"icp": {&ICP{HTTP: HTTP{URL: icpSrv.URL + "/mgmt-repo/charts", Client: icpSrv.Client(), Authorize: auth}, Tail: "{file}", Sync: "/helm-api/api/v2/synch"}, func(t *testing.T) []byte {
			if icp.Syncs != 1 {
				t.Errorf("synchronised %d times", icp.Syncs)
			}
			return download(t, icpSrv, "/mgmt-repo/requiredAssets/app-1.0.0+b1.tgz", auth)
		}},
	}
	for name, x := range all {
		t.Run(name, func(t *testing.T) {
			c, pkg := sample(t)
			for n, want := range []Result{Pushed, Present} {
				if got, err := x.put.Check(t.Context(), c, pkg); err != nil || got != want {
					t.Fatalf("check %d: %q, %v", n, got, err)
				}
				if got, err := x.put.Put(t.Context(), c, pkg); err != nil || got != want {
					t.Fatalf("put %d: %q, %v", n, got, err)
				}
			}
			if got := x.read(t); !bytes.Equal(got, pkg) {
				t.Errorf("read back %d bytes, put %d", len(got), len(pkg))
			}
		})
	}
}

func download(t *testing.T, srv *httptest.Server, path string, auth func(*http.Request)) []byte {
	t.Helper()
	h := HTTP{URL: srv.URL, Client: srv.Client(), Authorize: auth}
	_, b, err := h.do(t.Context(), http.MethodGet, srv.URL+path, "", nil, 200)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestHTTPFaults(t *testing.T) {
	c, pkg := sample(t)
	museum := &testkit.Museum{Token: "x"}
	srv := httptest.NewTLSServer(museum)
	t.Cleanup(srv.Close)
	m := &Museum{HTTP{URL: srv.URL, Client: srv.Client()}}
	if _, err := m.Put(t.Context(), c, pkg); fault.KindOf(err) != fault.Denied || fault.HintOf(err) == "" {
		t.Errorf("no token: %v", err)
	}
	museum.Token = ""
	if _, err := m.Put(t.Context(), c, pkg); err != nil {
		t.Fatal(err)
	}
	c.SetValues([]byte("other: 1\n"))
	other, err := c.Pack()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Put(t.Context(), c, other); fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "file already exists") {
		t.Errorf("another of that version: %v", err)
	}
	gone := &Museum{HTTP{URL: "https://127.0.0.1:1", Client: srv.Client()}}
	if _, err := gone.Put(t.Context(), c, other); fault.KindOf(err) != fault.Unreachable {
		t.Errorf("nobody there: %v", err)
	}
	icp := &ICP{HTTP: HTTP{URL: srv.URL + "/mgmt-repo/charts", Client: srv.Client()}, Tail: "{file}", Sync: "/nowhere"}
	if _, err := icp.Put(t.Context(), c, other); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), "the chart is uploaded") {
		t.Errorf("no sync: %v, %q", err, fault.HintOf(err))
	}
}

// TestHelmList: helm's own code downloads a chart by the entry that we wrote.
func TestHelmList(t *testing.T) {
	c, pkg := sample(t)
	museum := &testkit.Museum{}
	srv := httptest.NewServer(museum)
	t.Cleanup(srv.Close)
	h := &HTTP{URL: srv.URL, Client: srv.Client()}
	if _, err := (&Museum{*h}).Put(t.Context(), c, pkg); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f := FindHelmFiles(func(k string) string {
		return map[string]string{"HELM_CONFIG_HOME": filepath.Join(dir, "config"), "XDG_CACHE_HOME": filepath.Join(dir, "cache")}[k]
	})
	for range 2 {
		if err := f.Add(t.Context(), HelmRepo{Name: "site", URL: srv.URL}, h, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	list, err := repo.LoadFile(f.Config)
	if err != nil || len(list.Repositories) != 1 || !list.Has("site") {
		t.Fatalf("helm reads %+v, %v", list, err)
	}
	if st, err := os.Stat(f.Config); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	r, err := repo.NewChartRepository(list.Get("site"), getter.All(cli.New()))
	if err != nil {
		t.Fatal(err)
	}
	r.CachePath = f.Cache
	if _, err := r.DownloadIndexFile(); err != nil {
		t.Fatal(err)
	}
	cached, err := repo.LoadIndexFile(filepath.Join(f.Cache, "site-index.yaml"))
	if err != nil || !cached.Has("app", "1.0.0+b1") {
		t.Errorf("index in the cache: %v", err)
	}
	if err := f.Remove("site", time.Now()); err != nil {
		t.Fatal(err)
	}
	if all, err := f.List(); err != nil || len(all) != 0 {
		t.Errorf("%+v, %v", all, err)
	}
	if err := f.Remove("site", time.Now()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("removed twice: %v", err)
	}
	if err := f.Add(t.Context(), HelmRepo{Name: "no", URL: srv.URL + "/nowhere"}, h, time.Now()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("no repository: %v", err)
	}
}
