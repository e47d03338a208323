// Package release runs Helm's actions on one release, and finds its chart in a
// repository. Helm's SDK lives here. It decides nothing: when to install, wait
// or roll back is the job's affair.
package release

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/release"
	"helm.sh/helm/v3/pkg/storage/driver"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/cli-runtime/pkg/genericclioptions"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// Chart is a loaded chart.
type Chart struct{ inner *chart.Chart }

// Name is the chart's name.
func (c *Chart) Name() string { return c.inner.Metadata.Name }

// Version is the chart's version.
func (c *Chart) Version() string { return c.inner.Metadata.Version }

// AppVersion is the version of the images.
func (c *Chart) AppVersion() string { return c.inner.Metadata.AppVersion }

// Values are the chart's defaults: the keys that may be set.
func (c *Chart) Values() map[string]any { return c.inner.Values }

// Helm runs actions in one namespace.
type Helm struct {
	cfg       *action.Configuration
	namespace string
}

// New reaches the cluster of getter. debug gets Helm's own log lines.
func New(getter genericclioptions.RESTClientGetter, namespace string, debug func(string, ...any)) (*Helm, error) {
	cfg := new(action.Configuration)
	if err := cfg.Init(getter, namespace, "secret", debug); err != nil {
		return nil, fault.New(fault.Unreachable, "open Helm in namespace", namespace, err)
	}
	return &Helm{cfg, namespace}, nil
}

// NewFor runs actions by a configuration that is there already.
func NewFor(cfg *action.Configuration, namespace string) *Helm { return &Helm{cfg, namespace} }

// Options of a change.
type Options struct {
	Wait    bool
	Timeout time.Duration
}

// Template renders the manifests without any cluster, as for a Kubernetes
// version.
func Template(ch *Chart, name, namespace string, values map[string]any, kubeVersion string) (string, error) {
	i := action.NewInstall(&action.Configuration{Log: func(string, ...any) {}})
	i.DryRun, i.ClientOnly, i.Replace = true, true, true
	i.ReleaseName, i.Namespace = name, namespace
	v, err := chartutil.ParseKubeVersion(kubeVersion)
	if err != nil {
		return "", fault.Usagef("%q is not a Kubernetes version", kubeVersion)
	}
	i.KubeVersion = v
	r, err := i.Run(ch.inner, values)
	if err != nil {
		return "", chartFault(ch, err)
	}
	return r.Manifest, nil
}

// chartFault is a fault of the values or the chart: Helm's text has which.
func chartFault(ch *Chart, err error) error {
	return fault.New(fault.Usage, "render chart", ch.Name()+" "+ch.Version(), err).WithHint("check the values; `kmsctl render overrides` writes the manual's")
}

// Install installs the chart as a new release. The release that is left when
// it fails is returned beside the error.
func (h *Helm) Install(ctx context.Context, name string, ch *Chart, values map[string]any, o Options) (cluster.Release, error) {
	i := action.NewInstall(h.cfg)
	i.ReleaseName, i.Namespace, i.Replace = name, h.namespace, true // a failed first try is taken up again
	i.Wait, i.Timeout = o.Wait, o.Timeout
	r, err := i.RunWithContext(ctx, ch.inner, values)
	return plain(r), h.fault(ctx, "install release", name, err)
}

// Upgrade changes the release to the chart and values.
func (h *Helm) Upgrade(ctx context.Context, name string, ch *Chart, values map[string]any, o Options) (cluster.Release, error) {
	u := action.NewUpgrade(h.cfg)
	u.Namespace, u.ResetValues, u.MaxHistory = h.namespace, true, maxHistory
	u.Wait, u.Timeout = o.Wait, o.Timeout
	r, err := u.RunWithContext(ctx, name, ch.inner, values)
	return plain(r), h.fault(ctx, "upgrade release", name, err)
}

const maxHistory = 10

// Render gives the manifest that an upgrade would apply, with the cluster's own
// capabilities.
func (h *Helm) Render(ctx context.Context, name string, ch *Chart, values map[string]any) (string, error) {
	u := action.NewUpgrade(h.cfg)
	u.Namespace, u.ResetValues, u.DryRun, u.DryRunOption = h.namespace, true, true, "server"
	r, err := u.RunWithContext(ctx, name, ch.inner, values)
	if err != nil {
		if f := h.fault(ctx, "upgrade release", name, err); fault.KindOf(f) != fault.Other {
			return "", f
		}
		return "", chartFault(ch, err)
	}
	return r.Manifest, nil
}

