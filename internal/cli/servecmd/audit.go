package servecmd

import (
	"errors"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// AuditFlags say how the audit log is kept.
type AuditFlags struct {
	fileMiB  int64
	whenFull string
	stdout   bool
}

var auditPolicies = []string{string(audit.Refuse), string(audit.GoOn)}

// Add puts the flags into cmd.
func (f *AuditFlags) Add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.Int64Var(&f.fileMiB, "audit-file-mib", audit.DefaultMaxBytes>>20, "size in MiB at which a file of the audit log is closed and the next begun")
	fs.StringVar(&f.whenFull, "audit-when-full", auditPolicies[0], "calls that cannot be written down: refuse (503), or go-on (answered, counted, and the gap is written later)")
	fs.BoolVar(&f.stdout, "audit-stdout", false, "write every line of the audit log to standard output, too")
	_ = cmd.RegisterFlagCompletionFunc("audit-when-full", cobra.FixedCompletions(auditPolicies, cobra.ShellCompDirectiveNoFileComp))
}

// Check holds the rules of the flags.
func (f *AuditFlags) Check() error {
	var errs []error
	if f.fileMiB < 1 {
		errs = append(errs, fault.Usagef("--audit-file-mib: %d is less than 1", f.fileMiB))
	}
	if !slices.Contains(auditPolicies, f.whenFull) {
		errs = append(errs, fault.Usagef("--audit-when-full: %q is neither refuse nor go-on", f.whenFull))
	}
	return errors.Join(errs...)
}

// Config is what the flags say; the zero flags are the defaults.
func (f *AuditFlags) Config(stdout io.Writer) audit.Config {
	c := audit.Config{MaxBytes: f.fileMiB << 20, WhenFull: audit.Policy(f.whenFull)}
	if f.stdout {
		c.Mirror = stdout
	}
	return c
}
