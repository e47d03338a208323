package app

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/ask"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/seal"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Asker puts questions to a person.
type Asker interface {
	// Ask gives an answer, ask.ErrBack or ask.ErrStopped.
	Ask(q ask.Question) (string, error)
	// Password is Ask without showing what is typed.
	Password(q ask.Question) (secret.Value, error)
	Close() error
}

// OpenAsker is the terminal, or fault.Usage that names what to give instead.
func (a *App) OpenAsker(missing string) (Asker, error) {
	if a.Asker != nil {
		return a.Asker, nil
	}
	if a.Getenv("KMSCTL_NO_INPUT") == "" {
		if t, err := ask.Open(); err == nil {
			return t, nil
		}
	}
	return nil, fault.Usagef("%s: missing, and there is no terminal to ask on", missing)
}

// SecretInput is a secret that comes from a file, standard input, the
// environment or a question, and never from a flag's value.
type SecretInput struct {
	Name  string // of the flags, as in hsm-password
	Title string // for people, as in "HSM password"
	Exact bool   // keep a line break at the end, so that a check can refuse it
	File  string
	Stdin bool
}

// Add puts --NAME-file and --NAME-stdin into fs.
func (s *SecretInput) Add(fs *pflag.FlagSet) {
	fs.StringVar(&s.File, s.Name+"-file", "", "file with the "+s.Title+" (or "+s.env()+" in the environment)")
	fs.BoolVar(&s.Stdin, s.Name+"-stdin", false, "read the "+s.Title+" from standard input")
}

func (s *SecretInput) env() string {
	return "KMSCTL_" + strings.ToUpper(strings.ReplaceAll(s.Name, "-", "_"))
}

// Check holds the rules of the flags.
func (s *SecretInput) Check() error {
	if s.File != "" && s.Stdin {
		return fault.Usagef("--%s-file, --%s-stdin: only one of them", s.Name, s.Name)
	}
	return nil
}

// Given says whether the secret can be had without a question.
func (s *SecretInput) Given(a *App) bool { return s.File != "" || s.Stdin || a.Getenv(s.env()) != "" }

const secretLimit = 64 << 10

// Read gives the secret; with repeat a person types it twice.
func (s *SecretInput) Read(a *App, repeat bool) (secret.Value, error) {
	var b []byte
	var err error
	switch {
	case s.Stdin:
		if b, err = io.ReadAll(io.LimitReader(a.In, secretLimit)); err != nil {
			return secret.Value{}, fault.New(fault.Other, "read the "+s.Title+" from", "standard input", err)
		}
	case s.File != "":
		if b, err = a.ReadInput("--"+s.Name+"-file", s.File, secretLimit); err != nil {
			return secret.Value{}, err
		}
	case a.Getenv(s.env()) != "":
		b = []byte(a.Getenv(s.env()))
	default:
		return s.ask(a, repeat)
	}
	if !s.Exact {
		b = bytes.TrimRight(b, "\r\n")
	}
	return secret.New(b), nil
}

func (s *SecretInput) ask(a *App, repeat bool) (secret.Value, error) {
	t, err := a.OpenAsker("--" + s.Name + "-file")
	if err != nil {
		return secret.Value{}, withHint(err, "give --"+s.Name+"-file or --"+s.Name+"-stdin, or set "+s.env())
	}
	defer func() { _ = t.Close() }() // nothing was written
	v, err := t.Password(ask.Question{Title: s.Title})
	if err != nil {
		return v, fault.New(fault.Stopped, "ask for the "+s.Title, "", err)
	}
	if repeat {
		again, err := t.Password(ask.Question{Title: s.Title + ", again"})
		if err != nil {
			return v, fault.New(fault.Stopped, "ask for the "+s.Title, "", err)
		}
		defer again.Zero()
		if !v.Equal(again) {
			v.Zero()
			return secret.Value{}, fault.Usagef("the two entries of the %s differ", s.Title)
		}
	}
	return v, nil
}

func withHint(err error, hint string) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return f.WithHint("%s", hint)
	}
	return err
}

// PassphraseFlags open files that `render` encrypted.
type PassphraseFlags struct {
	passphrase   SecretInput
	identityFile string
}

// Add puts the flags into fs.
func (p *PassphraseFlags) Add(fs *pflag.FlagSet) {
	p.passphrase = SecretInput{Name: "passphrase", Title: "passphrase of the encrypted file"}
	p.passphrase.Add(fs)
	fs.StringVar(&p.identityFile, "identity-file", "", "age identity that opens files encrypted to a recipient")
}

// Check holds the rules of the flags.
func (p *PassphraseFlags) Check() error { return p.passphrase.Check() }

// New reads a passphrase to encrypt by; a person types it twice.
func (p *PassphraseFlags) New(a *App) (secret.Value, error) {
	v, err := p.passphrase.Read(a, true)
	if err == nil && v.Empty() {
		err = fault.Usagef("the passphrase is empty").WithHint("give a passphrase, or --recipient, or --plain")
	}
	return v, err
}

// Open decrypts raw when it is an age file, and passes clear text through.
// name is the file's name, for errors.
func (p *PassphraseFlags) Open(a *App, name string, raw []byte) ([]byte, error) {
	if !seal.Is(raw) {
		return raw, nil
	}
	var ids []byte
	var pass secret.Value
	var err error
	if p.identityFile != "" {
		if ids, err = os.ReadFile(p.identityFile); err != nil {
			return nil, fault.New(fault.NotFound, "read", p.identityFile, err).WithHint("check --identity-file")
		}
		defer clear(ids)
	} else {
		if !seal.ByPassphrase(raw) {
			return nil, fault.Usagef("%q is encrypted to a recipient", name).WithHint("give the identity with --identity-file")
		}
		if pass, err = p.passphrase.Read(a, false); err != nil {
			return nil, err
		}
		defer pass.Zero()
	}
	out, err := seal.Open(raw, ids, pass)
	if err != nil {
		return nil, fault.New(fault.Denied, "open", name, err).WithHint("check --passphrase-file or --identity-file")
	}
	return out, nil
}
