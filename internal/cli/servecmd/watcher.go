package servecmd

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/watcher"
	"github.com/kmsctl/kmsctl/templates"
)

type watcherOptions struct {
	*app.App
	server     string
	caFile     string
	apiKeyFile string
	release    string
	namespace  string
	identity   string
	watch      []string
	all        bool
	listen     string
}

func newRunWatcherCmd(a *app.App, run func(context.Context, *watcherOptions) error) *cobra.Command {
	o := &watcherOptions{App: a}
	if run == nil {
		run = runWatcher
	}
	cmd := &cobra.Command{
		Use: "watcher", Short: "Look after a running release: instance ids, certificates, health", Args: cobra.NoArgs,
		Long: `Look after a running release. A Secret with the annotation ` + watcher.Annotation + `: "<entry>"
gets the id of an instance of its own in that entry. Certificates are renewed before they
end. The API's health is on /readyz and /metrics, and in events. One watcher leads.`,
		Example: "  kmsctl run watcher --server https://kms-api.kube-system.svc:28674 --ca-file ca.crt --api-key-file key --namespace kube-system",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	host, _ := os.Hostname() // only a default
	fs := cmd.Flags()
	fs.StringVar(&o.server, "server", "", "URL of the API")
	fs.StringVar(&o.caFile, "ca-file", "", "CA of the API's certificate")
	fs.StringVar(&o.apiKeyFile, "api-key-file", "", "file with the watcher's own API key")
	fs.StringVar(&o.release, "release", templates.ChartName, "name of the release")
	fs.StringVar(&o.namespace, "namespace", "kube-system", "namespace of the release")
	fs.StringVar(&o.identity, "identity", host, "name of this watcher among the others")
	fs.StringArrayVar(&o.watch, "watch-namespace", nil, "namespace whose Secrets are filled; repeatable")
	fs.BoolVar(&o.all, "all-namespaces", false, "fill Secrets of all namespaces")
	fs.StringVar(&o.listen, "listen", ":8080", "address of /livez, /readyz and /metrics")
	return cmd
}

// Check holds the rules of the flags.
func (o *watcherOptions) Check() error {
	var errs []error
	for _, f := range [][2]string{{"server", o.server}, {"ca-file", o.caFile}, {"api-key-file", o.apiKeyFile}, {"identity", o.identity}} {
		if f[1] == "" {
			errs = append(errs, fault.Usagef("--%s: missing", f[0]))
		}
	}
	if o.all == (len(o.watch) > 0) {
		errs = append(errs, fault.Usagef("--watch-namespace, --all-namespaces: exactly one of them"))
	}
	return errors.Join(errs...)
}

func runWatcher(ctx context.Context, o *watcherOptions) error {
	log := newLogger(o.Err)
	c, err := kube.InCluster()
	if err != nil {
		return err
	}
	client, err := o.Client(ctx, &app.ClientFlags{Server: o.server, CAFile: o.caFile, APIKeyFile: o.apiKeyFile})
	if err != nil {
		return err
	}
	w := watcher.New(watcher.Config{Cluster: c, Instances: instances{o.App, client}, Ready: readyCheck(client), Release: o.release, Namespace: o.namespace,
		Identity: o.identity, Namespaces: o.watch, Now: o.Now, Log: log})
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fault.New(fault.Conflict, "listen on", o.listen, err)
	}
	srv := &http.Server{Handler: w.Handler(), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	log.Info("watching", "listen", l.Addr().String(), "release", o.release)
	err = w.Run(ctx)
	closed := srv.Close()
	if serr := <-served; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return errors.Join(err, closed)
}
