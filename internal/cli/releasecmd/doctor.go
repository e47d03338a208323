package releasecmd

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/templates"
)

type doctorOptions struct {
	*app.App
	kube      app.KubeFlags
	nodeLabel string
	hsmPort   string
	bundle    string
	lines     int64
}

func newDoctorCmd(a *app.App, run func(context.Context, *doctorOptions) error) *cobra.Command {
	o := &doctorOptions{App: a}
	if run == nil {
		run = runDoctor
	}
	cmd := &cobra.Command{
		Use: "doctor", Short: "Say what is wrong with a release, and what cures it", Args: cobra.NoArgs,
		Long: `Look at an installed release: its pods and what keeps them from being ready, the members of its
store (asked by a command in one of their pods), hsm-secret, the certificates, the HSM, what each
replica of the API says of itself, of its clock and of keys that come near their limit, and the
known faults of the old product beside the release. Changes nothing; exits 7 when something is wrong.

--bundle writes what support needs into a tar.gz: the report, the release's values as far as
the chart knows them, pods, logs; of Secrets only names and sizes. It holds no secret: what is
known as one, in any form, and what looks like one, is taken out.`,
		Example: "  kmsctl doctor\n  kmsctl doctor --bundle kmsctl-bundle.tar.gz",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	o.kube.Add(fs)
	fs.StringVar(&o.nodeLabel, "node-label", "", "gemalto: label of the nodes that run the pods and need a certificate pair; without it, all nodes")
	fs.StringVar(&o.hsmPort, "hsm-port", "", "port of the HSM; without it, the model's")
	fs.StringVar(&o.bundle, "bundle", "", "write a bundle for support here")
	fs.Int64Var(&o.lines, "log-lines", 2000, "lines of each log in the bundle")
	return cmd
}

// Check has nothing to check.
func (o *doctorOptions) Check() error { return nil }

func runDoctor(ctx context.Context, o *doctorOptions) error {
	d := diagnose.Doctor{Preflight: diagnose.Preflight{Release: o.kube.Release, Namespace: o.kube.Namespace, NodeLabel: o.nodeLabel, HSMPort: o.hsmPort, Now: o.Now}}
	c, h, err := o.OpenRelease(&o.kube)
	if err == nil {
		_, err = c.Version(ctx)
	}
	var r cluster.Release
	if err != nil {
		d.ClusterErr = err
	} else {
		d.Cluster, d.Running = c, c
		d.Store = func(ctx context.Context) (cluster.Store, error) { return o.Store(ctx, &o.kube) }
		d.Current = func(context.Context) (cluster.Release, error) { return h.Get(o.kube.Release) }
		d.Replicas = func(ctx context.Context) ([]diagnose.Replica, error) { return o.Replicas(ctx, c, o.kube) }
		d.Old = func(context.Context) (cluster.Release, error) { return h.Get("key-management") }
		if r, err = h.Get(o.kube.Release); err == nil {
			d.Settings = settingsOf(r.Values)
			d.Model, _ = hsm.Lookup(d.Settings.Model) // unknown: the checks say so
		}
	}
	report := diagnose.Run(ctx, d.Checks())
	if o.bundle != "" {
		if err := o.writeBundle(ctx, c, r, report); err != nil {
			return err
		}
		o.Progress().Line("written", o.bundle)
	}
	if err := o.Print(report); err != nil {
		return err
	}
	return report.Fault("doctor")
}

// settingsOf reads the hsm block of a release's values; what is absent is the
// chart's own.
func settingsOf(values map[string]any) hsm.Settings {
	block, _ := values["hsm"].(map[string]any)
	text := func(k string) string { s, _ := block[k].(string); return s }
	s := hsm.Settings{Model: text("hsm_model"), HSMIP: text("hsm_ip"), RFSIP: text("rfs_ip"), SlotID: text("slotId"), ESN: text("esn"), KeyHash: text("keyhash"), TokenLabel: text("tokenLabel")}
	if s.Model == "" {
		s.Model = "softhsm"
	}
	return s
}

// secretShape is what the bundle says about a Secret.
type secretShape struct {
	Name string     `json:"name"`
	Type string     `json:"type"`
	Keys []keyShape `json:"keys"`
}

type keyShape struct {
	Key   string `json:"key"`
	Bytes int    `json:"bytes"`
}

// public are keys of Secrets that are none.
var public = []string{"namespace", "ca.crt", "tls.crt", "ServerCAFile"}

func (o *doctorOptions) writeBundle(ctx context.Context, c *kube.Cluster, r cluster.Release, report diagnose.Report) error {
	var b diagnose.Bundle
	for _, name := range []string{"HSM_PASSWORD", "PASSPHRASE", "API_KEY", "REGISTRY_PASSWORD", "REGISTRY_TOKEN", "REPO_PASSWORD", "REPO_TOKEN"} {
		b.Known([]byte(o.Getenv("KMSCTL_" + name)))
	}
	if block, ok := r.Values["hsm"].(map[string]any); ok {
		if pw, ok := block["hsm_pw"].(string); ok {
			b.Known([]byte(pw))
		}
	}
	errs := []error{b.AddJSON("report.json", report), b.AddJSON("version.json", map[string]string{"kmsctl": o.Version})}
	if r.Name != "" {
		chart, err := release.LoadFS(templates.Chart())
		if err != nil {
			return err
		}
		errs = append(errs, b.AddJSON("release.json", r), b.AddJSON("values.json", diagnose.Allowed(r.Values, chart.Values())))
	}
	if c != nil {
		errs = append(errs, o.fromCluster(ctx, c, &b))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	var out bytes.Buffer
	if err := b.Write(&out, o.Now()); err != nil {
		return err
	}
	return app.WriteFile(o.bundle, out.Bytes(), 0o600)
}

// fromCluster adds what the cluster tells; what it refuses to tell is noted
// in the bundle, since a broken cluster is when one is wanted.
func (o *doctorOptions) fromCluster(ctx context.Context, c *kube.Cluster, b *diagnose.Bundle) error {
	var refused []string
	note := func(err error) {
		if err != nil {
			refused = append(refused, err.Error())
		}
	}
	secrets, err := c.Secrets(ctx, o.kube.Namespace)
	note(err)
	shapes := []secretShape{}
	for _, s := range secrets {
		shape := secretShape{s.Name, s.Type, []keyShape{}}
		for _, k := range slices.Sorted(maps.Keys(s.Data)) {
			shape.Keys = append(shape.Keys, keyShape{k, len(s.Data[k])})
			if !slices.Contains(public, k) {
				b.Known(s.Data[k])
			}
		}
		shapes = append(shapes, shape)
	}
	errs := []error{b.AddJSON("secrets.json", shapes)}
	version, err := c.Version(ctx)
	note(err)
	errs = append(errs, b.AddJSON("cluster.json", map[string]string{"server": c.Server(), "version": version}))
	nodes, err := c.Nodes(ctx)
	note(err)
	errs = append(errs, b.AddJSON("nodes.json", nodes))
	pods, err := c.PodsNamed(ctx, o.kube.Namespace, "key-management")
	note(err)
	errs = append(errs, b.AddJSON("pods.json", pods))
	if err != nil || secrets == nil {
		// Without the Secrets their values are not known, so no log is safe.
		refused = append(refused, "logs: left out, since the Secrets could not be read and their values not be taken out")
	} else {
		all, err := c.Containers(ctx, o.kube.Namespace, o.kube.Release)
		note(err)
		for _, k := range all {
			text, err := c.Logs(ctx, o.kube.Namespace, k, o.lines, false)
			note(err)
			b.Add("logs/"+k.Pod+"/"+k.Name+".log", text)
			if text, err := c.Logs(ctx, o.kube.Namespace, k, o.lines, true); err == nil {
				b.Add("logs/"+k.Pod+"/"+k.Name+".previous.log", text)
			}
		}
	}
	if len(refused) > 0 {
		b.Add("not-told.txt", []byte(strings.Join(refused, "\n")+"\n"))
	}
	return errors.Join(errs...)
}
