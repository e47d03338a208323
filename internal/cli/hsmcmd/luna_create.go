package hsmcmd

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

type lunaCreateOptions struct {
	*app.App
	kube      app.KubeFlags
	nodeLabel string
	nodes     []string
	dir       string
	partition string
	hsmIP     string
	renew     bool
}

func newLunaCreateCmd(a *app.App, run func(context.Context, *lunaCreateOptions) error) *cobra.Command {
	o := &lunaCreateOptions{App: a}
	if run == nil {
		run = runLunaCreate
	}
	cmd := &cobra.Command{
		Use: "create", Short: "Make a key and a certificate for each management node", Args: cobra.NoArgs,
		Long: `Make a key and a certificate for each management node, as "vtl createCert -n IP" would:
IP.pem and IPKey.pem, the name in the CN. Then print what the appliance's administrator has to type.

The nodes are given by --node, else they are those of the cluster, or of its nodes with --node-label.
A pair that is there and still good is kept, so the command can be run again when a node is added.`,
		Example: `  kmsctl hsm luna-cert create --node 10.0.0.11 --node 10.0.0.12 --output-dir certs --partition kms
  kmsctl hsm luna-cert create --node-label management=true --output-dir certs
  kmsctl hsm luna-cert create --node 10.0.0.11 --output-dir certs --renew`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.nodes, "node", nil, "IPv4 address of a management node; repeatable; without it, the cluster is asked")
	f.StringVar(&o.nodeLabel, "node-label", "", "label of the cluster's nodes that count, as key or key=value; without it, all")
	f.StringVar(&o.kube.Kubeconfig, "kubeconfig", "", "kubeconfig of the cluster; without it, as kubectl finds it")
	f.StringVar(&o.kube.Context, "context", "", "context in the kubeconfig")
	f.StringVar(&o.dir, "output-dir", ".", "folder for the files")
	f.StringVar(&o.partition, "partition", "PARTITION", "name of the partition, for the printed commands")
	f.StringVar(&o.hsmIP, "hsm-ip", "APPLIANCE", "address of the appliance, for the printed commands")
	f.BoolVar(&o.renew, "renew", false, "make new pairs in place of those that are there; the appliance must learn them anew")
	return cmd
}

// Check holds the rules of the flags.
func (o *lunaCreateOptions) Check() error {
	var errs []error
	if len(o.nodes) > 0 && o.nodeLabel != "" {
		errs = append(errs, fault.Usagef("--node, --node-label: only one of them"))
	}
	return errors.Join(append(errs, o.checkNodes())...)
}

func (o *lunaCreateOptions) checkNodes() error {
	var errs []error
	for i, ip := range o.nodes {
		if err := hsm.CheckNodeIP(ip); err != nil {
			errs = append(errs, fault.Usagef("--node: %w", err))
		}
		if slices.Contains(o.nodes[:i], ip) {
			errs = append(errs, fault.Usagef("--node: %s is given twice", ip))
		}
	}
	return errors.Join(errs...)
}

// lunaPair is one node's files.
type lunaPair struct {
	Node        string    `json:"node"`
	CertFile    string    `json:"certFile"`
	KeyFile     string    `json:"keyFile"`
	Fingerprint string    `json:"fingerprint"` // SHA-256
	NotAfter    time.Time `json:"notAfter"`
	Created     bool      `json:"created"` // false: it was there
}

type lunaPairs struct {
	Pairs    []lunaPair `json:"pairs"`
	Commands []string   `json:"commands"` // to be typed at the appliance and before it
}

// Table shows the pairs; the commands follow.
func (l lunaPairs) Table() ([]string, [][]string) {
	rows := make([][]string, len(l.Pairs))
	for i, p := range l.Pairs {
		did := "kept"
		if p.Created {
			did = "created"
		}
		rows[i] = []string{p.Node, did, p.CertFile, p.KeyFile, p.NotAfter.Format(time.DateOnly)}
	}
	return []string{"NODE", "PAIR", "CERTIFICATE", "KEY", "EXPIRES"}, rows
}

