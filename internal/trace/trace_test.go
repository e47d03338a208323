package trace_test

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/kmsctl/kmsctl/internal/trace"
)

func TestWanted(t *testing.T) {
	for _, c := range []struct {
		endpoint string
		env      map[string]string
		want     bool
	}{
		{"", nil, false},
		{"http://c:4318", nil, true},
		{"", map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, true},
		{"", map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, true},
		{"http://c:4318", map[string]string{"OTEL_SDK_DISABLED": "true"}, false},
		{"http://c:4318", map[string]string{"OTEL_TRACES_EXPORTER": "none"}, false},
	} {
		if got := trace.Wanted(c.endpoint, func(name string) string { return c.env[name] }); got != c.want {
			t.Errorf("%q with %v: %v", c.endpoint, c.env, got)
		}
	}
}

// TestEnvironment: the standard variables say where to, with which headers,
// and how many.
func TestEnvironment(t *testing.T) {
	calls := make(chan *http.Request, 10)
	c := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { calls <- r }))
	defer c.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", c.URL+"/base")
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=shop")
	span := func() {
		t.Helper()
		tracer, err := trace.Open(t.Context(), "", "1", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		_, s := tracer.Request(httptest.NewRequest(http.MethodGet, "/", nil), "x")
		s.Answered(200, "")
		if err := tracer.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	span()
	if r := <-calls; r.URL.Path != "/base/v1/traces" || r.Header.Get("X-Tenant") != "shop" {
		t.Errorf("%s %v", r.URL.Path, r.Header)
	}
	t.Setenv("OTEL_TRACES_SAMPLER", "always_off")
	span()
	if len(calls) != 0 {
		t.Error("a span that was not sampled was sent")
	}
}

func TestNilTracer(t *testing.T) {
	var tr *trace.Tracer
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	ctx, s := tr.Request(r, "x")
	if ctx != r.Context() || s != nil {
		t.Error("a tracer that is off made a span")
	}
	_, part := tr.Part(ctx, "y")
	s.Set([2]string{"a", "b"})
	part.End(nil)
	s.Answered(200, "")
	if err := tr.Close(ctx); err != nil {
		t.Error(err)
	}
}
