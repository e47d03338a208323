package servecmd

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/internal/store"
)

type apiOptions struct {
	*app.App
	listen      string
	behind      behindFlags
	cert, key   string
	clientCA    string
	accounts    bool
	audiences   []string
	adminHashes []string
	auditDir    string
	name        string
	apart       bool
	windows     WindowFlags
	audit       AuditFlags
	limit       LimitFlags
	signing     SigningFlags
	trace       TraceFlags
}

func newRunAPICmd(a *app.App, run func(context.Context, *apiOptions) error) *cobra.Command {
	o := &apiOptions{App: a}
	if run == nil {
		run = runAPI
	}
	cmd := &cobra.Command{
		Use: "api", Short: "Serve the API over an etcd and a connector that run elsewhere", Args: cobra.NoArgs,
		Long: `Serve the API. It stays up and not ready, and says why on /readyz, while the HSM, its
password or etcd is not right, and goes on by itself when they are. A password that the HSM
refused is not tried again until the secret changes.

With --to-socket it has a second HSM, to which "kmsctl hsm migrate" moves all keys. Every
replica of the API needs both until the move is over; one of them works on it, and another
goes on when that one dies.`,
		Example: `  kmsctl run api --listen :28674 --connector-socket /run/kms/connector.sock --etcd-endpoints https://storage:2379 …
  kmsctl run api --connector-socket /run/kms/connector.sock --to-socket /run/kms/next.sock …`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	fs.StringVar(&o.listen, "listen", ":28674", "address of the API")
	o.behind.Add(fs)
	o.behind.AddNext(fs, func(label string) {
		newLogger(a.Err).Info("all keys have moved, and the second HSM does alone", "token", label, "hint", "it can be given alone: see `kmsctl hsm migrate --help`")
	})
	fs.StringVar(&o.cert, "tls-cert-file", "", "certificate of the API")
	fs.StringVar(&o.key, "tls-key-file", "", "its key")
	fs.StringVar(&o.clientCA, "client-ca-file", "", "CA of client certificates, by which service IDs can be proved")
	fs.BoolVar(&o.accounts, "service-account-tokens", false, "take tokens of this cluster's ServiceAccounts too; needs the right to create TokenReviews")
	fs.StringSliceVar(&o.audiences, "token-audience", nil, "audience for which such a token must be made; repeatable; without it, "+app.TokenAudience+" or the cluster's own API server")
	fs.StringArrayVar(&o.adminHashes, "admin-key-hash-file", nil, "JSON with id and hash of an administrator's API key; repeatable")
	fs.StringVar(&o.auditDir, "audit-dir", "", "folder of the audit log")
	fs.StringVar(&o.name, "name", "", "name of this replica, which no other has; without it, the host's")
	fs.BoolVar(&o.apart, "token-per-replica", false, "replicas use tokens of their own, with the same master keys (clones, or nShield clients with files of their own): keep nothing in one of them that the others would lack")
	o.windows.Add(fs)
	o.audit.Add(cmd)
	o.limit.Add(cmd)
	o.signing.Add(fs)
	o.trace.Add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *apiOptions) Check() error {
	errs := []error{o.behind.Check(), o.audit.Check(), o.limit.Check(), o.signing.Check(), o.trace.Check()}
	for name, v := range map[string]string{"tls-cert-file": o.cert, "tls-key-file": o.key, "audit-dir": o.auditDir} {
		if v == "" {
			errs = append(errs, fault.Usagef("--%s: missing", name))
		}
	}
	if len(o.audiences) > 0 && !o.accounts {
		errs = append(errs, fault.Usagef("--token-audience: needs --service-account-tokens"))
	}
	if _, err := o.windows.Windows(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func runAPI(ctx context.Context, o *apiOptions) error {
	log := newLogger(o.Err)
	cfg, err := FileTLS(o.cert, o.key, o.clientCA)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fault.New(fault.Conflict, "listen on", o.listen, err)
	}
	gate := server.NewGate("starting")
	// The KMS outlives the last request: it is closed after the listener.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	opened := make(chan struct{})
	go func() {
		defer close(opened)
		o.openBehind(life, gate, log)
	}()
	log.Info("listening", "listen", l.Addr().String())
	err = ServeAll(ctx, gate, log, nil, Listener{Listener: tls.NewListener(l, cfg)})
	stop()
	<-opened
	return err
}

// Pauses between two attempts to open the KMS.
const (
	firstPause  = 200 * time.Millisecond
	awayPause   = time.Second      // the HSM or the storage is not there: it may be back at any moment
	deniedPause = 10 * time.Second // a person must do something first
)

// longestPause is for what the last attempt failed by.
func longestPause(err error) time.Duration {
	switch fault.KindOf(err) {
	case fault.Unreachable, fault.NotFound, fault.NotReady: // an HSM that is away shows no token
		return awayPause
	default:
		return deniedPause
	}
}

// openBehind opens the KMS behind the gate, and tries until it opens. It
// returns when ctx has ended and everything is closed.
func (o *apiOptions) openBehind(ctx context.Context, gate *server.Gate, log *slog.Logger) {
	for pause := firstPause; ; pause *= 2 {
		err := o.openOnce(ctx, gate, log)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errEnded) {
			pause = firstPause
		}
		pause = min(pause, longestPause(err))
		gate.Shut(err.Error())
		log.Warn("not ready", "error", err, "kind", fault.KindOf(err).String(), "hint", fault.HintOf(err), "again", pause.String())
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// errEnded says that the KMS was open, and its data are being cleared or
// restored.
var errEnded = errors.New(endedReason)

// openOnce opens the KMS and keeps it until ctx or the KMS ends, or says why it
// cannot. The opening after that finishes a clearing, and fails until a restore
// is finished.
func (o *apiOptions) openOnce(ctx context.Context, gate *server.Gate, log *slog.Logger) error {
	client, token, closeBoth, err := o.behind.Open(ctx)
	if err != nil {
		return err
	}
	defer closeBoth()
	if o.apart {
		token.Apart()
	}
	name := o.name
	if name == "" {
		if name, err = os.Hostname(); err != nil {
			return err
		}
	}
	windows, err := o.windows.Windows()
	if err != nil {
		return err
	}
	review, err := o.review()
	if err != nil {
		return err
	}
	tracer, stopTracing, err := o.trace.Open(ctx, o.App, log)
	if err != nil {
		return err
	}
	defer stopTracing()
	k, err := OpenKMS(ctx, KMSConfig{Etcd: client, Token: token, AuditDir: o.auditDir, Audit: o.audit.Config(o.Out), Limits: o.limit.Limits(), Uses: o.limit.Uses(), Signing: o.signing, Stale: o.limit.ServeStale(), Trace: tracer, Name: name,
		Now: o.Now, Log: log, Windows: windows, Review: review})
	if err != nil {
		return err
	}
	closed := false
	defer func() {
		if !closed {
			k.Close()
		}
	}()
	for _, file := range o.adminHashes {
		if err := registerAdmin(ctx, k, file); err != nil {
			return err
		}
	}
	gate.Open(k.Server)
	stopSweeping := k.Sweep(ctx)
	log.Info("ready", "token", k.Opened.Token.Serial, "install", k.Opened.Install)
	select {
	case <-ctx.Done():
	case <-k.Ended():
		err = errEnded
	}
	stopSweeping()
	if closed = err != nil; closed {
		k.CloseEnded(gate)
	}
	return err
}

func registerAdmin(ctx context.Context, k *KMS, file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return fault.New(fault.NotFound, "read", file, err)
	}
	var h struct{ ID, Hash string }
	if err := json.Unmarshal(b, &h); err != nil {
		return fault.New(fault.BadContent, "read", file, err)
	}
	return k.IAM.EnsureAdmin(ctx, h.ID, h.Hash)
}

// review asks this cluster about tokens; nil when that is not wanted.
func (o *apiOptions) review() (func(context.Context, string) (string, error), error) {
	if !o.accounts {
		return nil, nil
	}
	c, err := kube.InCluster()
	if err != nil {
		return nil, err
	}
	if len(o.audiences) > 0 {
		return func(ctx context.Context, token string) (string, error) {
			return c.ReviewToken(ctx, token, o.audiences...)
		}, nil
	}
	return func(ctx context.Context, token string) (string, error) {
		account, err := c.ReviewToken(ctx, token, app.TokenAudience)
		if err != nil || account != "" {
			return account, err
		}
		return c.ReviewToken(ctx, token) // as `kubectl create token` and every pod's own mount give it
	}, nil
}

type storageOptions struct {
	*app.App
	cfg    store.ServerConfig
	health string
}

func newRunStorageCmd(a *app.App, run func(context.Context, *storageOptions) error) *cobra.Command {
	o := &storageOptions{App: a}
	if run == nil {
		run = runStorage
	}
	cmd := &cobra.Command{
		Use: "storage", Short: "Run an etcd member that takes client certificates only", Args: cobra.NoArgs,
		Long: `Run an etcd member: the only one of its store, or one of three, each of which gets all
three by --member. A store of three begins only when all three are there and none has data;
a store that is there is joined, by one member after the other. No member leaves it: a folder
whose store has members that are not named is refused. A member whose folder has lost its data
does not begin, and says so in its log and on /readyz, until ` + "`kmsctl storage replace`" + ` has
taken it out: then it joins as one that learns, and votes when it has everything.`,
		Example: "  kmsctl run storage --data-dir /data --listen-client https://0.0.0.0:2379 --cert-file … --key-file … --ca-file …",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	fs.StringVar(&o.cfg.Dir, "data-dir", "", "folder of the data")
	fs.StringVar(&o.cfg.Name, "name", "storage-0", "name of the member")
	fs.StringVar(&o.cfg.ListenClient, "listen-client", "https://0.0.0.0:2379", "address for clients")
	fs.StringVar(&o.cfg.AdvertiseHost, "advertise-host", "", "DNS name that clients use")
	addPeer(fs, &o.cfg, "this one included; repeatable; without it, it is the only one for good")
	fs.StringVar(&o.cfg.ListenPeer, "listen-peer", "https://0.0.0.0:2380", "address for the other members")
	fs.StringVar(&o.health, "listen-health", "", "address of /readyz, in plain HTTP")
	return cmd
}

// addPeer puts the flags into fs by which members know each other.
func addPeer(fs *pflag.FlagSet, c *store.ServerConfig, rest string) {
	fs.StringVar(&c.CertFile, "cert-file", "", "certificate of this member")
	fs.StringVar(&c.KeyFile, "key-file", "", "its key")
	fs.StringVar(&c.CAFile, "ca-file", "", "CA that signs the certificates of clients and members")
	fs.StringToStringVar(&c.Members, "member", nil, "NAME=https://HOST:PORT of each member of the store, "+rest)
}

// checkPeer holds the rules of those flags.
func checkPeer(c store.ServerConfig) error {
	var errs []error
	for _, f := range [][2]string{{"cert-file", c.CertFile}, {"key-file", c.KeyFile}, {"ca-file", c.CAFile}} {
		if f[1] == "" {
			errs = append(errs, fault.Usagef("--%s: missing", f[0]))
		}
	}
	return errors.Join(errs...)
}

// Check holds the rules of the flags.
func (o *storageOptions) Check() error {
	errs := []error{o.cfg.Check(), checkPeer(o.cfg)}
	if o.cfg.Dir == "" {
		errs = append(errs, fault.Usagef("--data-dir: missing"))
	}
	return errors.Join(errs...)
}

func runStorage(ctx context.Context, o *storageOptions) error {
	log := newLogger(o.Err)
	h := &storageHealth{log: log}
	o.cfg.Waits = h.waits
	if o.health != "" {
		stop, err := h.serve(ctx, o.health)
		if err != nil {
			return err
		}
		defer stop()
	}
	m, err := store.OpenServer(ctx, o.cfg)
	if err != nil {
		return err
	}
	defer m.Close()
	h.runs(m)
	log.Info("ready", "listen", o.cfg.ListenClient, "members", max(len(o.cfg.Members), 1))
	select {
	case <-ctx.Done():
		return nil
	case err := <-m.Done():
		return fault.New(fault.Other, "run storage", o.cfg.Name, err)
	}
}

// healthWait is how long a member may take to agree with the others.
const healthWait = 3 * time.Second

// storageHealth answers probes, from before the member runs.
type storageHealth struct {
	log *slog.Logger

	mu     sync.Mutex
	member *store.Member // nil until it runs
	why    error         // it does not run yet
}

// waits takes what the member waits for, and logs it when it is news.
func (h *storageHealth) waits(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !sameObject(h.why, err) {
		h.log.Warn("waiting", "error", err, "kind", fault.KindOf(err).String(), "hint", fault.HintOf(err))
	}
	h.why = err
}

// sameObject says whether two faults are about the same: their causes may have
// numbers that change from one attempt to the next.
func sameObject(a, b error) bool {
	var f, g *fault.Error
	return errors.As(a, &f) && errors.As(b, &g) && f.Op == g.Op && f.Object == g.Object
}

func (h *storageHealth) runs(m *store.Member) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.member = m
}

// ready is nil for a member that most of the others agree with.
func (h *storageHealth) ready(ctx context.Context) error {
	h.mu.Lock()
	m, why := h.member, h.why
	h.mu.Unlock()
	switch {
	case m == nil && why == nil:
		return errors.New("starting")
	case m == nil:
		if hint := fault.HintOf(why); hint != "" {
			return fmt.Errorf("%w (%s)", why, hint)
		}
		return why
	}
	ctx, cancel := context.WithTimeout(ctx, healthWait)
	defer cancel()
	if err := m.Ready(ctx); err != nil {
		return fmt.Errorf("the members do not agree: %w", err)
	}
	return nil
}

// serve answers until stop.
func (h *storageHealth) serve(ctx context.Context, listen string) (stop func(), err error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", listen)
	if err != nil {
		return nil, fault.New(fault.Conflict, "listen on", listen, err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := h.ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: healthWait}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // it ends when it is closed
	}()
	return func() { _ = srv.Close(); <-done }, nil
}
