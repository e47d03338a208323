package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func TestRateIsForEachIdentity(t *testing.T) {
	w := newWorldWith(t, server.Limits{Rate: 2, Burst: 3})
	c := client{w: w, token: w.login(t, w.admin)}
	var o kmsapi.Onboarded
	c.do(t, "POST", "/kmsctl/v1/onboard", `{"name":"orders"}`).into(t, &o)
	s := client{w: w, token: w.login(t, o.APIKey), instance: o.InstanceID}
	for range 2 { // one of three went for the onboarding
		if r := c.do(t, "GET", "/kmsctl/v1/instances", ""); r.status != 200 {
			t.Fatalf("%+v", r)
		}
	}
	lines := w.audit.count()
	r := c.do(t, "GET", "/kmsctl/v1/instances", "")
	if r.status != 429 || r.code() != kmsapi.TooManyRequests || r.header.Get("Retry-After") != "1" {
		t.Errorf("%+v", r)
	}
	if w.audit.count() != lines {
		t.Error("a flood fills the audit log")
	}
	if r := s.do(t, "POST", "/api/v2/keys/"+o.KeyID+"/actions/wrap", ""); r.status != 200 {
		t.Errorf("another identity: %+v", r)
	}
	w.advance(-time.Hour) // the clock jumps back: nothing is given, nothing taken
	if r := c.do(t, "GET", "/kmsctl/v1/instances", ""); r.status != 401 && r.status != 429 {
		t.Errorf("after a jump back: %+v", r)
	}
	w.advance(time.Hour + time.Second)
	for i, want := range []int{200, 200, 429} {
		if r := c.do(t, "GET", "/kmsctl/v1/instances", ""); r.status != want {
			t.Errorf("a second later, call %d: %d, want %d", i, r.status, want)
		}
	}
}

// TestFailedProofsAreLimitedByAddress: guessing neither floods the log nor
// locks out those who can prove themselves.
func TestFailedProofsAreLimitedByAddress(t *testing.T) {
	w := newWorldWith(t, server.Limits{Rate: 1, Burst: 4})
	good := client{w: w, token: w.login(t, w.admin)}
	bad := client{w: w, token: "x"}
	for i, want := range []int{401, 401, 401, 401, 429, 429} {
		if r := bad.do(t, "GET", "/kmsctl/v1/instances", ""); r.status != want {
			t.Errorf("call %d: %d, want %d", i, r.status, want)
		}
	}
	if r := good.do(t, "GET", "/kmsctl/v1/instances", ""); r.status != 200 {
		t.Errorf("%+v", r)
	}
	// Tokens: one went for the login.
	for i, want := range []int{400, 400, 400, 429} {
		res, err := http.PostForm(w.url+"/identity/token", map[string][]string{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {"kms_x"}})
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want || (want == 429) != (res.Header.Get("Retry-After") != "") {
			t.Errorf("token %d: %d, want %d", i, res.StatusCode, want)
		}
	}
}

// slowAudit holds every record back until it is told to go on.
type slowAudit struct {
	auditor
	entered chan struct{}
	goOn    chan struct{}
}

func (a *slowAudit) Append(ctx context.Context, e audit.Event) error {
	a.entered <- struct{}{}
	<-a.goOn
	return a.auditor.Append(ctx, e)
}

func TestLoadIsShed(t *testing.T) {
	w := newWorldWith(t, server.Limits{Running: 1, Waiting: 1, Wait: 50 * time.Millisecond})
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	hold, held := make(chan struct{}), make(chan struct{}, 1)
	w.token.Hold = func() {
		select {
		case held <- struct{}{}:
		default:
		}
		<-hold
	}
	wrap := func() reply { return c.do(t, "POST", "/api/v2/keys/"+k.ID+"/actions/wrap", "") }
	var wg sync.WaitGroup
	replies := make(chan reply, 3)
	wg.Go(func() { replies <- wrap() })
	<-held
	lines := w.audit.count()
	wg.Go(func() { replies <- wrap() })
	wg.Go(func() { replies <- wrap() })
	// Of the two that come while one works, one waits too long and one finds
	// no place to wait, or both wait one after the other: neither runs.
	for range 2 {
		r := <-replies
		if r.status != 503 || r.code() != kmsapi.Unavailable || r.header.Get("Retry-After") != "1" {
			t.Errorf("%+v", r)
		}
	}
	if w.audit.count() != lines {
		t.Error("what was shed was written down")
	}
	close(hold)
	wg.Wait()
	if r := <-replies; r.status != 200 {
		t.Errorf("the one that worked: %+v", r)
	}
	if r := wrap(); r.status != 200 {
		t.Errorf("afterwards: %+v", r)
	}
	for _, want := range []string{`kmsctl_limited_total{limit="load"} 2`, "kmsctl_requests_in_flight 0"} {
		if m := scrape(t, w); !strings.Contains(m, want) {
			t.Errorf("no %s", want)
		}
	}
}

func scrape(t *testing.T, w *world) string {
	t.Helper()
	return client{w: w}.do(t, "GET", "/metrics", "").body
}

