package app

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// guarded is a server over TLS that lets in by one header, and says what it
// wants instead; its CA is in the file.
func guarded(t *testing.T, header, challenge string, inner http.Handler) (host, ca string) {
	t.Helper()
	var srv *httptest.Server
	srv = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch got := r.Header.Get("Authorization"); {
		case r.URL.Path == "/token" && got == header:
			fmt.Fprint(w, `{"token":"exchanged"}`)
		case got == header && strings.HasPrefix(challenge, "Basic"), got == "Bearer exchanged":
			inner.ServeHTTP(w, r)
		default:
			w.Header().Set("WWW-Authenticate", strings.ReplaceAll(challenge, "HERE", srv.URL))
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	t.Cleanup(srv.Close)
	ca = write(t, "ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})))
	return srv.Listener.Addr().String(), ca
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// env is an environment of its own.
func env(kv ...string) func(string) string {
	return func(k string) string {
		for n := 0; n < len(kv); n += 2 {
			if kv[n] == k {
				return kv[n+1]
			}
		}
		return ""
	}
}

// find reads the chart app by install's flags.
func find(t *testing.T, getenv func(string) string, args ...string) (string, error) {
	t.Helper()
	a := New("test")
	a.Getenv = getenv
	f := &ChartFlags{Name: "app"}
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.Add(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	if err := f.Check(); err != nil {
		return "", err
	}
	c, err := a.FindChart(t.Context(), f)
	if err != nil {
		return "", err
	}
	return c.Version(), nil
}

// fill puts two versions of the chart app into a repository by load's flags.
func fill(t *testing.T, args ...string) *DeliveryFlags {
	t.Helper()
	a := New("test")
	a.Getenv = env()
	f := &DeliveryFlags{}
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.Add(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	to, err := a.OpenCharts(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"1.0.0", "1.2.0+build", "2.0.0-rc.1"} {
		pkg := testkit.ChartTgz("app", v, "org/one")
		c, err := chart.Open("app.tgz", pkg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := to.Put(t.Context(), c, pkg); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// TestCredentialsOfCharts: what lets load put a chart into a repository lets
// install read it from there, whatever kind of repository it is.
func TestCredentialsOfCharts(t *testing.T) {
	token, password := write(t, "token", "s3cret-token\n"), write(t, "password", "s3cret-pw\n")
	bearer := []string{"--repo-token-file", token}
	basic := []string{"--repo-user", "me", "--repo-password-file", password}
	const asToken, asUser = "Bearer s3cret-token", "Basic bWU6czNjcmV0LXB3"
	const wantsBasic, wantsToken = `Basic realm="r"`, `Bearer realm="HERE/token",service="s"`
	for name, c := range map[string]struct {
		header, challenge, put, get string
		login                       []string
		env                         []string
	}{
		"web, token":                     {asToken, wantsBasic, "cm+https://", "https://", bearer, []string{"KMSCTL_REPO_TOKEN", "s3cret-token"}},
		"web, user":                      {asUser, wantsBasic, "cm+https://", "https://", basic, nil},
		"oci, token in place of a user":  {asToken, wantsBasic, "oci://", "oci://", bearer, []string{"KMSCTL_REPO_TOKEN", "s3cret-token"}},
		"oci, user":                      {asUser, wantsBasic, "oci://", "oci://", basic, nil},
		"oci, token for a token service": {asToken, wantsToken, "oci://", "oci://", bearer, []string{"KMSCTL_REPO_TOKEN", "s3cret-token"}},
		"oci, user for a token service":  {asUser, wantsToken, "oci://", "oci://", basic, nil},
	} {
		t.Run(name, func(t *testing.T) {
			inner, tail := http.Handler(&testkit.Museum{}), ""
			if c.put == "oci://" {
				inner, tail = ggcr.New(), "/charts"
			}
			host, ca := guarded(t, c.header, c.challenge, inner)
			fill(t, append([]string{"--registry", "other.example", "--repo", c.put + host + tail, "--repo-ca-file", ca}, c.login...)...)
			at := []string{"--repo", c.get + host + tail, "--repo-ca-file", ca}
			for version, want := range map[string]string{"": "1.2.0+build", "1.0.0": "1.0.0", "2.0.0-rc.1": "2.0.0-rc.1", "1.2.0+build": "1.2.0+build"} {
				if got, err := find(t, env(), append(append(at, c.login...), "--version", version)...); err != nil || got != want {
					t.Errorf("version %q: %q, %v", version, got, err)
				}
			}
			if c.env != nil {
				if got, err := find(t, env(c.env...), at...); err != nil || got != "1.2.0+build" {
					t.Errorf("by the environment: %q, %v", got, err)
				}
			}
			if _, err := find(t, env(), append(append(at, c.login...), "--version", "9.9.9")...); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), "kmsctl load") {
				t.Errorf("a version that is not there: %v, hint %q", err, fault.HintOf(err))
			}
			for _, who := range [][]string{nil, {"--repo-token-file", write(t, "wrong", "wr0ng")}} {
				_, err := find(t, env("DOCKER_CONFIG", t.TempDir()), append(at, who...)...)
				if fault.KindOf(err) != fault.Denied || !strings.Contains(fault.HintOf(err), "--repo-token-file") {
					t.Errorf("as %q: %v, hint %q", who, err, fault.HintOf(err))
				}
				if text := fmt.Sprint(err, fault.HintOf(err)); strings.Contains(text, "wr0ng") || strings.Contains(text, "s3cret") {
					t.Errorf("a secret in %q", text)
				}
			}
		})
	}
}

// TestChartsInTheImagesRegistry: a chart repository in the images' registry is
// reached by that one's flags, to put and to read.
func TestChartsInTheImagesRegistry(t *testing.T) {
	host, ca := guarded(t, "Bearer s3cret-token", `Bearer realm="HERE/token",service="s"`, ggcr.New())
	f := fill(t, "--registry", host+"/kms", "--registry-ca-file", ca, "--registry-token-file", write(t, "token", "s3cret-token"), "--repo", "oci://"+host+"/charts")
	a := New("test")
	a.Getenv = env()
	from := f.ChartFlags()
	from.Name = "app"
	if c, err := a.FindChart(t.Context(), &from); err != nil || c.Version() != "1.2.0+build" {
		t.Errorf("%v", err)
	}
}

// TestWhoPushesLooks: what lets load push lets a look at the registry in.
func TestWhoPushesLooks(t *testing.T) {
	host, ca := guarded(t, "Bearer s3cret-token", `Bearer realm="HERE/token",service="s"`, ggcr.New())
	f := fill(t, "--registry", host, "--ca-file", ca, "--registry-token-file", write(t, "token", "s3cret-token"), "--repo", "oci://"+host+"/charts")
	a := New("test")
	a.Getenv = env()
	r, err := a.OpenPull(t.Context(), f.Pull(), host, false, 1)
	if err != nil {
		t.Fatal(err)
	}
	if tags, err := r.Tags(t.Context(), "charts/app"); err != nil || len(tags) != 3 {
		t.Errorf("%q, %v", tags, err)
	}
}

// TestTokenStaysAtHome: a chart that the index names at another host is fetched
// without the repository's credentials.
func TestTokenStaysAtHome(t *testing.T) {
	asked := ""
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Header.Get("Authorization")
		_, _ = w.Write(testkit.ChartTgz("app", "1.0.0", "org/one"))
	}))
	t.Cleanup(other.Close)
	host, ca := guarded(t, "Bearer s3cret-token", `Basic realm="r"`, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "apiVersion: v1\nentries:\n  app:\n  - null\n  - {name: app, version: 1.0.0, urls: ['%s/app-1.0.0.tgz']}\n", other.URL)
	}))
	got, err := find(t, env(), "--repo", "https://"+host, "--repo-ca-file", ca, "--repo-token-file", write(t, "token", "s3cret-token"))
	if err != nil || got != "1.0.0" || asked != "" {
		t.Errorf("%q, %v; the other host saw %q", got, err, asked)
	}
}

