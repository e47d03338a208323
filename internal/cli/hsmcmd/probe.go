package hsmcmd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

type probeOptions struct {
	*app.App
	token    app.TokenFlags
	password app.SecretInput
	timeout  time.Duration
}

func newProbeCmd(a *app.App, run func(context.Context, *probeOptions) error) *cobra.Command {
	o := &probeOptions{App: a, password: app.SecretInput{Name: "hsm-password", Title: "HSM password", Exact: true}}
	if run == nil {
		run = runProbe
	}
	cmd := &cobra.Command{
		Use: "probe", Short: "Find out by trying what an HSM's token can do", Args: cobra.NoArgs,
		Long: `Find out by trying what a PKCS#11 token can do for the KMS: cipher suites, ways to take a
key out of the token and to bring one in, and whether it holds its keys as asked. Each is
compared with Go's own AES; nothing goes by the token's name.

It logs in once, so a wrong password costs one of the token's tries. It makes session
objects only and leaves nothing behind. The report holds no key, no password and no
address: send it to us when a token cannot be used.`,
		Example: `  kmsctl hsm probe --module /usr/lib/softhsm/libsofthsm2.so --token-label kms --hsm-password-file pin
  kmsctl hsm probe --module /usr/safenet/lunaclient/lib/libCryptoki2_64.so -o json > report.json`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	o.token.Add(fs, "")
	fs.DurationVar(&o.timeout, "timeout", time.Minute, "how long the token may take")
	o.password.Add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *probeOptions) Check() error {
	errs := []error{o.password.Check(), o.token.Check()}
	if o.token.Module == "" {
		errs = append(errs, fault.Usagef("--module: missing").WithHint("the PKCS#11 library of the HSM's client, as in /usr/lib/softhsm/libsofthsm2.so"))
	}
	return errors.Join(errs...)
}

func runProbe(ctx context.Context, o *probeOptions) error {
	path, err := connector.Find(o.Getenv)
	if err != nil {
		return err
	}
	slot, err := app.ParseSlot(o.token.Slot)
	if err != nil {
		return err
	}
	pin, err := o.password.Read(o.App, false)
	if err != nil {
		return err
	}
	defer pin.Zero()
	if err := app.CheckPassword(pin, "the HSM password"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	r, err := connector.Probe(ctx, connector.Options{Path: path, Module: o.token.Module, TokenLabel: o.token.Label, TokenSerial: o.token.Serial, Slot: slot, PIN: pin, Stderr: o.Err})
	if err != nil {
		return err
	}
	if err := o.Print(report(r)); err != nil {
		return err
	}
	if !r.Usable {
		return fault.Newf(fault.NotReady, "use token", r.Token.Label, "%s", strings.Join(r.Capabilities.Notes, "; ")).WithHint("send us the output of `kmsctl hsm probe -o json`")
	}
	return nil
}

// report shows a probe to a person.
type report hsm.Report

// Table has one line for each thing that was tried.
func (r report) Table() ([]string, [][]string) {
	c := r.Capabilities
	rows := [][]string{
		{"token", r.Token.Label, fmt.Sprintf("serial %s, slot %d, %s %s, firmware %s", r.Token.Serial, r.Token.Slot, r.Token.Manufacturer, r.Token.Model, r.Token.Firmware)},
		{"library", r.Token.Module, r.Token.Library},
	}
	for _, g := range []struct {
		title string
		all   []hsm.Finding
	}{{"suite", c.Suites}, {"wrap", c.WrapWays}, {"import", c.Imports}, {"guard", c.Guards}, {"sign", []hsm.Finding{c.Sign}}} {
		for _, f := range g.all {
			rows = append(rows, []string{g.title, mark(f.Works) + f.Name, f.Why})
		}
	}
	for _, n := range c.Notes {
		rows = append(rows, []string{"note", n, ""})
	}
	suite := "none"
	if c.Suite != 0 {
		suite = fmt.Sprint(c.Suite)
	}
	rows = append(rows, []string{"so", mark(r.Usable) + "usable", fmt.Sprintf("suite %s, placements: %s", suite, strings.Join(c.Placements, ", "))})
	return []string{"WHAT", "RESULT", "WHY"}, rows
}

func mark(ok bool) string {
	if ok {
		return "yes  "
	}
	return "no   "
}