// Rollback goes back to a revision. Helm knows no context here: when ctx ends
// first, the revision is left pending, as after a kill.
func (h *Helm) Rollback(ctx context.Context, name string, revision int, o Options) error {
	r := action.NewRollback(h.cfg)
	r.Version, r.Wait, r.Timeout, r.MaxHistory = revision, o.Wait, o.Timeout, maxHistory
	return h.until(ctx, "roll back release", name, func() error { return r.Run(name) })
}

// Uninstall removes the release; its claims and the Secrets outside of it stay.
func (h *Helm) Uninstall(ctx context.Context, name string, o Options) error {
	u := action.NewUninstall(h.cfg)
	u.Wait, u.Timeout, u.DeletionPropagation = o.Wait, o.Timeout, "foreground"
	return h.until(ctx, "uninstall release", name, func() error {
		_, err := u.Run(name)
		return err
	})
}

func (h *Helm) until(ctx context.Context, op, name string, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return h.fault(ctx, op, name, err)
	case <-ctx.Done():
		return h.fault(ctx, op, name, context.Cause(ctx))
	}
}

// Get gives the newest revision; fault.NotFound when there is no release.
func (h *Helm) Get(name string) (cluster.Release, error) {
	r, err := h.cfg.Releases.Last(name)
	if err != nil {
		return cluster.Release{}, h.fault(context.Background(), "find release", name, err)
	}
	return plain(r), nil
}

// History gives all revisions, oldest first.
func (h *Helm) History(name string) ([]cluster.Release, error) {
	rs, err := action.NewHistory(h.cfg).Run(name)
	if err != nil {
		return nil, h.fault(context.Background(), "find release", name, err)
	}
	out := make([]cluster.Release, len(rs))
	for i, r := range rs {
		out[i] = plain(r)
	}
	return out, nil
}

// MarkFailed ends a revision that is pending although nobody works on it.
func (h *Helm) MarkFailed(name, why string) error {
	r, err := h.cfg.Releases.Last(name)
	if err != nil {
		return h.fault(context.Background(), "find release", name, err)
	}
	r.SetStatus(release.StatusFailed, why)
	return h.fault(context.Background(), "repair release", name, h.cfg.Releases.Update(r))
}

// Forget removes a revision's record.
func (h *Helm) Forget(name string, revision int) error {
	_, err := h.cfg.Releases.Delete(name, revision)
	return h.fault(context.Background(), "repair release", name, err)
}

func (h *Helm) fault(ctx context.Context, op, name string, err error) error {
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "updates to statefulset spec"):
		return fault.New(fault.Conflict, op, name, err).WithHint("the volumes of a StatefulSet cannot be changed: give the same --storage-class, --host-path and sizes as before")
	case strings.Contains(err.Error(), "execution error at"): // what the chart itself refuses
		kind := fault.Usage
		if strings.Contains(err.Error(), "the store has") {
			kind = fault.Conflict
		}
		return fault.New(kind, op, name, err).WithHint("check the values; nothing was changed")
	case errors.Is(err, driver.ErrReleaseNotFound), errors.Is(err, driver.ErrNoDeployedReleases):
		return fault.New(fault.NotFound, op, name, fmt.Errorf("there is none in namespace %q", h.namespace)).WithHint("see: helm list --all-namespaces --all")
	case ctx.Err() != nil:
		return fault.New(fault.NotReady, op, name, context.Cause(ctx))
	}
	var ue *url.Error
	var ne net.Error
	switch {
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fault.New(fault.Denied, op, name, err).WithHint("the account of the kubeconfig needs more rights; `kmsctl preflight` lists which")
	case errors.As(err, &ue), errors.As(err, &ne):
		return fault.New(fault.Unreachable, op, name, err).WithHint("is the cluster of the kubeconfig running, and reachable from here?")
	}
	return fault.New(fault.Other, op, name, err)
}

func plain(r *release.Release) cluster.Release {
	if r == nil {
		return cluster.Release{}
	}
	out := cluster.Release{Name: r.Name, Namespace: r.Namespace, Revision: r.Version, Values: r.Config, Manifest: r.Manifest}
	if r.Info != nil {
		out.Status, out.Updated, out.Note = r.Info.Status.String(), r.Info.LastDeployed.Time.UTC(), r.Info.Description
	}
	if r.Chart != nil && r.Chart.Metadata != nil {
		out.Chart, out.Version, out.AppVersion = r.Chart.Metadata.Name, r.Chart.Metadata.Version, r.Chart.Metadata.AppVersion
	}
	return out
}
