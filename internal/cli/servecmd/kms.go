package servecmd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/internal/trace"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// KMSConfig is what a KMS is made of.
type KMSConfig struct {
	Etcd     store.EtcdClient
	Token    *connector.Client
	AuditDir string
	Audit    audit.Config // size, policy and copy of its files
	Limits   server.Limits
	Uses     uint64 // texts that one version of a key encrypts by AES-GCM
	Signing  SigningFlags
	Stale    bool // a view of the store that is too old is used
	Trace    *trace.Tracer
	Name     string // of this process, for the audit log's heads
	Now      func() time.Time
	Log      *slog.Logger
	Windows  kms.Windows
	Alone    bool                                                                // no other process can run on this store
	Review   func(ctx context.Context, token string) (account string, err error) // see server.Config
}

// KMS is an open KMS: the HSM unlocked, the records read.
type KMS struct {
	KMSConfig
	Opened kms.Opened
	IAM    *iam.Service
	Server *server.Server
	kms    *kms.Service
	master *kms.Rotation
	uses   *kms.Uses
	again  *reopener
	near   int    // versions of keys near their limit, when they were last looked at
	rest   func() // ends what works beside the calls
	store  *store.Store
	plain  *store.Plain
	codec  *record.Codec
	audit  *audit.Log
}

// OpenKMS unlocks the HSM and opens everything that depends on it. Etcd and
// Token stay the caller's.
func OpenKMS(ctx context.Context, c KMSConfig) (*KMS, error) {
	plain := store.NewPlain(c.Etcd)
	if err := plain.Whole(ctx); err != nil {
		return nil, err
	}
	cleared, err := kms.FinishClear(connector.Only(ctx), plain, c.Token.Members(), c.Now)
	if err != nil {
		return nil, err
	}
	var moved *kms.Moved
	if c.Token.Next() == nil {
		if moved, err = kms.LeaveToken(connector.Only(ctx), plain, c.Token.Members()); err != nil {
			return nil, err
		}
	}
	uses := kms.NewUses(c.Uses)
	again := newReopener(plain, c, uses)
	opened, err := unlock(ctx, plain, c, again)
	if err != nil {
		return nil, err
	}
	defer opened.Zero()
	codec, err := record.NewCodec(opened.RecordKey)
	if err != nil {
		return nil, err
	}
	key, err := signingKey(opened.TokenKey, nil)
	if err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, c.Etcd, codec)
	if err != nil {
		return nil, err
	}
	k := &KMS{KMSConfig: c, Opened: opened, store: st, plain: plain, codec: codec, uses: uses, again: again}
	k.kms = kms.New(st, c.Token, c.Token, c.Now, c.Windows)
	k.kms.Count(uses)
	if err := k.kms.KeepTime(ctx, steady, c.Alone); err != nil {
		st.Close()
		return nil, err
	}
	k.IAM = iam.New(st, iam.Config{SigningKey: key, Derive: k.deriveSigningKey, Now: c.Now, Time: k.kms.Time, Period: c.Signing.Period})
	ac := c.Audit
	ac.Sign, ac.PublicKey, ac.Now, ac.SaveHead = c.Token.Maker().Sign, opened.Master.PublicKey, c.Now, k.saveHead
	if ac.Known, err = k.knownHead(ctx); err != nil {
		st.Close()
		return nil, err
	}
	k.audit, err = audit.Open(c.AuditDir, ac)
	if err != nil {
		st.Close()
		return nil, err
	}
	k.master = k.rotation()
	k.kms.Follow(k.master.Masters)
	k.Token.Follow(k.master.Masters.Follow)
	k.Server = server.New(server.Config{KMS: k.kms, Review: c.Review, IAM: k.IAM, Audit: k.audit, Log: c.Log,
		Lag: st.Lag, ServeStale: c.Stale, Healthy: k.healthy, Full: st.Full, AuditHeads: k.heads, Backup: k.backup, Clearing: k.clearing(), Rotation: k.master, Limits: c.Limits, Trace: c.Trace})
	k.gauges()
	k.work(ctx)
	if err := errors.Join(k.noteCleared(ctx, cleared), k.noteMoved(ctx, moved), k.noteRestored(ctx)); err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

