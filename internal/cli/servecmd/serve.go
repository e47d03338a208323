// Package servecmd has the commands that open the KMS, which are those of the
// program kms-server: serve (everything in one process and its connector), run
// api|storage|watcher (one workload each, as the chart's pods do), restore, and
// plugin (for a Kubernetes API server). It joins the store, the connector and
// the jobs to a KMS.
package servecmd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	run := &cobra.Command{Use: "run", Short: "Run one workload of the KMS, as the chart's pods do"}
	run.AddCommand(newRunAPICmd(a, nil), newRunStorageCmd(a, nil), newRunWatcherCmd(a, nil), newRunRestoreCmd(a, nil), newRunMembersCmd(a, nil), newRunPrepareCmd(a, nil))
	return []*cobra.Command{newServeCmd(a, nil), run, newRestoreCmd(a, nil), newPluginCmd(a, nil)}
}

type serveOptions struct {
	*app.App
	kms          Embedded
	listen       string
	plainHTTP    bool
	adminKeyFile string
	san          []string
	clientCA     string
	oneCall      bool
}

func newServeCmd(a *app.App, run func(context.Context, *serveOptions) error) *cobra.Command {
	o := &serveOptions{App: a}
	if run == nil {
		run = runServe
	}
	cmd := &cobra.Command{
		Use: "serve", Short: "Run the embedded KMS: API, storage and HSM connector in one", Args: cobra.NoArgs,
		Long: `Run the embedded KMS. It takes its HSM settings from the same two files that the chart takes:
hsm-Secret.yaml (the HSM's password) and overrides_hsm.yaml (the model).

For the model softhsm the token is made in the data folder when there is none, and keys
survive restarts. The API is served by TLS; its CA is at DATA/tls/ca.pem. On this machine,
the user who runs it is administrator through DATA/api.sock.

Once it ran, commands such as ` + "`kmsctl keys list --data DIR`" + ` start it for the one call when it
is not running: the folder remembers where the two files are (and nothing that is in them).`,
		Example: "  kmsctl serve --data ./kms --listen 127.0.0.1:28674 --secret hsm-Secret.yaml --values overrides_hsm.yaml",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	app.DataFlag(fs, a, &o.kms.Data)
	fs.StringVar(&o.listen, "listen", "127.0.0.1:28674", "address of the API")
	fs.StringVar(&o.kms.SecretFile, "secret", "", "hsm-Secret.yaml, plain or encrypted, as \"kmsctl render secret\" writes it")
	fs.StringVar(&o.kms.ValuesFile, "values", "", "overrides_hsm.yaml")
	o.kms.Add(fs, ofModel)
	fs.StringVar(&o.kms.ToSecretFile, "to-secret", "", "hsm-Secret.yaml of a second HSM, to which \"kmsctl hsm migrate\" moves all keys")
	fs.StringVar(&o.kms.ToValuesFile, "to-values", "", "overrides_hsm.yaml of the second HSM")
	fs.StringVar(&o.kms.ToModule, "to-module", "", "path of the second HSM's PKCS#11 library"+ofModel)
	fs.BoolVar(&o.plainHTTP, "plain-http", false, "serve without TLS, on a loopback address only")
	fs.StringVar(&o.adminKeyFile, "admin-key-file", "", "make a first administrator's API key and write it here, once")
	fs.StringSliceVar(&o.san, "san", nil, "further DNS names or addresses in the API's certificate")
	fs.StringVar(&o.clientCA, "client-ca-file", "", "CA of client certificates, by which service IDs can be proved")
	fs.BoolVar(&o.oneCall, "for-one-call", false, "serve the program that started this one, until it closes its descriptor")
	_ = fs.MarkHidden("for-one-call")
	o.kms.Pass.Add(fs)
	o.kms.Windows.Add(fs)
	o.kms.Audit.Add(cmd)
	o.kms.Limit.Add(cmd)
	o.kms.Signing.Add(fs)
	o.kms.Trace.Add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *serveOptions) Check() error {
	errs := []error{o.kms.Check(), o.kms.Pass.Check(), o.kms.Audit.Check(), o.kms.Limit.Check(), o.kms.Signing.Check(), o.kms.Trace.Check(), checkListen(o.listen, o.plainHTTP)}
	for name, v := range map[string]string{"secret": o.kms.SecretFile, "values": o.kms.ValuesFile} {
		if v == "" && !o.oneCall {
			errs = append(errs, fault.Usagef("--%s: missing", name).WithHint("make the two files with `kmsctl render secret` and `kmsctl render overrides`"))
		}
	}
	if (o.kms.ToSecretFile == "") != (o.kms.ToValuesFile == "") || o.kms.ToModule != "" && o.kms.ToSecretFile == "" {
		errs = append(errs, fault.Usagef("--to-secret, --to-values: give both or none").WithHint("they are the two files of the HSM to which keys move; --to-module goes with them"))
	}
	if _, err := o.kms.Windows.Windows(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func checkListen(addr string, plain bool) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fault.Usagef("--listen: %q is not HOST:PORT", addr)
	}
	ip, err := netip.ParseAddr(host)
	if plain && host != "localhost" && (err != nil || !ip.IsLoopback()) {
		return fault.Usagef("--plain-http: %q is not a loopback address", addr).WithHint("keys and tokens would cross the network in the clear: leave --plain-http out")
	}
	return nil
}

func runServe(ctx context.Context, o *serveOptions) error {
	if o.oneCall {
		return serveOneCall(ctx, o.App, &o.kms)
	}
	unlock, err := LockData(o.kms.Data)
	if err != nil {
		return err
	}
	defer unlock()
	log := newLogger(o.Err)
	o.kms.Opened = o.opened
	k, err := o.kms.Start(ctx, o.App, log, o.Err, o.Progress().Line)
	if err != nil {
		return err
	}
	defer k.Close()
	l, ready, err := o.open(ctx)
	if err != nil {
		return err
	}
	local, err := LocalListener(ctx, app.SocketPath(o.kms.Data))
	if err != nil {
		return err
	}
	o.Progress().Line("ready", ready)
	Trim()
	return ServeAll(ctx, k.Gate, log, k.Died, Listener{Listener: l}, Listener{Listener: local, Local: true})
}

// opened does what is to be done after each opening.
func (o *serveOptions) opened(ctx context.Context, k *KMS, set hsm.Settings) (end func(), err error) {
	if o.adminKeyFile != "" {
		made, err := k.FirstAdmin(ctx, o.adminKeyFile)
		if err != nil {
			return nil, err
		}
		if made {
			o.Progress().Line("admin", "API key written", o.adminKeyFile)
		}
	}
	if set.ClearData {
		what, err := k.ClearAsked(ctx, "kmsctl hsm clear --data "+o.kms.Data)
		if err != nil {
			return nil, err
		}
		o.Warn("%s", what)
	}
	return k.Sweep(ctx), nil
}

// open listens for the API, by TLS unless asked otherwise.
func (o *serveOptions) open(ctx context.Context) (net.Listener, string, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", o.listen)
	if err != nil {
		return nil, "", fault.New(fault.Conflict, "listen on", o.listen, err).WithHint("is another server there? choose another address with --listen")
	}
	if o.plainHTTP {
		return l, "http://" + l.Addr().String(), nil
	}
	cfg, err := o.kms.TLS(o.Now(), o.listen, o.san, o.clientCA)
	if err != nil {
		return nil, "", errors.Join(err, l.Close())
	}
	return tls.NewListener(l, cfg), "https://" + l.Addr().String() + "  CA " + filepath.Join(o.kms.Data, "tls", "ca.pem"), nil
}

// newLogger logs requests as JSON lines.
func newLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: slog.LevelInfo}))
}
