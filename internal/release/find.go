package release

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/cli"
	"helm.sh/helm/v3/pkg/getter"
	"helm.sh/helm/v3/pkg/registry"
	"helm.sh/helm/v3/pkg/repo"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Source is a chart repository, and how to be let in.
type Source struct {
	// Repo is a folder with index.yaml, oci://HOST/PATH, an http(s) URL, or a
	// name in Helm's own repositories.yaml.
	Repo                      string
	CAFile, CertFile, KeyFile string
	User, Password            string
	Insecure                  bool // plain HTTP for oci://, no check of certificates for https://
}

// LoadFS loads a chart from a file system with Chart.yaml at its root.
func LoadFS(fsys fs.FS) (*Chart, error) {
	var files []*loader.BufferedFile
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(fsys, p)
		files = append(files, &loader.BufferedFile{Name: p, Data: b})
		return err
	})
	if err != nil {
		return nil, err
	}
	c, err := loader.LoadFiles(files)
	if err != nil {
		return nil, fault.New(fault.BadContent, "load the embedded chart", "", err)
	}
	return &Chart{c}, nil
}

// LoadFile loads a packed chart or a chart's folder.
func LoadFile(name string) (*Chart, error) {
	if _, err := os.Stat(name); err != nil {
		return nil, fault.New(fault.NotFound, "load chart", name, err).WithHint("check --chart")
	}
	c, err := loader.Load(name)
	if err != nil {
		return nil, fault.New(fault.BadContent, "load chart", name, err).WithHint("is it a chart packed by Helm or kmsctl, whole?")
	}
	return &Chart{c}, nil
}

// LoadBytes loads a packed chart.
func LoadBytes(name string, b []byte) (*Chart, error) {
	c, err := loader.LoadArchive(bytes.NewReader(b))
	if err != nil {
		return nil, fault.New(fault.BadContent, "load chart", name, err).WithHint("is it a chart packed by Helm or kmsctl, whole?")
	}
	return &Chart{c}, nil
}

// Find gets a chart from a repository; version "" means the newest.
func Find(s Source, name, version string) (*Chart, error) {
	switch {
	case registry.IsOCI(s.Repo):
		return s.oci(name, version)
	case strings.HasPrefix(s.Repo, "https://"), strings.HasPrefix(s.Repo, "http://"):
		return s.web(name, version)
	}
	if _, err := os.Stat(filepath.Join(s.Repo, "index.yaml")); err == nil {
		return s.folder(name, version)
	}
	return s.named(name, version)
}

func (s Source) notFound(name, version string, err error) error {
	return fault.New(fault.NotFound, "find chart "+strings.TrimSpace(name+" "+version)+" in", s.Repo, err).
		WithHint("load it with `kmsctl load ARCHIVE --repo %s`, or name another --version", s.Repo)
}

func (s Source) folder(name, version string) (*Chart, error) {
	index, err := repo.LoadIndexFile(filepath.Join(s.Repo, "index.yaml"))
	if err != nil {
		return nil, fault.New(fault.BadContent, "read", filepath.Join(s.Repo, "index.yaml"), err)
	}
	entry, err := index.Get(name, version)
	if err != nil {
		return nil, s.notFound(name, version, err)
	}
	if len(entry.URLs) == 0 {
		return nil, s.notFound(name, version, errors.New("the index has no file for it"))
	}
	file := entry.URLs[0]
	if strings.Contains(file, "://") {
		file = path.Base(file) // the folder is served elsewhere by that URL; the file lies here
	}
	return LoadFile(filepath.Join(s.Repo, filepath.FromSlash(file)))
}

