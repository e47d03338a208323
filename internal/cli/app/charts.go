package app

import (
	"context"
	"net/url"
	"strings"

	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/push"
)

// OpenCharts opens the chart repository of --repo; nil when there is none.
func (a *App) OpenCharts(ctx context.Context, f *DeliveryFlags) (push.Charts, error) {
	kind, rest, ok := strings.Cut(f.Repo, "://")
	switch {
	case f.Repo == "":
		return nil, nil
	case !ok:
		return &chart.Dir{Path: f.Repo, Now: a.Now}, nil
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
	return nil, fault.Usagef("--repo: %q is of no kind that is known", f.Repo).
		WithHint("give a folder, oci://HOST/PATH, icp+https://HOST:8443/mgmt-repo/charts, cm+https://HOST, or a name of `kmsctl repo list`")
}
