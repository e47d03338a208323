// Package watcher looks after a running release: it fills Secrets that ask for
// an instance id, watches the API's health, and renews the certificates. One
// watcher leads, the others stand by. It holds no key but its own API key.
package watcher

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/pki"
)

// Annotation on a Secret of any watched namespace names the data entry that
// gets an instance id.
const Annotation = "ibm.com/kms.instanceID"

// Cluster is what the watcher needs of Kubernetes.
type Cluster interface {
	// Lead runs f while this process leads, and returns when ctx ends.
	Lead(ctx context.Context, namespace, name, identity string, f func(ctx context.Context)) error
	// WatchAnnotated sends Secrets that have the annotation, until ctx ends.
	WatchAnnotated(ctx context.Context, namespaces []string, annotation string, found func(cluster.Annotated)) error
	// FillSecret sets an entry that is absent or empty, by compare-and-set.
	FillSecret(ctx context.Context, namespace, name, entry string, value []byte) (bool, error)
	Secret(ctx context.Context, namespace, name string) (cluster.Secret, error)
	// UpdateSecret replaces the data of a Secret that is there.
	UpdateSecret(ctx context.Context, s cluster.Secret) error
	// Event tells about an object of the cluster.
	Event(ctx context.Context, e cluster.Event) error
}

// Instances makes instances, or finds them by name.
type Instances interface {
	Ensure(ctx context.Context, name string) (id string, err error)
}

// Config of a watcher.
type Config struct {
	Cluster            Cluster
	Instances          Instances
	Ready              func(ctx context.Context) error // nil when the API is ready
	Release, Namespace string
	Identity           string
	Namespaces         []string // whose Secrets are filled; none: all
	Now                func() time.Time
	Log                *slog.Logger
	HealthEvery        time.Duration
	RenewEvery         time.Duration
}

// Watcher is one watcher. Run it once.
type Watcher struct {
	Config

	mu      sync.Mutex
	leading bool
	seen    bool // the API's health was asked at least once
	problem string
	expiry  map[string]time.Time
	filled  int
	failed  int
	renewed int
}

// New makes a watcher.
func New(c Config) *Watcher {
	if c.HealthEvery == 0 {
		c.HealthEvery = 10 * time.Second
	}
	if c.RenewEvery == 0 {
		c.RenewEvery = time.Hour
	}
	return &Watcher{Config: c, expiry: map[string]time.Time{}}
}

// Run watches until ctx ends.
func (w *Watcher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { w.every(ctx, w.HealthEvery, w.health) })
	err := w.Cluster.Lead(ctx, w.Namespace, w.Release+"-watcher", w.Identity, w.lead)
	cancel()
	wg.Wait()
	return err
}

// lead does what only one watcher may do.
func (w *Watcher) lead(ctx context.Context) {
	w.set(func() { w.leading = true })
	w.Log.Info("leading")
	defer w.set(func() { w.leading = false })
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { w.every(ctx, w.RenewEvery, w.renew) })
	err := w.Cluster.WatchAnnotated(ctx, w.Namespaces, Annotation, func(a cluster.Annotated) { w.fill(ctx, a) })
	if err != nil && ctx.Err() == nil {
		w.Log.Error("watch Secrets", "error", err)
	}
}

