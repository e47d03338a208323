package setupcmd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/render"
)

// prepared is what the answers come to.
type prepared struct {
	overrides render.Overrides
	secret    render.Secret
	values    map[string]any
	job       install.Options
	plan      []string
}

// result is what setup prints at its end.
type result struct {
	Plan        []string           `json:"plan"`
	Checks      []diagnose.Finding `json:"checks,omitempty"`
	Done        []string           `json:"done"`
	Command     string             `json:"command"`
	AnswersFile string             `json:"answersFile,omitempty"`
}

// Table is what was done, and how to do it again.
func (r result) Table() ([]string, [][]string) {
	var rows [][]string
	for _, d := range r.Done {
		rows = append(rows, []string{"done", d})
	}
	rows = append(rows, []string{"again", r.Command})
	if r.AnswersFile != "" {
		rows = append(rows, []string{"answers", r.AnswersFile})
	}
	return nil, rows
}

// prepare renders everything in memory, so that nothing begins that cannot
// end.
func (o *options) prepare() (prepared, error) {
	var p prepared
	o.pairs()
	o.hsm.Namespace = o.kube.Namespace
	errs := []error{o.hsm.CheckValues(), o.hsm.CheckSecret()}
	if o.archive != "" {
		errs = append(errs, o.delivery.Check(o.App))
	}
	if err := errors.Join(errs...); err != nil {
		return p, err
	}
	var err error
	if p.overrides, err = o.overrides(); err != nil {
		return p, err
	}
	if p.secret, err = o.hsmSecret(); err != nil {
		return p, err
	}
	for _, w := range append(p.overrides.Warnings, p.secret.Warnings...) {
		o.Warn("%s", w)
	}
	if p.overrides.HSM.ClearData {
		o.WarnClearData(o.kube)
	}
	p.values = p.overrides.Helm()
	o.rel.Beat(p.values)
	p.job = o.rel.Job(o.kube, p.values, &p.secret)
	p.plan = o.planOf(p)
	return p, nil
}

// overrides are the settings by --values and the flags.
func (o *options) overrides() (render.Overrides, error) {
	v, err := o.hsm.Overrides()
	if o.settings != nil {
		warnings := v.Warnings
		v = *o.settings
		v.Warnings = append(warnings, v.Warnings...)
		o.hsm.Beat(&v) // with what was asked since
	}
	images, err2 := o.imagesOfChartFile()
	if images != nil {
		v.Images = images
	}
	return v, errors.Join(err, err2)
}

// chart says where the chart of the release comes from: a file, a repository,
// else the archive itself.
func (o *options) chart() app.ChartFlags {
	f := o.delivery.ChartFlags()
	f.Version = o.version
	switch {
	case o.chartFile != "":
		f.Chart = o.chartFile
	case f.Repo == "":
		f.Archive, f.Site = o.archive, &o.delivery
	}
	return f
}

// imagesOfChartFile points a chart that no load has pointed anywhere at the
// registry, by the values; nil when the chart is pointed there.
func (o *options) imagesOfChartFile() (map[string]render.Image, error) {
	if o.chartFile == "" || o.delivery.Registry == "" {
		return nil, nil
	}
	m, err := o.hsm.CheckModel()
	if err != nil {
		return nil, err
	}
	host := o.delivery.Host()
	images := render.Images(host, "", m)
	for block, i := range images {
		i.Repository = host + "/" + o.delivery.Repository(strings.TrimPrefix(i.Repository, host+"/"))
		images[block] = i
	}
	return images, nil
}

// pairs turns --cert-dir into the pairs of the nodes.
func (o *options) pairs() {
	if o.certDir == "" || len(o.hsm.ClientCerts) > 0 {
		return
	}
	for _, ip := range o.hsm.Nodes {
		cert, key := pairFiles(o.certDir, ip)
		o.hsm.ClientCerts = append(o.hsm.ClientCerts, ip+"="+cert)
		o.hsm.ClientKeys = append(o.hsm.ClientKeys, ip+"="+key)
	}
}

// hsmSecret is hsm-secret by the flags, with the password that was typed.
func (o *options) hsmSecret() (render.Secret, error) {
	if o.password.Empty() {
		return o.hsm.Secret(o.App)
	}
	return o.hsm.SecretWith(o.App, o.password)
}

func (o *options) planOf(p prepared) []string {
	var plan []string
	if o.archive != "" {
		load := fmt.Sprintf("load %s: images to registry %s", o.archive, o.delivery.Registry)
		if o.delivery.Repo != "" {
			load += ", chart to " + o.delivery.Repo
		}
		plan = append(plan, load)
	}
	files := fmt.Sprintf("render overrides_hsm.yaml and hsm-Secret.yaml for the model %s, in memory", o.hsm.Model)
	if o.settings != nil {
		files += ", with the values of " + o.valuesFile
	}
	plan = append(plan, files)
	return append(plan, install.Plan(p.job, o.chartInWords())...)
}

