package servecmd

import (
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
)

// WindowFlags change the times of the key life cycle, each as NAME=DURATION.
type WindowFlags []string

// Add puts --window into fs.
func (f *WindowFlags) Add(fs *pflag.FlagSet) {
	fs.StringArrayVar((*[]string)(f), "window", nil,
		"a time of the key life cycle as NAME=DURATION, repeatable; names: "+strings.Join(kms.WindowNames, ", ")+"; without it, as IBM documents them")
}

// Windows are the documented times, changed by the flags.
func (f WindowFlags) Windows() (kms.Windows, error) {
	w := kms.DefaultWindows()
	for _, s := range f {
		name, text, ok := strings.Cut(s, "=")
		if !ok {
			return w, fault.Usagef("--window: %q is not NAME=DURATION", s).WithHint("as in rotate=1h")
		}
		d, err := time.ParseDuration(text)
		if err == nil {
			err = w.Set(name, d)
		}
		if err != nil {
			return w, fault.Usagef("--window: %q: %w", s, err).WithHint("as in rotate=1h; durations have units: s, m, h")
		}
	}
	return w, nil
}
