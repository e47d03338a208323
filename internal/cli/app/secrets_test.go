package app_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/ask"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// answers is an Asker that gives its answers in turn.
type answers []string

func (a *answers) Ask(q ask.Question) (string, error) {
	v, err := a.Password(q)
	return string(v.Reveal()), err
}

func (a *answers) Password(ask.Question) (secret.Value, error) {
	if len(*a) == 0 {
		return secret.Value{}, errors.New("no more answers")
	}
	v := secret.New([]byte((*a)[0]))
	*a = (*a)[1:]
	return v, nil
}

func (a *answers) Close() error { return nil }

func testApp(env map[string]string, in string, asked ...string) *app.App {
	a := app.New("test")
	a.In, a.Out, a.Err = strings.NewReader(in), &bytes.Buffer{}, &bytes.Buffer{}
	a.Getenv = func(k string) string { return env[k] }
	if asked != nil {
		x := answers(asked)
		a.Asker = &x
	}
	return a
}

func TestSecretInput(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(file, []byte("from file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		s    app.SecretInput
		a    *app.App
		want string
	}{
		"file":        {app.SecretInput{File: file}, testApp(nil, ""), "from file"},
		"exact":       {app.SecretInput{File: file, Exact: true}, testApp(nil, ""), "from file\n"},
		"stdin":       {app.SecretInput{Stdin: true}, testApp(nil, "from stdin\n"), "from stdin"},
		"environment": {app.SecretInput{}, testApp(map[string]string{"KMSCTL_HSM_PASSWORD": "from env"}, ""), "from env"},
		"question":    {app.SecretInput{}, testApp(nil, "", "asked", "asked"), "asked"},
	} {
		c.s.Name, c.s.Title = "hsm-password", "HSM password"
		v, err := c.s.Read(c.a, true)
		if err != nil || string(v.Reveal()) != c.want {
			t.Errorf("%s: %q, %v", name, v.Reveal(), err)
		}
	}
	s := app.SecretInput{Name: "hsm-password", Title: "HSM password"}
	if _, err := s.Read(testApp(nil, "", "one", "two"), true); err == nil || !strings.Contains(err.Error(), "differ") {
		t.Errorf("%v", err)
	}
	_, err := s.Read(testApp(map[string]string{"KMSCTL_NO_INPUT": "1"}, ""), false)
	if fault.KindOf(err) != fault.Usage || !strings.Contains(fault.HintOf(err), "--hsm-password-stdin") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	s.File, s.Stdin = file, true
	if fault.KindOf(s.Check()) != fault.Usage {
		t.Error("took two sources")
	}
}

func TestPassphraseFlags(t *testing.T) {
	r, err := age.NewScryptRecipient("pass")
	if err != nil {
		t.Fatal(err)
	}
	r.SetWorkFactor(10) // age's own takes seconds under the race detector
	var b bytes.Buffer
	w, err := age.Encrypt(&b, r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("text")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	sealed := b.Bytes()
	var p app.PassphraseFlags
	p.Add(pflag.NewFlagSet("x", pflag.ContinueOnError))
	for name, c := range map[string]struct {
		a    *app.App
		raw  []byte
		want string
		kind fault.Kind
	}{
		"clear":       {testApp(nil, ""), []byte("text"), "text", fault.Other},
		"environment": {testApp(map[string]string{"KMSCTL_PASSPHRASE": "pass"}, ""), sealed, "text", fault.Other},
		"wrong":       {testApp(map[string]string{"KMSCTL_PASSPHRASE": "other"}, ""), sealed, "", fault.Denied},
	} {
		got, err := p.Open(c.a, "f", c.raw)
		if string(got) != c.want || fault.KindOf(err) != c.kind {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}
