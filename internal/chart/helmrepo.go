package chart

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// HelmFiles are where Helm keeps its list of chart repositories and their
// indexes.
type HelmFiles struct{ Config, Cache string }

// FindHelmFiles finds them as Helm does.
func FindHelmFiles(getenv func(string) string) HelmFiles {
	dir := func(own, xdg, home string) string {
		if d := getenv(own); d != "" {
			return d
		}
		if d := getenv(xdg); d != "" {
			return filepath.Join(d, "helm")
		}
		return filepath.Join(getenv("HOME"), home, "helm")
	}
	f := HelmFiles{Config: getenv("HELM_REPOSITORY_CONFIG"), Cache: getenv("HELM_REPOSITORY_CACHE")}
	if f.Config == "" {
		f.Config = filepath.Join(dir("HELM_CONFIG_HOME", "XDG_CONFIG_HOME", ".config"), "repositories.yaml")
	}
	if f.Cache == "" {
		f.Cache = filepath.Join(dir("HELM_CACHE_HOME", "XDG_CACHE_HOME", ".cache"), "repository")
	}
	return f
}

// HelmRepo is one chart repository in Helm's list.
type HelmRepo struct {
	Name     string `json:"name"`
	URL      string `json:"url"`
	CAFile   string `json:"caFile,omitempty"`
	CertFile string `json:"certFile,omitempty"`
	KeyFile  string `json:"keyFile,omitempty"`
	Insecure bool   `json:"insecure_skip_tls_verify,omitempty"`
	// Username and Password are Helm's own keys; we read them and write none.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
}

type helmList struct {
	APIVersion   string           `json:"apiVersion"`
	Generated    time.Time        `json:"generated"`
	Repositories []map[string]any `json:"repositories"`
}

func (f HelmFiles) read() (*helmList, error) {
	l := &helmList{}
	b, err := os.ReadFile(f.Config)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Other, "read", f.Config, err)
	}
	if err := yaml.Unmarshal(b, l); err != nil {
		return nil, fault.New(fault.BadContent, "read", f.Config, err).WithHint("repair Helm's list of repositories, or move it away")
	}
	return l, nil
}

// List gives the repositories.
func (f HelmFiles) List() ([]HelmRepo, error) {
	l, err := f.read()
	if err != nil {
		return nil, err
	}
	all := []HelmRepo{}
	for _, m := range l.Repositories {
		var r HelmRepo
		b, err := yaml.Marshal(m)
		if err == nil {
			err = yaml.Unmarshal(b, &r)
		}
		if err != nil {
			return nil, fault.New(fault.BadContent, "read", f.Config, err)
		}
		all = append(all, r)
	}
	return all, nil
}

// Find gives the repository of a name.
func (f HelmFiles) Find(name string) (HelmRepo, bool, error) {
	all, err := f.List()
	if err != nil {
		return HelmRepo{}, false, err
	}
	n := slices.IndexFunc(all, func(r HelmRepo) bool { return r.Name == name })
	if n < 0 {
		return HelmRepo{}, false, nil
	}
	return all[n], true, nil
}

// Add writes a repository into Helm's list and its index into Helm's cache, so
// that helm itself then works. Entries and keys of others stay as they are.
func (f HelmFiles) Add(ctx context.Context, r HelmRepo, h *HTTP, now time.Time) error {
	status, index, err := h.do(ctx, http.MethodGet, strings.TrimSuffix(r.URL, "/")+"/index.yaml", "", nil, 200, 404)
	if err != nil {
		return err
	}
	var doc map[string]any
	if status == http.StatusNotFound || yaml.Unmarshal(index, &doc) != nil || doc["apiVersion"] == nil {
		return fault.Newf(fault.NotFound, "add chart repository", r.URL, "it has no index.yaml that is a chart repository's").WithHint("check the URL")
	}
	l, err := f.read()
	if err != nil {
		return err
	}
	b, err := yaml.Marshal(r) //nolint:gosec // repo add takes no password, so that there is none in it
	if err != nil {
		return err
	}
	entry := map[string]any{}
	if err := yaml.Unmarshal(b, &entry); err != nil {
		return err
	}
	if n := slices.IndexFunc(l.Repositories, func(m map[string]any) bool { return text(m["name"]) == r.Name }); n >= 0 {
		l.Repositories[n] = entry
	} else {
		l.Repositories = append(l.Repositories, entry)
	}
	if err := f.write(l, now); err != nil {
		return err
	}
	if err := os.MkdirAll(f.Cache, 0o755); err != nil {
		return fault.New(fault.Other, "make folder", f.Cache, err)
	}
	return writeFile(filepath.Join(f.Cache, r.Name+"-index.yaml"), index)
}

// Remove takes a repository out of Helm's list and cache.
func (f HelmFiles) Remove(name string, now time.Time) error {
	l, err := f.read()
	if err != nil {
		return err
	}
	n := slices.IndexFunc(l.Repositories, func(m map[string]any) bool { return text(m["name"]) == name })
	if n < 0 {
		return fault.Newf(fault.NotFound, "remove chart repository", name, "there is none of this name").WithHint("see: kmsctl repo list")
	}
	l.Repositories = slices.Delete(l.Repositories, n, n+1)
	for _, tail := range []string{"-index.yaml", "-charts.txt"} {
		if err := os.Remove(filepath.Join(f.Cache, name+tail)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fault.New(fault.Other, "remove", filepath.Join(f.Cache, name+tail), err)
		}
	}
	return f.write(l, now)
}

func (f HelmFiles) write(l *helmList, now time.Time) error {
	if l.Generated = now.UTC(); l.Repositories == nil {
		l.Repositories = []map[string]any{}
	}
	b, err := yaml.Marshal(l)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(f.Config), 0o755); err != nil {
		return fault.New(fault.Other, "make folder", filepath.Dir(f.Config), err)
	}
	return writeMode(f.Config, b, 0o600)
}
