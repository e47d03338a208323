package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// auditor keeps events, and fails when told to.
type auditor struct {
	mu     sync.Mutex
	events []audit.Event
	err    error
	full   error
	coming atomic.Int64
}

func (a *auditor) Append(_ context.Context, e audit.Event) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e.Expected {
		a.coming.Add(-1)
	}
	if a.err != nil {
		return a.err
	}
	a.events = append(a.events, e)
	return nil
}

func (a *auditor) Expect(n int) { a.coming.Add(int64(n)) }

func (a *auditor) Ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.full
}

func (a *auditor) last() audit.Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.events) == 0 {
		return audit.Event{}
	}
	return a.events[len(a.events)-1]
}

// forget drops the events so far.
func (a *auditor) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.events = nil
}

func (a *auditor) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.events)
}

// world is the API over a real embedded etcd and a token that can be told to
// fail, on a TCP address and on a local socket.
type world struct {
	url, socket string
	token       *testkit.Token
	etcd        store.EtcdClient
	store       *faulty
	kms         *kms.Service
	iam         *iam.Service
	audit       *auditor
	server      *server.Server
	log         *bytes.Buffer
	passed      atomic.Int64 // nanoseconds since start
	set         atomic.Int64 // nanoseconds by which the clock was set
	lag         atomic.Int64
	sick        atomic.Pointer[[]string]
	full        atomic.Bool
	admin       string   // an administrator's API key
	accounts    sync.Map // tokens of Kubernetes
	reviews     atomic.Int64
}

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func (w *world) now() time.Time {
	return start.Add(time.Duration(w.passed.Load() + w.set.Load()))
}

// advance lets time pass; jump sets the clock, and no time passes.
func (w *world) advance(d time.Duration) { w.passed.Add(int64(d)) }
func (w *world) jump(d time.Duration)    { w.set.Add(int64(d)) }

// safeBuffer may be written by the server while the test reads.
type safeBuffer struct {
	mu sync.Mutex
	b  *bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func newWorld(tb testing.TB) *world {
	tb.Helper()
	return newWorldWith(tb, server.Limits{})
}

func newWorldWith(tb testing.TB, limits server.Limits, more ...func(*server.Config)) *world {
	tb.Helper()
	return newWorldOn(tb, nil, limits, more...)
}

// newWorldOn has its keys in a token of one's own; nil: in the one that can be
// told to fail.
func newWorldOn(tb testing.TB, own *connector.Client, limits server.Limits, more ...func(*server.Config)) *world {
	tb.Helper()
	m, err := store.OpenEmbedded(tb.Context(), tb.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	c := m.Client()
	codec, err := record.NewCodec(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		tb.Fatal(err)
	}
	st, err := store.Open(tb.Context(), c, codec)
	if err != nil {
		tb.Fatal(err)
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	w := &world{etcd: c, token: testkit.NewToken("p", "p"), audit: &auditor{}, log: &bytes.Buffer{}}
	w.store = &faulty{Store: st}
	derive := func(_ context.Context, salt []byte) (*ecdsa.PrivateKey, error) {
		sum := sha256.Sum256(salt)
		return ecdsa.ParseRawPrivateKey(elliptic.P256(), sum[:])
	}
	w.iam = iam.New(w.store, iam.Config{SigningKey: k, Derive: derive, Now: w.now})
	w.kms = kms.New(w.store, w.token, w.token, w.now, kms.DefaultWindows())
	if own != nil {
		w.kms = kms.New(w.store, own, own, w.now, kms.DefaultWindows())
	}
	if err := w.kms.KeepTime(tb.Context(), func() time.Duration { return time.Duration(w.passed.Load()) }, true); err != nil {
		tb.Fatal(err)
	}
	none := []string{}
	w.sick.Store(&none)
	log := slog.New(slog.NewJSONHandler(&safeBuffer{b: w.log}, nil))
	cfg := server.Config{
		KMS: w.kms, IAM: w.iam, Audit: w.audit, Log: log,
		Review: func(_ context.Context, token string) (string, error) {
			w.reviews.Add(1)
			account, _ := w.accounts.Load(token)
			s, _ := account.(string)
			return s, nil
		},
		AuditHeads: func(context.Context) (kmsapi.AuditHeads, error) {
			return kmsapi.AuditHeads{PublicKey: w.token.PublicKey(), Heads: []kmsapi.AuditHead{}}, nil
		},
		Backup: func(_ context.Context, w io.Writer) error {
			_, err := io.WriteString(w, "a copy of the store")
			return err
		},
		Clearing: &kms.Clearing{Store: st, Plain: store.NewPlain(c), Sealer: w.token, Tokens: []kms.Inventory{w.token}, Now: w.now,
			Opened: kms.Opened{Install: "11111111", Token: hsm.TokenInfo{Label: "fake", Serial: w.token.Serial}}},
		Rotation: kms.NewRotation(kms.Rotation{Store: st, Plain: installation{}, Name: "here", Now: w.now}), // nobody works on it
		Lag:      func() time.Duration { return time.Duration(w.lag.Load()) },
		Healthy:  func(context.Context) []string { return *w.sick.Load() },
		Full:     w.full.Load,
		Limits:   limits, Now: w.now,
	}
	for _, f := range more {
		f(&cfg)
	}
	s := server.New(cfg)
	w.server = s
	ctx, cancel := context.WithCancel(tb.Context())
	var lc net.ListenConfig
	tcp, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	w.url, w.socket = "http://"+tcp.Addr().String(), tb.TempDir()+"/api.sock"
	local, err := lc.Listen(ctx, "unix", w.socket)
	if err != nil {
		tb.Fatal(err)
	}
	done := make(chan error, 2)
	go func() { done <- server.Serve(ctx, seen.watch(s), log, tcp, false) }()
	go func() { done <- server.Serve(ctx, seen.watch(s), log, local, true) }()
	tb.Cleanup(func() {
		if n := w.audit.coming.Load(); n != 0 {
			tb.Errorf("the audit log expects %d calls when all are over", n)
		}
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				tb.Errorf("serve: %v", err)
			}
		}
		st.Close()
		c.Close()
		m.Close()
	})
	key, id, hash, err := iam.NewAPIKey()
	if err != nil {
		tb.Fatal(err)
	}
	if err := w.iam.EnsureAdmin(tb.Context(), id, hash); err != nil {
		tb.Fatal(err)
	}
	w.admin = string(key.Reveal())
	return w
}

// reply is an answer of the API.
type reply struct {
	status int
	header http.Header
	body   string
}

func (r reply) code() string {
	var e kmsapi.Errors
	if json.Unmarshal([]byte(r.body), &e) != nil || len(e.Resources) != 1 || len(e.Resources[0].Reasons) != 1 {
		return ""
	}
	return e.Resources[0].Reasons[0].Code
}

func (r reply) into(tb testing.TB, v any) {
	tb.Helper()
	if err := json.Unmarshal([]byte(r.body), v); err != nil {
		tb.Fatalf("status %d, body %q: %v", r.status, r.body, err)
	}
}

func (r reply) key(tb testing.TB) kmsapi.Key {
	tb.Helper()
	var ks kmsapi.Keys
	r.into(tb, &ks)
	if len(ks.Resources) != 1 {
		tb.Fatalf("status %d, body %s", r.status, r.body)
	}
	return ks.Resources[0]
}

// who asks, in which instance.
type client struct {
	w        *world
	token    string
	instance string
	header   map[string]string
}

func (c client) do(tb testing.TB, method, path, body string) reply {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), method, c.w.url+path, strings.NewReader(body))
	if err != nil {
		tb.Fatal(err)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	if c.instance != "" {
		req.Header.Set(kmsapi.HeaderInstance, c.instance)
	}
	for k, v := range c.header {
		req.Header.Set(k, v)
	}
	return roundTrip(tb, http.DefaultClient, req)
}

