package watcher_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/pki"
	"github.com/kmsctl/kmsctl/internal/watcher"
)

// site is a cluster in memory; internal/kube has its own tests on client-go,
// and make e2e runs the watcher in a pod.
type site struct {
	mu        sync.Mutex
	secrets   map[string]cluster.Secret
	events    []cluster.Event
	annotated chan cluster.Annotated
	instances map[string]string
	failing   bool
	ready     error
}

func (s *site) Lead(ctx context.Context, _, _, _ string, f func(context.Context)) error {
	f(ctx)
	return nil
}

func (s *site) WatchAnnotated(ctx context.Context, _ []string, _ string, found func(cluster.Annotated)) error {
	for {
		select {
		case a := <-s.annotated:
			found(a)
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *site) FillSecret(_ context.Context, ns, name, entry string, value []byte) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.secrets[ns+"/"+name]
	if len(x.Data[entry]) > 0 {
		return false, nil
	}
	x.Data = map[string][]byte{entry: value}
	s.secrets[ns+"/"+name] = x
	return true, nil
}

func (s *site) Secret(_ context.Context, ns, name string) (cluster.Secret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, ok := s.secrets[ns+"/"+name]
	if !ok {
		return x, fault.Newf(fault.NotFound, "read Secret", name, "it is not there")
	}
	return x, nil
}

func (s *site) UpdateSecret(_ context.Context, x cluster.Secret) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets[x.Namespace+"/"+x.Name] = x
	return nil
}

func (s *site) Event(_ context.Context, e cluster.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
	return nil
}

func (s *site) Ensure(_ context.Context, name string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failing {
		return "", errors.New("503")
	}
	if s.instances[name] == "" {
		s.instances[name] = "id-of-" + name
	}
	return s.instances[name], nil
}

func (s *site) told() []cluster.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events)
}

func (s *site) isReady(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ready
}

func (s *site) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{secrets: map[string]cluster.Secret{}, annotated: make(chan cluster.Annotated), instances: map[string]string{}}
	ca, err := pki.NewCA("ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s.secrets["n/"+install.CASecret("kms")] = cluster.Secret{Data: map[string][]byte{"ca.crt": ca.Cert, "ca.key": ca.Key}}
	for _, l := range install.Leaves("kms", "n", "cluster.local", "kms-api") {
		if l.Use == pki.Server {
			l.Hosts = append(l.Hosts, "extra.example")
		}
		leaf, err := pki.Issue(ca, l.Name, l.Use, l.Hosts, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		s.secrets["n/"+l.Secret] = install.TLSSecret("n", l.Secret, nil, ca.Cert, leaf)
	}
	return s
}

func start(t *testing.T, s *site, every time.Duration) (*watcher.Watcher, *bytes.Buffer, func()) {
	t.Helper()
	log := &bytes.Buffer{}
	w := watcher.New(watcher.Config{Cluster: s, Instances: s, Ready: s.isReady, Release: "kms", Namespace: "n", Identity: "one", Now: time.Now,
		HealthEvery: every, RenewEvery: 24 * time.Hour,
		Log: slog.New(slog.NewJSONHandler(log, nil))})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	return w, log, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func get(t *testing.T, w *watcher.Watcher, path string) (int, string) {
	t.Helper()
	r := httptest.NewRecorder()
	w.Handler().ServeHTTP(r, httptest.NewRequestWithContext(t.Context(), "GET", path, nil))
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.Code, string(b)
}

// TestFill: an annotated Secret gets the id of its own instance, once; after a
// failure it gets it the next time.
func TestFill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		w, _, stop := start(t, s, 0)
		defer stop()
		s.set(func() { s.failing = true })
		want := cluster.Annotated{Namespace: "shop", Name: "kms", Value: "kms-instance"}
		s.annotated <- want
		synctest.Wait()
		if _, body := get(t, w, "/metrics"); !strings.Contains(body, "kms_watcher_secrets_failed_total 1") {
			t.Error(body)
		}
		s.set(func() { s.failing = false })
		s.annotated <- want
		s.annotated <- want
		s.annotated <- cluster.Annotated{Namespace: "shop", Name: "full", Value: "kms-instance", Has: true}
		synctest.Wait()
		if got, err := s.Secret(t.Context(), "shop", "kms"); err != nil || string(got.Data["kms-instance"]) != "id-of-shop.kms" {
			t.Errorf("%+v, %v", got, err)
		}
		if len(s.instances) != 1 {
			t.Errorf("instances %v", s.instances)
		}
		if _, body := get(t, w, "/metrics"); !strings.Contains(body, "kms_watcher_secrets_filled_total 1") || !strings.Contains(body, "kms_watcher_leading 1") {
			t.Error(body)
		}
		if !slices.ContainsFunc(s.told(), func(e cluster.Event) bool { return e.Warning && e.Kind == "Secret" && e.Name == "kms" }) {
			t.Errorf("no event tells of the failure: %+v", s.told())
		}
	})
}

