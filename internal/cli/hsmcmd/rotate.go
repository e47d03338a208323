package hsmcmd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// rotateOptions are those of the job that changes the master keys, in their
// token or to another.
type rotateOptions struct {
	*app.App
	client  app.ClientFlags
	confirm app.ConfirmFlags
	in      kmsapi.MasterRotationRequest
	move    kmsapi.MigrationRequest
	command string // rotate-master or migrate
	verb    string
	wait    bool
	timeout time.Duration
}

// masterStatus is what the commands print.
type masterStatus struct{ kmsapi.MasterStatus }

// Table is one fact a line.
func (s masterStatus) Table() ([]string, [][]string) {
	rows := [][]string{{"installation", s.Installation}, {"token", "serial " + s.Token}, {"version", fmt.Sprint(s.Version)}}
	if len(s.Older) > 0 {
		rows = append(rows, []string{"older", strings.Trim(fmt.Sprint(s.Older), "[]") + ", which still open what they made"})
	}
	r := s.Rotation
	if r == nil {
		return nil, append(rows, []string{"rotation", "none yet"})
	}
	what := "rotation"
	if r.To != nil {
		what = "migration"
		rows = append(rows, []string{"to", fmt.Sprintf("token %q serial %s", r.To.Label, r.To.Serial)})
	}
	rows = append(rows, []string{what, fmt.Sprintf("to version %d, %s", r.Version, r.State)}, []string{"records", fmt.Sprintf("%d taken over, %d left", r.Done, r.Left)},
		[]string{"began", r.Began.Format(time.RFC3339) + ", by " + r.By})
	if r.Ended != nil {
		rows = append(rows, []string{"ended", r.Ended.Format(time.RFC3339)})
	}
	if r.DestroyOld {
		rows = append(rows, []string{"afterwards", "older versions are destroyed"})
	}
	if r.LeavePlaced {
		rows = append(rows, []string{"left behind", "keys that stay in the old token by their placement"})
	}
	if r.Fault != "" {
		rows = append(rows, []string{"waits", r.Fault})
	}
	return nil, rows
}

func newRotateCmd(a *app.App) *cobra.Command {
	cmd := &cobra.Command{Use: "rotate-master", Short: "Change the master keys in the HSM, while the KMS serves", Long: `Change the master keys in the HSM: new ones are made beside the old, in every token of a group,
and everything that the old ones protect is taken over in the background, inside the token.
No key changes, no client's ciphertext changes, and the KMS serves all the time. The job can be
stopped and goes on after a crash, in whichever process of the KMS is there.

The old master keys stay in the token, so that a backup from before can be restored, unless
--destroy-old is given. Keys that stay in the token (placement token) need no master key and are
left as they are.`}
	cmd.AddCommand(
		newRotateVerb(a, "rotate-master", "start", "Begin, or go on with what was stopped", `  kmsctl hsm rotate-master start --data ./kms --wait
  kmsctl hsm rotate-master start --in-cluster-service --api-key-file admin.key
  kmsctl hsm rotate-master start --data ./kms --destroy-old --yes --wait`),
		newRotateVerb(a, "rotate-master", "status", "Show the versions and how far it is", `  kmsctl hsm rotate-master status --data ./kms
  kmsctl hsm rotate-master status --server https://kms:28674 --api-key-file admin.key -o json
  kmsctl hsm rotate-master status --data ./kms --wait --timeout 10m`),
		newRotateVerb(a, "rotate-master", "stop", "Let it rest; start goes on with it", `  kmsctl hsm rotate-master stop --data ./kms`),
	)
	return cmd
}

func newRotateVerb(a *app.App, command, verb, short, example string) *cobra.Command {
	o := &rotateOptions{App: a, command: command, verb: verb}
	cmd := &cobra.Command{Use: verb, Short: short, Example: example, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, runRotate) }}
	fs := cmd.Flags()
	o.client.Add(fs, a)
	switch {
	case verb == "start" && command == migrate:
		fs.BoolVar(&o.move.LeavePlaced, "leave-placed", false, "leave keys behind that stay in the old token by their instance's placement: after the move they cannot be used")
	case verb == "start":
		fs.BoolVar(&o.in.DestroyOld, "destroy-old", false, "destroy all older master keys at the end: a backup from before can then not be restored any more")
		o.confirm.Add(fs, "`kmsctl hsm rotate-master status`")
	}
	if verb != "stop" {
		fs.BoolVar(&o.wait, "wait", false, "wait until what runs is done, also while the KMS or its HSM is away for a moment")
		fs.DurationVar(&o.timeout, "timeout", time.Hour, "how long to wait; the job goes on by itself")
	}
	return cmd
}