// unlock opens the first member that can be opened. Each member opens itself
// again when it was away, by the ledger of logins, and so do those that could
// not be opened now.
func unlock(ctx context.Context, plain *store.Plain, c KMSConfig, again *reopener) (opened kms.Opened, err error) {
	stands, err := kms.Stands(ctx, plain)
	if err != nil {
		return opened, err
	}
	if c.Token.Next() != nil {
		return unlockBoth(ctx, plain, c, again, stands)
	}
	if len(stands.Left) > 0 {
		return opened, halfMoved(stands)
	}
	var errs []error
	for _, m := range c.Token.Members() {
		if opened, err = kms.Unlock(connector.Only(ctx), plain, m, c.Now); err == nil {
			break
		}
		errs = append(errs, err)
	}
	if err != nil {
		return opened, errors.Join(errs...)
	}
	again.uses.Saw(opened.Master.Suite)
	for _, m := range c.Token.Members() {
		m.Reopen(func(ctx context.Context) error {
			_, err := again.open(ctx, m)
			return err
		})
	}
	return opened, nil
}

// reopener opens members again, each by one at a time: whoever finds it away
// and whoever follows a change of the master keys would otherwise log in
// against each other.
type reopener struct {
	plain *store.Plain
	now   func() time.Time
	uses  *kms.Uses
	both  bool // there are two tokens, each of which holds some of the master keys
	turns map[*connector.Client]chan struct{}
}

func newReopener(plain *store.Plain, c KMSConfig, uses *kms.Uses) *reopener {
	r := &reopener{plain: plain, now: c.Now, uses: uses, turns: map[*connector.Client]chan struct{}{}}
	members := c.Token.Members()
	if next := c.Token.Next(); next != nil {
		r.both, members = true, append(members, next.Members()...)
	}
	for _, m := range members {
		r.turns[m] = make(chan struct{}, 1)
	}
	return r
}

func (r *reopener) open(ctx context.Context, m *connector.Client) (kms.Epoch, error) {
	select {
	case r.turns[m] <- struct{}{}:
	case <-ctx.Done():
		return kms.Epoch{}, fault.New(fault.Unreachable, "open the HSM again", "", ctx.Err())
	}
	defer func() { <-r.turns[m] }()
	open := kms.Unlock
	if r.both {
		open = kms.Attend
	}
	o, err := open(connector.Only(ctx), r.plain, m, r.now)
	o.Zero()
	r.uses.Saw(o.Master.Suite)
	return o.Epoch, err
}

// unlockBoth opens the token that makes what is new, and attends to the other,
// which may hold what was not taken over yet. Each opens itself again.
func unlockBoth(ctx context.Context, plain *store.Plain, c KMSConfig, again *reopener, stands kms.Standing) (opened kms.Opened, err error) {
	c.Token.Moved(stands.Serial, stands.Since, stands.Version)
	for _, m := range c.Token.Maker().Members() {
		if opened, err = kms.Unlock(connector.Only(ctx), plain, m, c.Now); err == nil {
			break
		}
	}
	if err != nil {
		return opened, err
	}
	again.uses.Saw(opened.Master.Suite)
	for _, m := range append(c.Token.Members(), c.Token.Next().Members()...) {
		attend := func(ctx context.Context) error {
			_, err := again.open(ctx, m)
			return err
		}
		if err := attend(ctx); err != nil {
			c.Log.Warn("one of two tokens", "error", err, "hint", fault.HintOf(err)) // what is in it answers 503 until then
		}
		m.Reopen(attend)
	}
	return opened, nil
}

