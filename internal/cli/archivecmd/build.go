package archivecmd

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pack"
	"github.com/kmsctl/kmsctl/templates"
)

type buildOptions struct {
	*app.App
	outputFile    string
	server        string
	connector     string
	lunaClient    string
	nshieldClient string
	batch         bool
	charts        []string
	images        []string
	sources       pack.Sources
	pull          app.PullFlags
	insecure      bool
	sign          signFlags
}

func newBuildCmd(a *app.App, run func(context.Context, *buildOptions) error) *cobra.Command {
	o := &buildOptions{App: a}
	if run == nil {
		run = runBuild
	}
	cmd := &cobra.Command{
		Use: "build", Short: "Build the product's archive: its chart and its images", Args: cobra.NoArgs,
		Long: `Build the archive of this product: the chart key-management-hsm and its six images, made
from kms-server, kms-connector and from Debian packages, without Docker. The same
inputs give the same bytes.

The Debian packages are pinned by name, version and SHA-256. They come from the folder debs of
the cache (KMSCTL_CACHE, else $XDG_CACHE_HOME/kmsctl), and from apt-get where that has none.

The vendors' clients for Luna and nShield may not be passed on, so that the images for them
have none, unless a tar of the installed client is given.

With --spec, --chart and --image, an archive of those is built instead. --spec is a
manifest.yaml as IBM's create-archive reads it: its images are pulled, unless --image gives
them under the same name. Its pull-authorization counts where --registry-user and
--registry-token-file are not given: a text, or {env: NAME}; it does not come into the archive.
Layers that are compressed are stored as they are.`,
		Example: `  kmsctl archive build --output-file key-management-hsm-amd64.tar.gz
  tar -C / -czf luna.tar.gz usr/safenet && kmsctl archive build --luna-client luna.tar.gz --output-file key-management-hsm-amd64.tar.gz
  kmsctl archive build --chart ./app --image org/app:1.0=app.tar --output-file app.tar.gz
  kmsctl archive build --spec manifest.yaml --registry registry.example:5000 --architectures amd64 --output-file app.tar.gz`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	fs.StringVar(&o.outputFile, "output-file", templates.ChartName+"-amd64.tar.gz", "file to write")
	fs.StringVar(&o.server, "kms-server", "", "the static kms-server for the images; without it, the one beside kmsctl, or that of PATH")
	fs.StringVar(&o.connector, "connector", "", "the kms-connector for the images; without it, KMSCTL_CONNECTOR, the one beside kmsctl, or that of PATH")
	fs.StringVar(&o.lunaClient, "luna-client", "", "tar of the installed Luna client, for kms-gemaltov6")
	fs.StringVar(&o.nshieldClient, "nshield-client", "", "tar of the installed nShield client, for kms-thalesv12")
	fs.BoolVar(&o.batch, "batch-images", false, "put all images into one member, each layer once: smaller, and IBM's loader from 3.1.2 on reads it")
	fs.StringArrayVar(&o.charts, "chart", nil, "build an archive of other content: a chart package or folder; repeatable")
	fs.StringArrayVar(&o.images, "image", nil, "build an archive of other content: NAME:TAG=FROM, where FROM is a tar of docker save or of an OCI layout, a folder with an OCI layout, or docker://HOST/REPOSITORY:TAG; repeatable")
	fs.StringVar(&o.sources.Spec, "spec", "", "build an archive of other content: a manifest.yaml that names charts and images")
	fs.StringSliceVar(&o.sources.Architectures, "architectures", nil, "of a spec's images, only those; of an image for many, the first (amd64 when none is given)")
	fs.StringVar(&o.sources.Fallback, "registry", "", "registry of a spec's images whose names have none")
	fs.BoolVar(&o.insecure, "insecure", false, "allow plain HTTP and certificates that nobody vouches for")
	o.pull.Add(fs)
	o.sign.add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *buildOptions) Check() error {
	errs := []error{o.sign.password.Check(), o.pull.Check()}
	for _, s := range o.images {
		i, err := pack.ParseImageSource(s)
		errs = append(errs, err)
		o.sources.Images = append(o.sources.Images, i)
	}
	o.sources.Charts = o.charts
	if o.outputFile == "" {
		errs = append(errs, fault.Usagef("--output-file: missing"))
	}
	return errors.Join(errs...)
}

func runBuild(ctx context.Context, o *buildOptions) error {
	if len(o.images)+len(o.charts) > 0 || o.sources.Spec != "" {
		return runBuildOther(ctx, o)
	}
	c, err := chart.FromFS(templates.Chart())
	if err != nil {
		return err
	}
	p := &pack.Product{Chart: c, RepositoryKeys: templates.RepositoryKeys(), Server: o.server, Connector: o.connector,
		LunaClient: o.lunaClient, NShieldClient: o.nshieldClient, Debs: filepath.Join(app.CacheDir(o.Getenv), "debs"), Batch: o.batch}
	if p.Server == "" {
		if p.Server, err = app.FindServer(o.Getenv); err != nil {
			return err
		}
	}
	if p.Connector == "" {
		if p.Connector, err = connector.Find(o.Getenv); err != nil {
			return err
		}
	}
	b, warnings, err := p.Build(ctx)
	if err != nil {
		return err
	}
	for _, w := range warnings {
		o.Progress().Line("warning", w)
	}
	return write(o.App, o.outputFile, &o.sign, b, warnings)
}

// runBuildOther builds an archive of the charts and images that were named.
func runBuildOther(ctx context.Context, o *buildOptions) error {
	p := &pack.Repack{Limits: archive.DefaultLimits, Batch: o.batch, Temp: filepath.Dir(o.outputFile), Level: 6}
	defer p.Close()
	o.sources.Getenv = o.Getenv
	o.sources.Open = func(ctx context.Context, host string, login pack.Login) (pack.Registry, error) {
		pull := o.pull
		if login != nil && !pull.Given(o.App) {
			user, password, err := login()
			if err != nil {
				return nil, err
			}
			pull.As(user, password)
		}
		return o.OpenPull(ctx, &pull, host, o.insecure, 0)
	}
	b, err := o.sources.Build(ctx, p)
	if err != nil {
		return err
	}
	return write(o.App, o.outputFile, &o.sign, b, nil)
}

// builtResult is what build prints.
type builtResult struct {
	pack.Written
	Images   []string `json:"images"`
	Charts   []string `json:"charts"`
	Warnings []string `json:"warnings"`
}

// Table is one line a field.
func (r builtResult) Table() ([]string, [][]string) {
	rows := [][]string{{"file", r.File}, {"size", bytesText(r.Size)}, {"digest", r.Digest}}
	for _, c := range r.Charts {
		rows = append(rows, []string{"chart", c})
	}
	for _, i := range r.Images {
		rows = append(rows, []string{"image", i})
	}
	return nil, rows
}

func built(w pack.Written, b archive.Build, warnings []string) builtResult {
	r := builtResult{Written: w, Images: []string{}, Charts: []string{}, Warnings: orEmpty(warnings)}
	for _, c := range b.Manifest.Charts {
		r.Charts = append(r.Charts, c.Archive)
	}
	for _, i := range b.Manifest.Images {
		r.Images = append(r.Images, i.Ref())
	}
	return r
}
