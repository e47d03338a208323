// Package releasecmd has the verbs on the release in a cluster: install,
// upgrade, rollback, status, uninstall.
package releasecmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/render"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	return []*cobra.Command{newInstallCmd(a, nil), newUpgradeCmd(a, nil), newRollbackCmd(a, nil), newStatusCmd(a, nil),
		newUninstallCmd(a, nil), newPreflightCmd(a, nil), newDoctorCmd(a, nil)}
}

// changeOptions are what install and upgrade have in common.
type changeOptions struct {
	*app.App
	kube       app.KubeFlags
	chart      app.ChartFlags
	hsm        app.HSMFlags
	rel        app.ReleaseFlags
	pass       app.PassphraseFlags
	clear      clearing
	secretFile string
	valuesFile string
	atomic     bool
	dryRun     bool
	wait       bool
	upgrade    bool
}

func (o *changeOptions) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	o.kube.Add(fs)
	o.chart.Add(fs)
	o.hsm.AddModel(cmd)
	o.hsm.AddSecret(fs)
	o.hsm.AddSettings(fs)
	o.pass.Add(fs)
	fs.StringVar(&o.secretFile, "secret", "", "hsm-Secret.yaml, plain or encrypted, as \"kmsctl render secret\" writes it")
	app.AddValuesFile(fs, &o.valuesFile)
	fs.StringVar(&o.hsm.Registry, "registry", "", "site's registry for all images; without it, the chart's own references hold")
	o.rel.Add(fs)
	fs.BoolVar(&o.atomic, "atomic", false, "undo a change that fails: back to the last good revision, or nothing")
	addWait(fs, &o.wait)
	o.addClear(fs)
}

func addWait(fs *pflag.FlagSet, wait *bool) {
	fs.BoolVar(wait, "wait", true, "wait until all pods are ready")
}

func addTimeout(fs *pflag.FlagSet, timeout *time.Duration) {
	fs.DurationVar(timeout, "timeout", app.DefaultTimeout, "how long the change may take at most")
}

// Check holds the rules of the flags.
func (o *changeOptions) Check() error {
	errs := []error{o.chart.Check(), o.pass.Check(), o.hsm.Password.Check(), o.rel.Check(), o.checkClear()}
	if o.valuesFile == "" && !o.keeps() {
		errs = append(errs, o.hsm.CheckValues())
	}
	if o.atomic && !o.wait {
		errs = append(errs, fault.Usagef("--atomic: needs --wait, since only waiting shows whether a change failed"))
	}
	if o.secretFile != "" && (o.hsm.Password.File != "" || o.hsm.Password.Stdin) {
		errs = append(errs, fault.Usagef("--secret, --hsm-password-file, --hsm-password-stdin: only one of them"))
	}
	return errors.Join(errs...)
}

// keeps says whether the settings of the release that is there stay: an upgrade
// without a model and without a values file.
func (o *changeOptions) keeps() bool { return o.upgrade && o.valuesFile == "" && o.hsm.Model == "" }

// inputs are what the flags and files say.
type inputs struct {
	values map[string]any
	hsm    render.Overrides
	secret *render.Secret // nil: it is in the cluster
}

func (i inputs) zero() {
	if i.secret != nil {
		i.secret.Password.Zero()
	}
}

// read reads the two files or the flags in their place. base are the values of
// the release that is there, for an upgrade that keeps them.
func (o *changeOptions) read(base map[string]any) (inputs, error) {
	var in inputs
	var err error
	o.takeClear()
	if in.hsm, err = o.overrides(base); err != nil {
		return in, err
	}
	if err := o.hsm.CheckValues(); err != nil {
		return in, err
	}
	if in.hsm.HSM.ClearData && !o.clear.asked {
		o.WarnClearData(o.kube)
	}
	in.values = in.hsm.Helm()
	o.rel.Beat(in.values)
	if in.secret, err = o.secret(in.hsm); err != nil {
		return in, err
	}
	for _, w := range in.hsm.Warnings {
		o.Warn("%s", w)
	}
	return in, nil
}