// halfMoved says that keys are in two tokens, of which one is configured.
func halfMoved(s kms.Standing) error {
	return fault.Newf(fault.NotReady, "open the KMS", "", "its keys are moving from the token with serial number %q to %q, and both are needed until the move is over", s.Left[0], s.Serial).
		WithHint("serve with --secret and --values of the old token, --to-secret and --to-values of the new one (a release: with hsm and migration.hsm); see `kmsctl hsm migrate status`")
}

// gauges shows in the metrics what the parts count.
func (k *KMS) gauges() {
	a := k.audit.Stats()
	for name, g := range map[string]struct {
		help string
		f    func() uint64
	}{
		"kmsctl_audit_lines":          {"Lines written to the audit log since the start.", a.Lines.Load},
		"kmsctl_audit_lost":           {"Calls that were answered and not written down, since the start.", a.Lost.Load},
		"kmsctl_audit_write_failures": {"Failed writes of the audit log since the start.", a.Failures.Load},
		"kmsctl_audit_files":          {"Files of the audit log that were closed since the start.", a.Files.Load},
	} {
		k.Server.Gauge(name, g.help, func() float64 { return float64(g.f()) })
	}
	k.Server.Gauge("kmsctl_keys_near_limit", "Keys that have encrypted half as many texts by AES-GCM as one version may, or more.", func() float64 {
		keys, _ := k.uses.Near()
		return float64(keys)
	})
	k.Server.Gauge("kmsctl_keys_near_limit_share", "Share of that limit which the furthest of them has come to; at 1 it encrypts no more.", func() float64 {
		_, share := k.uses.Near()
		return share
	})
	k.Server.Gauge("kmsctl_signing_key_age_seconds", "For how long the key signs that signs access tokens; 0 until that is counted.", k.signingKeyAge)
	k.Server.Gauge("kmsctl_hsm_ready", "1 when the HSM answers and is logged in.", func() float64 {
		if len(k.healthy(context.Background())) > 0 {
			return 0
		}
		return 1
	})
}

// Close ends the audit log with a signature, then the view of the store.
func (k *KMS) Close() {
	k.rest()
	if err := k.audit.Close(); err != nil {
		k.Log.Error("close audit log", "error", err)
	}
	k.store.Close()
}

// sweepEvery is how often the life cycle is looked at; the API itself treats
// an expired key as expired at once.
const sweepEvery = time.Minute

