package setupcmd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/push"
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
	Plan        []string `json:"plan"`
	Done        []string `json:"done"`
	Command     string   `json:"command"`
	AnswersFile string   `json:"answersFile,omitempty"`
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
	if p.overrides, err = o.hsm.Overrides(); err != nil {
		return p, err
	}
	if p.secret, err = o.hsmSecret(); err != nil {
		return p, err
	}
	for _, w := range append(p.overrides.Warnings, p.secret.Warnings...) {
		o.Warn("%s", w)
	}
	p.values = p.overrides.Helm()
	o.rel.Beat(p.values)
	p.job = o.rel.Job(o.kube, p.values, &p.secret)
	p.plan = o.planOf(p)
	return p, nil
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
		plan = append(plan, fmt.Sprintf("load %s: images to registry %s, chart to %s", o.archive, o.delivery.Registry, o.delivery.Repo))
	}
	plan = append(plan, fmt.Sprintf("render overrides_hsm.yaml and hsm-Secret.yaml for the model %s, in memory", o.hsm.Model))
	version := o.version
	if version == "" {
		version = "(the newest)"
	}
	return append(plan, install.Plan(p.job, version+" in "+o.delivery.Repo)...)
}

// carryOut shows the plan, asks, and goes through the phases.
func (o *options) carryOut(ctx context.Context, p prepared) error {
	r := result{Plan: p.plan, Done: []string{}, Command: commandLine(o.flags)}
	if o.Format == "table" {
		for i, s := range p.plan {
			fmt.Fprintf(o.Err, "%2d. %s\n", i+1, s)
		}
	}
	if !o.dryRun {
		if err := o.confirm(); err != nil {
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
	registry, err := o.OpenRegistry(ctx, &o.delivery, o.Uploads())
	if err != nil {
		return "", err
	}
	charts, err := o.OpenCharts(ctx, &o.delivery)
	if err != nil {
		return "", err
	}
	const jobs = 4
	report, err := push.Load(ctx, push.Options{Archive: a, Registry: registry, Host: o.delivery.Host(), Repository: o.delivery.Repository,
		RegistryValue: o.delivery.RegistryValue(), Charts: charts, Jobs: jobs, Compression: "gzip", Known: o.Layers(), Limits: archive.DefaultLimits,
		Progress: o.Progress()})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("loaded %s: %d objects", o.archive, len(report.Objects)), nil
}

// install applies hsm-secret and installs the release, as the verb does.
func (o *options) install(ctx context.Context, p prepared) (string, error) {
	f := o.delivery.ChartFlags()
	f.Version = o.version
	chart, err := o.FindChart(&f)
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