// with is the same client with one more header.
func (c client) with(name, value string) client {
	h := map[string]string{name: value}
	for k, v := range c.header {
		if k != name {
			h[k] = v
		}
	}
	c.header = h
	return c
}

func roundTrip(tb testing.TB, h *http.Client, req *http.Request) reply {
	tb.Helper()
	res, err := h.Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil && !errors.Is(err, io.EOF) {
		tb.Fatal(err)
	}
	return reply{res.StatusCode, res.Header, string(b)}
}

// login exchanges an API key by the token endpoint.
func (w *world) login(tb testing.TB, apiKey string) string {
	tb.Helper()
	res, err := http.PostForm(w.url+"/identity/token", url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {apiKey}})
	if err != nil {
		tb.Fatal(err)
	}
	defer res.Body.Close()
	var tok kmsapi.Token
	if err := json.NewDecoder(res.Body).Decode(&tok); err != nil || res.StatusCode != 200 || tok.TokenType != "Bearer" || tok.ExpiresIn != 3600 {
		tb.Fatalf("%d %+v %v", res.StatusCode, tok, err)
	}
	return tok.AccessToken
}

// root is an administrator in a new instance.
func (w *world) root(tb testing.TB, instance string) client {
	tb.Helper()
	c := client{w: w, token: w.login(tb, w.admin)}
	var in kmsapi.Instance
	r := c.do(tb, "POST", "/kmsctl/v1/instances", `{"name":"`+instance+`"}`)
	if r.into(tb, &in); r.status != 201 || in.ID == "" {
		tb.Fatal(r)
	}
	c.instance = in.ID
	return c
}

// service is a service ID with a role on an instance, or on one key or ring.
func (c client) service(tb testing.TB, name, role, key, ring string) client {
	tb.Helper()
	if _, err := c.w.iam.CreateServiceID(tb.Context(), iam.LocalAdmin(), name, ""); err != nil {
		tb.Fatal(err)
	}
	_, value, err := c.w.iam.CreateAPIKey(tb.Context(), iam.LocalAdmin(), "k", name)
	if err != nil {
		tb.Fatal(err)
	}
	if role != "" {
		p, err := iam.NewPolicy(c.instance, key, ring, role)
		if err != nil {
			tb.Fatal(err)
		}
		if _, err := c.w.iam.CreatePolicy(tb.Context(), iam.LocalAdmin(), name, p); err != nil {
			tb.Fatal(err)
		}
	}
	return client{w: c.w, token: c.w.login(tb, string(value.Reveal())), instance: c.instance}
}

// createBody is the body of POST /keys with these fields.
func createBody(fields string) string {
	return `{"metadata":{"collectionType":"application/vnd.ibm.kms.key+json","collectionTotal":1},"resources":[{"type":"application/vnd.ibm.kms.key+json",` + fields + `}]}`
}

func (c client) create(tb testing.TB, fields string) kmsapi.Key {
	tb.Helper()
	r := c.do(tb, "POST", "/api/v2/keys", createBody(fields))
	if r.status != 201 {
		tb.Fatalf("create %s: %d %s", fields, r.status, r.body)
	}
	return r.key(tb)
}

// allKeys selects keys in every state.
var allKeys = kms.Query{Limit: kmsapi.MaxLimit, States: []int{0, 1, 2, 3, 5}}
