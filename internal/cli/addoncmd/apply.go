package addoncmd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/push"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/render"
)

type applyOptions struct {
	*app.App
	file         string
	kube         app.KubeFlags
	delivery     app.DeliveryFlags
	pass         app.PassphraseFlags
	jobs         int
	adminKeyFile string
	dryRun       bool
	wait         bool
	timeout      time.Duration
}

func newApplyCmd(a *app.App, run func(context.Context, *applyOptions) error) *cobra.Command {
	o := &applyOptions{App: a}
	if run == nil {
		run = runApply
	}
	cmd := &cobra.Command{
		Use: "apply", Short: "Apply the resources, load the archives and install the charts of a cluster folder", Args: cobra.NoArgs,
		Long: `Do what ICP's installer did with a cluster folder: apply all objects of the folder resources
(YAML or JSON, also as render encrypts them), then, for each entry of archive_addons, load
the archive and install the charts that are listed. Where none are listed, none is installed.

Images go to --registry below the addon's namespace, charts to the repository by the name in
repo, which "kmsctl repo add" gave, or all to --repo. Each chart becomes the release of its own
name in the addon's namespace, in the version that the archive has.

Run it again at any time: what is done already is left alone, what differs is changed.`,
		Example: `  kmsctl addon apply -f cluster/config.yaml --registry mycluster.icp:8500 --admin-key-file admin.key
  kmsctl addon apply -f cluster/config.yaml --registry registry.site:5000 --map '{prefix}/{path}' --repo oci://registry.site:5000/charts
  kmsctl addon apply -f cluster/config.yaml --registry mycluster.icp:8500 --dry-run -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	fs.StringVarP(&o.file, "file", "f", "cluster/config.yaml", "ICP's config.yaml; its folder is the cluster folder")
	o.kube.AddCluster(fs)
	// The addon says the namespace.
	load := pflag.NewFlagSet("load", pflag.ContinueOnError)
	o.delivery.Add(load)
	load.VisitAll(func(f *pflag.Flag) {
		if f.Name != "namespace" {
			fs.AddFlag(f)
		}
	})
	o.pass.Add(fs)
	fs.IntVar(&o.jobs, "jobs", app.DefaultJobs, "uploads at the same time")
	fs.StringVar(&o.adminKeyFile, "admin-key-file", "", "where the first administrator's API key of key-management-hsm is written (mode 0600)")
	fs.BoolVar(&o.dryRun, "dry-run", false, "say what would be applied, sent and installed; the registry is asked, the cluster is not")
	fs.BoolVar(&o.wait, "wait", true, "wait until all pods are ready")
	fs.DurationVar(&o.timeout, "timeout", app.DefaultTimeout, "how long one installation may take")
	return cmd
}

// Check holds the rules of the flags.
func (o *applyOptions) Check() error {
	errs := []error{o.delivery.Check(o.App), o.pass.Check()}
	if o.jobs < 1 || o.jobs > 64 {
		errs = append(errs, fault.Usagef("--jobs: %d is not between 1 and 64", o.jobs))
	}
	if o.timeout <= 0 {
		errs = append(errs, fault.Usagef("--timeout: %s is not positive", o.timeout))
	}
	return errors.Join(errs...)
}

func runApply(ctx context.Context, o *applyOptions) error {
	j, err := o.prepare()
	if err != nil {
		return err
	}
	defer j.zero()
	j.run(ctx)
	return errors.Join(j.outcome(ctx), o.Print(j.report))
}

// job is one run of apply.
type job struct {
	*applyOptions
	addons    []addon
	values    map[string]map[string]any // of our own chart, by addon
	resources []resource
	report    report
	errs      []error
}

// prepare reads everything that can be read before anything is done.
func (o *applyOptions) prepare() (*job, error) {
	j := &job{applyOptions: o, values: map[string]map[string]any{}}
	text, err := o.ReadInput("--file", o.file, 4<<20)
	if err != nil {
		return nil, err
	}
	var warnings []string
	if j.addons, warnings, err = parseConfig(text); err != nil {
		return nil, fault.New(fault.Usage, "read", o.file, err).WithHint("%s", hintOr(err, "the manual's step 6 shows the form; `kmsctl addon init` writes it"))
	}
	j.report = report{DryRun: o.dryRun, Resources: []resourceLine{}, Addons: []addonLine{}, Warnings: append([]string{}, warnings...)}
	if len(j.addons) == 0 {
		j.warn("%s has no %s: no archive is loaded", o.file, addonsKey)
	}
	for _, w := range warnings {
		o.Warn("%s", w)
	}
	errs := []error{j.readResources()}
	for _, a := range j.addons {
		binding, err := a.bindings(o.file)
		errs = append(errs, err)
		j.resources = append(j.resources, binding...)
		errs = append(errs, j.readValues(a))
	}
	return j, errors.Join(errs...)
}

func (j *job) zero() {
	for _, r := range j.resources {
		if r.secret != nil {
			r.secret.Password.Zero()
		}
	}
}

func hintOr(err error, other string) string {
	if h := fault.HintOf(err); h != "" {
		return h
	}
	return other
}

func (j *job) warn(format string, a ...any) {
	w := fmt.Sprintf(format, a...)
	j.report.Warnings = append(j.report.Warnings, w)
	j.Warn("%s", w)
}

// readValues reads the values of our own chart as install does; those of
// others are theirs.
func (j *job) readValues(a addon) error {
	for _, c := range a.Charts {
		if !c.ours() {
			continue
		}
		text, err := yaml.Marshal(c.Values)
		if err != nil {
			return err
		}
		object := fmt.Sprintf("%s: values of %s.%s", j.file, addonsKey, a.Name)
		ov, err := render.ParseOverrides(text)
		if err != nil {
			return fault.New(fault.Usage, "read", object, err).WithHint("%s", hintOr(err, "`kmsctl addon init --model M` writes them"))
		}
		var hsm app.HSMFlags
		hsm.Beat(&ov)
		if err := hsm.CheckValues(); err != nil {
			return fault.New(fault.Usage, "read", object, err)
		}
		if !ov.Password.Empty() || len(ov.Clients) > 0 || ov.HSM.ClearData {
			ov.Password.Zero()
			return fault.Newf(fault.Usage, "read", object, "hsm_pw, client_certs and clear_data have no place here").
				WithHint("put password and certificates into %s/%s, see `kmsctl render secret`; this version does not clear an HSM", resourcesFolder, secretFile)
		}
		for _, w := range ov.Warnings {
			j.warn("%s", w)
		}
		j.values[a.Name] = ov.Helm()
	}
	return nil
}

// run applies, loads and installs. Without all resources no archive is begun:
// the charts count on them.
func (j *job) run(ctx context.Context) {
	whole := j.applyResources(ctx)
	for _, a := range j.addons {
		line := addonLine{Name: a.Name, Namespace: a.Namespace, Repo: j.target(a), Path: a.Path, Charts: []chartLine{}}
		for _, c := range a.Charts {
			line.Charts = append(line.Charts, chartLine{Name: c.Name, Status: notBegun})
		}
		line.Status = notBegun
		if whole && ctx.Err() == nil {
			j.addon(ctx, a, &line)
		}
		j.report.Addons = append(j.report.Addons, line)
	}
	if err := ctx.Err(); err != nil {
		j.errs = append(j.errs, err)
	}
}

// addon loads an addon's archive, then installs its charts.
func (j *job) addon(ctx context.Context, a addon, line *addonLine) {
	fail := func(err error) {
		line.Status, line.Error = push.Failed, err.Error()
		j.errs = append(j.errs, fault.New(fault.KindOf(err), "apply addon", a.Name, err).WithHint("%s", fault.HintOf(err)))
	}
	loaded, err := j.load(ctx, a)
	line.Load = loaded
	if err != nil {
		fail(err)
		return
	}
	if line.Status = done; j.dryRun {
		line.Status = wouldLoad
	}
	for i, c := range a.Charts {
		l := &line.Charts[i]
		if err := j.install(ctx, a, c, loaded, l); err != nil {
			l.Status, l.Error = push.Failed, err.Error()
			fail(err)
		}
	}
}

// repository is where an addon's charts go: --repo, else the name in Helm's
// list.
func (j *job) repository(a addon) (app.DeliveryFlags, error) {
	d := j.delivery
	d.Namespace = a.Namespace
	if d.Repo != "" {
		return d, nil
	}
	d.Repo = a.Repo
	return d, j.KnownRepository(a.Repo)
}

func (j *job) target(a addon) string {
	if j.delivery.Repo != "" {
		return j.delivery.Repo
	}
	return a.Repo
}

// load is what the verb load does.
func (j *job) load(ctx context.Context, a addon) (*push.Report, error) {
	d, err := j.repository(a)
	if err != nil {
		return nil, err
	}
	in, err := archive.Open(filepath.Join(filepath.Dir(j.file), filepath.FromSlash(a.Path)), nil)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	r, err := j.LoadArchive(ctx, app.Load{Archive: in, Delivery: &d, Jobs: j.jobs, DryRun: j.dryRun})
	if r != nil {
		j.report.Warnings = append(j.report.Warnings, r.Warnings...)
	}
	return r, err
}

// install is what the verb install does, in the version that the archive has.
func (j *job) install(ctx context.Context, a addon, c chart, loaded *push.Report, line *chartLine) error {
	var has []string
	for _, o := range loaded.Objects {
		name, version := chartOf(o)
		if name == c.Name {
			line.Version = version
		}
		if name != "" {
			has = append(has, name)
		}
	}
	if line.Version == "" {
		return fault.Newf(fault.NotFound, "find chart", c.Name, "it is not in archive %q", a.Path).WithHint("the archive has: %s", strings.Join(has, ", "))
	}
	if line.Release = c.Name; j.dryRun {
		line.Status = "would install"
		return nil
	}
	d, err := j.repository(a)
	if err != nil {
		return err
	}
	f := d.ChartFlags()
	f.Name, f.Version = c.Name, line.Version
	ch, err := j.FindChart(ctx, &f)
	if err != nil {
		return err
	}
	k := j.kube
	k.Namespace, k.Release = a.Namespace, c.Name
	cl, helm, err := j.OpenRelease(&k)
	if err != nil {
		return err
	}
	values := c.Values
	if c.ours() {
		values = j.values[a.Name]
	}
	res, err := j.InstallJob(cl, helm, app.Change{Chart: ch, Values: values, Options: release.Options{Wait: j.wait, Timeout: j.timeout}}).
		Apply(ctx, install.Options{Release: c.Name, Namespace: a.Namespace, HSMSecretName: render.SecretName,
			AdminKeyFile: j.adminKeyFile, Wait: j.wait, Timeout: j.timeout, Foreign: !c.ours()}.Named(values))
	if err != nil {
		return err
	}
	line.Status, line.Revision = unchanged, res.Release.Revision
	if res.Changed {
		line.Status = done
	}
	return nil
}

// fileForm is how helm package names its files.
var fileForm = regexp.MustCompile(`^(.+)-(v?[0-9]+\.[0-9].*)\.tgz$`)

// chartOf is a loaded chart's name and version. A dry run does not read the
// packages of a foreign archive, and goes by their files' names.
func chartOf(o push.Object) (name, version string) {
	if m := fileForm.FindStringSubmatch(o.Name); o.Kind == "chart" && o.Chart == "" && m != nil {
		return m[1], m[2]
	}
	return o.Chart, o.Version
}

// outcome is the run's error: partial when something is done.
func (j *job) outcome(ctx context.Context) error {
	if len(j.errs) == 0 {
		return nil
	}
	if ctx.Err() != nil {
		return errors.Join(j.errs...)
	}
	if did := j.report.did(); did > 0 {
		return fault.New(fault.Partial, "", "", fmt.Errorf("%d objects are done\n%w", did, errors.Join(j.errs...))).
			WithHint("%s", hintOr(errors.Join(j.errs...), "mend the cause")+"; then run the same command again: it does only what is missing")
	}
	return errors.Join(j.errs...)
}

// resourceFiles lists the manifests of the folder resources, by name.
func resourceFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // the manual calls it optional
	}
	if err != nil {
		return nil, fault.New(fault.Other, "read folder", dir, err)
	}
	var out []string
	for _, e := range entries {
		if !e.IsDir() && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(e.Name())) {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out, nil
}
