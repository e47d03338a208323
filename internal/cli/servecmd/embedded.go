package servecmd

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/pki"
	"github.com/kmsctl/kmsctl/internal/render"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/internal/store"
)

// Embedded is the KMS of one machine, in a data folder. Its fields are what
// `serve` was given; a copy without anything secret lies in the folder, so
// that a command can start the KMS again for one call.
type Embedded struct {
	Data       string `json:"-"`
	SecretFile string `json:"secretFile"` // hsm-Secret.yaml
	ValuesFile string `json:"valuesFile"` // overrides_hsm.yaml
	app.TokenFlags
	Windows WindowFlags  `json:"windows,omitzero"`
	Signing SigningFlags `json:"signing,omitzero"`
	// The token to which keys can move; empty: there is none.
	ToSecretFile string `json:"toSecretFile,omitempty"`
	ToValuesFile string `json:"toValuesFile,omitempty"`
	ToModule     string `json:"toModule,omitempty"`

	Pass  app.PassphraseFlags `json:"-"`
	Audit AuditFlags          `json:"-"`
	Limit LimitFlags          `json:"-"`
	Trace TraceFlags          `json:"-"`

	// Opened runs after each opening, before anybody gets in: the first, and
	// those after a clearing. end runs before the KMS is closed. Nil: nothing.
	Opened func(ctx context.Context, k *KMS, set hsm.Settings) (end func(), err error) `json:"-"`
}

// ofModel is said of --module.
const ofModel = "; without it, where the model's client puts it"

const (
	tokenLabel    = "kms" // what a SoftHSM token of ours is called
	embeddedName  = "embedded"
	renewBefore   = 30 * 24 * time.Hour // a certificate that ends sooner is made anew
	maxSocketPath = 107                 // sockaddr_un, unix(7)
)

// RunningKMS is an embedded KMS that answers.
type RunningKMS struct {
	Gate  *server.Gate
	Died  <-chan error // the storage ended by itself
	Token hsm.TokenInfo
	stop  []func()
}

// Close ends it, last part first. A second call does nothing.
func (r *RunningKMS) Close() {
	for i := len(r.stop) - 1; i >= 0; i-- {
		r.stop[i]()
	}
	r.stop = nil
}

// Start opens the KMS of the folder, and opens it again when its data were
// cleared. The caller holds the folder's lock.
func (e *Embedded) Start(ctx context.Context, a *app.App, log *slog.Logger, connectorLog io.Writer, progress func(did string, details ...string)) (running *RunningKMS, err error) {
	windows, err := e.Windows.Windows()
	if err != nil {
		return nil, err
	}
	sec, set, err := e.settings(a)
	if err != nil {
		return nil, err
	}
	defer sec.Password.Zero()
	r := &RunningKMS{Gate: server.NewGate("starting")}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	tracer, stopTracing, err := e.Trace.Open(ctx, a, log)
	if err != nil {
		return nil, err
	}
	r.stop = append(r.stop, stopTracing)
	member, err := store.OpenEmbedded(ctx, filepath.Join(e.Data, "etcd"))
	if err != nil {
		return nil, err
	}
	r.stop, r.Died = append(r.stop, member.Close), member.Done()
	client := member.Client()
	r.stop = append(r.stop, func() { _ = client.Close() }) // the member behind it ends next
	progress("storage", "etcd, embedded", filepath.Join(e.Data, "etcd"))
	token, err := e.tokens(ctx, a, store.NewPlain(client), sec, set, connectorLog)
	if err != nil {
		return nil, err
	}
	r.stop = append(r.stop, token.Close)
	open := func(ctx context.Context) (openKMS, error) {
		k, err := OpenKMS(ctx, KMSConfig{Etcd: client, Token: token, AuditDir: filepath.Join(e.Data, "audit"), Audit: e.Audit.Config(a.Out), Limits: e.Limit.Limits(), Uses: e.Limit.Uses(), Signing: e.Signing, Stale: e.Limit.ServeStale(), Trace: tracer, Name: embeddedName,
			Now: a.Now, Log: log, Windows: windows, Alone: true})
		if err != nil {
			return openKMS{}, err
		}
		end := func() {}
		if e.Opened != nil {
			if end, err = e.Opened(ctx, k, set); err != nil {
				k.Close()
				return openKMS{}, err
			}
		}
		r.Gate.Open(k.Server)
		return openKMS{k, end}, nil
	}
	first, err := open(ctx)
	if err != nil {
		return nil, err
	}
	r.Token = first.Opened.Token
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.keepOpen(life, log, first, open)
	}()
	r.stop = append(r.stop, func() { end(); <-done })
	progress("hsm", fmt.Sprintf("token %q serial %s", r.Token.Label, r.Token.Serial), set.Model)
	return r, e.remember()
}

