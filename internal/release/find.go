package release

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/registry"
	"helm.sh/helm/v3/pkg/repo"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Source is a chart repository, and how to reach it.
type Source struct {
	// Repo is a folder with index.yaml, oci://HOST/PATH, or an http(s) URL.
	Repo string
	// Get reads a URL of a repository behind HTTP.
	Get func(ctx context.Context, url string) ([]byte, error)
	// Registry is the one of a repository behind oci://.
	Registry Registry
}

// Registry is what reading a chart needs of an image registry.
type Registry interface {
	Tags(ctx context.Context, repo string) ([]string, error)
	Manifest(ctx context.Context, repo, ref string) (mediaType string, body []byte, ok bool, err error)
	ReadBlob(ctx context.Context, repo, digest string, limit int64) ([]byte, error)
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

// IsOCI says whether a repository stands in an image registry, and on which
// host.
func IsOCI(repo string) (host string, ok bool) {
	ref, ok := strings.CutPrefix(repo, registry.OCIScheme+"://")
	host, _, _ = strings.Cut(ref, "/")
	return host, ok
}

// IsWeb says whether a repository stands behind HTTP.
func IsWeb(repo string) bool {
	return strings.HasPrefix(repo, "https://") || strings.HasPrefix(repo, "http://")
}

// Find gets a chart from a repository; version "" means the newest.
func Find(ctx context.Context, s Source, name, version string) (*Chart, error) {
	if _, ok := IsOCI(s.Repo); ok {
		return s.oci(ctx, name, version)
	}
	if IsWeb(s.Repo) {
		return s.web(ctx, name, version)
	}
	return s.folder(name, version)
}

func (s Source) notFound(name, version string, err error) error {
	return fault.New(fault.NotFound, "find chart "+strings.TrimSpace(name+" "+version)+" in", s.Repo, err).
		WithHint("load it with `kmsctl load ARCHIVE --repo %s`, or name another --version", s.Repo)
}

// pick finds the file of a version in an index.
func (s Source) pick(index *repo.IndexFile, name, version string) (string, error) {
	entry, err := index.Get(name, version)
	if err != nil {
		return "", s.notFound(name, version, err)
	}
	if len(entry.URLs) == 0 {
		return "", s.notFound(name, version, errors.New("the index has no file for it"))
	}
	return entry.URLs[0], nil
}

func (s Source) folder(name, version string) (*Chart, error) {
	index, err := repo.LoadIndexFile(filepath.Join(s.Repo, "index.yaml"))
	if err != nil {
		return nil, fault.New(fault.BadContent, "read", filepath.Join(s.Repo, "index.yaml"), err)
	}
	file, err := s.pick(index, name, version)
	if err != nil {
		return nil, err
	}
	if strings.Contains(file, "://") {
		file = path.Base(file) // the folder is served elsewhere by that URL; the file lies here
	}
	return LoadFile(filepath.Join(s.Repo, filepath.FromSlash(file)))
}

func (s Source) web(ctx context.Context, name, version string) (*Chart, error) {
	b, err := s.Get(ctx, strings.TrimSuffix(s.Repo, "/")+"/index.yaml")
	if err != nil {
		return nil, err
	}
	index := &repo.IndexFile{}
	if err := yaml.Unmarshal(b, index); err != nil || index.APIVersion == "" {
		return nil, fault.New(fault.BadContent, "read chart repository", s.Repo, errors.Join(errors.New("its index.yaml is no index of charts"), err)).WithHint("check the URL of --repo")
	}
	for chart, all := range index.Entries { // as Helm does with what is half an entry
		index.Entries[chart] = slices.DeleteFunc(all, func(v *repo.ChartVersion) bool { return v == nil || v.Metadata == nil })
	}
	index.SortEntries()
	file, err := s.pick(index, name, version)
	if err != nil {
		return nil, err
	}
	u, err := repo.ResolveReferenceURL(s.Repo, file)
	if err != nil {
		return nil, fault.New(fault.BadContent, "read chart repository", s.Repo, err)
	}
	if b, err = s.Get(ctx, u); err != nil {
		return nil, err
	}
	return LoadBytes(u, b)
}

// maxChart bounds a chart that is held in memory.
const maxChart = 64 << 20

func (s Source) oci(ctx context.Context, name, version string) (*Chart, error) {
	host, _ := IsOCI(s.Repo)
	at := strings.Trim(strings.TrimPrefix(s.Repo, registry.OCIScheme+"://"+host), "/")
	if path.Base(at) != name {
		at = strings.TrimPrefix(at+"/"+name, "/")
	}
	if version == "" {
		var err error
		if version, err = s.newest(ctx, at, name); err != nil {
			return nil, err
		}
	}
	_, body, ok, err := s.Registry.Manifest(ctx, at, strings.ReplaceAll(version, "+", "_"))
	if err != nil {
		return nil, s.About(err)
	}
	if !ok {
		return nil, s.notFound(name, version, errors.New("the registry does not have it"))
	}
	var m struct {
		Layers []struct{ MediaType, Digest string }
	}
	err = json.Unmarshal(body, &m)
	for _, l := range m.Layers {
		if l.MediaType != registry.ChartLayerMediaType {
			continue
		}
		b, err := s.Registry.ReadBlob(ctx, at, l.Digest, maxChart)
		if err != nil {
			return nil, s.About(err)
		}
		return LoadBytes(host+"/"+at+":"+version, b)
	}
	return nil, fault.New(fault.BadContent, "read chart", host+"/"+at+":"+version, errors.Join(errors.New("it is no chart"), err)).WithHint("check --repo: is it the place of images?")
}

// newest gives a chart's newest version by its tags, none that is for trial
// when there is another.
func (s Source) newest(ctx context.Context, at, name string) (string, error) {
	tags, err := s.Registry.Tags(ctx, at)
	if err != nil {
		return "", s.About(err)
	}
	index := repo.NewIndexFile()
	for _, t := range tags {
		index.Entries[name] = append(index.Entries[name], &repo.ChartVersion{Metadata: &chart.Metadata{Name: name, Version: strings.ReplaceAll(t, "_", "+")}})
	}
	index.SortEntries()
	entry, err := index.Get(name, "")
	if err != nil {
		return "", s.notFound(name, "", err)
	}
	return entry.Version, nil
}

// About says that the registry spoke of a chart repository.
func (s Source) About(err error) error {
	hint := fault.HintOf(err)
	if fault.KindOf(err) == fault.Denied {
		hint = "give --repo-token-file, --repo-user with --repo-password-file, or a client certificate by --repo-cert-file and --repo-key-file"
	}
	return fault.New(fault.KindOf(err), "read chart repository", s.Repo, err).WithHint("%s", hint)
}
