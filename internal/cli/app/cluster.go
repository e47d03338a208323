package app

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/push"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/templates"
)

// KubeFlags say which cluster, and which release in it.
type KubeFlags struct {
	Kubeconfig string
	Context    string
	Namespace  string
	Release    string
}

// ClearCommand is what clears the release: a value in a file alone never does.
func (f *KubeFlags) ClearCommand() string {
	return fmt.Sprintf("`kmsctl hsm clear --in-cluster-service --release %s --release-namespace %s`", f.Release, f.Namespace)
}

// WarnClearData says that clear_data in the settings of a release clears nothing.
func (a *App) WarnClearData(f KubeFlags) {
	a.Warn("clear_data is in the settings, and a file clears nothing, nor does setup: see what would go, and confirm it, with %s, or give --clear-data to `kmsctl upgrade` itself", f.ClearCommand())
}

// Add puts the flags into fs, but for --namespace, which HSMFlags has where a
// command takes both.
func (f *KubeFlags) Add(fs *pflag.FlagSet) {
	f.AddCluster(fs)
	fs.StringVarP(&f.Namespace, "namespace", "n", "kube-system", "namespace of the release")
	fs.StringVar(&f.Release, "release", templates.ChartName, "name of the release")
}

// AddCluster puts the flags of the cluster alone into fs.
func (f *KubeFlags) AddCluster(fs *pflag.FlagSet) {
	fs.StringVar(&f.Kubeconfig, "kubeconfig", "", "kubeconfig of the cluster; without it, as kubectl finds it")
	fs.StringVar(&f.Context, "context", "", "context in the kubeconfig")
}

// AddInCluster puts the flags into fs by which a command that works with a KMS
// works with the one of a release.
func (f *KubeFlags) AddInCluster(fs *pflag.FlagSet, inCluster *bool) {
	fs.BoolVar(inCluster, "in-cluster-service", false, "reach the release in the cluster of the kubeconfig, through its API server")
	f.AddCluster(fs)
	fs.StringVar(&f.Release, "release", templates.ChartName, "name of the release")
	fs.StringVar(&f.Namespace, "release-namespace", "kube-system", "namespace of the release")
}

// Cluster opens the cluster.
func (a *App) Cluster(f *KubeFlags) (*kube.Cluster, error) {
	if a.OpenCluster != nil {
		return a.OpenCluster(f)
	}
	return kube.Open(kube.Config{Kubeconfig: f.Kubeconfig, Context: f.Context, Namespace: f.Namespace})
}

// ChartFlags say where the chart comes from.
type ChartFlags struct {
	Repo     string
	Chart    string
	Archive  string
	Site     *DeliveryFlags // --archive: where its images went; nil: the chart is left as it is
	Version  string
	Insecure bool
	Name     string // of the chart; empty: ours
	access   repoAccess
}

// Add puts the flags into fs.
func (f *ChartFlags) Add(fs *pflag.FlagSet) {
	fs.StringVar(&f.Repo, "repo", "", "chart repository: a folder with index.yaml, oci://…, https://…, or a name that \"kmsctl repo add\" gave")
	fs.StringVar(&f.Chart, "chart", "", "packed chart or its folder, instead of --repo")
	fs.StringVar(&f.Archive, "archive", "", "archive with the chart in it, instead of --repo")
	fs.StringVar(&f.Version, "version", "", "version of the chart; without it, the newest")
	f.access.add(fs)
	fs.BoolVar(&f.Insecure, "insecure", false, "allow a repository without TLS, or with a certificate of nobody known")
}

// Check holds the rules of the flags.
func (f *ChartFlags) Check() error {
	if f.given() != 1 {
		return fault.Usagef("--repo, --chart, --archive: exactly one of them").WithHint("--repo is what `kmsctl load --repo` filled")
	}
	return f.access.check()
}

// CheckOptional is Check for who can do without a chart.
func (f *ChartFlags) CheckOptional() error {
	if f.given() > 1 {
		return f.Check()
	}
	return f.access.check()
}

