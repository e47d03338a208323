package app

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// ClearTimeout is how long a command waits for the end of a clearing.
const ClearTimeout = 2 * time.Minute

// ClearJob clears a KMS's data through its API: it shows what will go, asks,
// begins once, and waits until the KMS serves again.
type ClearJob struct {
	App          *App
	Client       *kmsclient.Client
	Release      string // its name is what a person types; empty: the installation's id
	Installation string // another one's leftovers, instead of the KMS's own data
	Confirm      ConfirmFlags
	Timeout      time.Duration
}

// ClearResult is what a clearing took away, or would.
type ClearResult struct {
	kmsapi.ClearPlan
	Target  string `json:"target"` // the installation whose data go
	DryRun  bool   `json:"dryRun"`
	Nothing bool   `json:"nothing"` // there was nothing to clear
}

// Table is one line a thing.
func (r ClearResult) Table() ([]string, [][]string) {
	rows := [][]string{}
	if r.Nothing {
		return nil, append(rows, []string{"nothing to clear in", r.Target})
	}
	verb := "cleared"
	if r.DryRun {
		verb = "would go"
	}
	for _, l := range goes(r.ClearPlan, r.Target) {
		rows = append(rows, []string{verb, l})
	}
	return nil, rows
}

// goes lists what goes with an installation.
func goes(p kmsapi.ClearPlan, target string) []string {
	objects := p.Objects
	if i := slices.IndexFunc(p.Others, func(o kmsapi.ClearTarget) bool { return o.Installation == target }); i >= 0 {
		objects = p.Others[i].Objects
	}
	out := []string{fmt.Sprintf("on token %q (serial %s), of installation %s: %s", p.TokenLabel, p.TokenSerial, target, strings.Join(objects, ", "))}
	if target != p.Installation {
		return append(out, "whatever that installation wrapped or stored: it can never be opened again")
	}
	for _, c := range []struct {
		n    int
		what string
	}{{p.Instances, "instances"}, {p.RootKeys, "root keys, and whatever they wrapped"}, {p.StandardKeys, "standard keys"}, {p.ServiceIDs, "service IDs"},
		{p.APIKeys, "API keys of service IDs"}, {p.Policies, "access policies"}} {
		if c.n > 0 {
			out = append(out, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	return out
}

// Look gives the plan and changes nothing.
func (j ClearJob) Look(ctx context.Context) (kmsapi.ClearPlan, error) {
	var p kmsapi.ClearPlan
	if err := j.Client.Do(ctx, http.MethodGet, "/kmsctl/v1/clear", nil, &p); err != nil {
		return p, j.App.ClientError("see what would be cleared", j.name(p), err)
	}
	return p, j.known(p)
}

// known refuses an installation that left nothing on the token.
func (j ClearJob) known(p kmsapi.ClearPlan) error {
	if j.Target(p) == p.Installation || slices.ContainsFunc(p.Others, func(o kmsapi.ClearTarget) bool { return o.Installation == j.Installation }) {
		return nil
	}
	return fault.Newf(fault.NotFound, "clear installation", j.Installation, "token %q holds nothing of it", p.TokenLabel).WithHint("see them with --leftovers")
}

// Target is the installation whose data go.
func (j ClearJob) Target(p kmsapi.ClearPlan) string {
	if j.Installation == "" {
		return p.Installation
	}
	return j.Installation
}

// name is what a person types.
func (j ClearJob) name(p kmsapi.ClearPlan) string {
	if j.Release == "" || j.Target(p) != p.Installation {
		return j.Target(p)
	}
	return j.Release
}

// Run clears. Where nobody keeps anything it does nothing.
func (j ClearJob) Run(ctx context.Context) (ClearResult, error) {
	p, err := j.Look(ctx)
	if err != nil {
		return ClearResult{}, err
	}
	in := kmsapi.ClearRequest{Name: j.name(p), Installation: j.Installation}
	if err := j.Client.Do(ctx, http.MethodPost, "/kmsctl/v1/clear/plan", in, &p); err != nil {
		return ClearResult{}, j.App.ClientError("plan the clearing of", in.Name, err)
	}
	res := ClearResult{ClearPlan: p, Target: j.Target(p), Nothing: p.Confirmation == ""}
	res.Confirmation, res.Expires = "", nil // it is for one use, and not for a screen
	if res.Nothing {
		return res, nil
	}
	if err := j.App.Confirm(&j.Confirm, in.Name, goes(p, res.Target)); err != nil {
		return res, err
	}
	in.Confirmation = p.Confirmation
	if err := j.Client.Do(ctx, http.MethodPost, "/kmsctl/v1/clear", in, nil); err != nil {
		return res, j.App.ClientError("clear", in.Name, err)
	}
	return res, j.wait(ctx, in.Name)
}

// OnceResult is what a request to clear came to that counts once.
type OnceResult struct {
	Cleared *ClearResult    `json:"cleared,omitempty"` // now
	Before  *kmsapi.Cleared `json:"before,omitempty"`  // or before, or there was nothing yet
	Unseen  string          `json:"unseen,omitempty"`  // what may go, where no KMS could be asked
}

// Goes lists what goes, or would.
func (r OnceResult) Goes() []string {
	switch {
	case r.Unseen != "":
		return []string{r.Unseen}
	case r.Cleared == nil || r.Cleared.Nothing:
		return nil
	}
	return goes(r.Cleared.ClearPlan, r.Cleared.Target)
}

// Rows are the lines of a table.
func (r OnceResult) Rows(f KubeFlags) [][]string {
	if r.Cleared != nil {
		_, rows := r.Cleared.Table()
		return rows
	}
	if r.Unseen != "" {
		return [][]string{{"would go", r.Unseen}}
	}
	return [][]string{{"clear data", Settled(*r.Before) + ", to clear what is there now: " + f.ClearCommand()}}
}

// Once clears, unless that was done or there was nothing to clear when it was
// asked for before: the KMS keeps a note of it, so that the same command run
// again takes nothing.
func (j ClearJob) Once(ctx context.Context) (OnceResult, error) {
	var before kmsapi.Cleared
	err := j.Client.Do(ctx, http.MethodPost, "/kmsctl/v1/clear/settle", nil, &before)
	if err == nil {
		return OnceResult{Before: &before}, nil
	}
	if !kmsclient.IsStatus(err, http.StatusConflict) {
		return OnceResult{}, j.App.ClientError("ask whether to clear", j.Release, err)
	}
	res, err := j.Run(ctx)
	return OnceResult{Cleared: &res}, err
}

// Would tells what Once would do, and does nothing.
func (j ClearJob) Would(ctx context.Context) (OnceResult, error) {
	p, err := j.Look(ctx)
	if err != nil || p.Cleared != nil {
		return OnceResult{Before: p.Cleared}, err
	}
	return OnceResult{Cleared: &ClearResult{ClearPlan: p, Target: p.Installation, DryRun: true, Nothing: p.Empty()}}, nil
}

// Settled says that a request to clear counts no more.
func Settled(c kmsapi.Cleared) string {
	at := c.At.Format(time.RFC3339)
	if c.Nothing {
		return fmt.Sprintf("clear_data was looked at on %s, when there was nothing to clear; it does nothing more and may be removed", at)
	}
	return fmt.Sprintf("clear_data was carried out on %s (by %s); it does nothing more and may be removed", at, c.By)
}

// clearBeat is between two looks at a KMS that is clearing.
const clearBeat = 200 * time.Millisecond

// wait returns when the KMS serves again.
func (j ClearJob) wait(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, j.Timeout)
	defer cancel()
	tick := time.NewTicker(clearBeat)
	defer tick.Stop()
	for {
		err := j.Client.Do(ctx, http.MethodGet, "/readyz", nil, nil)
		if err == nil {
			return nil
		}
		var e *kmsclient.Error
		if !errors.As(err, &e) && ctx.Err() == nil {
			return j.App.ClientError("wait for the end of the clearing of", name, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fault.New(fault.NotReady, "wait for the end of the clearing of", name, errors.Join(err, ctx.Err())).
				WithHint("it has begun and goes on by itself as soon as the HSM and the storage answer: /readyz and the log say what is missing; the same command again tells whether it has ended")
		}
	}
}
