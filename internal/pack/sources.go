package pack

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Sources are charts and images that an archive is built of: packages or
// folders of charts; images as files, as folders, or in registries.
type Sources struct {
	Spec   string // a manifest.yaml that names them, as IBM's create-archive reads it
	Charts []string
	Images []ImageSource
	// Architectures are those that are taken of a spec, none: all; the first
	// is that of an image which is there for many.
	Architectures []string
	Fallback      string // registry of a reference that names none
	Getenv        func(string) string
	// Open reaches a registry. login is that of the spec, or nil; it is asked
	// only when nothing else says as whom.
	Open func(ctx context.Context, host string, login Login) (Registry, error)

	registries map[registryAs]Registry
	logins     map[string]ppa.Login // of the spec, by reference
	chartKeys  map[string]ppa.Chart // of the spec, by file
	lists      []ppa.Image
}

// ImageSource is an image's name:tag in the archive and where it is: a tar
// (docker save, or an OCI layout), packed or not, a folder with an OCI layout,
// or docker://HOST/REPOSITORY:TAG.
type ImageSource struct {
	Ref, From string
	platform  ppa.Platform
}

// Login gives a user and a password.
type Login func() (user string, password secret.Value, err error)

const registryScheme = "docker://"

// Build makes an archive of ours of them. It writes them as an archive of the
// old kind into a pipe and repacks that, so that both go one way and are
// checked alike.
func (s *Sources) Build(ctx context.Context, p *Repack) (archive.Build, error) {
	s.registries, s.chartKeys = map[registryAs]Registry{}, map[string]ppa.Chart{}
	if s.Spec != "" {
		if err := s.readSpec(); err != nil {
			return archive.Build{}, err
		}
	}
	m, files, err := s.manifest()
	if err != nil {
		return archive.Build{}, err
	}
	members := make([]member, len(s.Images))
	for n, i := range s.Images { // all that can be seen to be missing, before anything is read
		if members[n], err = s.open(ctx, i); err != nil {
			return archive.Build{}, err
		}
	}
	pr, pw := io.Pipe()
	go func() { _ = pw.CloseWithError(write(pw, m, files, members)) }() // a pipe's close does not fail
	defer func() { _ = pr.Close() }()                                   // ends the writer
	a, err := archive.Open("-", pr)
	if err != nil {
		return archive.Build{}, err
	}
	a.Name = "what was given"
	return p.Build(ctx, a)
}

// readSpec adds what the spec names. What --image gives under a name of the
// spec is taken in place of what the spec would pull.
func (s *Sources) readSpec() error {
	text, err := os.ReadFile(s.Spec)
	if err != nil {
		return fault.New(fault.NotFound, "read spec", s.Spec, reason(err)).WithHint("check --spec")
	}
	m, err := ppa.ParseYAML(text)
	if err != nil {
		return fault.New(fault.BadContent, "read spec", s.Spec, err).WithHint("see the form in a chart's ibm_cloud_pak/manifest.yaml")
	}
	if s.logins, err = ppa.ParseLogins(text); err != nil {
		return fault.New(fault.BadContent, "read spec", s.Spec, err).WithHint("write each value as a text in quotes, or as {env: NAME}")
	}
	for _, c := range m.Charts {
		file := filepath.Join(filepath.Dir(s.Spec), filepath.FromSlash(c.Archive))
		s.Charts, s.chartKeys[file] = append(s.Charts, file), c
	}
	given := map[string]bool{}
	for _, i := range s.Images {
		given[i.Ref] = true
	}
	for _, i := range m.Images {
		refs := i.References
		if len(refs) == 0 {
			refs = []ppa.Reference{{Name: i.Name, Tag: i.Tag, PullRepository: i.Ref()}}
		}
		var taken []ppa.Reference
		for _, r := range refs {
			if len(s.Architectures) > 0 && r.Platform.Architecture != "" && !slices.Contains(s.Architectures, r.Platform.Architecture) {
				continue
			}
			taken = append(taken, r)
			if given[r.Ref()] {
				continue
			}
			given[r.Ref()] = true
			from := r.PullRepository
			if from == "" {
				from = r.Ref()
			}
			s.Images = append(s.Images, ImageSource{r.Ref(), registryScheme + os.Expand(from, s.Getenv), r.Platform})
		}
		if i.Archive, i.References = "", taken; i.IsList() {
			s.lists = append(s.lists, i)
		}
	}
	return nil
}

// open finds one image.
func (s *Sources) open(ctx context.Context, i ImageSource) (member, error) {
	want := i.platform
	if want.Architecture == "" {
		want = ppa.Platform{OS: "linux", Architecture: "amd64"}
		if len(s.Architectures) > 0 {
			want.Architecture = s.Architectures[0]
		}
	}
	ref, remote := strings.CutPrefix(i.From, registryScheme)
	if !remote {
		if isLayout(i.From) {
			m, err := pulled(ctx, layout(i.From), i.Ref, want)
			return m, about(i.Ref, i.From, err)
		}
		return fileMember(i.From)
	}
	host, repo, tag, err := splitSource(ref, s.Fallback)
	if err != nil {
		return member{}, err
	}
	r, err := s.registry(ctx, host, i.Ref)
	if err != nil {
		return member{}, err
	}
	m, err := pulled(ctx, repository{r, repo, tag}, i.Ref, want)
	return m, about(i.Ref, i.From, err)
}

