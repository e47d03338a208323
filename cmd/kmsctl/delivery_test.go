package main

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmsctl/kmsctl/internal/testkit"
)

// registry starts a real image registry and sets a variable to its HOST:PORT,
// behind a login when one is given: registry VAR [USER:PASSWORD].
func registry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: registry VAR [USER:PASSWORD]")
	}
	dir, err := os.MkdirTemp(ts.Getenv("WORK"), "registry-")
	ts.Check(err)
	host, stop, err := testkit.StartRegistry(dir)
	ts.Check(err)
	ts.Defer(stop)
	if len(args) == 2 {
		front := httptest.NewServer(behindLogin(args[1], host))
		ts.Defer(front.Close)
		host = front.Listener.Addr().String()
	}
	ts.Setenv(args[0], host)
}

// behindLogin lets one user through to a registry.
func behindLogin(login, host string) http.Handler {
	next := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: host}); r.Out.Host = r.In.Host }}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user+":"+password != login {
			w.Header().Set("WWW-Authenticate", `Basic realm="site"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// museum starts a chart repository over TLS, sets VAR to its HOST:PORT and
// writes its CA to FILE: museum VAR FILE.
func museum(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: museum VAR FILE")
	}
	srv := httptest.NewTLSServer(&testkit.Museum{})
	ts.Defer(srv.Close)
	ts.Setenv(args[0], srv.Listener.Addr().String())
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), ca, 0o600))
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

// packageCache names the folder of the Debian packages, for archive build: one
// for all scripts, so that they are fetched once.
func packageCache(e *testscript.Env, bin string) {
	cache := os.Getenv("KMSCTL_CACHE")
	if cache == "" {
		cache = filepath.Join(bin, "../.cache")
	}
	e.Setenv("KMSCTL_CACHE", cache)
}
