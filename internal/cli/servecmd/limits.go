package servecmd

import (
	"errors"
	"slices"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/server"
)

// LimitFlags bound what callers can make the KMS do.
type LimitFlags struct {
	set     bool
	rate    float64
	running int
	uses    uint64
	stale   string
}

// What is done by a view of the store that is older than a second.
var stalePolicies = []string{"refuse", "serve"}

// Add puts the flags into fs.
func (f *LimitFlags) Add(cmd *cobra.Command) {
	fs := cmd.Flags()
	d := server.DefaultLimits()
	f.set = true
	fs.Float64Var(&f.rate, "rate-limit", d.Rate, "calls a second of one identity, and failed proofs of one address; 0: no limit")
	fs.IntVar(&f.running, "max-concurrent", d.Running, "calls that work at the same time; four times as many wait, and those beyond are refused (503)")
	fs.Uint64Var(&f.uses, "gcm-limit", kms.DefaultUses, "texts that one version of a key encrypts by AES-GCM before the key must be rotated; at most 2^32 (NIST SP 800-38D)")
	fs.StringVar(&f.stale, "stale-view", stalePolicies[0], "calls while the storage is silent for over a second: refuse (503), or serve, by which what is revoked meanwhile is honoured")
	_ = cmd.RegisterFlagCompletionFunc("stale-view", cobra.FixedCompletions(stalePolicies, cobra.ShellCompDirectiveNoFileComp))
}

// Check holds the rules of the flags.
func (f *LimitFlags) Check() error {
	var errs []error
	if f.rate < 0 {
		errs = append(errs, fault.Usagef("--rate-limit: %g is negative", f.rate))
	}
	if f.running < 1 {
		errs = append(errs, fault.Usagef("--max-concurrent: %d is less than 1", f.running))
	}
	if f.uses < 1 || f.uses > kms.DefaultUses {
		errs = append(errs, fault.Usagef("--gcm-limit: %d is not between 1 and %d", f.uses, uint64(kms.DefaultUses)))
	}
	if !slices.Contains(stalePolicies, f.stale) {
		errs = append(errs, fault.Usagef("--stale-view: %q is neither refuse nor serve", f.stale))
	}
	return errors.Join(errs...)
}

// ServeStale says whether a view that is too old is used.
func (f *LimitFlags) ServeStale() bool { return f.stale == stalePolicies[1] }

// Limits are what the flags say; flags that were never added are the defaults.
func (f *LimitFlags) Limits() server.Limits {
	l := server.DefaultLimits()
	if f.set {
		l.Rate, l.Running, l.Waiting = f.rate, f.running, 4*f.running
	}
	return l
}

// Uses is how many texts a version of a key encrypts.
func (f *LimitFlags) Uses() uint64 {
	if f.set {
		return f.uses
	}
	return kms.DefaultUses
}
