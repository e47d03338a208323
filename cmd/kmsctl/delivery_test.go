package main

import (
	"os"
	"path/filepath"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmsctl/kmsctl/internal/testkit"
)

// registry starts a real image registry and sets a variable to its HOST:PORT:
// registry VAR.
func registry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: registry VAR")
	}
	dir, err := os.MkdirTemp(ts.Getenv("WORK"), "registry-")
	ts.Check(err)
	host, stop, err := testkit.StartRegistry(dir)
	ts.Check(err)
	ts.Defer(stop)
	ts.Setenv(args[0], host)
}

// mkarchive writes an archive of testkit: mkarchive NAME FILE.
func mkarchive(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mkarchive NAME FILE")
	}
	b, ok := testkit.Archives()[args[0]]
	if !ok {
		ts.Fatalf("no archive %q", args[0])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b, 0o600))
}

// flip changes one bit in the middle of a file: flip FILE.
func flip(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: flip FILE")
	}
	p := ts.MkAbs(args[0])
	b, err := os.ReadFile(p)
	ts.Check(err)
	b[len(b)/2] ^= 1
	ts.Check(os.WriteFile(p, b, 0o600))
}

// cut keeps the first half of a file: cut FILE.
func cut(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: cut FILE")
	}
	p := ts.MkAbs(args[0])
	st, err := os.Stat(p)
	ts.Check(err)
	ts.Check(os.Truncate(p, st.Size()/2))
}

// builtPrograms names the programs that make build left, for archive build: the
// test program itself is no static kmsctl.
func builtPrograms(e *testscript.Env, bin string) {
	e.Setenv("KMSCTL_KMSCTL", filepath.Join(bin, "kmsctl"))
	cache := os.Getenv("KMSCTL_CACHE")
	if cache == "" {
		cache = filepath.Join(bin, "../.cache")
	}
	e.Setenv("KMSCTL_CACHE", cache)
}