func (w *Watcher) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *Watcher) every(ctx context.Context, d time.Duration, f func(context.Context)) {
	t := time.NewTicker(d)
	defer t.Stop()
	for {
		f(ctx)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// health asks the API whether it is ready, and tells when the answer changes.
func (w *Watcher) health(ctx context.Context) {
	problem := ""
	if err := w.Ready(ctx); err != nil {
		problem = err.Error()
	}
	if ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	changed := !w.seen || w.problem != problem
	w.seen, w.problem = true, problem
	leading := w.leading
	w.mu.Unlock()
	if !changed {
		return
	}
	e := cluster.Event{Namespace: w.Namespace, Kind: "StatefulSet", Name: install.API(w.Release), Reason: "KMSReady", Message: "the API is ready"}
	if problem == "" {
		w.Log.Info("the API is ready")
	} else {
		w.Log.Warn("the API is not ready", "error", problem)
		e.Warning, e.Reason, e.Message = true, "KMSNotReady", problem
	}
	if leading {
		w.tell(ctx, e)
	}
}

func (w *Watcher) tell(ctx context.Context, e cluster.Event) {
	if err := w.Cluster.Event(ctx, e); err != nil && ctx.Err() == nil {
		w.Log.Warn("write event", "reason", e.Reason, "error", err)
	}
}

// fill gives a Secret its instance id. The instance has the Secret's name, so
// that a second try after half of the work finds it again.
func (w *Watcher) fill(ctx context.Context, a cluster.Annotated) {
	log := w.Log.With("secret", a.Namespace+"/"+a.Name, "entry", a.Value)
	if a.Value == "" || a.Has {
		return
	}
	id, err := w.Instances.Ensure(ctx, a.Namespace+"."+a.Name)
	if err == nil {
		var set bool
		if set, err = w.Cluster.FillSecret(ctx, a.Namespace, a.Name, a.Value, []byte(id)); err == nil && set {
			w.set(func() { w.filled++ })
			log.Info("filled", "instance", id)
			return
		}
	}
	if err != nil && ctx.Err() == nil {
		w.set(func() { w.failed++ })
		log.Warn("fill Secret", "error", err, "hint", fault.HintOf(err))
		w.tell(ctx, cluster.Event{Namespace: a.Namespace, Kind: "Secret", Name: a.Name, Warning: true, Reason: "KMSInstance", Message: err.Error()})
	}
}

// renew makes certificates anew before they end. Who serves them reads them
// again by itself, so nothing restarts.
func (w *Watcher) renew(ctx context.Context) {
	ca, err := w.Cluster.Secret(ctx, w.Namespace, install.CASecret(w.Release))
	if err != nil {
		if ctx.Err() == nil {
			w.Log.Error("read the CA", "error", err)
		}
		return
	}
	for _, l := range install.Leaves(w.Release, w.Namespace, "", "") {
		if err := w.renewOne(ctx, pki.Pair{Cert: ca.Data["ca.crt"], Key: ca.Data["ca.key"]}, l); err != nil && ctx.Err() == nil {
			w.Log.Error("renew certificate", "secret", l.Secret, "error", err)
			w.tell(ctx, cluster.Event{Namespace: w.Namespace, Kind: "Secret", Name: l.Secret, Warning: true, Reason: "KMSCertificate", Message: err.Error()})
		}
	}
}

func (w *Watcher) renewOne(ctx context.Context, ca pki.Pair, l install.Leaf) error {
	s, err := w.Cluster.Secret(ctx, w.Namespace, l.Secret)
	if err != nil {
		return err
	}
	old, err := tls.X509KeyPair(s.Data["tls.crt"], s.Data["tls.key"])
	if err != nil {
		return fault.New(fault.BadContent, "read certificate", l.Secret, err).WithHint("run `kmsctl install` again: it makes broken certificates anew")
	}
	end := old.Leaf.NotAfter
	if w.Now().Add(install.RenewBefore).After(end) {
		// The names stand in the old one, those that an operator added too.
		hosts, err := pki.Hosts(s.Data["tls.crt"])
		if err != nil {
			return err
		}
		leaf, err := pki.Issue(ca, old.Leaf.Subject.CommonName, l.Use, hosts, w.Now())
		if err != nil {
			return err
		}
		fresh := install.TLSSecret(w.Namespace, l.Secret, s.Labels, ca.Cert, leaf)
		if err := w.Cluster.UpdateSecret(ctx, fresh); err != nil {
			return err
		}
		made, err := tls.X509KeyPair(leaf.Cert, leaf.Key)
		if err != nil {
			return err
		}
		w.set(func() { w.renewed++ })
		w.Log.Info("renewed certificate", "secret", l.Secret, "ended", end.UTC().Format(time.RFC3339), "ends", made.Leaf.NotAfter.UTC().Format(time.RFC3339))
		end = made.Leaf.NotAfter
	}
	w.set(func() { w.expiry[l.Secret] = end })
	return nil
}

// Handler serves /livez, /readyz and /metrics.
func (w *Watcher) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprintln(rw, "ok") })
	mux.HandleFunc("GET /readyz", w.readyz)
	mux.HandleFunc("GET /metrics", w.metrics)
	return mux
}

func (w *Watcher) readyz(rw http.ResponseWriter, _ *http.Request) {
	w.mu.Lock()
	seen, problem := w.seen, w.problem
	w.mu.Unlock()
	switch {
	case !seen:
		http.Error(rw, "the API was not asked yet", http.StatusServiceUnavailable)
	case problem != "":
		http.Error(rw, problem, http.StatusServiceUnavailable)
	default:
		fmt.Fprintln(rw, "ok")
	}
}

// metrics are few enough to be written by hand, in Prometheus' text format.
func (w *Watcher) metrics(rw http.ResponseWriter, _ *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var b strings.Builder
	metric := func(name, kind, help string, lines ...string) {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
		for _, l := range lines {
			fmt.Fprintf(&b, "%s%s\n", name, l)
		}
	}
	metric("kms_watcher_leading", "gauge", "1 while this watcher leads.", fmt.Sprintf(" %d", bit(w.leading)))
	metric("kms_api_ready", "gauge", "1 while the API says that it is ready.", fmt.Sprintf(" %d", bit(w.seen && w.problem == "")))
	metric("kms_watcher_secrets_filled_total", "counter", "Secrets that got an instance id.", fmt.Sprintf(" %d", w.filled))
	metric("kms_watcher_secrets_failed_total", "counter", "Attempts to fill a Secret that failed.", fmt.Sprintf(" %d", w.failed))
	metric("kms_watcher_certificates_renewed_total", "counter", "Certificates that were made anew.", fmt.Sprintf(" %d", w.renewed))
	var ends []string
	for name, end := range w.expiry {
		ends = append(ends, fmt.Sprintf("{secret=%q} %d", name, end.Unix()))
	}
	slices.Sort(ends)
	metric("kms_certificate_expiry_seconds", "gauge", "End of a certificate, in Unix seconds.", ends...)
	rw.Header().Set("Content-Type", "text/plain; version=0.0.4")
	_, _ = rw.Write([]byte(b.String()))
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}
