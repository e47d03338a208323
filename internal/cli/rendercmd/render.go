// Package rendercmd has the verbs that write the manual's two files:
// hsm-Secret.yaml and overrides_hsm.yaml.
package rendercmd

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	cmd := &cobra.Command{Use: "render", Short: "Write the manual's two files for an HSM model", Long: `Write hsm-Secret.yaml (the Secret hsm-secret) or overrides_hsm.yaml (the chart's values)
with exactly the keys of the product's manual.

Both can hold what others must not read, so they are encrypted with age: to --recipient,
or by a passphrase. --plain writes clear text instead (mode 0600): apply it, then delete it.
install and serve read both forms.`}
	cmd.AddCommand(newSecretCmd(a, nil), newOverridesCmd(a, nil))
	return []*cobra.Command{cmd}
}

// target is where the rendered text goes, and in which form.
type target struct {
	outputFile string
	decrypt    string
	seal       app.SealFlags
}

func (t *target) add(fs *pflag.FlagSet) {
	fs.StringVar(&t.outputFile, "output-file", "", "write here (mode 0600) instead of to standard output")
	fs.StringVar(&t.decrypt, "decrypt", "", "show this file of an earlier run in clear text, and render nothing")
	t.seal.Add(fs)
}

func (t *target) check(format string) error {
	errs := []error{t.seal.Check()}
	if format != "table" && t.outputFile == "" && !t.seal.Plain && t.decrypt == "" {
		errs = append(errs, fault.Usagef("--output-file: missing for an encrypted file with -o %s", format).WithHint("add --output-file or --plain"))
	}
	return errors.Join(errs...)
}

// result is what -o json prints about a written file.
type result struct {
	OutputFile string   `json:"outputFile"`
	Encrypted  bool     `json:"encrypted"`
	Warnings   []string `json:"warnings"`
}

// Table says nothing: the file is the result.
func (result) Table() ([]string, [][]string) { return nil, nil }

// write seals text if asked, and writes it. It clears text.
func (t *target) write(a *app.App, text []byte, warnings []string) error {
	defer clear(text)
	for _, w := range warnings {
		a.Warn("%s", w)
	}
	out, err := t.seal.Seal(a, t.outputFile, text)
	if err != nil {
		return err
	}
	if t.outputFile == "" {
		return show(a, out)
	}
	if err := app.WriteFile(t.outputFile, out, 0o600); err != nil {
		return err
	}
	a.Progress().Line("written", t.outputFile)
	if warnings == nil {
		warnings = []string{}
	}
	return a.Print(result{t.outputFile, !t.seal.Plain, warnings})
}

// show prints text on standard output; with -o json as JSON, which kubectl
// and Helm read as well.
func show(a *app.App, text []byte) error {
	if a.Format == "json" {
		j, err := yaml.YAMLToJSON(text)
		if err != nil {
			return err
		}
		return a.Print(json.RawMessage(j))
	}
	_, err := a.Out.Write(text)
	return err
}

// reveal shows the file of --decrypt.
func (t *target) reveal(a *app.App) error {
	raw, err := a.ReadInput("--decrypt", t.decrypt, 1<<20)
	if err != nil {
		return err
	}
	text, err := t.seal.Pass.Open(a, t.decrypt, raw)
	if err != nil {
		return err
	}
	defer clear(text)
	return show(a, text)
}

type secretOptions struct {
	*app.App
	hsm app.HSMFlags
	target
}

func newSecretCmd(a *app.App, run func(context.Context, *secretOptions) error) *cobra.Command {
	o := &secretOptions{App: a}
	if run == nil {
		run = runSecret
	}
	cmd := &cobra.Command{
		Use: "secret", Short: "Write hsm-Secret.yaml", Args: cobra.NoArgs,
		Example: `  kmsctl render secret --model softhsm --hsm-password-file pw --output-file hsm-Secret.yaml
  kmsctl render secret --model gemalto --server-ca-file server.pem --client-cert 10.0.0.11=node1.pem \
    --client-key 10.0.0.11=node1Key.pem --recipient age1… --output-file hsm-Secret.yaml
  kmsctl render secret --decrypt hsm-Secret.yaml`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	o.hsm.AddModel(cmd)
	o.hsm.AddNamespace(cmd.Flags())
	o.hsm.AddSecret(cmd.Flags())
	o.add(cmd.Flags())
	return cmd
}

// Check holds the rules of the flags.
func (o *secretOptions) Check() error {
	if o.decrypt != "" {
		return o.check(o.Format)
	}
	return errors.Join(o.hsm.CheckSecret(), o.check(o.Format))
}

func runSecret(_ context.Context, o *secretOptions) error {
	if o.decrypt != "" {
		return o.reveal(o.App)
	}
	s, err := o.hsm.Secret(o.App)
	defer s.Password.Zero()
	if err != nil {
		return err
	}
	text, err := s.YAML()
	if err != nil {
		return err
	}
	return o.write(o.App, text, s.Warnings)
}

type overridesOptions struct {
	*app.App
	hsm app.HSMFlags
	target
}

func newOverridesCmd(a *app.App, run func(context.Context, *overridesOptions) error) *cobra.Command {
	o := &overridesOptions{App: a}
	if run == nil {
		run = runOverrides
	}
	cmd := &cobra.Command{
		Use: "overrides", Short: "Write overrides_hsm.yaml", Args: cobra.NoArgs,
		Long: `Write overrides_hsm.yaml, the chart's values. Without --registry the image blocks are left
out, and the chart's own references hold, which kmsctl load has set to the site's registry.`,
		Example: `  kmsctl render overrides --model softhsm --registry mycluster.icp:8500 --version 3.2.1 --plain
  kmsctl render overrides --model thales --hsm-ip 10.0.0.1 --rfs-ip 10.0.0.2 --slot-id 492971158 \
    --esn 1111-2222-3333 --key-hash 000102030405060708090a0b0c0d0e0f10111213 --output-file overrides_hsm.yaml`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	o.hsm.AddModel(cmd)
	o.hsm.AddNamespace(cmd.Flags())
	o.hsm.AddValues(cmd.Flags())
	o.add(cmd.Flags())
	return cmd
}

// Check holds the rules of the flags.
func (o *overridesOptions) Check() error {
	if o.decrypt != "" {
		return o.check(o.Format)
	}
	return errors.Join(o.hsm.CheckValues(), o.check(o.Format))
}

func runOverrides(_ context.Context, o *overridesOptions) error {
	if o.decrypt != "" {
		return o.reveal(o.App)
	}
	v, err := o.hsm.Overrides()
	if err != nil {
		return err
	}
	text, err := v.YAML()
	if err != nil {
		return err
	}
	return o.write(o.App, text, v.Warnings)
}
