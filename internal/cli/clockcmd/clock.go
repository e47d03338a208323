// Package clockcmd has the verbs for the clock that the life of keys goes by.
package clockcmd

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

type options struct {
	*app.App
	client  app.ClientFlags
	confirm app.ConfirmFlags
}

// Check holds the rules of the flags.
func (o *options) Check() error { return o.client.Check(false) }

// status is what the commands print.
type status struct{ kmsapi.ClockStatus }

var says = map[string]string{
	kmsapi.ClockRight:    "right",
	kmsapi.ClockIsAhead:  "further ahead than time has passed: nothing is destroyed by it",
	kmsapi.ClockBehind:   "behind what was seen before: time goes on from there",
	kmsapi.ClockStarting: "ahead by what may have been a stop: the KMS looks whether another process runs, for three minutes",
}

// Table is one fact a line.
func (s status) Table() ([]string, [][]string) {
	rows := [][]string{{"clock", says[s.State]}, {"machine", s.Machine.Format(time.RFC3339)}, {"time of the KMS", s.Time.Format(time.RFC3339)},
		{"ahead", (time.Duration(s.AheadSeconds) * time.Second).String()}}
	for _, g := range s.goes() {
		rows = append(rows, []string{"when confirmed", g})
	}
	if s.ConfirmedAt != nil {
		rows = append(rows, []string{"confirmed", s.ConfirmedAt.Format(time.RFC3339) + ", by " + s.ConfirmedBy})
	}
	return nil, rows
}

// goes lists what is due by the machine's clock.
func (s status) goes() (out []string) {
	if s.Purges > 0 {
		out = append(out, fmt.Sprintf("%d deleted keys are purged", s.Purges))
	}
	if s.Expires > 0 {
		out = append(out, fmt.Sprintf("%d expired keys are deactivated for good", s.Expires))
	}
	return out
}

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	o := &options{App: a}
	cmd := &cobra.Command{Use: "clock", Short: "Show whether the machine's clock agrees with the time that passed, and confirm it", Args: cobra.NoArgs,
		Long: `A machine's clock that is set wrong destroys no key. The life of keys (purge, windows, rotation by
policy, the final mark of an expired key) goes by a time of the KMS's own: the newest that any of its
processes saw, plus what truly passed since. The machine's clock is followed while it agrees.

When it is more than an hour ahead (--window clock-jump=… of kms-server), it is not followed: what is
not yet due by the time that passed is refused with CLOCK_NOT_CONFIRMED_ERR, /readyz warns, and
the metric kmsctl_clock_wrong is 1. Keys that it calls expired are refused, and come back with the
right clock. Set the clock right, or confirm it. A clock that is set back changes nothing.

How long the KMS was stopped cannot be known: a gap of up to three days (--window downtime=…) is taken
for a stop when no other process runs; after a longer one the clock waits to be confirmed. So it does
after the restore of an older backup.

The exit code is 7 when the clock is not right.`,
		Example: "  kmsctl clock\n  kmsctl clock --data ./kms -o json\n  kmsctl clock --server https://kms:28674 --api-key-file admin.key",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, runShow) }}
	o.client.Add(cmd.Flags(), a)
	cmd.AddCommand(newConfirmCmd(a))
	return []*cobra.Command{cmd}
}

func newConfirmCmd(a *app.App) *cobra.Command {
	o := &options{App: a}
	cmd := &cobra.Command{Use: "confirm", Short: "Make the machine's clock the time that the life of keys goes by", Args: cobra.NoArgs,
		Long: `Make the machine's clock, whichever way it is off, the time that the life of keys goes by, in all
processes of the KMS. What is due by it is then done: look at it first with kmsctl clock. It is for
administrators, and written to the audit log. A clock that is right is left alone.`,
		Example: "  kmsctl clock confirm\n  kmsctl clock confirm --data ./kms --yes -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, runConfirm) }}
	o.client.Add(cmd.Flags(), a)
	o.confirm.Add(cmd.Flags(), "`kmsctl clock`")
	return cmd
}

func (o *options) look(ctx context.Context) (c *kmsclient.Client, s status, err error) {
	if c, err = o.Client(ctx, &o.client); err != nil {
		return nil, s, err
	}
	err = c.Do(ctx, http.MethodGet, "/kmsctl/v1/clock", nil, &s.ClockStatus)
	return c, s, o.ClientError("look at", "the clock", err)
}

func runShow(ctx context.Context, o *options) error {
	_, s, err := o.look(ctx)
	if err != nil {
		return err
	}
	if err := o.Print(s); err != nil || s.State == kmsapi.ClockRight {
		return err
	}
	return fault.Newf(fault.NotReady, "look at", "the clock", "it is %s", says[s.State]).WithHint("set the machine's clock right, or accept it with: kmsctl clock confirm")
}

func runConfirm(ctx context.Context, o *options) error {
	c, s, err := o.look(ctx)
	if err != nil {
		return err
	}
	if s.State != kmsapi.ClockRight {
		shown := s.Machine.Format(time.RFC3339)
		if err := o.Confirm(&o.confirm, shown, append(s.goes(), "the time "+s.Time.Format(time.RFC3339)+": it becomes "+shown)); err != nil {
			return err
		}
		in := kmsapi.ConfirmClock{Machine: s.Machine}
		s = status{}
		if err := c.Do(ctx, http.MethodPost, "/kmsctl/v1/clock/confirm", in, &s.ClockStatus); err != nil {
			return o.ClientError("confirm", "the clock", err)
		}
	}
	return o.Print(s)
}