// openKMS is an open KMS, and what must end before it is closed.
type openKMS struct {
	*KMS
	end func()
}

// reopenPause is between two attempts to open a KMS whose data were cleared.
const reopenPause = time.Second

// keepOpen closes the KMS when ctx ends; when its data are being cleared it
// opens it again, which finishes the clearing.
func (r *RunningKMS) keepOpen(ctx context.Context, log *slog.Logger, k openKMS, open func(context.Context) (openKMS, error)) {
	for {
		select {
		case <-ctx.Done():
			k.end()
			k.Close()
			return
		case <-k.Ended():
		}
		k.end()
		k.CloseEnded(r.Gate)
		for {
			var err error
			if k, err = open(ctx); err == nil {
				break
			}
			r.Gate.Shut(endedReason + ": " + err.Error())
			log.Error("clear", "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(reopenPause):
			}
		}
	}
}

// settings reads the two files.
func (e *Embedded) settings(a *app.App) (render.Secret, hsm.Settings, error) {
	raw, err := a.ReadInput("--secret", e.SecretFile, 1<<20)
	if err != nil {
		return render.Secret{}, hsm.Settings{}, err
	}
	if raw, err = e.Pass.Open(a, e.SecretFile, raw); err != nil {
		return render.Secret{}, hsm.Settings{}, err
	}
	defer clear(raw)
	sec, err := render.ParseSecret(raw)
	if err != nil {
		return sec, hsm.Settings{}, usage("read", e.SecretFile, err, "make it with `kmsctl render secret`")
	}
	values, err := a.ReadInput("--values", e.ValuesFile, 1<<20)
	if err != nil {
		return sec, hsm.Settings{}, err
	}
	if values, err = e.Pass.Open(a, e.ValuesFile, values); err != nil {
		return sec, hsm.Settings{}, err
	}
	ov, err := render.ParseOverrides(values)
	if err != nil {
		return sec, hsm.Settings{}, usage("read", e.ValuesFile, err, "make it with `kmsctl render overrides`")
	}
	if err := hsm.CheckPIN(sec.Password.Reveal()); err != nil {
		return sec, ov.HSM, usage("read hsm-pass in", e.SecretFile, err, "encode it without a line break: printf %s \"$PASSWORD\" | base64")
	}
	return sec, ov.HSM, nil
}

// usage keeps a fault that says more, and makes one of what is none.
func usage(op, object string, err error, hint string) error {
	if h := fault.HintOf(err); h != "" {
		hint = h
	}
	f := fault.New(fault.Usage, op, object, err)
	f.Hint = hint
	return f
}

func (e *Embedded) connector(ctx context.Context, a *app.App, sec render.Secret, set hsm.Settings, log io.Writer) (*connector.Client, error) {
	model, err := hsm.Lookup(set.Model)
	if err != nil {
		return nil, usage("read", e.ValuesFile, err, "choose another hsm_model")
	}
	path, err := connector.Find(a.Getenv)
	if err != nil {
		return nil, err
	}
	slot, err := app.ParseSlot(e.Slot)
	if err != nil {
		return nil, err
	}
	opts := connector.Options{Path: path, Module: e.Module, TokenLabel: e.Label, TokenSerial: e.Serial, Slot: slot, PIN: sec.Password, Stderr: log, GivesKeys: e.ToSecretFile != ""}
	if opts.Module == "" {
		opts.Module = model.Module
	}
	if e.Label == "" && e.Serial == "" && slot == nil {
		switch {
		case set.Model == "softhsm":
			opts.TokenLabel, opts.SoftHSMDir = cmp.Or(set.TokenLabel, tokenLabel), filepath.Join(e.Data, "softhsm")
		case set.TokenLabel != "":
			opts.TokenLabel = set.TokenLabel
		case set.SlotID != "":
			if opts.Slot, err = app.ParseSlot(set.SlotID); err != nil {
				return nil, err
			}
		}
	}
	return connector.Start(ctx, opts)
}