// registryAs is a registry, and as whom it is reached.
type registryAs struct {
	host  string
	login ppa.Login
}

// registry reaches the registry of an image, once for all that are pulled from
// it by the same login.
func (s *Sources) registry(ctx context.Context, host, ref string) (Registry, error) {
	at := registryAs{host: host}
	var ask Login
	if l, ok := s.logins[ref]; ok {
		at.login, ask = l, func() (string, secret.Value, error) { return s.login(l, ref) }
	}
	if r := s.registries[at]; r != nil {
		return r, nil
	}
	r, err := s.Open(ctx, host, ask)
	if err == nil {
		s.registries[at] = r
	}
	return r, err
}

func (s *Sources) login(l ppa.Login, ref string) (string, secret.Value, error) {
	user, err := l.Username.Value(s.Getenv)
	what := "username"
	var password string
	if err == nil {
		what = "password"
		password, err = l.Password.Value(s.Getenv)
	}
	if err != nil {
		return "", secret.Value{}, fault.Newf(fault.Usage, "read pull-authorization of", ref, "%s: %w", what, err).
			WithHint("set it in the environment, or give --registry-user with --registry-password-file or --registry-token-file, which count instead, or take pull-authorization out of the spec")
	}
	return user, secret.New([]byte(password)), nil
}

// manifest says what the archive holds; where no spec does, the charts' values
// tell which of their keys name one of the images.
func (s *Sources) manifest() (m ppa.Manifest, files []archive.File, err error) {
	m.Revision = "1.0"
	var names []string
	for n, i := range s.Images {
		name, tag := ppa.SplitRef(i.Ref)
		m.Images = append(m.Images, ppa.Image{Name: name, Tag: tag, Archive: fmt.Sprintf("images/%d.tar", n)})
		names = append(names, name)
	}
	for _, l := range s.lists {
		m.Images = append(m.Images, l)
		names = append(names, l.Name)
	}
	for _, file := range s.Charts {
		c, err := openChart(file)
		if err != nil {
			return m, nil, err
		}
		pkg, err := c.Pack()
		if err != nil {
			return m, nil, err
		}
		entry := s.chartKeys[file]
		if entry.Archive = "charts/" + c.File(); len(entry.RepositoryKeys)+len(entry.RegistryKeys) == 0 {
			if entry.RepositoryKeys, err = chart.RepositoryKeys(c.Values(), names); err != nil {
				return m, nil, fault.New(fault.BadContent, "read chart", file, err)
			}
		}
		files = append(files, archive.File{Name: entry.Archive, Data: pkg})
		m.Charts = append(m.Charts, entry)
	}
	return m, files, nil
}

func openChart(file string) (*chart.Chart, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, fault.New(fault.NotFound, "read chart", file, reason(err)).WithHint("check --chart")
	}
	if st.IsDir() {
		return chart.FromFS(os.DirFS(file))
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.New(fault.Other, "read chart", file, reason(err))
	}
	return chart.Open(file, b)
}

func write(w io.Writer, m ppa.Manifest, files []archive.File, members []member) error {
	tw := tar.NewWriter(w)
	for _, f := range append([]archive.File{{Name: ppa.JSONName, Data: m.JSON()}, {Name: ppa.YAMLName, Data: m.YAML()}}, files...) {
		if err := tw.WriteHeader(&tar.Header{Name: f.Name, Mode: 0o644, Size: int64(len(f.Data))}); err != nil {
			return err
		}
		if _, err := tw.Write(f.Data); err != nil {
			return err
		}
	}
	for n, one := range members {
		if err := tw.WriteHeader(&tar.Header{Name: m.Images[n].Archive, Mode: 0o644, Size: one.size}); err != nil {
			return err
		}
		if err := one.write(tw); err != nil {
			return err
		}
	}
	return tw.Close()
}

// fileMember is an image that is there as a tar.
func fileMember(name string) (member, error) {
	st, err := os.Stat(name)
	if err != nil {
		return member{}, fault.New(fault.NotFound, "read image", name, reason(err)).WithHint("check --image")
	}
	if !st.Mode().IsRegular() {
		return member{}, fault.Newf(fault.Usage, "read image", name, "it is neither a file nor a folder with an OCI layout").
			WithHint("give the tar that docker save wrote, an OCI layout, or docker://HOST/REPOSITORY:TAG")
	}
	return member{st.Size(), func(w io.Writer) error {
		f, err := os.Open(name)
		if err != nil {
			return fault.New(fault.Other, "read image", name, reason(err))
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	}}, nil
}

// ParseImageSource reads NAME:TAG=FROM.
func ParseImageSource(s string) (ImageSource, error) {
	ref, file, ok := strings.Cut(s, "=")
	name, tag := ppa.SplitRef(ref)
	if !ok || name == "" || tag == "" || file == "" {
		return ImageSource{}, fault.Usagef("--image: %q is not NAME:TAG=FROM", s).WithHint("as in --image org/app:1.0=app.tar; FROM is a tar, a folder with an OCI layout, or docker://HOST/REPOSITORY:TAG")
	}
	return ImageSource{Ref: ref, From: file}, nil
}
