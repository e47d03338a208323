package app

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/internal/push"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// ICPRepositories are the names under which ICP's own chart repositories are
// known, to its installer and in its manuals.
var ICPRepositories = []string{"mgmt-charts", "local-charts"}

// OpenCharts opens the chart repository of --repo; nil when there is none.
func (a *App) OpenCharts(ctx context.Context, f *DeliveryFlags) (push.Charts, error) {
	kind, rest, isURL := strings.Cut(f.Repo, "://")
	if f.Repo == "" {
		return nil, nil
	}
	if !isURL {
		r, ok, err := chart.FindHelmFiles(a.Getenv).Find(f.Repo)
		switch {
		case err != nil:
			return nil, err
		case !ok && slices.Contains(ICPRepositories, f.Repo):
			return nil, a.KnownRepository(f.Repo) // a folder of that name is ./mgmt-charts
		case !ok:
			return &chart.Dir{Path: f.Repo, Now: a.Now}, nil
		}
		return a.namedCharts(f, r)
	}
	u, err := url.Parse("https://" + rest)
	if err != nil || u.Host == "" {
		return nil, fault.Usagef("--repo: %q is not a URL", f.Repo)
	}
	access := f.access(u.Host)
	if kind == "oci" {
		r, err := a.chartRegistry(ctx, &access, u.Host)
		if err != nil {
			return nil, err
		}
		return &chart.OCI{Registry: r, Host: u.Host, Path: strings.Trim(u.Path, "/")}, nil
	}
	product, scheme, ok := strings.Cut(kind, "+")
	if !ok || (scheme != "https" && scheme != "http") {
		product = ""
	}
	h, err := a.chartHTTP(&access, scheme+"://"+rest)
	if err != nil {
		return nil, err
	}
	switch product {
	case "icp":
		return f.icp(h), nil
	case "cm":
		return &chart.Museum{HTTP: *h}, nil
	}
	return nil, fault.Usagef("--repo: %q is of no kind that is known", f.Repo).
		WithHint("give a folder, oci://HOST/PATH, icp+https://HOST:8443/mgmt-repo/charts, cm+https://HOST, or a name of `kmsctl repo list`")
}

func (f *DeliveryFlags) icp(h *chart.HTTP) *chart.ICP {
	return &chart.ICP{HTTP: *h, Tail: f.putPath, Multipart: f.putForm, Sync: f.syncPath}
}

// namedCharts opens a repository of Helm's list: one of ICP's by its path, else
// ChartMuseum. The flags beat what the list says.
func (a *App) namedCharts(f *DeliveryFlags, r chart.HelmRepo) (push.Charts, error) {
	access := f.access("").of(r)
	h, err := a.chartHTTP(&access, r.URL)
	if err != nil {
		return nil, err
	}
	if strings.Contains(r.URL, "/mgmt-repo/") || strings.Contains(r.URL, "/helm-repo/") {
		return f.icp(h), nil
	}
	return &chart.Museum{HTTP: *h}, nil
}

// repoAccess says how a chart repository is reached, and as whom.
type repoAccess struct {
	tls             TLSFlags
	user            string
	password, token SecretInput
	insecure        bool
	listed          chart.HelmRepo // what Helm's list says of it
	site            *DeliveryFlags // the images' registry, where the repository stands in it
}

func (r *repoAccess) add(fs *pflag.FlagSet) {
	r.password = SecretInput{Name: "repo-password", Title: "password of the chart repository's user"}
	r.token = SecretInput{Name: "repo-token", Title: "bearer token for the chart repository"}
	fs.StringVar(&r.user, "repo-user", "", "user at the chart repository")
	r.password.Add(fs)
	r.token.Add(fs)
	r.tls.add(fs, "repo-", "the chart repository")
}

func (r *repoAccess) check() error {
	return errors.Join(r.password.Check(), r.token.Check(), r.tls.check("repo-"))
}

// of fills what is not given from Helm's list.
func (r repoAccess) of(l chart.HelmRepo) repoAccess {
	r.tls = r.tls.or(TLSFlags{l.CAFile, l.CertFile, l.KeyFile})
	r.insecure = r.insecure || l.Insecure
	r.listed = l
	return r
}

// access is how a chart repository is reached: by its own flags, else, where it
// stands in the registry of the images, by the registry's.
func (f *DeliveryFlags) access(host string) repoAccess {
	r := f.charts
	r.insecure = f.Insecure
	if f.Registry != "" && host == f.Host() {
		r.tls, r.site = r.tls.or(f.registry), f
	}
	r.tls = r.tls.or(f.all)
	return r
}

