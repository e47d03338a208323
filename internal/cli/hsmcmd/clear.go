package hsmcmd

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

type clearOptions struct {
	*app.App
	client       app.ClientFlags
	start        app.StartFlags
	confirm      app.ConfirmFlags
	installation string
	leftovers    bool
	dryRun       bool
	timeout      time.Duration
}

func newClearCmd(a *app.App, run func(context.Context, *clearOptions) error) *cobra.Command {
	o := &clearOptions{App: a}
	if run == nil {
		run = runClear
	}
	cmd := &cobra.Command{
		Use: "clear", Short: "Clear the HSM's application data: master keys, instances, keys, service IDs", Args: cobra.NoArgs,
		Long: `Clear the HSM's application data: the master keys on the token, and with them every key,
instance, service ID and policy of the KMS. Nothing that was wrapped can be unwrapped again.
The token itself is never initialised, and what others keep on it stays.

It shows what will go and has the release's name typed (of an embedded KMS, its
installation's id). The clearing is then begun once, by a confirmation that is bound to that
name and to the token and ends after ten minutes. A crash on the way is made good by the
next start, before anybody is served. Afterwards the KMS goes on with new master keys;
administrators' keys of an installed release still work, and the audit log says who cleared
what.

--leftovers lists what older installations, whose store is gone, left on the same token, and
--installation clears one of them. Make sure that no other KMS uses it: it is told apart by
its id alone.`,
		Example: `  kmsctl hsm clear --data ./kms --dry-run
  kmsctl hsm clear --in-cluster-service --api-key-file admin.key
  kmsctl hsm clear --data ./kms --leftovers -o json
  kmsctl hsm clear --data ./kms --installation 8c1f02aa --yes`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	o.client.Add(fs, a)
	fs.StringVar(&o.installation, "installation", "", "clear what this other installation left on the token, instead of the KMS's own data")
	fs.BoolVar(&o.leftovers, "leftovers", false, "only list what other installations left on the token")
	fs.BoolVar(&o.dryRun, "dry-run", false, "only show what would go")
	fs.DurationVar(&o.timeout, "timeout", app.ClearTimeout, "how long to wait for the end of the clearing, which goes on by itself")
	o.confirm.Add(fs, app.WithDryRun)
	o.start.Add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *clearOptions) Check() error {
	errs := []error{o.client.Check(false), o.start.Check()}
	if o.leftovers && o.installation != "" {
		errs = append(errs, fault.Usagef("--leftovers, --installation: only one of them").WithHint("--leftovers lists, --installation clears"))
	}
	if o.timeout <= 0 {
		errs = append(errs, fault.Usagef("--timeout: %s is not positive", o.timeout))
	}
	return errors.Join(errs...)
}

// leftovers is what --leftovers prints.
type leftovers struct {
	TokenLabel  string               `json:"tokenLabel"`
	TokenSerial string               `json:"tokenSerial"`
	Own         string               `json:"own"` // the KMS's own installation
	Leftovers   []kmsapi.ClearTarget `json:"leftovers"`
}

// Table is one line an installation.
func (l leftovers) Table() ([]string, [][]string) {
	rows := [][]string{}
	for _, t := range l.Leftovers {
		rows = append(rows, []string{t.Installation, strings.Join(t.Objects, ", ")})
	}
	return []string{"INSTALLATION", "OBJECTS"}, rows
}

func runClear(ctx context.Context, o *clearOptions) error {
	if o.start.SecretFile != "" {
		o.client.Start = &o.start
	}
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	job := app.ClearJob{App: o.App, Client: c, Release: o.client.Release(), Installation: o.installation, Confirm: o.confirm, Timeout: o.timeout}
	if o.dryRun || o.leftovers {
		p, err := job.Look(ctx)
		if err != nil {
			return err
		}
		if o.leftovers {
			return o.Print(leftovers{p.TokenLabel, p.TokenSerial, p.Installation, p.Others})
		}
		return o.Print(app.ClearResult{ClearPlan: p, DryRun: true, Target: job.Target(p)})
	}
	res, err := job.Run(ctx)
	if err != nil {
		return err
	}
	return o.Print(res)
}