// TestNamedRepository reads a chart by a name of Helm's own list, with the CA
// and the user that stand there; a flag beats the list.
func TestNamedRepository(t *testing.T) {
	host, ca := guarded(t, "Basic bWU6czNjcmV0LXB3", `Basic realm="r"`, &testkit.Museum{})
	fill(t, "--registry", "other.example", "--repo", "cm+https://"+host, "--ca-file", ca, "--repo-user", "me", "--repo-password-file", write(t, "password", "s3cret-pw"))
	list := write(t, "repositories.yaml", fmt.Sprintf("apiVersion: ''\nrepositories:\n- {name: site, url: 'https://%s', caFile: %s, username: me, password: s3cret-pw}\n", host, ca))
	helm := env("HELM_REPOSITORY_CONFIG", list)
	if got, err := find(t, helm, "--repo", "site"); err != nil || got != "1.2.0+build" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := find(t, helm, "--repo", "site", "--repo-user", "me", "--repo-password-file", write(t, "wrong", "no")); fault.KindOf(err) != fault.Denied {
		t.Errorf("a wrong password by the flags: %v", err)
	}
	if _, err := find(t, helm, "--repo", "unheard"); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), "kmsctl repo add unheard") {
		t.Errorf("%v", err)
	}
	if _, err := find(t, helm, "--repo", "site", "--repo-cert-file", "x"); fault.KindOf(err) != fault.Usage {
		t.Errorf("a certificate without its key: %v", err)
	}
}
