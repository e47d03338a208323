package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
)

func run(t *testing.T, env map[string]string, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	a := app.New("1.2.3")
	a.In, a.Out, a.Err = strings.NewReader(""), &o, &e
	a.Getenv = func(k string) string { return env[k] }
	return Main(context.Background(), Program{Name: "kmsctl"}, a, args), o.String(), e.String()
}

func TestEveryKindHasItsOwnExitCode(t *testing.T) {
	seen := map[int]fault.Kind{}
	for _, k := range fault.Kinds() {
		c := ExitCode(k)
		if other, dup := seen[c]; dup || c == 0 {
			t.Errorf("kind %v has code %d, as %v", k, c, other)
		}
		seen[c] = k
	}
}

func TestErrorText(t *testing.T) {
	var b bytes.Buffer
	err := errors.Join(fault.Usagef("--model: missing").WithHint("give --model"), fault.Usagef("--slot-id: missing"))
	printError(&b, "kmsctl", "table", err)
	if want := "kmsctl: error: --model: missing\nkmsctl: error: --slot-id: missing\nkmsctl: hint: give --model\n"; b.String() != want {
		t.Errorf("%s", b.String())
	}
	b.Reset()
	printError(&b, "kmsctl", "json", fault.Newf(fault.Denied, "push", "r/i:1", "401").WithHint("log in"))
	var got errorJSON
	if err := json.Unmarshal(b.Bytes(), &got); err != nil || got != (errorJSON{4, fault.Said{Kind: "denied", Message: `push "r/i:1": 401`, Object: "r/i:1", Hint: "log in"}}) {
		t.Errorf("%s %v", b.String(), err)
	}
}

func TestRoot(t *testing.T) {
	for _, c := range []struct {
		name string
		env  map[string]string
		args []string
		code int
		out  string
		errs string
	}{
		{"version", nil, []string{"version"}, 0, "kmsctl 1.2.3", ""},
		{"json", nil, []string{"version", "-o", "json"}, 0, `"version": "1.2.3"`, ""},
		{"environment", map[string]string{"KMSCTL_OUTPUT": "yaml"}, []string{"version"}, 0, "version: 1.2.3", ""},
		{"flag beats environment", map[string]string{"KMSCTL_OUTPUT": "xml"}, []string{"version", "-o", "yaml"}, 0, "version: 1.2.3", ""},
		{"unknown format", nil, []string{"version", "-o", "xml"}, 2, "", `--output: unknown format "xml"`},
		{"unknown flag", nil, []string{"version", "--nope"}, 2, "", "see: kmsctl version --help"},
		{"unknown command", nil, []string{"nope"}, 2, "", "unknown command"},
		{"bad variable", map[string]string{"KMSCTL_DEBUG": "maybe"}, []string{"version"}, 2, "", "KMSCTL_DEBUG"},
	} {
		code, out, errs := run(t, c.env, c.args...)
		if code != c.code || !strings.Contains(out, c.out) || !strings.Contains(errs, c.errs) || (c.code != 0 && out != "") {
			t.Errorf("%s: code %d\nout %s\nerr %s", c.name, code, out, errs)
		}
	}
}