func (o *options) chartInWords() string {
	version := o.version
	if version == "" {
		version = "(the newest)"
	}
	switch f := o.chart(); {
	case f.Chart != "":
		return f.Chart
	case f.Archive != "":
		return "in " + f.Archive
	}
	return version + " in " + o.delivery.Repo
}

// carryOut shows the plan, asks, and goes through the phases.
func (o *options) carryOut(ctx context.Context, p prepared) error {
	r := result{Plan: p.plan, Done: []string{}, Command: commandLine(o.flags)}
	if o.Format == "table" {
		for i, s := range p.plan {
			fmt.Fprintf(o.Err, "%2d. %s\n", i+1, s)
		}
	}
	checks, err := o.checked(ctx, p)
	if err != nil {
		return err
	}
	r.Checks = checks.Findings
	if !o.dryRun {
		if err := o.decide(ctx, p, checks); err != nil {
			if o.yes && o.Format != "table" { // a pipeline reads there what failed
				err = errors.Join(o.Print(r), err)
			}
			return err
		}
		for _, phase := range []func(context.Context, prepared) (string, error){o.load, o.install} {
			did, err := phase(ctx, p)
			if err != nil {
				return err
			}
			if did != "" {
				r.Done = append(r.Done, did)
			}
		}
	}
	if len(o.answered) > 0 && o.saveAnswers != "" {
		if err := o.writeAnswers(); err != nil {
			return err
		}
		r.AnswersFile = o.saveAnswers
	}
	if !o.password.Empty() {
		r.Command = strings.Replace(r.Command, " --yes", " --hsm-password-file FILE --yes", 1)
	}
	if !o.dryRun {
		if err := o.dropState(); err != nil {
			return err
		}
	}
	return o.Print(r)
}

// checked looks whether the plan will work, and shows what stands against it.
func (o *options) checked(ctx context.Context, p prepared) (diagnose.Report, error) {
	if o.skipChecks {
		return diagnose.Report{}, nil
	}
	chart := o.chart()
	in := app.PreflightInput{Kube: o.kube, Release: o.rel, NodeLabel: o.nodeLabel, Settings: &p.overrides, Secret: &p.secret,
		Chart: &chart, Pull: o.delivery.Pull(), Insecure: o.delivery.Insecure}
	if o.archive != "" {
		in.ToLoad = &o.delivery
		if chart.Repo != "" { // it comes there only with the load
			chart.Repo, chart.Archive, chart.Site = "", o.archive, &o.delivery
		}
	}
	checks, err := o.Preflight(ctx, in)
	if err != nil {
		return diagnose.Report{}, err
	}
	report := diagnose.Run(ctx, checks.Checks())
	if o.Format != "table" {
		return report, nil
	}
	for _, f := range report.Findings {
		if f.Verdict == diagnose.Fail || f.Verdict == diagnose.Warn {
			fmt.Fprintf(o.Err, "%s  %s: %s\n      cure: %s\n", f.Verdict, f.Check, f.Reason, f.Cure)
		}
	}
	return report, nil
}

func (o *options) writeAnswers() error {
	b, err := yaml.Marshal(answers(o.flags))
	if err != nil {
		return err
	}
	return app.WriteFile(o.saveAnswers, b, 0o600)
}

// load brings the archive to the site, as the verb load does.
func (o *options) load(ctx context.Context, _ prepared) (string, error) {
	if o.archive == "" {
		return "", nil
	}
	a, err := archive.Open(o.archive, o.In)
	if err != nil {
		return "", err
	}
	defer a.Close()
	report, err := o.LoadArchive(ctx, app.Load{Archive: a, Delivery: &o.delivery})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("loaded %s: %d objects", o.archive, len(report.Objects)), nil
}

// install applies hsm-secret and installs the release, as the verb does.
func (o *options) install(ctx context.Context, p prepared) (string, error) {
	f := o.chart()
	chart, err := o.FindChart(ctx, &f)
	if err != nil {
		return "", err
	}
	c, h, err := o.OpenRelease(&o.kube)
	if err != nil {
		return "", err
	}
	res, err := o.InstallJob(c, h, app.Change{Chart: chart, Values: p.values, Options: release.Options{Wait: true, Timeout: o.rel.Timeout}}).Run(ctx, p.job)
	if err != nil {
		if fault.KindOf(err) == fault.NotReady || fault.KindOf(err) == fault.Unreachable {
			o.Warn("see `kmsctl doctor`; run the same command again to go on")
		}
		return "", err
	}
	return fmt.Sprintf("installed release %s, revision %d, chart %s, %d pods", res.Release.Name, res.Release.Revision, res.Release.Version, len(res.Pods)), nil
}