// tokens starts the connector of the token, and of a second one to which keys
// can move. When they have, the first is not asked for any more.
func (e *Embedded) tokens(ctx context.Context, a *app.App, plain kms.Plain, sec render.Secret, set hsm.Settings, log io.Writer) (*connector.Client, error) {
	if e.ToSecretFile == "" {
		return e.connector(ctx, a, sec, set, log)
	}
	to := &Embedded{Data: e.Data, SecretFile: e.ToSecretFile, ValuesFile: e.ToValuesFile, TokenFlags: app.TokenFlags{Module: e.ToModule}, Pass: e.Pass}
	toSec, toSet, err := to.settings(a)
	if err != nil {
		return nil, err
	}
	defer toSec.Password.Zero()
	next, err := to.connector(ctx, a, toSec, toSet, log)
	if err != nil {
		return nil, err
	}
	return join(ctx, plain, next, func() (*connector.Client, error) { return e.connector(ctx, a, sec, set, log) }, func(label string) {
		a.Warn("all keys have moved to token %q: give its two files as --secret and --values, and leave --to-secret and --to-values out", label)
	})
}

// remember writes down where the two files are, and never what is in them.
func (e *Embedded) remember() error {
	abs := *e
	var err error
	for _, p := range []*string{&abs.SecretFile, &abs.ValuesFile, &abs.ToSecretFile, &abs.ToValuesFile} {
		if *p == "" {
			continue
		}
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	b, err := json.Marshal(abs)
	if err != nil {
		return err
	}
	return app.WriteFile(filepath.Join(e.Data, app.RememberedFile), b, 0o600)
}

// recall reads what remember wrote; nil when the folder has no KMS.
func (e *Embedded) recall() (*Embedded, error) {
	path := filepath.Join(e.Data, app.RememberedFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.Other, "read", path, err)
	}
	old := &Embedded{}
	if err := json.Unmarshal(b, old); err != nil {
		return nil, fault.New(fault.BadContent, "read", path, err).WithHint("start `kmsctl serve --data %s …` once; it writes the file anew", e.Data)
	}
	old.Data, old.Pass = e.Data, e.Pass
	return old, nil
}

// LockData takes the data folder for this process; another holder is
// fault.Conflict. The lock dies with the process.
func LockData(dir string) (func(), error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.New(fault.Other, "make folder", dir, err)
	}
	if err := os.Chmod(dir, 0o700); err != nil { // others must not reach api.sock
		return nil, fault.New(fault.Other, "protect folder", dir, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fault.New(fault.Other, "open lock in", dir, err)
	}
	if err := flock(f); err != nil {
		f.Close()
		return nil, fault.Newf(fault.Conflict, "take data folder", dir, "another kmsctl holds it").
			WithHint("use the running one (kmsctl keys list --data %s), or stop it", dir)
	}
	return func() { f.Close() }, nil
}

// LocalListener listens on the local socket; a socket that a killed process
// left is removed, which the data folder's lock makes safe.
func LocalListener(ctx context.Context, path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(fault.Other, "remove", path, err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		hint := "check the folder's permissions"
		if len(path) > maxSocketPath {
			hint = "the path is too long for a socket: choose a shorter --data"
		}
		return nil, fault.New(fault.Other, "listen on", path, err).WithHint("%s", hint)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// TLS makes or reuses DATA/tls: a CA, and the API's leaf with the given names.
func (e *Embedded) TLS(now time.Time, listen string, san []string, clientCA string) (*tls.Config, error) {
	dir := filepath.Join(e.Data, "tls")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.New(fault.Other, "make folder", dir, err)
	}
	host, _, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, err
	}
	hosts := append([]string{"localhost", "127.0.0.1"}, san...)
	if ip, err := netip.ParseAddr(host); host != "" && (err != nil || !ip.IsUnspecified()) {
		hosts = append(hosts, host)
	}
	read := func(name string) pki.Pair {
		cert, _ := os.ReadFile(filepath.Join(dir, name+".pem")) // absent: made below
		key, _ := os.ReadFile(filepath.Join(dir, name+"-key.pem"))
		return pki.Pair{Cert: cert, Key: key}
	}
	write := func(name string, p pki.Pair) error {
		return errors.Join(app.WriteFile(filepath.Join(dir, name+"-key.pem"), p.Key, 0o600), app.WriteFile(filepath.Join(dir, name+".pem"), p.Cert, 0o644))
	}
	ca := read("ca")
	if _, err := tls.X509KeyPair(ca.Cert, ca.Key); err != nil {
		if ca, err = pki.NewCA("kmsctl", now); err != nil {
			return nil, err
		}
		if err := write("ca", ca); err != nil {
			return nil, err
		}
	}
	leaf := read("api")
	if pki.Valid(ca.Cert, leaf, hosts, now, renewBefore) != nil {
		if leaf, err = pki.Issue(ca, "kms-api", pki.Server, hosts, now); err != nil {
			return nil, err
		}
		if err := write("api", leaf); err != nil {
			return nil, err
		}
	}
	return FileTLS(filepath.Join(dir, "api.pem"), filepath.Join(dir, "api-key.pem"), clientCA)
}