// Check holds the rules of the flags.
func (o *rotateOptions) Check() error {
	errs := []error{o.client.Check(false)}
	if o.verb != "stop" && o.timeout <= 0 {
		errs = append(errs, fault.Usagef("--timeout: %s is not positive", o.timeout))
	}
	return errors.Join(errs...)
}

func runRotate(ctx context.Context, o *rotateOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	do := func(method, path string, in any) (s masterStatus, err error) {
		err = c.Do(ctx, method, "/kmsctl/v1/master"+path, in, &s.MasterStatus)
		err = o.ClientError(o.verb+" "+o.job(), o.object(), err)
		if f := new(fault.Error); o.command == migrate && fault.KindOf(err) == fault.Conflict && errors.As(err, &f) {
			_ = f.WithHint("nothing has begun; `kmsctl hsm migrate --help` says what a move needs, and what --leave-placed leaves behind")
		}
		return s, err
	}
	var s masterStatus
	switch o.verb {
	case "status":
		s, err = do(http.MethodGet, "", nil)
	case "stop":
		s, err = do(http.MethodPost, "/stop", nil)
	case "start":
		if o.command == migrate {
			s, err = do(http.MethodPost, "/migrate", o.move)
			break
		}
		if s, err = do(http.MethodGet, "", nil); err == nil && o.in.DestroyOld {
			err = o.Confirm(&o.confirm, s.Installation, []string{fmt.Sprintf("master keys of version %d and older, once all is taken over: a backup from before can then not be restored any more", s.Version)})
		}
		if err == nil {
			s, err = do(http.MethodPost, "/rotate", o.in)
		}
	}
	if o.wait && (err == nil || o.verb == "status") {
		s, err = o.await(ctx, s, err, do)
	}
	if err != nil {
		return err
	}
	return o.Print(s)
}

func (o *rotateOptions) job() string {
	if o.command == migrate {
		return "the move of"
	}
	return "the rotation of"
}

func (o *rotateOptions) object() string {
	if o.command == migrate {
		return "the keys"
	}
	return "the master keys"
}

// absence is how long the KMS may be away while somebody waits for it: longer
// than it needs to come back by itself.
const absence = 2 * time.Minute

// await waits until the job is done, and tells how far it is; also while the
// KMS or its HSM is away, since the job then waits as well. err is that of the
// answer s.
func (o *rotateOptions) await(ctx context.Context, s masterStatus, err error, do func(method, path string, in any) (masterStatus, error)) (masterStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	changed := s.Changed
	op, object := "wait for "+o.job(), o.object()
	var away time.Time // since then it does not answer
	for {
		switch r := s.Rotation; {
		case fault.KindOf(err) == fault.Unreachable && away.IsZero():
			away = time.Now()
			o.Progress().Line("waits", err.Error())
		case fault.KindOf(err) == fault.Unreachable && time.Since(away) < absence:
		case err != nil:
			return s, err
		case r == nil || r.State == kmsapi.RotationDone:
			s.Changed = changed
			return s, nil
		case r.State == kmsapi.RotationStopped:
			return s, fault.Newf(fault.Conflict, op, object, "somebody stopped it").WithHint("go on with: kmsctl hsm %s start", o.command)
		default:
			away = time.Time{}
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			f := fault.New(fault.NotReady, op, object, cmp.Or(err, ctx.Err())).WithHint("it goes on by itself: see kmsctl hsm %s status", o.command)
			if s.Rotation != nil && s.Rotation.Fault != "" {
				f = fault.Newf(fault.NotReady, op, object, "%s", s.Rotation.Fault).WithHint("it is tried again by itself: see kmsctl hsm %s status", o.command)
			}
			return s, f
		}
		s, err = do(http.MethodGet, "", nil)
	}
}