// overrides reads --values and lets the flags beat it; afterwards the flags
// hold what is in force, so that one check serves both.
func (o *changeOptions) overrides(base map[string]any) (render.Overrides, error) {
	o.aim()
	switch {
	case o.keeps():
		return o.kept(base)
	case o.valuesFile == "":
		return o.hsm.Overrides()
	}
	return o.hsm.ValuesFile(o.App, o.valuesFile, &o.pass)
}

// aim points the chart of an archive at --registry as a load of it does, so
// that the values need not.
func (o *changeOptions) aim() {
	if o.chart.Archive != "" && o.hsm.Registry != "" {
		o.chart.Site, o.hsm.Registry = app.SiteAt(o.hsm.Registry), ""
	}
}

// kept takes the values of the release that is there, and lets the flags beat
// them.
func (o *changeOptions) kept(base map[string]any) (render.Overrides, error) {
	b, err := yaml.Marshal(base)
	if err != nil {
		return render.Overrides{}, err
	}
	ov, err := render.ParseOverrides(b)
	if err != nil {
		return ov, fault.New(fault.Usage, "read the values of release", o.kube.Release, err).WithHint("give all settings with --values or --model")
	}
	o.hsm.Beat(&ov)
	return ov, nil
}

func hintOr(err error, other string) string {
	if h := fault.HintOf(err); h != "" {
		return h
	}
	return other
}

func (o *changeOptions) open(flag, path string) ([]byte, error) {
	raw, err := o.ReadInput(flag, path, 1<<20)
	if err != nil {
		return nil, err
	}
	return o.pass.Open(o.App, path, raw)
}

// secret reads --secret or the flags in its place, and takes in what the
// values file had that belongs there. nil when nothing was given.
func (o *changeOptions) secret(ov render.Overrides) (*render.Secret, error) {
	var s render.Secret
	switch {
	case o.secretFile != "":
		text, err := o.open("--secret", o.secretFile)
		if err != nil {
			return nil, err
		}
		defer clear(text)
		if s, err = render.ParseSecret(text); err != nil {
			return nil, fault.New(fault.Usage, "read", o.secretFile, err).WithHint("%s", hintOr(err, "make it with `kmsctl render secret`"))
		}
	case o.hsm.Password.Given(o.App):
		o.hsm.Namespace = o.kube.Namespace
		if err := o.hsm.CheckSecret(); err != nil {
			return nil, err
		}
		var err error
		if s, err = o.hsm.Secret(o.App); err != nil {
			return nil, err
		}
	case !ov.Password.Empty() || len(ov.Clients) > 0:
		s.Password, s.Part = ov.Password, true
	default:
		return nil, nil
	}
	if s.Namespace != "" && s.Namespace != o.kube.Namespace {
		return nil, fault.Usagef("%q is for namespace %q, and the release goes to %q", o.secretFile, s.Namespace, o.kube.Namespace).WithHint("give --namespace %s", s.Namespace)
	}
	s.Namespace = o.kube.Namespace
	for ip, p := range ov.Clients {
		if s.Clients == nil {
			s.Clients = map[string]render.Pair{}
		}
		s.Clients[ip] = p
	}
	if !s.Password.Empty() || !s.Part {
		if err := app.CheckPassword(s.Password, "hsm-pass"); err != nil {
			return nil, err
		}
	}
	if err := o.CheckCertificates(&s); err != nil {
		return nil, err
	}
	for _, w := range s.Warnings {
		o.Warn("%s", w)
	}
	return &s, nil
}

func (o *changeOptions) job(in inputs) install.Options {
	out := o.rel.Job(o.kube, in.values, in.secret)
	out.Atomic, out.Wait = o.atomic, o.wait
	return out
}

func newInstallCmd(a *app.App, run func(context.Context, *changeOptions) error) *cobra.Command {
	o := &changeOptions{App: a}
	if run == nil {
		run = runInstall
	}
	cmd := &cobra.Command{
		Use: "install", Short: "Install the release key-management-hsm", Args: cobra.NoArgs,
		Long: `Install the release: apply and verify the Secret hsm-secret, make the certificates and the
first administrator's API key, install the chart, wait until every pod is ready.

Settings come from the manual's two files (--secret, --values), or from flags in their
place. Run it again at any time: what is done already is left alone.`,
		Example: `  kmsctl install --repo ./charts --secret hsm-Secret.yaml --values overrides_hsm.yaml --admin-key-file admin.key
  kmsctl install --repo mgmt-charts --model softhsm --hsm-password-file pw --admin-key-file admin.key
  kmsctl install --archive key-management-hsm-amd64.tar.gz --registry registry.site:5000 --model softhsm --hsm-password-file pw
  kmsctl install --repo oci://registry.site/charts --model softhsm --dry-run`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	o.add(cmd)
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "print the plan and the manifests, secrets masked; needs no cluster")
	return cmd
}

