package server_test

import (
	"bytes"
	"encoding/base64"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/internal/trace"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// collected is what a collector got.
type collected struct {
	mu    sync.Mutex
	raw   []byte
	spans []*tracepb.Span
}

func (c *collected) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	var in collector.ExportTraceServiceRequest
	if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(b, &in) != nil {
		http.Error(w, "not understood", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.raw = append(c.raw, b...)
	for _, rs := range in.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			c.spans = append(c.spans, ss.Spans...)
		}
	}
}

func attributes(s *tracepb.Span) map[string]string {
	out := map[string]string{}
	for _, a := range s.Attributes {
		if out[a.Key] = a.Value.GetStringValue(); out[a.Key] == "" {
			out[a.Key] = a.Value.String()
		}
	}
	return out
}

// tracedWorld is a world whose spans are collected once the tracer is closed.
func tracedWorld(t *testing.T) (*world, *trace.Tracer, *collected) {
	t.Helper()
	got := &collected{}
	c := httptest.NewServer(got)
	t.Cleanup(c.Close)
	tracer, err := trace.Open(t.Context(), c.URL, "1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return newWorldWith(t, server.Limits{}, func(c *server.Config) { c.Trace = tracer }), tracer, got
}

// TestTraces: a request's span says what the audit line says, is joined with
// it by the correlation id and with the caller's trace, and holds no secret.
func TestTraces(t *testing.T) {
	w, tracer, got := tracedWorld(t)
	root := w.root(t, "shop")
	const plain, aad = "a secret that nobody shall read!", "additional data, private too"
	text := base64.StdEncoding.EncodeToString([]byte(plain))
	key := root.create(t, `"name":"root"`)
	std := root.create(t, `"name":"std","extractable":true,"payload":"`+text+`"`)
	root.do(t, "GET", "/api/v2/keys/"+std.ID, "")
	traced := root.with("traceparent", "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01").with(kmsapi.HeaderCorrelation, "corr-1")
	r := traced.do(t, "POST", "/api/v2/keys/"+key.ID+"/actions/wrap", `{"plaintext":"`+text+`","aad":["`+aad+`"]}`)
	var a kmsapi.ActionAnswer
	if r.into(t, &a); r.status != 200 {
		t.Fatal(r)
	}
	line := w.audit.last()
	traced.do(t, "POST", "/api/v2/keys/"+key.ID+"/actions/unwrap", `{"ciphertext":"`+a.Ciphertext+`","aad":["`+aad+`"]}`)
	root.do(t, "POST", "/api/v2/keys/"+key.ID+"/actions/unwrap?x="+text, `{"ciphertext":"e30="}`)
	if err := tracer.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	var wrap *tracepb.Span
	for _, s := range got.spans {
		if s.Name == "kms.secrets.wrap" {
			wrap = s
		}
	}
	if wrap == nil {
		t.Fatalf("no span of the wrap among %d", len(got.spans))
	}
	at := attributes(wrap)
	for name, want := range map[string]string{"kmsctl.correlation_id": line.CorrelationID, "kmsctl.principal": line.Principal, "kmsctl.instance": root.instance,
		"kmsctl.key": key.ID, "http.request.method": "POST", "http.route": "/api/v2/keys/{id}/actions/wrap", "http.response.status_code": "int_value:200"} {
		if at[name] != want {
			t.Errorf("%s is %q, want %q", name, at[name], want)
		}
	}
	if line.CorrelationID != "corr-1" || !bytes.Equal(wrap.TraceId, []byte("\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef")) {
		t.Errorf("correlation %q, trace %x", line.CorrelationID, wrap.TraceId)
	}
	parts := map[string]int{}
	for _, s := range got.spans {
		if bytes.Equal(s.ParentSpanId, wrap.SpanId) {
			parts[s.Name]++
		}
	}
	if len(parts) != 2 || parts["perform"] != 1 || parts["audit"] != 1 {
		t.Errorf("parts of the wrap: %v", parts)
	}
	for _, secret := range []string{plain, text, aad, a.Ciphertext, root.token, w.admin} {
		if strings.Contains(string(got.raw), secret) {
			t.Errorf("the spans hold %q", secret)
		}
	}
}

// TestTokenTraces: each form of the token endpoint has a span, joined with the
// audit line by the correlation id, which holds neither key nor token.
func TestTokenTraces(t *testing.T) {
	w, tracer, got := tracedWorld(t)
	form := client{w: w}.with("Content-Type", "application/x-www-form-urlencoded")
	const grant = "grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey="
	var tok kmsapi.Token
	want := map[string]map[string]string{}
	for _, path := range []string{"/identity/token", "/oidc/token", "/iam-token/oidc/token"} {
		for _, x := range []struct {
			body, status, code string
			line               bool
		}{
			{grant + w.admin, "int_value:200", "", true},
			{grant + "kms_not-a-key", "int_value:400", "BXNIM0415E", true},
			{"grant_type=password", "int_value:400", "BXNIM0137E", false},
		} {
			corr := path + " " + x.status + x.code
			r := form.with(kmsapi.HeaderCorrelation, corr).do(t, "POST", path, x.body)
			if x.code == "" {
				r.into(t, &tok)
			}
			line := w.audit.last()
			if (line.CorrelationID == corr) != x.line || r.header.Get(kmsapi.HeaderCorrelation) != corr {
				t.Errorf("%s: answer %v, line %+v", corr, r.header, line)
			}
			at := map[string]string{"http.route": path, "http.response.status_code": x.status, "error.type": x.code}
			if x.line {
				at["kmsctl.principal"] = line.Principal
			}
			want[corr] = at
		}
	}
	if err := tracer.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, s := range got.spans {
		at := attributes(s)
		for name, v := range want[at["kmsctl.correlation_id"]] {
			if at[name] != v {
				t.Errorf("%s: %s is %q, want %q", at["kmsctl.correlation_id"], name, at[name], v)
			}
		}
		delete(want, at["kmsctl.correlation_id"])
	}
	if len(want) != 0 {
		t.Errorf("no span of %v", want)
	}
	for _, secret := range []string{w.admin, tok.AccessToken, "kms_not-a-key"} {
		if strings.Contains(string(got.raw), secret) {
			t.Errorf("the spans hold %q", secret)
		}
	}
}

// TestCollectorAway: without a collector the service works on.
func TestCollectorAway(t *testing.T) {
	c := httptest.NewServer(http.NotFoundHandler())
	c.Close()
	tracer, err := trace.Open(t.Context(), c.URL, "1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w := newWorldWith(t, server.Limits{}, func(c *server.Config) { c.Trace = tracer })
	w.root(t, "shop").create(t, `"name":"root"`)
}
