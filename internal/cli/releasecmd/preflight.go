package releasecmd

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/render"
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
The oldest Kubernetes for the chart is 1.21.

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
	errs := []error{o.pass.Check(), o.hsm.Password.Check(), o.pull.Check(), o.rel.Check(), o.chart.CheckOptional()}
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
	in := app.PreflightInput{Kube: o.kube, Release: o.rel, NodeLabel: o.nodeLabel, HSMPort: o.hsmPort, Pull: &o.pull, Insecure: o.chart.Insecure}
	if err := o.given(&in); err != nil {
		return nil, err
	}
	in.Chart = &o.chart // after the settings, by which it is pointed at the registry
	return o.Preflight(ctx, in)
}

// given reads the settings and the secret as far as they were given. What is
// wrong with them is a finding; what cannot be read at all is an error.
func (o *preflightOptions) given(in *app.PreflightInput) error {
	if o.valuesFile != "" || o.hsm.Model != "" {
		v, err := o.overrides(nil)
		switch {
		case err == nil:
			in.Settings, in.SettingsErr = &v, o.hsm.CheckValues()
		case fault.KindOf(err) == fault.Usage:
			in.SettingsErr = err
			return nil
		default:
			return err
		}
	}
	switch {
	case o.secretFile != "":
		text, err := o.open("--secret", o.secretFile)
		if err != nil {
			return err
		}
		defer clear(text)
		s, err := render.ParseSecret(text)
		if err != nil {
			in.SecretErr = fault.New(fault.Usage, "read", o.secretFile, err).WithHint("%s", hintOr(err, "make it with `kmsctl render secret`"))
			return nil
		}
		in.Secret = &s
	case o.hsm.Password.Given(o.App):
		o.hsm.Namespace = o.kube.Namespace
		if in.SecretErr = o.hsm.CheckSecret(); in.SecretErr != nil {
			return nil
		}
		s, err := o.hsm.Secret(o.App)
		if err != nil {
			in.SecretErr = err
			return nil
		}
		in.Secret = &s
	}
	return nil
}