// find asks the cluster for its nodes.
func (o *lunaCreateOptions) find(ctx context.Context) error {
	missing := func(err error) error {
		return fault.Usagef("--node: missing, and the cluster does not tell: %w", err).WithHint("give every management node: kubectl get nodes -o wide")
	}
	c, err := o.Cluster(&o.kube)
	if err != nil {
		return missing(err)
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return missing(err)
	}
	for _, n := range nodes {
		if n.Matches(o.nodeLabel) {
			o.nodes = append(o.nodes, n.IP)
		}
	}
	if len(o.nodes) == 0 {
		return missing(fmt.Errorf("none of its %d nodes has the label %s", len(nodes), o.nodeLabel))
	}
	return o.checkNodes()
}

func runLunaCreate(ctx context.Context, o *lunaCreateOptions) error {
	if len(o.nodes) == 0 {
		if err := o.find(ctx); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return fault.New(fault.Other, "make folder", o.dir, err)
	}
	var out lunaPairs
	for _, ip := range o.nodes {
		p, err := o.pair(ip)
		if err != nil {
			return err
		}
		out.Pairs = append(out.Pairs, p)
		out.Commands = append(out.Commands, fmt.Sprintf("scp %s admin@%s:", p.CertFile, o.hsmIP))
	}
	out.Commands = append(out.Commands, hsm.LunaCommands(o.partition, o.nodes)...)
	if err := o.Print(out); err != nil || o.Format != "table" {
		return err
	}
	fmt.Fprintf(o.Out, "\nLet the nodes in: copy the certificates to the appliance, then type there (lunash):\n")
	for _, c := range out.Commands {
		fmt.Fprintf(o.Out, "  %s\n", c)
	}
	return nil
}

// pair makes a node's files, or finds those that are there.
func (o *lunaCreateOptions) pair(ip string) (lunaPair, error) {
	p := lunaPair{Node: ip, CertFile: filepath.Join(o.dir, ip+".pem"), KeyFile: filepath.Join(o.dir, ip+"Key.pem")}
	cert, err1 := readIfThere(p.CertFile)
	key, err2 := readIfThere(p.KeyFile)
	if err := errors.Join(err1, err2); err != nil {
		return p, err
	}
	defer clear(key)
	switch {
	case o.renew || (cert == nil && key == nil):
		return o.create(p)
	case cert == nil || key == nil:
		return p, fault.Newf(fault.Conflict, "make a pair for node", ip, "only one of %s and %s is there", p.CertFile, p.KeyFile).
			WithHint("put the other file back, or make a new pair with --renew")
	}
	warns, err := hsm.CheckClient(ip, cert, key, o.Now())
	if err != nil {
		return p, fault.New(fault.Conflict, "use the pair in", o.dir, err).WithHint("make a new pair with --renew, then register it at the appliance")
	}
	for _, w := range warns {
		o.Warn("%s", w)
	}
	return p, p.describe(cert)
}

func (o *lunaCreateOptions) create(p lunaPair) (lunaPair, error) {
	cert, key, err := hsm.NewLunaClient(p.Node, o.Now())
	if err != nil {
		return p, fault.New(fault.Other, "make a pair for node", p.Node, err)
	}
	defer clear(key)
	// The key comes first: a run that ends in between is seen as half a pair.
	if err := errors.Join(app.WriteFile(p.KeyFile, key, 0o600), app.WriteFile(p.CertFile, cert, 0o644)); err != nil {
		return p, err
	}
	p.Created = true
	return p, p.describe(cert)
}

func (p *lunaPair) describe(cert []byte) error {
	block, _ := pem.Decode(cert)
	if block == nil {
		return fault.Newf(fault.BadContent, "read", p.CertFile, "there is no certificate in it")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return fault.New(fault.BadContent, "read", p.CertFile, err)
	}
	p.Fingerprint, p.NotAfter = hsm.Fingerprint(c.Raw), c.NotAfter.UTC()
	return nil
}

func readIfThere(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fault.New(fault.Other, "read", path, err)
	}
	return b, nil
}
