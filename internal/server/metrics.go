package server

import (
	"context"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are what /metrics shows. No label holds a key, a person or an
// address; the two gauges of Key Protect name the instance.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	limited  *prometheus.CounterVec
	running  prometheus.Gauge
	ibm      *ibmGauges
}

func newMetrics(now func() time.Time) *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), ibm: &ibmGauges{now: now},
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kmsctl_requests_total", Help: "Requests answered, by audit action and HTTP status."}, []string{"action", "status"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "kmsctl_request_duration_seconds", Help: "Time to answer a request, its audit record included.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1, 5, 30}}, []string{"action"}),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kmsctl_limited_total", Help: "Requests refused by a limit, without an audit record: rate (429) or load (503)."}, []string{"limit"}),
		running: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kmsctl_requests_in_flight", Help: "Requests under way."}),
	}
	m.registry.MustRegister(m.requests, m.duration, m.limited, m.running, m.ibm)
	return m
}

// gauge adds a figure that is read when it is asked for.
func (m *metrics) gauge(name, help string, f func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
}

// done counts an answered request.
func (m *metrics) done(rt route, instance string, status int, took time.Duration) {
	code := strconv.Itoa(status)
	m.requests.WithLabelValues(rt.name, code).Inc()
	m.duration.WithLabelValues(rt.name).Observe(took.Seconds())
	if rt.scope.inside() && instance != "" {
		m.ibm.count(rt.name, code, instance, took)
	}
}

// handler shows this server's metrics and the process's own: Go's runtime,
// and of an embedded storage etcd's.
func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(prometheus.Gatherers{m.registry, prometheus.DefaultGatherer}, promhttp.HandlerOpts{})
}

// ibmGauges are the two metrics that Key Protect sends to a monitoring
// instance: the number of requests of the last whole minute, and their mean
// latency in milliseconds.
type ibmGauges struct {
	now  func() time.Time
	name func(ctx context.Context, instance string) string

	mu        sync.Mutex
	minute    int64 // of now, since 1970
	this, old map[ibmKey]ibmSum
}

type ibmKey struct{ api, code, instance string }

type ibmSum struct {
	n    int
	took time.Duration
}

// maxSeries bounds the memory that callers' instance headers can take.
const maxSeries = 5000

// turn moves on to the present minute; the lock is held.
func (g *ibmGauges) turn() {
	minute := g.now().Unix() / 60
	switch {
	case minute == g.minute+1:
		g.old, g.this = g.this, map[ibmKey]ibmSum{}
	case minute != g.minute:
		g.old, g.this = nil, map[ibmKey]ibmSum{}
	}
	g.minute = minute
}

func (g *ibmGauges) count(api, code, instance string, took time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.turn()
	k := ibmKey{api, code, instance}
	s, known := g.this[k]
	if !known && len(g.this) >= maxSeries {
		return
	}
	s.n++
	s.took += took
	g.this[k] = s
}

var (
	ibmLabels = []string{"ibm_kms_api", "ibm_kms_response_code", "ibm_service_instance", "ibm_resource", "ibm_resource_type", "ibm_ctype",
		"ibm_location", "ibm_scope", "ibm_service_name", "ibm_service_instance_name", "ibm_resource_group_name"}
	ibmRequests = prometheus.NewDesc("ibm_kms_api_request_gauge", "Requests of the last whole minute.", ibmLabels, nil)
	ibmLatency  = prometheus.NewDesc("ibm_kms_api_latency_gauge", "Their mean latency in milliseconds.", ibmLabels, nil)
)

// Describe is part of prometheus.Collector.
func (g *ibmGauges) Describe(ch chan<- *prometheus.Desc) {
	ch <- ibmRequests
	ch <- ibmLatency
}

// Collect is part of prometheus.Collector.
func (g *ibmGauges) Collect(ch chan<- prometheus.Metric) {
	g.mu.Lock()
	g.turn()
	old := g.old // nobody writes it any more
	g.mu.Unlock()
	names := map[string]string{}
	for k, s := range old {
		name, known := names[k.instance]
		if !known && g.name != nil {
			name = g.name(context.Background(), k.instance)
			names[k.instance] = name
		}
		labels := []string{k.api, k.code, k.instance, "", "instance", "private", "local", "", "kms", name, ""}
		ch <- prometheus.MustNewConstMetric(ibmRequests, prometheus.GaugeValue, float64(s.n), labels...)
		ch <- prometheus.MustNewConstMetric(ibmLatency, prometheus.GaugeValue, float64(s.took.Microseconds())/1000/float64(s.n), labels...)
	}
}
