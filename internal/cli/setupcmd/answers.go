package setupcmd

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/render"
)

// notAnswers are flags that are about the run and not about the site.
var notAnswers = []string{"answers", "save-answers", "yes", "dry-run", "skip-preflight", "help", "output", "debug"}

// answerNames are the keys of an answers file: the flags' names.
func answerNames(flags *pflag.FlagSet) []string {
	var out []string
	flags.VisitAll(func(f *pflag.Flag) {
		if !slices.Contains(notAnswers, f.Name) && !strings.HasSuffix(f.Name, "-stdin") {
			out = append(out, f.Name)
		}
	})
	return out
}

// readAnswers sets the flags that were given neither on the command line nor
// in the environment from an answers file. All its faults are named at once.
func readAnswers(flags *pflag.FlagSet, name string, b []byte) error {
	var doc map[string]any
	if err := yaml.UnmarshalStrict(b, &doc); err != nil {
		return fault.Newf(fault.Usage, "read answers", name, "it is not a YAML mapping of names and answers").WithHint("each line is a flag's name without dashes, a colon and the answer")
	}
	known := answerNames(flags)
	var errs []error
	for _, k := range slices.Sorted(maps.Keys(doc)) {
		if !slices.Contains(known, k) {
			errs = append(errs, unknownAnswer(k, known))
			continue
		}
		f := flags.Lookup(k)
		if f.Changed {
			continue
		}
		if err := set(flags, f, doc[k]); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fault.New(fault.Usage, "read answers", name, err).WithHint("%s", fault.HintOf(err))
	}
	return nil
}

func unknownAnswer(key string, known []string) error {
	if slices.Contains(known, key+"-file") { // a secret itself
		return fault.Usagef("%s: a secret does not stand in an answers file", key).WithHint("name a file: %s-file", key)
	}
	hint := "the keys are the flags of `kmsctl setup --help`"
	if n := render.Nearest(key, known); n != "" {
		hint = "did you mean " + n + "?"
	}
	return fault.Usagef("unknown key %s", key).WithHint("%s", hint)
}

func set(flags *pflag.FlagSet, f *pflag.Flag, v any) error {
	list, isList := v.([]any)
	_, takesList := f.Value.(pflag.SliceValue)
	if isList && !takesList {
		return fault.Usagef("%s: one answer, not a list", f.Name)
	}
	if !isList {
		list = []any{v}
	}
	for _, e := range list {
		switch e.(type) {
		case string, bool, float64, int64:
		default:
			return fault.Usagef("%s: neither a text nor a list of texts", f.Name)
		}
		if err := flags.Set(f.Name, text(e)); err != nil {
			return fault.Usagef("%s: %w", f.Name, err)
		}
	}
	return nil
}

// text writes a YAML number as it was meant: slot-id without an exponent.
func text(v any) string {
	if n, ok := v.(float64); ok && n == float64(int64(n)) {
		return fmt.Sprint(int64(n))
	}
	return fmt.Sprint(v)
}

// answers are the flags in force that differ from their defaults.
func answers(flags *pflag.FlagSet) map[string]any {
	out := map[string]any{}
	for _, name := range answerNames(flags) {
		f := flags.Lookup(name)
		if !f.Changed || f.Value.String() == f.DefValue { // else it is of --values, which is an answer itself
			continue
		}
		switch v := f.Value.(type) {
		case pflag.SliceValue:
			out[name] = v.GetSlice()
		default:
			out[name] = f.Value.String()
			if f.Value.Type() == "bool" {
				out[name] = f.Value.String() == "true"
			}
		}
	}
	return out
}

// commandLine is the command that does the same without a question.
func commandLine(flags *pflag.FlagSet) string {
	parts := []string{"kmsctl setup"}
	all := answers(flags)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		switch v := all[name].(type) {
		case []string:
			for _, e := range v {
				parts = append(parts, "--"+name+" "+quoted(e))
			}
		case bool:
			parts = append(parts, "--"+name)
		default:
			parts = append(parts, "--"+name+" "+quoted(fmt.Sprint(v)))
		}
	}
	return strings.Join(append(parts, "--yes"), " ")
}

func quoted(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=+,@%", r)
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// state is what a stopped run leaves for the next: the answers so far,
// without secrets, which no flag holds.
func (o *options) stateFile() string { return filepath.Join(app.StateDir(o.Getenv), "setup.yaml") }

func (o *options) saveState() error {
	keep := map[string]string{}
	for name := range o.answered {
		keep[name] = o.value(name)
	}
	b, err := yaml.Marshal(keep)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(o.stateFile()), 0o700); err != nil {
		return fault.New(fault.Other, "keep the answers in", o.stateFile(), err)
	}
	return app.WriteFile(o.stateFile(), b, 0o600)
}

// loadState gives the answers of a stopped run; nil when there are none.
func (o *options) loadState() map[string]string {
	b, err := os.ReadFile(o.stateFile())
	if err != nil {
		return nil
	}
	var doc map[string]string
	if yaml.Unmarshal(b, &doc) != nil {
		return nil // written by another version: ask anew
	}
	return doc
}

func (o *options) dropState() error {
	if err := os.Remove(o.stateFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.Other, "remove", o.stateFile(), err)
	}
	return nil
}
