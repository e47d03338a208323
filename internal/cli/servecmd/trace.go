package servecmd

import (
	"context"
	"log/slog"
	"net/url"
	"time"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/trace"
)

// TraceFlags say where traces go; they are off by default.
type TraceFlags struct {
	set      bool
	endpoint string
}

// Add puts the flags into fs.
func (f *TraceFlags) Add(fs *pflag.FlagSet) {
	f.set = true
	fs.StringVar(&f.endpoint, "otlp-endpoint", "", "base URL of an OpenTelemetry collector that gets traces, as in http://127.0.0.1:4318; OTEL_* variables count too")
}

// Check holds the rules of the flags.
func (f *TraceFlags) Check() error {
	if u, err := url.Parse(f.endpoint); f.endpoint != "" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		return fault.Usagef("--otlp-endpoint: %q is no http:// or https:// URL", f.endpoint)
	}
	return nil
}

// flushMost is how long an end waits for a collector to take the last spans.
const flushMost = 3 * time.Second

// Open begins tracing where it is asked for; stop sends what is left.
func (f *TraceFlags) Open(ctx context.Context, a *app.App, log *slog.Logger) (t *trace.Tracer, stop func(), err error) {
	if !f.set || !trace.Wanted(f.endpoint, a.Getenv) {
		return nil, func() {}, nil
	}
	if t, err = trace.Open(ctx, f.endpoint, a.Version, log); err != nil {
		return nil, nil, err
	}
	return t, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushMost)
		defer cancel()
		if err := t.Close(ctx); err != nil {
			log.Warn("traces", "error", err)
		}
	}, nil
}
