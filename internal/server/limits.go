package server

import (
	"context"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Limits bound what callers can make the service do. The zero value of a
// field is no limit.
type Limits struct {
	Rate    float64       // calls a second of one identity, or failed proofs of one address
	Burst   int           // calls that may come at once; 0: twice the rate
	Running int           // calls that work at the same time
	Waiting int           // calls that wait for their turn; those beyond are shed
	Wait    time.Duration // how long one waits before it is shed
}

// DefaultLimits keep one caller from starving the others, and the service
// from drowning.
func DefaultLimits() Limits {
	return Limits{Rate: 1000, Running: 256, Waiting: 1024, Wait: 2 * time.Second}
}

// shed is what Retry-After says when the service is loaded, in seconds.
const shed = 1

// limited is a refusal by a limit. No audit line is written of one, or a
// flood would fill the disk: metrics count them.
type limited struct {
	name  string // of the limit: rate or load
	after int    // seconds
	err   error
}

func (l *limited) Error() string { return l.err.Error() }
func (l *limited) Unwrap() error { return l.err }

// limiter keeps the limits. Safe for concurrent use.
type limiter struct {
	Limits
	now     func() time.Time
	running chan struct{} // nil: no limit
	waiting chan struct{}

	mu      sync.Mutex
	buckets map[string]*bucket
}

// bucket holds tokens as of a moment; a call takes one.
type bucket struct {
	tokens float64
	at     time.Time
}

func newLimiter(l Limits, now func() time.Time) *limiter {
	if l.Burst <= 0 {
		l.Burst = int(math.Ceil(2 * l.Rate))
	}
	m := &limiter{Limits: l, now: now, buckets: map[string]*bucket{}}
	if l.Running > 0 {
		m.running, m.waiting = make(chan struct{}, l.Running), make(chan struct{}, l.Running+l.Waiting)
	}
	return m
}

// maxBuckets bounds the memory for identities; full buckets are as good as
// none.
const maxBuckets = 10_000

// take takes a token of who, or says when there is one.
func (m *limiter) take(who string) error {
	if m.Rate <= 0 {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	b := m.buckets[who]
	if b == nil {
		if len(m.buckets) >= maxBuckets {
			m.sweep(now)
		}
		b = &bucket{tokens: float64(m.Burst), at: now}
		m.buckets[who] = b
	}
	if d := now.Sub(b.at); d > 0 { // a clock that jumps back gives nothing and takes nothing
		b.tokens = min(float64(m.Burst), b.tokens+d.Seconds()*m.Rate)
	}
	b.at = now
	if b.tokens < 1 {
		after := int(math.Ceil((1 - b.tokens) / m.Rate))
		return &limited{"rate", after, fault.Newf(fault.Unreachable, "", "", "more than %g calls a second", m.Rate).WithReason(kmsapi.TooManyRequests)}
	}
	b.tokens--
	return nil
}

// sweep drops the buckets that are full by now; the lock is held. When none
// is, all go: to forget is better than to grow.
func (m *limiter) sweep(now time.Time) {
	for who, b := range m.buckets {
		if b.tokens+now.Sub(b.at).Seconds()*m.Rate >= float64(m.Burst) {
			delete(m.buckets, who)
		}
	}
	if len(m.buckets) >= maxBuckets {
		clear(m.buckets)
	}
}

func overloaded() error {
	return &limited{"load", shed, fault.Newf(fault.Unreachable, "", "", "too many calls at once").WithReason(kmsapi.Unavailable)}
}

// enter waits for a turn; leave ends it.
func (m *limiter) enter(ctx context.Context) (leave func(), err error) {
	if m.running == nil {
		return func() {}, nil
	}
	select {
	case m.waiting <- struct{}{}:
	default:
		return nil, overloaded()
	}
	leave = func() { <-m.running; <-m.waiting }
	select {
	case m.running <- struct{}{}:
		return leave, nil
	default:
	}
	late := time.NewTimer(m.Wait)
	defer late.Stop()
	select {
	case m.running <- struct{}{}:
		return leave, nil
	case <-late.C:
		<-m.waiting
		return nil, overloaded()
	case <-ctx.Done():
		<-m.waiting
		return nil, fault.New(fault.Unreachable, "", "", ctx.Err()).WithReason(kmsapi.Unavailable)
	}
}

// soon is what Retry-After says while the HSM or the storage is away, in
// seconds: one that is back is used within this time.
const soon = "2"

// retryAfter says when to come again, for refusals that pass by.
func retryAfter(h http.Header, code string, lim *limited) {
	switch {
	case lim != nil:
		h.Set("Retry-After", strconv.Itoa(lim.after))
	case code == kmsapi.Unavailable:
		h.Set("Retry-After", soon)
	}
}