func runInstall(ctx context.Context, o *changeOptions) error {
	in, err := o.read(nil)
	if err != nil {
		return err
	}
	defer in.zero()
	chart, err := o.FindChart(ctx, &o.chart)
	if err != nil {
		return err
	}
	if o.dryRun {
		return o.showPlan(chart, in, o.job(in))
	}
	c, h, err := o.OpenRelease(&o.kube)
	if err != nil {
		return err
	}
	return o.carryOut(ctx, c, in, o.InstallJob(c, h, app.Change{Chart: chart, Values: in.values, Options: o.release()}).Run)
}

// carryOut changes the release, between the question of --clear-data and what
// it asks for.
func (o *changeOptions) carryOut(ctx context.Context, c *kube.Cluster, in inputs, do func(context.Context, install.Options) (install.Result, error)) error {
	if err := o.askClear(ctx, c); err != nil {
		return err
	}
	res, err := do(ctx, o.job(in))
	if err != nil {
		return err
	}
	once, err := o.clearOnce(ctx)
	if err != nil {
		return err
	}
	return o.Print(changeResult{Result: res, Clearing: once, kube: o.kube})
}

func (o *changeOptions) release() release.Options {
	return release.Options{Wait: o.wait, Timeout: o.rel.Timeout}
}

// dryRun is what --dry-run prints.
type dryRun struct {
	Plan     []string `json:"plan"`
	Manifest string   `json:"manifest"`
}

// showPlan prints the plan as comments and the manifests as YAML, secrets
// masked.
func (o *changeOptions) showPlan(chart *release.Chart, in inputs, opts install.Options) error {
	m, err := release.Template(chart, opts.Release, opts.Namespace, in.values, app.PlanVersion)
	if err != nil {
		return err
	}
	if in.secret != nil {
		m = maskedSecret(in.secret) + m
	}
	plan := install.Plan(opts, fmt.Sprintf("%s %s", chart.Name(), chart.Version()))
	if o.clear.asked {
		plan = append(plan, "clear the HSM's application data, unless that was done, or there was nothing to clear, when it was asked for before")
	}
	d := dryRun{plan, m}
	if o.Format != "table" {
		return o.Print(d)
	}
	for i, p := range d.Plan {
		fmt.Fprintf(o.Out, "# %d. %s\n", i+1, p)
	}
	_, err = fmt.Fprint(o.Out, d.Manifest)
	return err
}

func maskedSecret(s *render.Secret) string {
	keys := map[string]string{}
	for k := range s.Data() {
		keys[k] = "MASKED"
	}
	b, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Secret", "type": "Opaque",
		"metadata": map[string]string{"name": render.SecretName, "namespace": s.Namespace}, "stringData": keys})
	if err != nil {
		return ""
	}
	return "---\n# applied apart from the release, never by Helm\n" + string(b) + "\n"
}

// changeResult prints a finished change.
type changeResult struct {
	install.Result
	Clearing *app.OnceResult `json:"clearing,omitempty"`
	kube     app.KubeFlags
}

// Table is one line a field.
func (r changeResult) Table() ([]string, [][]string) {
	rows := [][]string{{"release", r.Release.Name}, {"namespace", r.Release.Namespace}, {"revision", strconv.Itoa(r.Release.Revision)},
		{"status", r.Release.Status}, {"chart", r.Release.Version}}
	ready := 0
	for _, p := range r.Pods {
		if p.Ready {
			ready++
		}
	}
	rows = append(rows, []string{"pods", fmt.Sprintf("%d of %d ready", ready, len(r.Pods))})
	if r.Clearing != nil {
		rows = append(rows, r.Clearing.Rows(r.kube)...)
	}
	return nil, rows
}
