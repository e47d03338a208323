package servecmd

import (
	"errors"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/server"
)

// LimitFlags bound what callers can make the KMS do.
type LimitFlags struct {
	set     bool
	rate    float64
	running int
}

// Add puts the flags into fs.
func (f *LimitFlags) Add(fs *pflag.FlagSet) {
	d := server.DefaultLimits()
	f.set = true
	fs.Float64Var(&f.rate, "rate-limit", d.Rate, "calls a second of one identity, and failed proofs of one address; 0: no limit")
	fs.IntVar(&f.running, "max-concurrent", d.Running, "calls that work at the same time; four times as many wait, and those beyond are refused (503)")
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
	return errors.Join(errs...)
}

// Limits are what the flags say; flags that were never added are the defaults.
func (f *LimitFlags) Limits() server.Limits {
	l := server.DefaultLimits()
	if f.set {
		l.Rate, l.Running, l.Waiting = f.rate, f.running, 4*f.running
	}
	return l
}
