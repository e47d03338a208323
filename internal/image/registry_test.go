package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

func dial(t *testing.T, o Options) *Registry {
	t.Helper()
	r, err := Dial(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	r.wait = func(context.Context, time.Duration) error { return nil } // no test waits
	return r
}

func content(n int) ([]byte, string) {
	b := testkit.LayerTar(uint64(n), n)
	h := sha256.Sum256(b)
	return b, "sha256:" + hex.EncodeToString(h[:])
}

func from(b []byte) func(int64) (io.Reader, error) {
	return func(at int64) (io.Reader, error) { return bytes.NewReader(b[at:]), nil }
}

// tokenServer is a registry behind a token service, which takes a password or
// a bearer token, as Docker's and ICP's do.
func tokenServer(t *testing.T, accept func(r *http.Request) bool) (host string, scopes *[]string) {
	t.Helper()
	inner := registry.New()
	scopes = &[]string{}
	var mu sync.Mutex
	var srv *httptest.Server
	srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			if !accept(r) {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			mu.Lock()
			*scopes = append(*scopes, r.URL.Query()["scope"]...)
			mu.Unlock()
			fmt.Fprint(w, `{"token":"t1","expires_in":1800}`)
		case r.Header.Get("Authorization") != "Bearer t1":
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+srv.URL+`/token",service="token-service"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String(), scopes
}

func TestTokenServiceByPassword(t *testing.T) {
	host, scopes := tokenServer(t, func(r *http.Request) bool { u, p, _ := r.BasicAuth(); return u == "me" && p == "pw" })
	r := dial(t, Options{Host: host, User: "me", Password: secret.New([]byte("pw"))})
	r.Scope("a/one", "a/two")
	b, d := content(5000)
	if err := r.PutBlob(t.Context(), "a/one", d, int64(len(b)), from(b), nil); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(*scopes, " "); got != "repository:a/one:pull,push repository:a/two:pull,push" {
		t.Errorf("scopes %q, want both at once", got)
	}
	wrong := dial(t, Options{Host: host, User: "me", Password: secret.New([]byte("no"))})
	_, err := wrong.HasBlob(t.Context(), "a/one", d)
	if fault.KindOf(err) != fault.Denied || fault.HintOf(err) == "" || strings.Contains(err.Error(), "no\"") {
		t.Errorf("wrong password: %v", err)
	}
}

func TestTokenServiceByBearerToken(t *testing.T) {
	host, _ := tokenServer(t, func(r *http.Request) bool { return r.Header.Get("Authorization") == "Bearer id-token" })
	r := dial(t, Options{Host: host, Token: secret.New([]byte("id-token"))})
	if _, err := r.HasBlob(t.Context(), "a/b", "sha256:"+strings.Repeat("0", 64)); err != nil {
		t.Error(err)
	}
}

func TestDockerConfiguration(t *testing.T) {
	host, _ := tokenServer(t, func(r *http.Request) bool { u, p, _ := r.BasicAuth(); return u == "doc" && p == "ker" })
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	conf := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte("doc:ker")))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	r := dial(t, Options{Host: host})
	if _, err := r.HasBlob(t.Context(), "a/b", "sha256:"+strings.Repeat("0", 64)); err != nil {
		t.Error(err)
	}
}

func TestCredentialHelper(t *testing.T) {
	host, _ := tokenServer(t, func(r *http.Request) bool { u, p, _ := r.BasicAuth(); return u == "hel" && p == "per" })
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	helper := "#!/bin/sh\necho '{\"Username\":\"hel\",\"Secret\":\"per\"}'\n"
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(helper), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), fmt.Appendf(nil, `{"credHelpers":{%q:"test"}}`, host), 0o600); err != nil {
		t.Fatal(err)
	}
	r := dial(t, Options{Host: host})
	if _, err := r.HasBlob(t.Context(), "a/b", "sha256:"+strings.Repeat("0", 64)); err != nil {
		t.Error(err)
	}
}

func TestBasic(t *testing.T) {
	inner := registry.New()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != "me" || p != "pw" {
			w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	host := srv.Listener.Addr().String()
	for name, c := range map[string]struct {
		o    Options
		kind fault.Kind
		text string
	}{
		"unknown CA":     {Options{}, fault.Unreachable, "certificate"},
		"nobody":         {Options{Insecure: true}, fault.Denied, "asks for a user"},
		"wrong password": {Options{Insecure: true, User: "me", Password: secret.New([]byte("xx"))}, fault.Denied, "401"},
	} {
		c.o.Host = host
		_, err := Dial(t.Context(), c.o)
		if fault.KindOf(err) != c.kind || !strings.Contains(fmt.Sprint(err), c.text) || fault.HintOf(err) == "" {
			t.Errorf("%s: kind %v, %v, hint %q", name, fault.KindOf(err), err, fault.HintOf(err))
		}
	}
	r := dial(t, Options{Host: host, Insecure: true, User: "me", Password: secret.New([]byte("pw"))})
	if _, err := r.HasBlob(t.Context(), "a/b", "sha256:"+strings.Repeat("0", 64)); err != nil {
		t.Error(err)
	}
}

func TestNoRegistry(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(srv.Close)
	_, err := Dial(t.Context(), Options{Host: srv.Listener.Addr().String()})
	if fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "no image registry") {
		t.Errorf("a web server: %v", err)
	}
	portal := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>log in</html>") }))
	t.Cleanup(portal.Close)
	_, err = Dial(t.Context(), Options{Host: portal.Listener.Addr().String()})
	if fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "a web page for /v2/") {
		t.Errorf("a page that answers everything: %v", err)
	}
}

// resumable is a registry that keeps what it received of an upload that broke,
// as many do and Docker's own does not.
type resumable struct {
	mu       sync.Mutex
	data     map[string][]byte
	blobs    map[string][]byte
	received int
	cutAt    int // break the connection after so many bytes of a PATCH, once
	next     int
}

func (s *resumable) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	answer := func(status int) {
		w.Header().Set("Location", "/v2/a/b/blobs/uploads/"+id)
		w.Header().Set("Range", fmt.Sprintf("0-%d", max(len(s.data[id])-1, 0)))
		w.WriteHeader(status)
	}
	switch {
	case r.URL.Path == "/v2/":
	case r.Method == http.MethodHead:
		if s.blobs[id] == nil {
			w.WriteHeader(http.StatusNotFound)
		}
	case r.Method == http.MethodPost:
		s.next++
		id = fmt.Sprint(s.next)
		s.data[id] = []byte{}
		answer(http.StatusAccepted)
	case s.data[id] == nil:
		w.WriteHeader(http.StatusNotFound)
	case r.Method == http.MethodGet:
		answer(http.StatusNoContent)
	default:
		s.receive(w, r, id, answer)
	}
}

func (s *resumable) receive(w http.ResponseWriter, r *http.Request, id string, answer func(int)) {
	var start int
	if c := r.Header.Get("Content-Range"); c != "" {
		_, _ = fmt.Sscanf(c, "%d-", &start)
		if start != len(s.data[id]) {
			answer(http.StatusRequestedRangeNotSatisfiable)
			return
		}
	}
	in := io.Reader(r.Body)
	if s.cutAt > 0 {
		in = io.LimitReader(r.Body, int64(s.cutAt))
	}
	b, _ := io.ReadAll(in)
	s.data[id] = append(s.data[id], b...)
	s.received += len(b)
	if s.cutAt > 0 {
		s.cutAt = 0
		panic(http.ErrAbortHandler)
	}
	if r.Method == http.MethodPatch {
		answer(http.StatusAccepted)
		return
	}
	h := sha256.Sum256(s.data[id])
	if d := r.URL.Query().Get("digest"); d != "sha256:"+hex.EncodeToString(h[:]) {
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]any{"errors": []any{map[string]string{"code": "DIGEST_INVALID", "message": "no"}}})
		return
	}
	s.blobs[r.URL.Query().Get("digest")] = s.data[id]
	w.WriteHeader(http.StatusCreated)
}

func newResumable(t *testing.T) (*resumable, string) {
	t.Helper()
	s := &resumable{data: map[string][]byte{}, blobs: map[string][]byte{}}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	return s, srv.Listener.Addr().String()
}

// TestResumeInsideBlob: a connection that breaks in the middle of a chunk goes
// on at the very byte that the registry has.
func TestResumeInsideBlob(t *testing.T) {
	s, host := newResumable(t)
	s.cutAt = 300_000
	r := dial(t, Options{Host: host, Chunk: 1 << 20})
	b, d := content(3 << 20)
	if err := r.PutBlob(t.Context(), "a/b", d, int64(len(b)), from(b), nil); err != nil {
		t.Fatal(err)
	}
	if s.received != len(b) {
		t.Errorf("%d bytes went over for a blob of %d", s.received, len(b))
	}
}

// pieces is a body that stands in a file, with a gap behind each 100,000 bytes.
type pieces struct {
	f         *os.File
	at, n     int64
	sectioned *int64 // what was not read
}

const piece, gap = 100_000, 7

func (p *pieces) place() (at, left int64) {
	return p.at/piece*(piece+gap) + p.at%piece, min(piece-p.at%piece, p.n-p.at)
}

func (p *pieces) Read(b []byte) (int, error) {
	at, left := p.place()
	if left == 0 {
		return 0, io.EOF
	}
	n, err := p.f.ReadAt(b[:min(left, int64(len(b)))], at)
	p.at += int64(n)
	return n, err
}

func (p *pieces) Section(limit int64) (*os.File, int64, int64) {
	at, left := p.place()
	n := min(left, limit)
	p.at, *p.sectioned = p.at+n, *p.sectioned+n
	return p.f, at, n
}

// TestBlobFromFile: the system sends what stands in a file, over a break too.
func TestBlobFromFile(t *testing.T) {
	s, host := newResumable(t)
	s.cutAt = 300_000
	r := dial(t, Options{Host: host, Chunk: 1 << 20})
	b, d := content(3 << 20)
	f, err := os.Create(filepath.Join(t.TempDir(), "blob"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := 0; i < len(b); i += piece {
		if _, err := f.Write(append(bytes.Clone(b[i:min(i+piece, len(b))]), "nothing"[:gap]...)); err != nil {
			t.Fatal(err)
		}
	}
	var sectioned int64
	open := func(from int64) (io.Reader, error) { return &pieces{f, from, int64(len(b)), &sectioned}, nil }
	if err := r.PutBlob(t.Context(), "a/b", d, int64(len(b)), open, nil); err != nil || !bytes.Equal(s.blobs[d], b) {
		t.Fatalf("%d bytes arrived of %d, %v", len(s.blobs[d]), len(b), err)
	}
	if sectioned < int64(len(b))/2 {
		t.Errorf("only %d bytes of %d were left to the system", sectioned, len(b))
	}
	if err := f.Truncate(2 << 20); err != nil {
		t.Fatal(err)
	}
	if err := r.PutBlob(t.Context(), "a/c", d, int64(len(b)), open, nil); fault.KindOf(err) != fault.BadContent {
		t.Errorf("a file that became shorter: %v", err)
	}
}

type table map[string]string

func (m table) Load(k string) (string, bool) { v, ok := m[k]; return v, ok }
func (m table) Save(k, v string)             { m[k] = v }
func (m table) Drop(k string)                { delete(m, k) }

// TestResumeAfterKill: a run that is stopped leaves its upload, and the next
// sends what is missing.
func TestResumeAfterKill(t *testing.T) {
	for name, host := range map[string]string{"any": "", "docker": testkit.Registry(t, t.TempDir())} {
		s, h := newResumable(t)
		if host == "" {
			host = h
		}
		b, d := content(4 << 20)
		sessions := table{}
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		stopping := func(at int64) (io.Reader, error) {
			if n++; n == 3 { // two chunks are there
				cancel()
				return nil, ctx.Err()
			}
			return bytes.NewReader(b[at:]), nil
		}
		r, err := Dial(ctx, Options{Host: host, Chunk: 1 << 20, Sessions: sessions})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.PutBlob(ctx, "a/b", d, int64(len(b)), stopping, nil); err == nil {
			t.Fatal("no error")
		}
		if len(sessions) != 1 {
			t.Fatalf("%s: %d uploads are remembered", name, len(sessions))
		}
		var started []int64
		second := dial(t, Options{Host: host, Chunk: 1 << 20, Sessions: sessions})
		err = second.PutBlob(t.Context(), "a/b", d, int64(len(b)), func(at int64) (io.Reader, error) {
			started = append(started, at)
			return bytes.NewReader(b[at:]), nil
		}, nil)
		if err != nil || started[0] != 2<<20 || len(sessions) != 0 {
			t.Errorf("%s: went on at %v, %d uploads left, %v", name, started, len(sessions), err)
		}
		if name == "any" && s.received != len(b) {
			t.Errorf("%d bytes went over for a blob of %d", s.received, len(b))
		}
	}
}

// TestStaleSession: what was remembered is gone at the registry, or holds
// other bytes; the blob is sent anew.
func TestStaleSession(t *testing.T) {
	s, host := newResumable(t)
	b, d := content(2 << 20)
	r := dial(t, Options{Host: host, Chunk: 1 << 20, Sessions: table{host + "/a/b@" + d: "/v2/a/b/blobs/uploads/77"}})
	if err := r.PutBlob(t.Context(), "a/b", d, int64(len(b)), from(b), nil); err != nil {
		t.Error(err)
	}
	s.blobs, s.data["other"] = map[string][]byte{}, []byte("quite other bytes")
	r = dial(t, Options{Host: host, Chunk: 1 << 20, Sessions: table{host + "/a/b@" + d: "/v2/a/b/blobs/uploads/other"}})
	if err := r.PutBlob(t.Context(), "a/b", d, int64(len(b)), from(b), nil); err != nil {
		t.Error(err)
	}
}

// TestDamage: bytes that are not the digest's are told from a registry's fault.
func TestDamage(t *testing.T) {
	_, host := newResumable(t)
	b, d := content(5000)
	b = bytes.Clone(b)
	b[100] ^= 1
	r := dial(t, Options{Host: host})
	if err := r.PutBlob(t.Context(), "a/b", d, int64(len(b)), from(b), nil); fault.KindOf(err) != fault.BadContent {
		t.Errorf("got %v", err)
	}
}

// TestUnknownLength writes a blob whose digest is known at its end.
func TestUnknownLength(t *testing.T) {
	s, host := newResumable(t)
	r := dial(t, Options{Host: host})
	s.cutAt = 1000
	b, d := content(100_000)
	w := r.NewWriter(t.Context(), "a/b")
	for i := 0; i < len(b); i += 30_000 {
		if _, err := w.Write(b[i:min(i+30_000, len(b))]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Commit(d); err != nil || !bytes.Equal(s.blobs[d], b) {
		t.Errorf("%d bytes arrived of %d, %v", len(s.blobs[d]), len(b), err)
	}
}

func TestErrorsHideUploadState(t *testing.T) {
	_, host := newResumable(t)
	r := dial(t, Options{Host: host, Tries: 1})
	_, err := r.do(t.Context(), request{method: http.MethodGet, url: "http://127.0.0.1:1/v2/x?_state=secret", want: []int{200}})
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
}