// named looks the repository up where `helm repo add` and `kmsctl repo add`
// keep it.
func (s Source) named(name, version string) (*Chart, error) {
	settings := cli.New()
	file, err := repo.LoadFile(settings.RepositoryConfig)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.BadContent, "read", settings.RepositoryConfig, err)
	}
	var entry *repo.Entry
	if file != nil {
		entry = file.Get(s.Repo)
	}
	if entry == nil {
		return nil, fault.Newf(fault.NotFound, "find chart repository", s.Repo, "it is neither a folder with index.yaml nor a name in %s", settings.RepositoryConfig).
			WithHint("add it with `kmsctl repo add %s URL`", s.Repo)
	}
	t := Source{Repo: entry.URL, CAFile: first(s.CAFile, entry.CAFile), CertFile: first(s.CertFile, entry.CertFile), KeyFile: first(s.KeyFile, entry.KeyFile),
		User: first(s.User, entry.Username), Password: first(s.Password, entry.Password), Insecure: s.Insecure || entry.InsecureSkipTLSverify}
	if registry.IsOCI(t.Repo) {
		return t.oci(name, version)
	}
	return t.web(name, version)
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func (s Source) web(name, version string) (*Chart, error) {
	getters := getter.All(cli.New())
	url, err := repo.FindChartInAuthAndTLSAndPassRepoURL(s.Repo, s.User, s.Password, name, version, s.CertFile, s.KeyFile, s.CAFile, s.Insecure, false, getters)
	if err != nil {
		if strings.Contains(err.Error(), "not found in") {
			return nil, s.notFound(name, version, err)
		}
		return nil, s.webFault(err)
	}
	g, err := getters.ByScheme("https")
	if err != nil {
		return nil, err
	}
	b, err := g.Get(url, getter.WithURL(s.Repo), getter.WithBasicAuth(s.User, s.Password), getter.WithTLSClientConfig(s.CertFile, s.KeyFile, s.CAFile),
		getter.WithInsecureSkipVerifyTLS(s.Insecure))
	if err != nil {
		return nil, s.webFault(err)
	}
	return LoadBytes(url, b.Bytes())
}

func (s Source) webFault(err error) error {
	kind := fault.Unreachable
	if strings.Contains(err.Error(), "401") || strings.Contains(err.Error(), "403") {
		kind = fault.Denied
	}
	return fault.New(kind, "read chart repository", s.Repo, err).WithHint("check --repo, --repo-ca-file and the client certificate or user")
}

func (s Source) oci(name, version string) (*Chart, error) {
	ref := strings.TrimSuffix(strings.TrimPrefix(s.Repo, registry.OCIScheme+"://"), "/")
	if path.Base(ref) != name {
		ref += "/" + name
	}
	c, err := s.registryClient(ref)
	if err != nil {
		return nil, err
	}
	if version == "" {
		tags, err := c.Tags(ref)
		if err != nil {
			return nil, s.ociFault(name, version, err)
		}
		if len(tags) == 0 {
			return nil, s.notFound(name, version, errors.New("it has no version"))
		}
		version = tags[0] // sorted, newest first
	}
	res, err := c.Pull(ref + ":" + strings.ReplaceAll(version, "+", "_"))
	if err != nil {
		return nil, s.ociFault(name, version, err)
	}
	return LoadBytes(ref+":"+version, res.Chart.Data)
}

func (s Source) ociFault(name, version string, err error) error {
	if strings.Contains(err.Error(), "not found") || strings.Contains(err.Error(), "404") {
		return s.notFound(name, version, err)
	}
	return s.webFault(err)
}

func (s Source) registryClient(ref string) (*registry.Client, error) {
	host, _, _ := strings.Cut(ref, "/")
	opts := []registry.ClientOption{registry.ClientOptWriter(io.Discard)}
	if s.CAFile == "" && (s.Insecure || loopback(host)) {
		opts = append(opts, registry.ClientOptPlainHTTP())
	}
	if s.User != "" {
		opts = append(opts, registry.ClientOptBasicAuth(s.User, s.Password))
	}
	t, err := s.tls()
	if err != nil {
		return nil, err
	}
	opts = append(opts, registry.ClientOptHTTPClient(&http.Client{Transport: &http.Transport{TLSClientConfig: t, Proxy: http.ProxyFromEnvironment}}))
	return registry.NewClient(opts...)
}

func (s Source) tls() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if s.CAFile != "" {
		b, err := os.ReadFile(s.CAFile)
		if err != nil {
			return nil, fault.New(fault.NotFound, "read", s.CAFile, err).WithHint("check --repo-ca-file")
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(b) {
			return nil, fault.Newf(fault.Usage, "read", s.CAFile, "there is no certificate in it").WithHint("check --repo-ca-file")
		}
	}
	if s.CertFile != "" {
		c, err := tls.LoadX509KeyPair(s.CertFile, s.KeyFile)
		if err != nil {
			return nil, fault.New(fault.Usage, "read", s.CertFile, err).WithHint("check --repo-cert-file and --repo-key-file")
		}
		t.Certificates = []tls.Certificate{c}
	}
	return t, nil
}

func loopback(host string) bool {
	h, _, err := net.SplitHostPort(host)
	if err != nil {
		h = host
	}
	ip, err := netip.ParseAddr(strings.Trim(h, "[]"))
	return slices.Contains([]string{"localhost", "ip6-localhost"}, h) || (err == nil && ip.IsLoopback())
}
