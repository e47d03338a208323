package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// TestScripts runs every script against the programs that `make build` made:
// what a user gets, and many times as quick as with the race detector, under
// which each package's own tests run.
func TestScripts(t *testing.T) {
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kmsctl", "kms-server", "kms-connector"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			t.Fatalf("run `make build` first: %v", err)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "../../testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("KMSCTL_UPDATE") != "",
		Setup: func(e *testscript.Env) error {
			e.Values["servers"] = servers{}
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv("CHART", filepath.Join(filepath.Dir(bin), "templates", "key-management-hsm"))
			packageCache(e, bin)
			e.Setenv("KMSCTL_NO_INPUT", "1") // never a question, whoever runs the tests
			e.Setenv("XDG_DATA_HOME", filepath.Join(e.WorkDir, "xdg-data"))
			e.Setenv("XDG_STATE_HOME", filepath.Join(e.WorkDir, "xdg-state"))
			e.Setenv("XDG_CACHE_HOME", filepath.Join(e.WorkDir, "xdg-cache"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "kms": kms, "field": field, "seal": seal, "luna": luna,
			"registry": registry, "museum": museum, "mkarchive": mkarchive, "flip": flip, "cut": cut},
	})
}

// exits runs a command and checks its exit code: exits CODE COMMAND [ARG...].
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var ee *exec.ExitError
		if !errors.As(err, &ee) {
			ts.Fatalf("%v", err)
		}
		got = ee.ExitCode()
	}
	if got != want {
		ts.Fatalf("%s exited %d, want %d", args[1], got, want)
	}
}

// seal encrypts material as a machine without a way to the KMS would: seal TOKEN
// MATERIAL OUT sets NONCE and IV to what goes with OUT.
func seal(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: seal TOKEN MATERIAL OUT")
	}
	var t kmsapi.ImportToken
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &t))
	var in kmsapi.CreateKey
	ts.Check(kmsclient.SealUnder(t, []byte(ts.ReadFile(args[1])), &in))
	sealed, err := base64.StdEncoding.DecodeString(in.Payload)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), sealed, 0o600))
	ts.Setenv("NONCE", in.EncryptedNonce)
	ts.Setenv("IV", in.IV)
}

// field reads one field of the last command's JSON into a variable: field VAR
// NAME[.NAME...].
func field(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: field VAR NAME[.NAME...]")
	}
	var v any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &v))
	for _, name := range strings.Split(args[1], ".") {
		m, ok := v.(map[string]any)
		if !ok || m[name] == nil {
			ts.Fatalf("no field %q", args[1])
		}
		v = m[name]
	}
	ts.Setenv(args[0], fmt.Sprint(v))
}
