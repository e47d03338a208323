package app

import (
	"context"
	"slices"
	"strings"
	"sync"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/pattern"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/render"
	"github.com/kmsctl/kmsctl/templates"
)

// PreflightInput is what an installation would work with. What is not given is
// not checked.
type PreflightInput struct {
	Kube        KubeFlags
	Release     ReleaseFlags
	NodeLabel   string
	HSMPort     string
	Settings    *render.Overrides
	SettingsErr error // what is wrong with them
	Secret      *render.Secret
	SecretErr   error
	Chart       *ChartFlags
	Pull        *PullFlags
	Insecure    bool
	// ToLoad is the registry that the images are still to be loaded into: it
	// must answer, and need not have them.
	ToLoad *DeliveryFlags
}

// PlanVersion is the Kubernetes for which a chart is rendered without one.
const PlanVersion = "1.30.0"

// Preflight makes the checks of an installation.
func (a *App) Preflight(ctx context.Context, in PreflightInput) (*diagnose.Preflight, error) {
	p := &diagnose.Preflight{Release: in.Kube.Release, Namespace: in.Kube.Namespace, StorageClass: in.Release.StorageClass, NoVolumes: in.Release.NoClaims(),
		SCCs: in.Release.sccs(nil), NodeLabel: in.NodeLabel, PullSecrets: in.Release.PullSecrets, HSMPort: in.HSMPort, Repair: in.Release.Repair, Now: a.Now,
		SettingsErr: in.SettingsErr, SecretErr: in.SecretErr}
	if err := a.preflightCluster(ctx, p, &in.Kube); err != nil {
		return nil, err
	}
	var values map[string]any // nil: without a model the release is not known
	if in.Settings != nil {
		var err error
		values = in.Settings.Helm()
		in.Release.Beat(values)
		p.Replicated = severalOf(values, "storage") || severalOf(values, "oss") || severalOf(values, "watcher")
		oss, _ := values["oss"].(map[string]any)
		p.AccountTokens, _ = oss["serviceAccountTokens"].(bool)
		p.SCCs = in.Release.sccs(values)
		watcher, _ := values["watcher"].(map[string]any)
		p.WatchAll, _ = watcher["allNamespaces"].(bool)
		p.Watched = texts(watcher["namespaces"])
		p.Settings = in.Settings.HSM
		if p.Model, err = hsm.Lookup(p.Settings.Model); err != nil {
			return nil, err
		}
	}
	if in.Secret != nil {
		p.HSMSecret = checkable(*in.Secret)
	}
	chart := a.preflightChart(ctx, p, in.Chart)
	if in.ToLoad != nil {
		p.Registry = in.ToLoad.Host()
		p.Answers = func(ctx context.Context) error {
			_, err := a.OpenRegistry(ctx, in.ToLoad, nil)
			return err
		}
		return p, nil
	}
	if refs := imagesOf(chart, values, in); len(refs) > 0 {
		p.Registry, _, _ = strings.Cut(refs[0], "/")
		var once sync.Mutex
		var imgs []diagnose.Image
		var ierr error
		p.Images = func(ctx context.Context) ([]diagnose.Image, error) { // two checks want them
			once.Lock()
			defer once.Unlock()
			if imgs == nil && ierr == nil {
				imgs, ierr = a.LookAtImages(ctx, in.Pull, refs, in.Insecure)
			}
			return imgs, ierr
		}
	}
	return p, nil
}

func (a *App) preflightCluster(ctx context.Context, p *diagnose.Preflight, f *KubeFlags) error {
	c, err := a.Cluster(f)
	if err == nil {
		_, err = c.Version(ctx)
	}
	if err != nil {
		p.ClusterErr = err
		return nil //nolint:nilerr // the check cluster tells it
	}
	p.Cluster = c
	h, err := a.Helm(c, f)
	if err != nil {
		return err
	}
	p.Current = func(context.Context) (cluster.Release, error) { return h.Get(f.Release) }
	return nil
}

// preflightChart finds the chart; nil when it cannot, as the check tells.
func (a *App) preflightChart(ctx context.Context, p *diagnose.Preflight, f *ChartFlags) *release.Chart {
	if f == nil || !f.Given() {
		return nil
	}
	chart, err := a.FindChart(ctx, f)
	p.Chart = func(context.Context) (string, string, error) {
		if err != nil {
			return "", "", err
		}
		return chart.Name(), chart.Version(), nil
	}
	return chart
}

// texts are the texts of a list in values.
func texts(list any) (out []string) {
	all, _ := list.([]any)
	for _, v := range all {
		if s, ok := v.(string); ok {
			out = append(out, s)
		}
	}
	return out
}

// severalOf says whether the values ask for several replicas of a block.
func severalOf(values map[string]any, block string) bool {
	b, _ := values[block].(map[string]any)
	n, _ := b["replicas"].(int64)
	return n > 1
}

func checkable(s render.Secret) *diagnose.Secret {
	out := &diagnose.Secret{Password: s.Password.Reveal(), ServerCA: s.ServerCA, Cert: map[string][]byte{}, Key: map[string][]byte{}}
	for ip, p := range s.Clients {
		out.Cert[ip], out.Key[ip] = p.Cert, p.Key
	}
	return out
}

var imageLine = pattern.Lazy(`(?m)^\s*image: "?([^"\s]+)"?$`)

// imagesOf are the references that the pods will have: those of the rendered
// chart, else those of the settings.
func imagesOf(chart *release.Chart, values map[string]any, in PreflightInput) []string {
	if values == nil {
		return nil
	}
	var refs []string
	if chart != nil {
		m, err := release.Template(chart, in.Kube.Release, in.Kube.Namespace, values, PlanVersion)
		if err == nil {
			for _, f := range imageLine().FindAllStringSubmatch(m, -1) {
				refs = append(refs, f[1])
			}
		}
	}
	if len(refs) == 0 {
		for _, i := range in.Settings.SortedImages() {
			if i.Tag == "" {
				i.Tag = templates.ChartVersion
			}
			refs = append(refs, i.Repository+":"+i.Tag)
		}
	}
	slices.Sort(refs)
	return slices.Compact(refs)
}
