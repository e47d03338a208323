// Package server is the HTTP API: routes as data, authentication,
// authorization before any look-up, an audit line before any reply, and the
// error bodies of Key Protect. It holds no rule of keys (internal/kms) or of
// rights (internal/iam).
package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/trace"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// maxLag is how old the view of the store may be: longer, and a revoked right
// might still be honoured, so requests are refused.
const maxLag = time.Second

// Auditor writes a line down for good before it returns. Ready says beforehand
// that it could not.
type Auditor interface {
	Append(ctx context.Context, e audit.Event) error
	Ready() error
	// Expect says that n more calls are under way whose events will be Expected,
	// or with -1 that one will not come.
	Expect(n int)
}

// Config joins the parts.
type Config struct {
	KMS   *kms.Service
	IAM   *iam.Service
	Audit Auditor
	Log   *slog.Logger
	// Lag is the age of the view of the store.
	Lag func() time.Duration
	// ServeStale answers by a view that is too old, and says so: what was
	// revoked meanwhile is honoured until the store is back.
	ServeStale bool
	// AuditHeads gives the signed heads of the audit logs.
	AuditHeads func(ctx context.Context) (kmsapi.AuditHeads, error)
	// Backup writes a copy of the store.
	Backup func(ctx context.Context, w io.Writer) error
	// Clearing plans and begins the clearing of the data.
	Clearing *kms.Clearing
	// Rotation changes the master keys.
	Rotation *kms.Rotation
	// Review asks Kubernetes whose a token is: a ServiceAccount as
	// namespace:name, or "". Nil where there is no Kubernetes.
	Review func(ctx context.Context, token string) (account string, err error)
	// Healthy lists what is wrong with the HSM; empty means ready.
	Healthy func(ctx context.Context) []string
	// Full says whether the store takes no writes: what it holds is served all
	// the same. Nil: never.
	Full   func() bool
	Limits Limits
	Trace  *trace.Tracer    // nil: no traces
	Now    func() time.Time // nil: the machine's clock
}

// Server answers the API. Safe for concurrent use.
type Server struct {
	Config
	mux     *http.ServeMux
	limits  *limiter
	metrics *metrics
	reviews *reviews
}

// New builds the routes.
func New(c Config) *Server {
	if c.Now == nil {
		c.Now = time.Now
	}
	s := &Server{Config: c, mux: http.NewServeMux(), limits: newLimiter(c.Limits, c.Now), metrics: newMetrics(c.Now)}
	s.reviews = &reviews{ask: c.Review, now: c.Now}
	s.metrics.ibm.name = s.instanceName
	s.Gauge("kmsctl_store_view_age_seconds", "Age of the view of the store; above 1 every request is refused, unless --stale-view says otherwise.", func() float64 { return c.Lag().Seconds() })
	s.Gauge("kmsctl_clock_ahead_seconds", "How far the machine's clock is ahead of the time that the life of keys goes by; negative: behind.", func() float64 { return c.KMS.ClockAhead().Seconds() })
	s.Gauge("kmsctl_clock_wrong", "1 when that is more than is believed: nothing is purged by the machine's clock.", func() float64 {
		if c.KMS.ClockFault() != nil {
			return 1
		}
		return 0
	})
	actions := map[string]route{}
	for _, r := range routes() {
		for _, p := range r.patterns() {
			s.mux.Handle(p, s.handler(r))
			if _, name, ok := strings.Cut(p, "/actions/"); ok {
				actions[name] = r
			}
		}
	}
	for _, p := range api("/keys/{id}") {
		s.mux.Handle("POST "+p, s.oldActions(actions))
	}
	for _, o := range openRoutes() {
		for _, p := range o.paths {
			s.mux.HandleFunc(o.method+" "+p, func(w http.ResponseWriter, r *http.Request) { o.handle(s, w, r) })
		}
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, kmsapi.NoSuchPath, "Request could not be served", r.Method+" "+r.URL.Path+" is not served")
	})
	return s
}

