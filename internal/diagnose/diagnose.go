// Package diagnose finds out what is wrong, before an installation
// (preflight) and after one (doctor): a list of checks, each with what was
// found, why that matters and what cures it. It only looks, and needs no
// library of those it looks at.
package diagnose

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Verdict of a check.
type Verdict string

// The verdicts. Skipped checks say why; only Fail fails the whole.
const (
	OK   Verdict = "ok"
	Warn Verdict = "warn"
	Fail Verdict = "fail"
	Skip Verdict = "skip"
)

// Finding is one result of a check.
type Finding struct {
	Check   string  `json:"check"`
	Verdict Verdict `json:"result"`
	Reason  string  `json:"reason"`         // what was found
	Cure    string  `json:"cure,omitempty"` // what to do about it
}

// Check looks at one thing.
type Check struct {
	Name string
	Run  func(ctx context.Context) []Finding
}

// Report is what all checks found, in their order.
type Report struct {
	Findings []Finding `json:"checks"`
	Failed   int       `json:"failed"`
	Warned   int       `json:"warned"`
}

// Table shows each finding, its cure in a line of its own.
func (r Report) Table() ([]string, [][]string) {
	var rows [][]string
	for _, f := range r.Findings {
		rows = append(rows, []string{string(f.Verdict), f.Check, f.Reason})
		if f.Cure != "" {
			rows = append(rows, []string{"", "", "cure: " + f.Cure})
		}
	}
	return []string{"RESULT", "CHECK", "REASON"}, rows
}

// Fault is nil when nothing failed.
func (r Report) Fault(what string) error {
	if r.Failed == 0 {
		return nil
	}
	var names []string
	hint := ""
	for _, f := range r.Findings {
		if f.Verdict != Fail {
			continue
		}
		if len(names) == 0 || names[len(names)-1] != f.Check {
			names = append(names, f.Check)
		}
		if hint == "" {
			hint = f.Cure
		}
	}
	return fault.Newf(fault.NotReady, what, "", "%d of %d checks failed: %s", r.Failed, len(r.Findings), strings.Join(names, ", ")).WithHint("%s", hint)
}

// patience with one check: a firewall that drops packets answers never.
const patience = 20 * time.Second

// Run runs the checks side by side.
func Run(ctx context.Context, checks []Check) Report {
	found := make([][]Finding, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() {
			cctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			found[i] = c.Run(cctx)
			for j := range found[i] {
				found[i][j].Check = c.Name
			}
		})
	}
	wg.Wait()
	r := Report{Findings: []Finding{}}
	for _, fs := range found {
		for _, f := range fs {
			r.Findings = append(r.Findings, f)
			switch f.Verdict {
			case Fail:
				r.Failed++
			case Warn:
				r.Warned++
			case OK, Skip:
			}
		}
	}
	return r
}

func ok(format string, a ...any) []Finding {
	return []Finding{{Verdict: OK, Reason: fmt.Sprintf(format, a...)}}
}

func skip(format string, a ...any) []Finding {
	return []Finding{{Verdict: Skip, Reason: fmt.Sprintf(format, a...)}}
}

func bad(v Verdict, cure, format string, a ...any) Finding {
	return Finding{Verdict: v, Reason: fmt.Sprintf(format, a...), Cure: cure}
}

func warn(cure, format string, a ...any) []Finding { return []Finding{bad(Warn, cure, format, a...)} }
func fail(cure, format string, a ...any) []Finding { return []Finding{bad(Fail, cure, format, a...)} }

// failErr is a failed check by an error, with its own hint where it has one.
func failErr(err error, cure string) []Finding {
	if h := fault.HintOf(err); h != "" {
		cure = h
	}
	return fail(cure, "%v", err)
}

// orElse is all, or a finding that all is well when there is none.
func orElse(all []Finding, format string, a ...any) []Finding {
	if len(all) == 0 {
		return ok(format, a...)
	}
	return all
}
