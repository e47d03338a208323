// Package trace sends traces of the API's requests to a collector, by
// OpenTelemetry's protocol over HTTP. It is off unless asked for, and then
// costs nothing. Its spans name what was done to which key with what result:
// the same as the audit log's lines, with which they share the correlation id,
// and never more.
package trace

import (
	"context"
	"log/slog"
	"net/http"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Tracer makes spans. A nil one makes none. Safe for concurrent use.
type Tracer struct {
	provider *sdktrace.TracerProvider
	tracer   oteltrace.Tracer
	parent   propagation.TraceContext
}

// Wanted says whether traces are asked for: by an endpoint, or by
// OpenTelemetry's own variables.
func Wanted(endpoint string, getenv func(string) string) bool {
	if getenv("OTEL_SDK_DISABLED") == "true" || getenv("OTEL_TRACES_EXPORTER") == "none" {
		return false
	}
	return endpoint != "" || getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != ""
}

// Open sends to endpoint, the base URL of a collector, or to where
// OpenTelemetry's variables say. Those also rule headers, certificates,
// sampling and the resource. A collector that is away loses spans and holds up
// nobody: log hears of it.
func Open(ctx context.Context, endpoint, version string, log *slog.Logger) (*Tracer, error) {
	var opts []otlptracehttp.Option
	if endpoint != "" {
		opts = append(opts, otlptracehttp.WithEndpointURL(strings.TrimRight(endpoint, "/")+"/v1/traces"))
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("traces", "error", err) }))
	out, err := otlptracehttp.New(ctx, opts...)
	if err != nil {
		return nil, fault.New(fault.Usage, "send traces to", endpoint, err)
	}
	res, err := resource.New(ctx, resource.WithAttributes(semconv.ServiceName("kmsctl"), semconv.ServiceVersion(version)), resource.WithFromEnv())
	if err != nil {
		return nil, fault.New(fault.Usage, "read", "OTEL_RESOURCE_ATTRIBUTES", err)
	}
	p := sdktrace.NewTracerProvider(sdktrace.WithBatcher(out), sdktrace.WithResource(res))
	return &Tracer{provider: p, tracer: p.Tracer("github.com/kmsctl/kmsctl")}, nil
}

// Close sends what is left.
func (t *Tracer) Close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	return t.provider.Shutdown(ctx)
}

// Span is one thing that was done. A nil one ignores all calls.
type Span struct{ span oteltrace.Span }

// Request begins the span of a request, below the caller's where it sent one.
func (t *Tracer) Request(r *http.Request, name string) (context.Context, *Span) {
	if t == nil {
		return r.Context(), nil
	}
	_, path, _ := strings.Cut(r.Pattern, " ")
	ctx := t.parent.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
	ctx, s := t.tracer.Start(ctx, name, oteltrace.WithSpanKind(oteltrace.SpanKindServer),
		oteltrace.WithAttributes(semconv.HTTPRequestMethodKey.String(r.Method), semconv.HTTPRoute(path)))
	return ctx, &Span{s}
}

// Part begins a span within that of ctx.
func (t *Tracer) Part(ctx context.Context, name string) (context.Context, *Span) {
	if t == nil {
		return ctx, nil
	}
	ctx, s := t.tracer.Start(ctx, name)
	return ctx, &Span{s}
}

// Set adds what is known by now; empty values are left out.
func (s *Span) Set(pairs ...[2]string) {
	if s == nil {
		return
	}
	for _, p := range pairs {
		if p[1] != "" {
			s.span.SetAttributes(attribute.String(p[0], p[1]))
		}
	}
}

// Answered ends the span of a request. code is the reason of a refusal.
func (s *Span) Answered(status int, code string) {
	if s == nil {
		return
	}
	s.span.SetAttributes(semconv.HTTPResponseStatusCode(status))
	if code != "" {
		s.span.SetAttributes(semconv.ErrorTypeKey.String(code))
	}
	if status >= http.StatusInternalServerError {
		s.span.SetStatus(codes.Error, strconv.Itoa(status))
	}
	s.span.End()
}

// End ends a part. Of an error only its kind is told: its text may name more
// than a trace should.
func (s *Span) End(err error) {
	if s == nil {
		return
	}
	if err != nil {
		s.span.SetStatus(codes.Error, fault.KindOf(err).String())
	}
	s.span.End()
}
