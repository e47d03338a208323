package app

import (
	"fmt"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/ask"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// ConfirmFlags guard the dangerous verbs.
type ConfirmFlags struct {
	Yes  bool
	look string // how to see what will go, without a question
}

// WithDryRun is the look of commands that have one.
const WithDryRun = "--dry-run"

// Add puts --yes into fs; look is how to see what will go.
func (f *ConfirmFlags) Add(fs *pflag.FlagSet, look string) {
	f.look = look
	fs.BoolVar(&f.Yes, "yes", false, "do not ask")
}

// Confirm shows what will go, and has the person type name, unless --yes.
func (a *App) Confirm(f *ConfirmFlags, name string, goes []string) error {
	if f.Yes {
		return nil
	}
	t, err := a.OpenAsker("--yes")
	if err != nil {
		return withHint(err, "look at what will go with "+f.look+", then give --yes")
	}
	defer func() { _ = t.Close() }()
	fmt.Fprintln(a.Err, "This will go:")
	for _, g := range goes {
		fmt.Fprintln(a.Err, "  "+g)
	}
	got, err := t.Ask(ask.Question{Title: fmt.Sprintf("Type %q to go on", name)})
	if err != nil {
		return fault.New(fault.Stopped, "confirm", name, err)
	}
	if got != name {
		return fault.Newf(fault.Stopped, "confirm", name, "%q was typed", got).WithHint("nothing was done")
	}
	return nil
}