// Gauge adds a figure to /metrics.
func (s *Server) Gauge(name, help string, f func() float64) { s.metrics.gauge(name, help, f) }

func (s *Server) instanceName(ctx context.Context, id string) string {
	in, err := s.KMS.Instance(ctx, id)
	if err != nil {
		return ""
	}
	return in.Name
}

type localKey struct{}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Serve answers on l until ctx ends, then lets running requests finish.
// local marks a unix socket whose peers run as the same user: they are
// administrators. handler is a Server, or the Gate before one.
func Serve(ctx context.Context, handler http.Handler, log *slog.Logger, l net.Listener, local bool) error {
	return serve(ctx, handler, log, l, local, patience{header: 10 * time.Second, read: 30 * time.Second, write: time.Minute, finish: 10 * time.Second})
}

// patience is how long a client may take: for its headers, for the whole
// request, to take the answer; and how long a stop waits for calls under way.
type patience struct{ header, read, write, finish time.Duration }

func serve(ctx context.Context, handler http.Handler, log *slog.Logger, l net.Listener, local bool, p patience) error {
	h := &http.Server{
		Handler: handler, ReadHeaderTimeout: p.header, ReadTimeout: p.read, WriteTimeout: p.write, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, localKey{}, local && sameUser(c))
		},
	}
	done := make(chan error, 1)
	go func() { done <- h.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.finish)
	defer cancel()
	err := h.Shutdown(stop)
	if err != nil {
		err = errors.Join(err, h.Close())
	}
	if serr := <-done; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

func (s *Server) readyz(w http.ResponseWriter, r *http.Request) {
	h := kmsapi.Health{Reasons: s.reasons(r.Context())}
	h.Ready = len(h.Reasons) == 0
	if err := s.KMS.ClockFault(); err != nil {
		state, ahead := s.KMS.ClockState()
		h.Clock = &kmsapi.ClockHealth{State: state, AheadSeconds: int64(ahead / time.Second)}
		h.Warnings = append(h.Warnings, "clock: "+err.Error()+" (see: kmsctl clock)")
	}
	if keys, share := s.KMS.Near(); keys > 0 {
		h.KeyUse = &kmsapi.KeyUse{Near: keys, Furthest: share}
		h.Warnings = append(h.Warnings, fmt.Sprintf("keys: %d have encrypted half as many texts by AES-GCM as one version may, or more (see: kmsctl keys versions)", keys))
	}
	if silent := s.silent(); silent != "" && s.ServeStale {
		h.Warnings = append(h.Warnings, silent+": rights that were revoked since are honoured (--stale-view serve)")
	}
	if s.Full != nil && s.Full() {
		h.Warnings = append(h.Warnings, "storage: full, nothing is written until keys are purged, or it has a larger volume and is started again")
	}
	status := http.StatusOK
	if !h.Ready {
		status = http.StatusServiceUnavailable
	}
	writeJSON(w, status, h)
}

func (s *Server) reasons(ctx context.Context) []string {
	out := s.Healthy(ctx)
	if err := s.Audit.Ready(); err != nil {
		out = append(out, "audit: "+err.Error())
	}
	if silent := s.silent(); silent != "" && !s.ServeStale {
		out = append(out, silent)
	}
	return out
}

// silent says that the view of the store is too old; empty: it is not.
func (s *Server) silent() string {
	lag := s.Lag()
	if lag <= maxLag {
		return ""
	}
	return fmt.Sprintf("storage: silent for %s", lag.Round(100*time.Millisecond))
}

// call is one request on its way.
type call struct {
	*Server
	rt        route
	r         *http.Request
	status    int // of a success
	who       iam.Principal
	instance  string
	id        string // of the key, or of the object in the path
	ring      string
	body      []byte
	resHeader http.Header
	expected  bool // by the audit log
	found     *found
}

// found is what became of the look for the key in the path.
type found struct {
	id, ring string
	err      error
}