// login reads as whom the repository is reached: a user with a password, or a
// token, or nobody.
func (a *App) login(r *repoAccess) (user string, password, token secret.Value, err error) {
	switch {
	case r.user != "":
		password, err = r.password.Read(a, false)
		return r.user, password, token, err
	case r.token.Given(a):
		token, err = r.token.Read(a, false)
	case r.listed.Username != "":
		return r.listed.Username, secret.New([]byte(r.listed.Password)), token, nil
	case r.site != nil && r.site.User != "":
		password, err = r.site.password.Read(a, false)
		return r.site.User, password, token, err
	case r.site != nil && r.site.token.Given(a):
		token, err = r.site.token.Read(a, false)
	}
	return "", password, token, err
}

// chartRegistry reaches the registry of an oci:// chart repository.
func (a *App) chartRegistry(ctx context.Context, r *repoAccess, host string) (target, error) {
	o := image.Options{Host: host, Insecure: r.insecure, UserAgent: "kmsctl/" + a.Version, CAFile: r.tls.CA, CertFile: r.tls.Cert, KeyFile: r.tls.Key}
	var err error
	if o.User, o.Password, o.Token, err = a.login(r); err != nil {
		return target{}, err
	}
	reg, err := image.Dial(ctx, o)
	if err != nil {
		return target{}, release.Source{Repo: "oci://" + host}.About(err)
	}
	return target{reg}, nil
}

// chartHTTP makes the client of a chart repository behind HTTP.
func (a *App) chartHTTP(r *repoAccess, u string) (*chart.HTTP, error) {
	c, err := image.NewClient(image.Options{Insecure: r.insecure, CAFile: r.tls.CA, CertFile: r.tls.Cert, KeyFile: r.tls.Key})
	if err != nil {
		return nil, err
	}
	user, password, token, err := a.login(r)
	if err != nil {
		return nil, err
	}
	h := &chart.HTTP{URL: u, Client: c}
	switch {
	case user != "":
		h.Authorize = func(req *http.Request) { req.SetBasicAuth(user, string(password.Reveal())) }
	case !token.Empty():
		h.Authorize = func(req *http.Request) { req.Header.Set("Authorization", "Bearer "+string(token.Reveal())) }
	}
	return h, nil
}

// chartSource opens the repository of the flags to read a chart from it.
func (a *App) chartSource(ctx context.Context, f *ChartFlags) (release.Source, error) {
	s, access := release.Source{Repo: f.Repo}, f.access
	access.insecure = f.Insecure
	_, oci := release.IsOCI(s.Repo)
	if !oci && !release.IsWeb(s.Repo) {
		if _, err := os.Stat(filepath.Join(s.Repo, "index.yaml")); err == nil {
			return s, nil
		}
		files := chart.FindHelmFiles(a.Getenv)
		l, ok, err := files.Find(s.Repo)
		if err != nil {
			return s, err
		}
		if !ok {
			return s, fault.Newf(fault.NotFound, "find chart repository", s.Repo, "it is neither a folder with index.yaml nor a name in %s", files.Config).
				WithHint("add it with `kmsctl repo add %s URL`", s.Repo)
		}
		s.Repo, access = l.URL, access.of(l)
	}
	if host, ok := release.IsOCI(s.Repo); ok {
		r, err := a.chartRegistry(ctx, &access, host)
		s.Registry = r
		return s, err
	}
	h, err := a.chartHTTP(&access, s.Repo)
	if err == nil {
		s.Get = h.Get
	}
	return s, err
}

// HelmHTTP makes the client of a repository that is to be put into Helm's list.
func (a *App) HelmHTTP(r chart.HelmRepo) (*chart.HTTP, error) {
	access := repoAccess{}.of(r)
	return a.chartHTTP(&access, r.URL)
}

// KnownRepository says how to make a repository known by name, when it is not.
func (a *App) KnownRepository(name string) error {
	_, ok, err := chart.FindHelmFiles(a.Getenv).Find(name)
	if err == nil && !ok {
		err = fault.Newf(fault.NotFound, "find chart repository", name, "Helm's list does not have it").
			WithHint("add it with `kmsctl repo add %s URL`, or give another place with --repo", name)
	}
	return err
}
