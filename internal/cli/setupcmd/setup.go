// Package setupcmd has the verb setup: the whole way from an archive to a
// running release, as questions and answers, or from flags and a file of
// answers. It does the same as load, render and install, by the same jobs.
package setupcmd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/render"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command { return []*cobra.Command{newSetupCmd(a, nil)} }

type options struct {
	*app.App
	kube        app.KubeFlags
	hsm         app.HSMFlags
	delivery    app.DeliveryFlags
	rel         app.ReleaseFlags
	pass        app.PassphraseFlags
	valuesFile  string
	archive     string
	chartFile   string
	version     string
	certDir     string
	nodeLabel   string
	answersFile string
	saveAnswers string
	yes, dryRun bool
	skipChecks  bool

	flags        *pflag.FlagSet
	answered     map[string]bool // by the person, not by flag, environment or file
	password     secret.Value    // typed
	chartVersion string          // in the archive
	reach        *kube.Cluster   // nil: not reached
	reachTried   bool
	storage      *storage
	settings     *render.Overrides // of --values
}

func newSetupCmd(a *app.App, run func(context.Context, *options) error) *cobra.Command {
	o := &options{App: a, answered: map[string]bool{}}
	if run == nil {
		run = runSetup
	}
	cmd := &cobra.Command{
		Use: "setup", Short: "Load, render and install, led by questions or by a file of answers", Args: cobra.NoArgs,
		Long: `Go the whole way: load the archive, render the settings of the HSM model, apply hsm-secret,
install the release. What is given by no flag, variable or answers file is asked at the
terminal; ? explains a question, < goes back to the one before, Ctrl-C stops and keeps the
answers (but no secret) for the next run.

--values takes a file as install does: any value of the chart, the manual's own among them.
What it says of the HSM is not asked; flags beat it, and an unknown key in it is refused.

Before it begins it checks, as "kmsctl preflight" does, whether it will work. A check that
fails is shown with its cure and needs a decision; with --yes it ends the run with exit code 7.

At the end it prints the command that does the same without a question, and writes the
answers into a file. --answers FILE --yes never asks.`,
		Example: `  kmsctl setup
  kmsctl setup --model thales --archive key-management-hsm-amd64.tar.gz
  kmsctl setup --values overrides_hsm.yaml --archive key-management-hsm-amd64.tar.gz
  kmsctl setup --answers site.yaml --hsm-password-file pw --yes`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.flags = cmd.Flags()
			if err := o.readFile(); err != nil {
				return err
			}
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.add(cmd)
	return cmd
}

func (o *options) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	o.kube.Add(fs)
	o.hsm.AddModel(cmd)
	o.hsm.AddSecret(fs)
	o.hsm.AddSettings(fs)
	// Where load says --namespace, setup means that of the release.
	load := pflag.NewFlagSet("load", pflag.ContinueOnError)
	o.delivery.Add(load)
	load.VisitAll(func(f *pflag.Flag) {
		if f.Name == "namespace" {
			f.Name = "registry-namespace"
		}
		fs.AddFlag(f)
	})
	fs.StringVar(&o.archive, "archive", "", "archive with images and chart; without one, both are loaded already")
	fs.StringVar(&o.chartFile, "chart", "", "packed chart or its folder, instead of --repo; without both, the chart in the archive")
	fs.StringVar(&o.version, "version", "", "version of the chart; without it, the newest")
	fs.StringVar(&o.certDir, "cert-dir", "", "gemalto: folder with IP.pem and IPKey.pem of each --node, instead of --client-cert and --client-key")
	fs.StringVar(&o.nodeLabel, "node-label", "", "gemalto: label of the nodes that run the pods")
	o.rel.Add(fs)
	app.AddValuesFile(fs, &o.valuesFile)
	o.pass.Add(fs)
	fs.StringVar(&o.answersFile, "answers", "", "file of answers: flags' names and their values, as YAML")
	fs.StringVar(&o.saveAnswers, "save-answers", "kmsctl-answers.yaml", "where the answers that were typed are written, without secrets")
	fs.BoolVar(&o.yes, "yes", false, "ask nothing")
	fs.BoolVar(&o.dryRun, "dry-run", false, "end after the plan and the checks")
	fs.BoolVar(&o.skipChecks, "skip-preflight", false, "do not check before beginning whether it will work")
}

func (o *options) readFile() error {
	if o.answersFile == "" {
		return nil
	}
	b, err := o.ReadInput("--answers", o.answersFile, 1<<20)
	if err != nil {
		return err
	}
	return readAnswers(o.flags, o.answersFile, b)
}

// Check holds the rules of the flags that need no answers.
func (o *options) Check() error {
	errs := []error{o.hsm.Password.Check(), o.rel.Check(), o.pass.Check()}
	if o.chartFile != "" && o.delivery.Repo != "" {
		errs = append(errs, fault.Usagef("--repo, --chart: only one of them"))
	}
	for _, q := range questions() {
		if v := o.value(q.name); v != "" && !q.secret && q.check != nil && (q.when == nil || q.when(o)) {
			if err := q.check(o, v); err != nil {
				errs = append(errs, fault.New(fault.Usage, "", "", fmt.Errorf("--%s: %w", q.name, err)).WithHint("%s", q.help))
			}
		}
	}
	return errors.Join(errs...)
}

// missing names every answer that is needed and not there.
func (o *options) missing() error {
	var errs []error
	for _, q := range questions() {
		if q.mayBeEmpty(o) || o.value(q.name) != "" || (q.when != nil && !q.when(o)) {
			continue
		}
		name := q.name
		if q.secret {
			if o.hsm.SecretGiven(o.App) || !o.password.Empty() {
				continue
			}
			name += "-file"
		}
		errs = append(errs, fault.Usagef("--%s: missing", name).WithHint("%s; or answer the questions at a terminal", "give it as a flag, in the environment or in --answers"))
	}
	return errors.Join(errs...)
}

// value is what a flag holds, as a person would type it.
func (o *options) value(name string) string {
	f := o.flags.Lookup(name)
	if f == nil {
		return ""
	}
	if s, ok := f.Value.(pflag.SliceValue); ok {
		return strings.Join(s.GetSlice(), ",")
	}
	return f.Value.String()
}

// cluster is the cluster, when it can be reached; the phases tell why not.
func (o *options) cluster(ctx context.Context) *kube.Cluster {
	if o.reachTried {
		return o.reach
	}
	o.reachTried = true
	c, err := o.Cluster(&o.kube)
	if err != nil {
		return nil
	}
	tctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	if _, err := c.Nodes(tctx); err == nil {
		o.reach = c
	}
	return o.reach
}

// readValues takes the settings of --values, which are not asked for.
func (o *options) readValues() error {
	if o.valuesFile == "" {
		return nil
	}
	v, err := o.hsm.ValuesFile(o.App, o.valuesFile, &o.pass)
	o.settings = &v
	return err
}

func runSetup(ctx context.Context, o *options) error {
	if err := o.readValues(); err != nil {
		return err
	}
	if err := o.interview(ctx); err != nil {
		return err
	}
	if err := errors.Join(o.missing(), o.Check()); err != nil {
		return err
	}
	p, err := o.prepare()
	if err != nil {
		return err
	}
	defer p.secret.Password.Zero()
	return o.carryOut(ctx, p)
}
