package app

import (
	"context"
	"net/http"
	"net/url"
	"strings"

	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/internal/push"
)

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
		case !ok:
			return &chart.Dir{Path: f.Repo, Now: a.Now}, nil
		}
		return a.namedCharts(f, r)
	}
	u, err := url.Parse("https://" + rest)
	if err != nil || u.Host == "" {
		return nil, fault.Usagef("--repo: %q is not a URL", f.Repo)
	}
	if kind == "oci" {
		r, err := a.ociRegistry(ctx, f, u)
		if err != nil {
			return nil, err
		}
		return &chart.OCI{Registry: r, Host: u.Host, Path: strings.Trim(u.Path, "/")}, nil
	}
	product, scheme, ok := strings.Cut(kind, "+")
	if !ok || (scheme != "https" && scheme != "http") {
		product = ""
	}
	h, err := a.chartHTTP(f, scheme+"://"+rest, f.repo.or(f.all), f.Insecure)
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
	h, err := a.chartHTTP(f, r.URL, f.repo.or(f.all).or(TLSFlags{r.CAFile, r.CertFile, r.KeyFile}), f.Insecure || r.Insecure)
	if err != nil {
		return nil, err
	}
	if h.Authorize == nil && r.Username != "" {
		h.Authorize = func(req *http.Request) { req.SetBasicAuth(r.Username, r.Password) }
	}
	if strings.Contains(r.URL, "/mgmt-repo/") || strings.Contains(r.URL, "/helm-repo/") {
		return f.icp(h), nil
	}
	return &chart.Museum{HTTP: *h}, nil
}

// chartHTTP makes the client of a chart repository behind HTTP.
func (a *App) chartHTTP(f *DeliveryFlags, u string, t TLSFlags, insecure bool) (*chart.HTTP, error) {
	c, err := image.NewClient(image.Options{Insecure: insecure, CAFile: t.CA, CertFile: t.Cert, KeyFile: t.Key})
	if err != nil {
		return nil, err
	}
	h := &chart.HTTP{URL: u, Client: c}
	switch {
	case f.repoUser != "":
		p, err := f.repoPassword.Read(a, false)
		if err != nil {
			return nil, err
		}
		h.Authorize = func(req *http.Request) { req.SetBasicAuth(f.repoUser, string(p.Reveal())) }
	case f.repoToken.Given(a):
		token, err := f.repoToken.Read(a, false)
		if err != nil {
			return nil, err
		}
		h.Authorize = func(req *http.Request) { req.Header.Set("Authorization", "Bearer "+string(token.Reveal())) }
	}
	return h, nil
}

// HelmHTTP makes the client of a repository that is to be put into Helm's list.
func (a *App) HelmHTTP(r chart.HelmRepo) (*chart.HTTP, error) {
	return a.chartHTTP(&DeliveryFlags{}, r.URL, TLSFlags{r.CAFile, r.CertFile, r.KeyFile}, r.Insecure)
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