// resolve gives the id and the ring of the key in the path. It looks once:
// what was allowed is what is done.
func (c *call) resolve(ctx context.Context) (id, ring string, err error) {
	if c.found == nil {
		id, ring, err := c.KMS.Resolve(ctx, c.instance, c.id)
		c.found = &found{id, ring, err}
	}
	return c.found.id, c.found.ring, c.found.err
}

// route is one endpoint.
type route struct {
	methods string // "POST", or several with a blank between
	paths   []string
	name    string // audit action
	what    string // what could not be done, for errors
	action  iam.Action
	scope   scope
	status  int
	handle  func(ctx context.Context, c *call) (any, error)
}

// scope says what a right must cover for the call.
type scope int

const (
	inInstance scope = iota // the instance of the header
	inRing                  // the key ring of the header, the default one without
	onKey                   // the key in the path, within the instance
	everywhere              // no instance: administration
	managing                // of an administrator nothing, else the whole instance of the header
)

// inside says whether every call is in an instance.
func (s scope) inside() bool { return s == inInstance || s == inRing || s == onKey }

func (r route) patterns() []string {
	var out []string
	for _, m := range strings.Fields(r.methods) {
		for _, p := range r.paths {
			out = append(out, m+" "+p)
		}
	}
	return out
}

// oldActions serves the older form of actions, POST /keys/{id}?action=x.
func (s *Server) oldActions(actions map[string]route) http.Handler {
	handlers := map[string]http.Handler{}
	for name, rt := range actions {
		handlers[name] = s.handler(rt)
	}
	unknown := s.handler(route{name: "kms.secrets.action", what: "Action could not be performed on key", action: iam.KeysMetadata, scope: onKey,
		handle: func(context.Context, *call) (any, error) {
			return nil, badParam("action", "one of "+strings.Join(slices.Sorted(maps.Keys(actions)), ", "))
		}})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := handlers[r.URL.Query().Get("action")]
		if h == nil {
			h = unknown
		}
		h.ServeHTTP(w, r)
	})
}

func (s *Server) handler(rt route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		s.metrics.running.Inc()
		defer s.metrics.running.Dec()
		corr := correlate(w, r)
		c := &call{Server: s, rt: rt, r: r, id: r.PathValue("id"), status: rt.status, resHeader: w.Header()}
		defer func() {
			if c.expected { // it was broken off
				s.Audit.Expect(-1)
			}
		}()
		ctx, span := s.Trace.Request(r, rt.name)
		body, err := s.do(ctx, rt, c)
		var lim *limited
		errors.As(err, &lim)
		status, code, message, what := c.status, "", "", rt.what
		if err != nil {
			var lead string
			code, lead, message = publicError(err)
			if lead != "" {
				what += ": " + lead
			}
			status = kmsapi.StatusOf(code)
		}
		e := audit.Event{Action: rt.name, Outcome: "success", Status: status, Principal: c.who.String(), Instance: c.instance, Key: c.id,
			CorrelationID: corr, Remote: remote(r), Expected: c.expected}
		if err != nil {
			e.Outcome, e.Detail = "failure", code
		}
		c.expected = false
		if lim != nil {
			s.metrics.limited.WithLabelValues(lim.name).Inc()
		} else if aerr := s.append(ctx, e); aerr != nil {
			// What is not written down does not happen for the caller.
			s.Log.Error("audit", "error", aerr)
			status, code, message, err = http.StatusServiceUnavailable, kmsapi.Unavailable, "", aerr
		}
		if err != nil {
			retryAfter(w.Header(), code, lim)
			writeError(w, code, what, message)
		} else if st, ok := body.(stream); ok {
			s.stream(w, r, rt, corr, st)
		} else {
			writeJSON(w, status, body)
		}
		span.Set([2]string{"kmsctl.correlation_id", corr}, [2]string{"kmsctl.principal", e.Principal}, [2]string{"kmsctl.instance", e.Instance}, [2]string{"kmsctl.key", e.Key})
		span.Answered(status, code)
		s.metrics.done(rt, c.instance, status, time.Since(start))
		level := slog.LevelInfo
		attrs := []slog.Attr{slog.String("route", rt.name), slog.Int("status", status), slog.Float64("ms", float64(time.Since(start).Microseconds())/1000),
			slog.String("correlation", corr)}
		if status >= http.StatusInternalServerError {
			level = slog.LevelError
			attrs = append(attrs, slog.String("error", err.Error()))
		}
		s.Log.LogAttrs(r.Context(), level, "request", attrs...)
	})
}