// TestHealth: the API's state is on /readyz and /metrics, and a change of it
// is an event with the reason.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		w, _, stop := start(t, s, 0)
		defer stop()
		synctest.Wait()
		if code, _ := get(t, w, "/readyz"); code != 200 {
			t.Errorf("%d", code)
		}
		s.set(func() { s.ready = errors.New("hsm: not logged in") })
		time.Sleep(11 * time.Second)
		synctest.Wait()
		if code, body := get(t, w, "/readyz"); code != 503 || !strings.Contains(body, "not logged in") {
			t.Errorf("%d %s", code, body)
		}
		if _, body := get(t, w, "/metrics"); !strings.Contains(body, "kms_api_ready 0") {
			t.Error(body)
		}
		if code, _ := get(t, w, "/livez"); code != 200 {
			t.Errorf("livez %d", code)
		}
		e := s.told()[len(s.told())-1]
		if e.Reason != "KMSNotReady" || !e.Warning || !strings.Contains(e.Message, "not logged in") || e.Name != "kms-oss" {
			t.Errorf("%+v", e)
		}
		n := len(s.told())
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(s.told()) != n {
			t.Error("the same state was told again")
		}
	})
}

// TestRenew: certificates are renewed before they end, with the same names,
// and by the same CA.
func TestRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		w, log, stop := start(t, s, 24*time.Hour)
		defer stop()
		synctest.Wait()
		before, err := s.Secret(t.Context(), "n", "kms-api-tls")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(330 * 24 * time.Hour)
		synctest.Wait()
		if now, err := s.Secret(t.Context(), "n", "kms-api-tls"); err != nil || string(now.Data["tls.crt"]) != string(before.Data["tls.crt"]) {
			t.Errorf("renewed too early, %v", err)
		}
		time.Sleep(10 * 24 * time.Hour)
		synctest.Wait()
		now, err := s.Secret(t.Context(), "n", "kms-api-tls")
		if err != nil {
			t.Fatal(err)
		}
		ca, err := s.Secret(t.Context(), "n", "kms-ca")
		if err != nil {
			t.Fatal(err)
		}
		hosts := []string{"kms-api.n.svc.cluster.local", "127.0.0.1", "extra.example"}
		if err := pki.Valid(ca.Data["ca.crt"], pki.Pair{Cert: now.Data["tls.crt"], Key: now.Data["tls.key"]}, hosts, time.Now(), 300*24*time.Hour); err != nil {
			t.Error(err)
		}
		c, err := tls.X509KeyPair(now.Data["tls.crt"], now.Data["tls.key"])
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(log.String(), "renewed certificate") || strings.Contains(log.String(), "PRIVATE KEY") {
			t.Error(log.String())
		}
		if _, body := get(t, w, "/metrics"); !strings.Contains(body, "kms_watcher_certificates_renewed_total 3") || !strings.Contains(body, `kms_certificate_expiry_seconds{secret="kms-api-tls"}`) {
			t.Errorf("%s\nends %s", body, c.Leaf.NotAfter)
		}
	})
}