func (f *ChartFlags) given() int {
	n := 0
	for _, s := range []string{f.Repo, f.Chart, f.Archive} {
		if s != "" {
			n++
		}
	}
	return n
}

// Given says that there is a chart to find.
func (f *ChartFlags) Given() bool { return f.given() > 0 }

// ChartFlags is the same repository for who reads charts from it.
func (f *DeliveryFlags) ChartFlags() ChartFlags {
	host, _ := release.IsOCI(f.Repo)
	return ChartFlags{Repo: strings.TrimPrefix(strings.TrimPrefix(f.Repo, "icp+"), "cm+"), Insecure: f.Insecure, access: f.access(host)}
}

// FindChart gets the chart.
func (a *App) FindChart(ctx context.Context, f *ChartFlags) (*release.Chart, error) {
	switch {
	case f.Chart != "":
		return release.LoadFile(f.Chart)
	case f.Archive != "":
		return a.chartInArchive(ctx, f)
	}
	s, err := a.chartSource(ctx, f)
	if err != nil {
		return nil, err
	}
	name := f.Name
	if name == "" {
		name = templates.ChartName
	}
	return release.Find(ctx, s, name, f.Version)
}

// chartInArchive is the chart as a load of the archive would put it into a
// repository.
func (a *App) chartInArchive(ctx context.Context, f *ChartFlags) (*release.Chart, error) {
	in, err := archive.Open(f.Archive, a.In)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	o := push.Options{Archive: in, Limits: archive.DefaultLimits}
	if f.Site != nil {
		o.Host, o.Repository, o.RegistryValue = f.Site.Host(), f.Site.Repository, f.Site.RegistryValue()
	}
	b, err := push.Chart(ctx, o, templates.ChartName, f.Version)
	if err != nil {
		return nil, err
	}
	return release.LoadBytes(f.Archive, b)
}

// Helm opens Helm in the release's namespace.
func (a *App) Helm(c *kube.Cluster, f *KubeFlags) (*release.Helm, error) {
	if a.OpenHelm != nil {
		return a.OpenHelm(f)
	}
	return release.New(c.Getter(), f.Namespace, func(format string, args ...any) {
		slog.Debug("helm", "said", strings.TrimSpace(fmt.Sprintf(format, args...)))
	})
}

// changer joins Helm, the chart and the values to what install wants.
type changer struct {
	helm   *release.Helm
	chart  *release.Chart
	values map[string]any
	opts   release.Options
}

func (c changer) Target() (string, map[string]any) { return c.chart.Version(), c.values }

func (c changer) Install(ctx context.Context, name string) (cluster.Release, error) {
	return c.helm.Install(ctx, name, c.chart, c.values, c.opts)
}

func (c changer) Upgrade(ctx context.Context, name string) (cluster.Release, error) {
	return c.helm.Upgrade(ctx, name, c.chart, c.values, c.opts)
}

func (c changer) Rollback(ctx context.Context, name string, revision int) error {
	return c.helm.Rollback(ctx, name, revision, c.opts)
}

func (c changer) Uninstall(ctx context.Context, name string) error {
	return c.helm.Uninstall(ctx, name, c.opts)
}

// Change is what a release is changed to; rollback and status need no chart.
type Change struct {
	Chart  *release.Chart
	Values map[string]any
	release.Options
}

// InstallJob is the job of package install.
func (a *App) InstallJob(c *kube.Cluster, h *release.Helm, to Change) install.Job {
	return install.Job{Cluster: c, Releases: h, Changer: changer{h, to.Chart, to.Values, to.Options}, Now: a.Now, NewKey: iam.NewAPIKey,
		WriteFile: func(path string, b []byte) error { return WriteFile(path, b, 0o600) }, Line: a.Progress().Line}
}

// OpenRelease opens the cluster, and Helm in it.
func (a *App) OpenRelease(f *KubeFlags) (*kube.Cluster, *release.Helm, error) {
	c, err := a.Cluster(f)
	if err != nil {
		return nil, nil, err
	}
	h, err := a.Helm(c, f)
	return c, h, err
}

// DefaultTimeout is how long a change may take.
const DefaultTimeout = 10 * time.Minute