// correlate gives the id by which a request is found again, the caller's where
// there is one, and answers with it.
func correlate(w http.ResponseWriter, r *http.Request) string {
	corr := r.Header.Get(kmsapi.HeaderCorrelation)
	if len(corr) > 128 || corr == "" {
		corr = uuid.NewString()
	}
	w.Header().Set(kmsapi.HeaderCorrelation, corr)
	return corr
}

// append writes e down, whatever becomes of the call.
func (s *Server) append(ctx context.Context, e audit.Event) error {
	ctx, span := s.Trace.Part(ctx, "audit")
	err := s.Audit.Append(context.WithoutCancel(ctx), e)
	span.End(err)
	return err
}

// do is the order that every call keeps: is the view fresh, who is it, may
// they, and only then look anything up.
func (s *Server) do(ctx context.Context, rt route, c *call) (any, error) {
	if lag := s.Lag(); lag > maxLag && !s.ServeStale {
		return nil, fault.Newf(fault.Unreachable, "", "", "the view of the store is %s old", lag).WithReason(kmsapi.Unavailable)
	}
	if err := s.Audit.Ready(); err != nil { // nothing is begun that could not be written down
		return nil, fault.New(fault.Unreachable, "", "", err).WithReason(kmsapi.Unavailable)
	}
	var err error
	if c.who, err = s.authenticate(ctx, c.r); err != nil {
		return nil, errors.Join(s.limits.take("from "+remote(c.r)), err)
	}
	if c.who != iam.LocalAdmin() {
		if err := s.limits.take(c.who.String()); err != nil {
			return nil, err
		}
	}
	if rt.scope.inside() || rt.scope == managing && !c.who.Admin() {
		c.instance = instanceOf(c.r)
	}
	if uuid.Validate(c.instance) != nil {
		c.instance = ""
		if rt.scope.inside() {
			return nil, fault.Newf(fault.Usage, "", "", "instance header missing or no UUID").WithReason(kmsapi.InvalidInstance)
		}
	}
	if rt.scope.inside() {
		c.ring = c.r.Header.Get(kmsapi.HeaderKeyRing)
	}
	if rt.scope == inRing && c.ring == "" {
		c.ring = kmsapi.DefaultKeyRing
	}
	if err := s.authorize(ctx, rt, c); err != nil {
		return nil, err
	}
	if rt.scope == onKey {
		id, ring, err := c.resolve(ctx)
		if err != nil {
			return nil, err
		}
		if c.ring != "" && c.ring != ring {
			return nil, fault.Newf(fault.NotFound, "", c.id, "the key is in another ring").WithReason(kmsapi.KeyNotFound)
		}
		c.id = id
	}
	if err := c.readBody(); err != nil {
		return nil, err
	}
	defer clear(c.body)
	leave, err := s.limits.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	s.Audit.Expect(1)
	c.expected = true
	ctx, span := s.Trace.Part(ctx, "perform")
	out, err := rt.handle(ctx, c)
	span.End(err)
	return out, err
}

// usualBody is up to which size memory is given at a caller's word.
const usualBody = 16 << 10

