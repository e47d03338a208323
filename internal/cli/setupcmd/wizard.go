package setupcmd

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/ask"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// interview asks for what was not given. Without a terminal, or with --yes,
// it asks nothing; what is missing is then told at once.
func (o *options) interview(ctx context.Context) error {
	if o.yes {
		return nil
	}
	t, err := o.OpenAsker("--yes")
	if err != nil {
		if m := o.missing(); m != nil {
			return m
		}
		return fault.New(fault.Usage, "", "", err).WithHint("look at the plan with --dry-run --yes, then give --yes")
	}
	defer func() { _ = t.Close() }() // nothing was written
	w := wizard{options: o, t: t, qs: questions(), given: map[string]bool{}}
	o.flags.VisitAll(func(f *pflag.Flag) { w.given[f.Name] = f.Changed || f.Value.String() != f.DefValue })
	if err := w.resume(); err != nil {
		return w.stopped(err)
	}
	if err := w.all(ctx); err != nil {
		return w.stopped(err)
	}
	w.forgetIdle()
	return nil
}

// wizard goes through the questions, back and forth.
type wizard struct {
	*options
	t     app.Asker
	qs    []question
	given map[string]bool // by flag, environment or a file: not asked
}

func (w *wizard) stopped(err error) error {
	if !errors.Is(err, ask.ErrStopped) {
		return err
	}
	f := fault.New(fault.Stopped, "set up", "", err)
	if len(w.answered) > 0 {
		return f.WithHint("your answers are kept, but no secret; run `kmsctl setup` again to go on")
	}
	return f.WithHint("nothing was done")
}

// resume takes over the answers of a run that was stopped, if the person
// wants.
func (w *wizard) resume() error {
	state := w.loadState()
	if len(state) == 0 {
		return nil
	}
	answer, err := w.t.Ask(ask.Question{Title: fmt.Sprintf("Go on with the %d answers of the run that was stopped?", len(state)), Options: []string{"yes", "no"},
		Help: "they are in " + w.stateFile()})
	if err != nil {
		return err
	}
	if answer == "no" {
		return w.dropState()
	}
	for _, q := range w.qs {
		v, there := state[q.name]
		if !there || w.given[q.name] {
			continue
		}
		if w.check(q, v) != nil || w.take(q, v) != nil {
			continue // it was good once and is not now: asked anew
		}
		w.answered[q.name] = true
	}
	return nil
}

func (w *wizard) asked(i int) bool {
	q := w.qs[i]
	return !w.given[q.name] && (q.when == nil || q.when(w.options)) && (!q.secret || !w.hsm.SecretGiven(w.App))
}

func (w *wizard) before(i int) int {
	for j := i - 1; j >= 0; j-- {
		if w.asked(j) {
			return j
		}
	}
	return -1
}

func (w *wizard) all(ctx context.Context) error {
	for i := 0; i < len(w.qs); {
		if ctx.Err() != nil {
			return ask.ErrStopped
		}
		if q := w.qs[i]; !w.asked(i) || (w.answered[q.name] && !q.secret) {
			i++
			continue
		}
		err := w.one(ctx, w.qs[i], w.before(i) >= 0)
		switch {
		case errors.Is(err, ask.ErrBack):
			i = w.before(i)
			delete(w.answered, w.qs[i].name)
			if err := w.saveState(); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		i++
	}
	return nil
}

func (w *wizard) one(ctx context.Context, q question, back bool) error {
	a := ask.Question{Title: q.title, Help: q.help, Back: back, Check: func(s string) error {
		if err := w.check(q, s); err != nil || q.verify == nil {
			return err
		}
		return q.verify(ctx, w.options, s)
	}}
	if q.secret {
		v, err := w.secret(a)
		if err == nil {
			w.password = v
		}
		return err
	}
	if a.Default = w.value(q.name); a.Default == "" && q.preset != nil {
		a.Default = q.preset(ctx, w.options)
	}
	if q.options != nil {
		a.Options = q.options(w.options)
	}
	answer, err := w.t.Ask(a)
	if err != nil {
		return err
	}
	if answer == nothing {
		answer = ""
	}
	if err := w.take(q, answer); err != nil {
		return err
	}
	if q.try != nil && answer != "" {
		if err := q.try(ctx, w.options, answer); err != nil {
			w.Warn("%s: %v", q.title, err)
		}
	}
	w.answered[q.name] = true
	return w.saveState()
}

// check is a question's own check, its hint with it.
func (w *wizard) check(q question, s string) error {
	switch {
	case s == "" && q.mayBeEmpty(w.options) && q.name != "storage-class":
		return nil
	case q.check == nil:
		return nil
	}
	err := q.check(w.options, s)
	if h := fault.HintOf(err); h != "" {
		return fmt.Errorf("%w: %s", err, h)
	}
	return err
}

func (w *wizard) take(q question, answer string) error {
	f := w.flags.Lookup(q.name)
	if s, ok := f.Value.(pflag.SliceValue); ok {
		f.Changed = true
		return s.Replace(splitNodes(answer))
	}
	return w.flags.Set(q.name, answer)
}

// secret is typed twice.
func (w *wizard) secret(a ask.Question) (secret.Value, error) {
	for {
		first, err := w.t.Password(a)
		if err != nil {
			return first, err
		}
		again, err := w.t.Password(ask.Question{Title: a.Title + ", again", Help: a.Help, Back: true})
		if err != nil && !errors.Is(err, ask.ErrBack) {
			return again, err
		}
		if err == nil && first.Equal(again) {
			again.Zero()
			return first, nil
		}
		first.Zero()
		if err == nil {
			w.Warn("the two entries differ")
		}
	}
}

// forgetIdle takes back the answers to questions that a later choice, as of
// another model, made void.
func (w *wizard) forgetIdle() {
	for _, q := range w.qs {
		if q.secret || q.when == nil || q.when(w.options) || w.given[q.name] {
			continue
		}
		f := w.flags.Lookup(q.name)
		if s, ok := f.Value.(pflag.SliceValue); ok {
			_ = s.Replace(nil) // a list takes none as well as some
		} else {
			_ = f.Value.Set(f.DefValue) // it was this at the start
		}
		f.Changed = false
		delete(w.answered, q.name)
	}
}

// decide asks whether to begin, and what to do about checks that failed. With
// --yes a failed check is an error.
func (o *options) decide(ctx context.Context, p prepared, checks diagnose.Report) error {
	if o.yes {
		err := checks.Fault("preflight")
		if err == nil {
			return nil
		}
		return fault.New(fault.KindOf(err), "", "", err).WithHint("%s; --skip-preflight goes on all the same", fault.HintOf(err))
	}
	t, err := o.OpenAsker("--yes")
	if err != nil {
		return err
	}
	defer func() { _ = t.Close() }() // nothing was written
	const again = "check again"
	for {
		q := ask.Question{Title: "Begin?", Options: []string{"yes", "no"}, Help: "no ends here and keeps the answers"}
		if checks.Failed > 0 {
			q.Title, q.Options = fmt.Sprintf("Checks that failed: %d. Begin all the same?", checks.Failed), []string{"no", again, "yes"}
		}
		answer, err := t.Ask(q)
		if err == nil && answer == "no" {
			err = ask.ErrStopped
		}
		if err != nil {
			return fault.New(fault.Stopped, "set up", "", err).WithHint("your answers are kept, but no secret; run `kmsctl setup` again to go on")
		}
		if answer == "yes" {
			return nil
		}
		if checks, err = o.checked(ctx, p); err != nil {
			return err
		}
	}
}
