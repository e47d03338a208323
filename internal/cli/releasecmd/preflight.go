package releasecmd

import (
	"context"
	"errors"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/render"
	"github.com/kmsctl/kmsctl/templates"
)

// preflightOptions are those of install, so that the same flags can be tried
// before, and what only the checks need.
type preflightOptions struct {
	changeOptions
	pull      app.PullFlags
	nodeLabel string
	hsmPort   string
}

func (o *preflightOptions) addChecks(cmd *cobra.Command) {
	o.add(cmd)
	o.pull.Add(cmd.Flags())
	cmd.Flags().StringVar(&o.nodeLabel, "node-label", "", "gemalto: label of the nodes that run the pods and need a certificate pair; without it, all nodes")
	cmd.Flags().StringVar(&o.hsmPort, "hsm-port", "", "port of the HSM; without it, the model's")
}

func newPreflightCmd(a *app.App, run func(context.Context, *preflightOptions) error) *cobra.Command {
	o := &preflightOptions{changeOptions: changeOptions{App: a}}
	if run == nil {
		run = runPreflight
	}
	cmd := &cobra.Command{
		Use: "preflight", Short: "Check whether an installation will work, each check with its cure", Args: cobra.NoArgs,
		Long: `Look at everything that an installation needs, and change nothing: the cluster and your rights
in it, storage, registry and images, chart, the HSM and its certificates, what is installed already.

It takes install's flags; what is not given is not checked. Exits 7 when a check fails.`,
		Example: `  kmsctl preflight
  kmsctl preflight --repo mgmt-charts --secret hsm-Secret.yaml --values overrides_hsm.yaml
  kmsctl preflight --model gemalto --hsm-ip 10.0.0.1 --node-label management=true -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	o.addChecks(cmd)
	return cmd
}

// Check holds the rules of the flags: what is missing is not checked, so less
// is required than by install.
func (o *preflightOptions) Check() error {
	errs := []error{o.pass.Check(), o.hsm.Password.Check(), o.pull.Check(), o.rel.Check()}
	if o.chart.Repo != "" && o.chart.Chart != "" {
		errs = append(errs, fault.Usagef("--repo, --chart: only one of them"))
	}
	if o.hsm.Model != "" {
		_, err := o.hsm.CheckModel()
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func runPreflight(ctx context.Context, o *preflightOptions) error {
	p, err := o.preflight(ctx)
	if err != nil {
		return err
	}
	r := diagnose.Run(ctx, p.Checks())
	if err := o.Print(r); err != nil {
		return err
	}
	return r.Fault("preflight")
}

// preflight joins the flags to the checks.
func (o *preflightOptions) preflight(ctx context.Context) (*diagnose.Preflight, error) {
	p := &diagnose.Preflight{Release: o.kube.Release, Namespace: o.kube.Namespace, StorageClass: o.rel.StorageClass, NoVolumes: o.rel.NoClaims(),
		NodeLabel: o.nodeLabel, PullSecrets: o.rel.PullSecrets, HSMPort: o.hsmPort, Now: o.Now}
	c, err := o.Cluster(&o.kube)
	if err != nil {
		p.ClusterErr = err
	} else if _, err := c.Version(ctx); err != nil {
		p.ClusterErr = err
	} else {
		p.Cluster = c
		h, err := o.Helm(c, &o.kube)
		if err != nil {
			return nil, err
		}
		p.Current = func(context.Context) (cluster.Release, error) { return h.Get(o.kube.Release) }
	}
	ov, err := o.given(p)
	if err != nil {
		return nil, err
	}
	var chart *release.Chart
	if o.chart.Repo != "" || o.chart.Chart != "" {
		find := sync.OnceValues(func() (*release.Chart, error) { return o.FindChart(&o.chart) })
		p.Chart = func(context.Context) (string, string, error) {
			chart, err := find()
			if err != nil {
				return "", "", err
			}
			return chart.Name(), chart.Version(), nil
		}
		chart, _ = find() // the check chart tells
	}
	if refs := o.images(chart, ov); len(refs) > 0 {
		p.Registry, _, _ = strings.Cut(refs[0], "/")
		var once sync.Mutex
		var imgs []diagnose.Image
		var ierr error
		p.Images = func(ctx context.Context) ([]diagnose.Image, error) { // two checks want them
			once.Lock()
			defer once.Unlock()
			if imgs == nil && ierr == nil {
				imgs, ierr = o.LookAtImages(ctx, &o.pull, refs, o.chart.Insecure)
			}
			return imgs, ierr
		}
	}
	return p, nil
}

// given reads the settings and the secret as far as they were given. What is
// wrong with them is a finding; what cannot be read at all is an error.
func (o *preflightOptions) given(p *diagnose.Preflight) (*render.Overrides, error) {
	var ov *render.Overrides
	if o.valuesFile != "" || o.hsm.Model != "" {
		v, err := o.overrides(nil)
		if err != nil {
			if fault.KindOf(err) != fault.Usage {
				return nil, err
			}
			p.SettingsErr = err
			return nil, nil
		}
		ov, p.SettingsErr = &v, o.hsm.CheckValues()
		p.Settings = v.HSM
		if p.Model, err = hsm.Lookup(v.HSM.Model); err != nil {
			return nil, err
		}
	}
	switch {
	case o.secretFile != "":
		text, err := o.open("--secret", o.secretFile)
		if err != nil {
			return nil, err
		}
		defer clear(text)
		s, err := render.ParseSecret(text)
		if err != nil {
			p.SecretErr = fault.New(fault.Usage, "read", o.secretFile, err).WithHint("%s", hintOr(err, "make it with `kmsctl render secret`"))
			return ov, nil
		}
		p.HSMSecret = checkable(s)
	case o.hsm.Password.Given(o.App):
		o.hsm.Namespace = o.kube.Namespace
		if p.SecretErr = o.hsm.CheckSecret(); p.SecretErr != nil {
			return ov, nil
		}
		s, err := o.hsm.Secret(o.App)
		if err != nil {
			p.SecretErr = err
			return ov, nil
		}
		p.HSMSecret = checkable(s)
	}
	return ov, nil
}

func checkable(s render.Secret) *diagnose.Secret {
	out := &diagnose.Secret{Password: s.Password.Reveal(), ServerCA: s.ServerCA, Cert: map[string][]byte{}, Key: map[string][]byte{}}
	for ip, p := range s.Clients {
		out.Cert[ip], out.Key[ip] = p.Cert, p.Key
	}
	return out
}

var imageLine = regexp.MustCompile(`(?m)^\s*image: "?([^"\s]+)"?$`)

// images are the references that the pods will have: those of the rendered
// chart, else those of the values.
func (o *preflightOptions) images(chart *release.Chart, ov *render.Overrides) []string {
	var refs []string
	if ov == nil {
		return nil // without a model the release's images are not known
	}
	if chart != nil {
		m, err := release.Template(chart, o.kube.Release, o.kube.Namespace, ov.Helm(), planVersion)
		if err == nil {
			for _, f := range imageLine.FindAllStringSubmatch(m, -1) {
				refs = append(refs, f[1])
			}
		}
	}
	if len(refs) == 0 {
		for _, i := range ov.SortedImages() {
			if i.Tag == "" {
				i.Tag = templates.ChartVersion
			}
			refs = append(refs, i.Repository+":"+i.Tag)
		}
	}
	slices.Sort(refs)
	return slices.Compact(refs)
}