func TestMetrics(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	for range 3 {
		c.do(t, "POST", "/api/v2/keys/"+k.ID+"/actions/wrap", "")
	}
	c.do(t, "POST", "/api/v2/keys/"+k.ID+"x/actions/wrap", "")
	w.server.Gauge("kmsctl_test_figure", "A figure.", func() float64 { return 42 })
	m := scrape(t, w)
	for _, want := range []string{
		`kmsctl_requests_total{action="kms.secrets.wrap",status="200"} 3`, `kmsctl_requests_total{action="kms.secrets.wrap",status="404"} 1`,
		`kmsctl_request_duration_seconds_count{action="kms.secrets.wrap"} 4`, "kmsctl_store_view_age_seconds 0", "kmsctl_test_figure 42", "go_goroutines", "etcd_",
	} {
		if !strings.Contains(m, want) {
			t.Errorf("no %s", want)
		}
	}
	for _, secret := range []string{k.ID, w.admin} {
		if strings.Contains(m, secret) {
			t.Errorf("%s is in the metrics", secret)
		}
	}
	if strings.Contains(m, "ibm_kms_api_request_gauge{") {
		t.Error("the minute is not over yet")
	}
	w.advance(time.Minute)
	m = scrape(t, w)
	want := fmt.Sprintf(`ibm_kms_api="kms.secrets.wrap",ibm_kms_response_code="200",ibm_location="local",ibm_resource="",ibm_resource_group_name="",ibm_resource_type="instance",ibm_scope="",ibm_service_instance="%s",ibm_service_instance_name="shop",ibm_service_name="kms"} 3`, c.instance)
	if !strings.Contains(m, `ibm_kms_api_request_gauge{ibm_ctype="private",`+want) || !strings.Contains(m, "ibm_kms_api_latency_gauge{") {
		t.Errorf("no %s in\n%s", want, m)
	}
	w.advance(2 * time.Minute)
	if strings.Contains(scrape(t, w), "ibm_kms_api_request_gauge{") {
		t.Error("an old minute is shown")
	}
}

// served starts a server with little patience; stop ends it and gives what it
// ended with.
func served(t *testing.T, h http.Handler, finish time.Duration) (addr string, stop func() error) {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.ServeImpatiently(ctx, h, l, 200*time.Millisecond, 400*time.Millisecond, finish) }()
	var once sync.Once
	stop = func() (err error) {
		once.Do(func() { cancel(); err = <-done })
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return l.Addr().String(), stop
}

// TestSlowClients: one that does not get on with its request loses its
// connection, and holds nobody up.
func TestSlowClients(t *testing.T) {
	w := newWorldWith(t, server.Limits{Running: 1, Waiting: 1, Wait: time.Second})
	c := w.root(t, "shop")
	addr, _ := served(t, w.server, time.Second)
	for name, start := range map[string]string{
		"header": "POST /api/v2/keys HTTP/1.1\r\nHost: x\r\nAuth",
		"body":   "POST /api/v2/keys HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + c.token + "\r\nBluemix-Instance: " + c.instance + "\r\nContent-Length: 100\r\n\r\n{",
	} {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, start); err != nil {
			t.Fatal(err)
		}
		if r := c.do(t, "GET", "/api/v2/keys", ""); r.status != 200 {
			t.Errorf("%s: another client: %+v", name, r)
		}
		if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(conn)
		if err != nil || (len(b) > 0 && !strings.Contains(string(b), " 400 ") && !strings.Contains(string(b), " 408 ")) {
			t.Errorf("%s: the connection stays open: %v %q", name, err, b)
		}
	}
}

// TestStopLosesNoReply: what was begun is answered, after the stop as well.
func TestStopLosesNoReply(t *testing.T) {
	w := newWorld(t)
	slow := &slowAudit{entered: make(chan struct{}, 8), goOn: make(chan struct{})}
	c := w.root(t, "shop")
	s := server.New(server.Config{KMS: w.kms, IAM: w.iam, Audit: slow, Log: w.server.Log, Lag: w.server.Lag, Healthy: w.server.Healthy})
	addr, stop := served(t, s, 5*time.Second)
	const calls = 5
	replies := make(chan error, calls)
	for range calls {
		go func() {
			req, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), "GET", "http://"+addr+"/api/v2/keys", nil)
			if err != nil {
				replies <- err
				return
			}
			req.Header.Set("Authorization", "Bearer "+c.token)
			req.Header.Set(kmsapi.HeaderInstance, c.instance)
			res, err := http.DefaultClient.Do(req)
			if err == nil {
				_, err = io.ReadAll(res.Body)
				res.Body.Close()
				if res.StatusCode != 200 {
					err = errors.Join(err, fmt.Errorf("status %d", res.StatusCode))
				}
			}
			replies <- err
		}()
	}
	for range calls {
		<-slow.entered
	}
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	for until := time.Now().Add(5 * time.Second); ; { // nobody new is let in
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", addr)
		if err != nil {
			break
		}
		conn.Close()
		if time.Now().After(until) {
			t.Fatal("it still listens")
		}
	}
	close(slow.goOn)
	for range calls {
		if err := <-replies; err != nil {
			t.Errorf("a reply was lost: %v", err)
		}
	}
	if err := <-stopped; err != nil {
		t.Errorf("stop: %v", err)
	}
}

// TestBodyLimit: more than the API takes is refused with its own status, and
// is not read to its end.
func TestBodyLimit(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	r := c.do(t, "POST", "/api/v2/keys", strings.Repeat("x", kmsapi.MaxBody+1))
	if r.status != http.StatusRequestEntityTooLarge || r.code() != kmsapi.TooLarge {
		t.Errorf("%d %s", r.status, r.body)
	}
	rec := httptest.NewRecorder()
	endless := &counting{}
	req := httptest.NewRequestWithContext(t.Context(), "POST", "/api/v2/keys", bufio.NewReader(endless))
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set(kmsapi.HeaderInstance, c.instance)
	w.server.ServeHTTP(rec, req)
	if rec.Code != http.StatusRequestEntityTooLarge || endless.n > 2*kmsapi.MaxBody {
		t.Errorf("%d after %d bytes", rec.Code, endless.n)
	}
}

type counting struct{ n int }

func (c *counting) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	c.n += len(b)
	return len(b), nil
}