func (c *call) readBody() (err error) {
	if c.r.Body == nil {
		return nil
	}
	if n := c.r.ContentLength; n >= 0 && n <= usualBody { // the reader ends there
		c.body = make([]byte, n)
		_, err = io.ReadFull(c.r.Body, c.body)
	} else {
		c.body, err = io.ReadAll(io.LimitReader(c.r.Body, kmsapi.MaxBody+1))
	}
	if err != nil {
		return fault.New(fault.Usage, "read", "body", err).WithReason(kmsapi.BadBody)
	}
	if len(c.body) > kmsapi.MaxBody {
		return fault.Newf(fault.Usage, "read", "body", "more than %d bytes", kmsapi.MaxBody).WithReason(kmsapi.TooLarge)
	}
	return nil
}

func (s *Server) authorize(ctx context.Context, rt route, c *call) error {
	res := iam.Resource{Instance: c.instance}
	if rt.scope == onKey {
		res.Key = c.id
		res.Resolve = func() (string, string) {
			id, ring, err := c.resolve(ctx)
			if err != nil { // what cannot be found is covered by no policy on a key or a ring
				return "", ""
			}
			return id, ring
		}
	} else {
		res.KeyRing = c.ring
	}
	err := s.IAM.Authorize(ctx, c.who, rt.action, res)
	if err == nil && c.instance != "" && c.who.Kind != iam.KindLocal {
		var allowed bool
		if allowed, err = s.KMS.AllowsAddress(ctx, c.instance, remote(c.r)); err == nil && !allowed {
			return fault.Newf(fault.Denied, "", "", "the instance's policy does not allow this address").WithReason(kmsapi.ConfigRule)
		}
	}
	if fault.KindOf(err) == fault.Denied {
		return fault.New(fault.Denied, "", "", err).WithReason(kmsapi.Forbidden)
	}
	return err
}

func instanceOf(r *http.Request) string {
	if v := r.Header.Get(kmsapi.HeaderInstance); v != "" {
		return v
	}
	return r.Header.Get(kmsapi.HeaderInstanceICP)
}

func remote(r *http.Request) string {
	if local, _ := r.Context().Value(localKey{}).(bool); local {
		return "local"
	}
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return ""
	}
	return host
}

// publicError gives the code and the texts that a caller may see: a lead that
// the summary ends with, and the message. A fault with a reason says its own
// cause; everything else is one of a few general texts.
func publicError(err error) (code, lead, message string) {
	var f *fault.Error
	if !errors.As(err, &f) || !kmsapi.Known(f.Reason) {
		code, message = generalError(err)
		return code, "", message
	}
	switch f.Reason {
	case kmsapi.InvalidField, kmsapi.InvalidQuery, kmsapi.TooEarly, kmsapi.ClockAhead:
		message = f.Err.Error()
	case kmsapi.InvalidState, kmsapi.KeyExpired, kmsapi.AuthorizationsLack:
		lead = f.Op
	case kmsapi.BadBody:
		if why := f.Err.Error(); strings.HasPrefix(why, "json: unknown field") || strings.HasPrefix(why, twicePrefix) || strings.HasPrefix(why, "Only ") {
			message = kmsapi.MessageOf(kmsapi.BadBody) + ": " + why
		}
	}
	return f.Reason, lead, message
}

func generalError(err error) (code, message string) {
	switch fault.KindOf(err) {
	case fault.Usage:
		return kmsapi.InvalidField, err.Error()
	case fault.Denied:
		return kmsapi.Forbidden, ""
	case fault.NotFound:
		return kmsapi.KeyNotFound, err.Error()
	case fault.Conflict:
		return kmsapi.Conflict, err.Error()
	case fault.Unreachable, fault.NotReady:
		return kmsapi.Unavailable, ""
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return kmsapi.Unavailable, ""
	}
	return kmsapi.Internal, ""
}

func writeError(w http.ResponseWriter, code, what, message string) {
	writeJSON(w, kmsapi.StatusOf(code), kmsapi.NewErrors(code, what, message))
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	if v == nil {
		w.WriteHeader(status)
		return
	}
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	defer clear(b)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(b) // a caller who is gone cannot be told
}