// Sweep does what is due by itself (expiry, rotation by policy, purge), once a
// minute until the function that it gives is called, and writes each act down.
// As often it looks how much memory the keys take.
func (k *KMS) Sweep(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(min(sweepEvery, max(k.Windows.Expiry, time.Second)))
		defer tick.Stop()
		for {
			limitGarbage()
			if err := k.sweep(ctx); err != nil && ctx.Err() == nil {
				k.Log.Error("life cycle", "error", err)
			}
			k.warnOfUse()
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// warnOfUse says when more keys than before must be rotated some day soon.
func (k *KMS) warnOfUse() {
	keys, share := k.uses.Near()
	if keys > k.near {
		k.Log.Warn("keys have encrypted half as many texts as they may, or more: rotate them", "keys", keys, "furthest", share, "names", k.uses.Nearest())
	}
	k.near = keys
}

func (k *KMS) sweep(ctx context.Context) error {
	acts, err := k.kms.Sweep(ctx)
	acts = append(acts, k.sweepSigningKey(ctx)...)
	for _, a := range acts {
		e := audit.Event{Action: a.Action, Outcome: "success", Status: 204, Principal: "life-cycle", Instance: a.Instance, Key: a.Key}
		if a.Err != nil {
			e.Outcome, e.Status = "failure", http.StatusInternalServerError
			var f *fault.Error
			if errors.As(a.Err, &f) && kmsapi.Known(f.Reason) {
				e.Status, e.Detail = kmsapi.StatusOf(f.Reason), a.Err.Error()
			}
			k.Log.Error("life cycle", "action", a.Action, "key", a.Key, "error", a.Err)
		}
		err = errors.Join(err, k.audit.Append(ctx, e))
	}
	return err
}

// saveHead keeps the audit log's signed head in the store too, so that a cut
// file is noticed.
func (k *KMS) saveHead(ctx context.Context, h audit.Head) error {
	path := "audit/" + k.Name
	var old kmsapi.AuditHead
	rev, err := k.store.Get(ctx, path, &old)
	if err != nil && !errors.Is(err, record.ErrNotFound) {
		return err
	}
	v := kmsapi.AuditHead{Log: k.Name, Chain: h.Chain, Seq: h.Seq, Prev: h.Prev, Signature: h.Signature}
	return k.store.Commit(ctx, record.Change{Path: path, Value: v, Rev: rev})
}

// knownHead is the head that this process, or one of the same name before it,
// kept in the store last.
func (k *KMS) knownHead(ctx context.Context) (*audit.Head, error) {
	var h kmsapi.AuditHead
	_, err := k.store.Get(ctx, "audit/"+k.Name, &h)
	if errors.Is(err, record.ErrNotFound) { // the last one of an installation that was cleared
		_, err = k.plain.Get(ctx, "heads/"+k.Name, &h)
	}
	if errors.Is(err, record.ErrNotFound) {
		return nil, nil
	}
	return &audit.Head{Chain: h.Chain, Seq: h.Seq, Prev: h.Prev, Signature: h.Signature}, err
}

func (k *KMS) heads(ctx context.Context) (kmsapi.AuditHeads, error) {
	out := kmsapi.AuditHeads{PublicKey: k.audit.PublicKey(), Heads: []kmsapi.AuditHead{}}
	err := k.store.List(ctx, "audit/", func(_ record.Meta, decode func(any) error) error {
		var h kmsapi.AuditHead
		if err := decode(&h); err != nil {
			return err
		}
		out.Heads = append(out.Heads, h)
		if h.Log == k.Name {
			out.Own = &h
		}
		return nil
	})
	return out, err
}

// FirstAdmin makes an administrator's API key and writes it to path, unless
// the file is there already.
func (k *KMS) FirstAdmin(ctx context.Context, path string) (bool, error) {
	if _, err := os.Stat(path); err == nil {
		return false, nil
	}
	key, id, hash, err := iam.NewAPIKey()
	if err != nil {
		return false, err
	}
	defer key.Zero()
	// The file first: a key that is registered and lost would be of no use.
	if err := app.WriteFile(path, key.Reveal(), 0o600); err != nil {
		return false, err
	}
	if err := k.IAM.EnsureAdmin(ctx, id, hash); err != nil {
		return false, errors.Join(err, os.Remove(path))
	}
	return true, nil
}

// healthy lists what is wrong with the HSM and the storage.
func (k *KMS) healthy(ctx context.Context) []string {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var out []string
	if err := k.Token.Ready(ctx); err != nil {
		out = append(out, "hsm: "+err.Error())
	}
	select {
	case <-k.Ended():
		out = append(out, endedReason)
	default:
	}
	return out
}

// Listener is a listener, and whether its peers are local administrators.
type Listener struct {
	net.Listener
	Local bool
}

// ServeAll answers on all listeners until ctx ends or the storage dies.
func ServeAll(ctx context.Context, g *server.Gate, log *slog.Logger, died <-chan error, ls ...Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, len(ls))
	for _, l := range ls {
		go func() {
			err := server.Serve(ctx, g, log, l.Listener, l.Local)
			cancel() // one listener alone would be half a server
			done <- err
		}()
	}
	var errs []error
	select {
	case err := <-died:
		errs = append(errs, fault.New(fault.Other, "run storage", "", err))
		cancel()
	case <-ctx.Done():
	}
	for range ls {
		errs = append(errs, <-done)
	}
	return errors.Join(errs...)
}
