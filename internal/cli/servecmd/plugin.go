package servecmd

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/plugin"
)

type pluginOptions struct {
	*app.App
	client app.ClientFlags
	socket string
	key    string
}

func newPluginCmd(a *app.App, run func(context.Context, *pluginOptions) error) *cobra.Command {
	o := &pluginOptions{App: a}
	if run == nil {
		run = runPlugin
	}
	cmd := &cobra.Command{
		Use: "plugin", Short: "Let a Kubernetes API server encrypt its Secrets by a root key (KMS v2)", Args: cobra.NoArgs,
		Long: `Answer a Kubernetes API server as its KMS v2 plugin, on a unix socket. The API server names the
socket in its EncryptionConfiguration:

  apiVersion: apiserver.config.k8s.io/v1
  kind: EncryptionConfiguration
  resources:
    - resources: [secrets]
      providers:
        - kms: {apiVersion: v2, name: kmsctl, endpoint: unix:///run/kmsctl/kms.sock}
        - identity: {}

Its key needs no more than the role Reader on this one root key: look up, wrap, unwrap. After
"kmsctl keys rotate" the API server wraps by the new version; what older ones wrapped still opens.
With another --key, what the former one wrapped still opens too, while its policy allows it.

Without --server the embedded KMS of --data is used, and is started when it does not run. Do not
let the API server depend on a KMS that runs in its own cluster: it could not start without it.`,
		Example: "  kmsctl plugin --socket /run/kmsctl/kms.sock --server https://kms.site:28674 --ca-file ca.crt \\\n" +
			"    --api-key-file key --instance 2b8d5e2c-… --key etcd-root",
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	fs.StringVar(&o.socket, "socket", "", "unix socket to answer on; only its owner may use it")
	fs.StringVar(&o.key, "key", "", "id or alias of the root key")
	o.client.Add(fs, a)
	o.client.AddInstance(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *pluginOptions) Check() error {
	errs := []error{o.client.Check(true)}
	for name, v := range map[string]string{"socket": o.socket, "key": o.key} {
		if v == "" {
			errs = append(errs, fault.Usagef("--%s: missing", name))
		}
	}
	return errors.Join(errs...)
}

func runPlugin(ctx context.Context, o *pluginOptions) error {
	if err := freeSocket(ctx, o.socket); err != nil {
		return err
	}
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	l, err := LocalListener(ctx, o.socket)
	if err != nil {
		return err
	}
	o.Progress().Line("ready", "unix://"+o.socket)
	return plugin.New(c, o.key, newLogger(o.Err)).Serve(ctx, l)
}

// freeSocket refuses a path where something else is, or where somebody
// answers; what a killed plugin left may go.
func freeSocket(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.New(fault.Other, "look at", path, err)
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fault.Newf(fault.Conflict, "listen on", path, "something else than a socket is there").WithHint("choose another --socket")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil //nolint:nilerr // nobody answers: it is free
	}
	return errors.Join(fault.Newf(fault.Conflict, "listen on", path, "another program answers there").WithHint("stop it, or choose another --socket"), c.Close())
}
