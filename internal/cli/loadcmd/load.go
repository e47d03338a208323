// Package loadcmd has the verbs that bring an archive to its site.
package loadcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pack"
	"github.com/kmsctl/kmsctl/internal/push"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command { return []*cobra.Command{newLoadCmd(a, nil), newRepoCmd(a)} }

type loadOptions struct {
	*app.App
	archive     string
	delivery    app.DeliveryFlags
	jobs        int
	dryRun      bool
	compression string
	staging     string
	spool       string
	key         string
	limits      app.ArchiveLimits
}

var compressions = []string{app.DefaultCompression, "zstd", "none"}

func newLoadCmd(a *app.App, run func(context.Context, *loadOptions) error) *cobra.Command {
	o := &loadOptions{App: a}
	if run == nil {
		run = runLoad
	}
	cmd := &cobra.Command{
		Use: "load ARCHIVE", Short: "Bring an archive's images into a registry and its charts into a chart repository", Args: cobra.ExactArgs(1),
		Long: `Bring an archive's images into a registry and its charts into a chart repository. ARCHIVE is
a file, a folder with the parts of a split archive, or - for standard input; any PPA archive
will do, not only one of kmsctl's own. Nothing is unpacked to disk.

An image named ibmcom/kms-oss in the archive goes to REGISTRY[/PATH][/NAMESPACE]/ibmcom/kms-oss
(an organisation with which that place ends already is not put in twice); --map gives another
rule. The charts' values are pointed there too.

Run it again after a fault: what is there is not sent again, and a broken upload goes on where
the registry has it.`,
		Example: `  kmsctl load key-management-hsm-amd64.tar.gz --registry registry.example:5000 --repo oci://registry.example:5000/charts
  kmsctl load key-management-hsm-amd64.tar.gz --registry mycluster.icp:8500/ibmcom --repo ./charts --dry-run
  kmsctl load key-management-hsm-amd64.tar.gz --registry docker-registry.default.svc:5000 --namespace kms --map '{namespace}/{name}' --repo ./charts`,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.archive = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	fs := cmd.Flags()
	o.delivery.Add(fs)
	fs.IntVar(&o.jobs, "jobs", app.DefaultJobs, "uploads at the same time")
	fs.BoolVar(&o.dryRun, "dry-run", false, "say what would be sent, to the byte, and send nothing; an archive that is not kmsctl's own is read and compressed for it")
	fs.StringVar(&o.compression, "layer-compression", app.DefaultCompression, "of layers that stand uncompressed in the archive: "+strings.Join(compressions, ", "))
	fs.StringVar(&o.staging, "staging-repository", "", "repository for layers whose own is not known yet, when standard input has the manifest behind the images")
	fs.StringVar(&o.key, "key", "", "minisign public key file by which the archive must be signed")
	fs.StringVar(&o.spool, "spool-dir", "", "folder that keeps standard input on disk for the time of the load, so that any archive can be read from there")
	o.limits.Add(fs)
	_ = cmd.RegisterFlagCompletionFunc("layer-compression", cobra.FixedCompletions(compressions, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// Check holds the rules of the flags.
func (o *loadOptions) Check() error {
	errs := []error{o.delivery.Check(o.App)}
	if o.jobs < 1 || o.jobs > 64 {
		errs = append(errs, fault.Usagef("--jobs: %d is not between 1 and 64", o.jobs))
	}
	if !slices.Contains(compressions, o.compression) {
		errs = append(errs, fault.Usagef("--layer-compression: unknown %q", o.compression).WithHint("use one of: %s", strings.Join(compressions, ", ")))
	}
	if o.spool != "" && o.archive != "-" {
		errs = append(errs, fault.Usagef("--spool-dir: is for standard input (-)"))
	}
	errs = append(errs, o.limits.Check())
	return errors.Join(errs...)
}

// memoryLimit is where the collector begins to work harder. What a load holds
// at once is under 64 MiB whatever the archive's size; without a limit the
// collector lets twice that grow.
const memoryLimit = 80 << 20

func runLoad(ctx context.Context, o *loadOptions) error {
	debug.SetMemoryLimit(memoryLimit)
	a, err := o.open(ctx)
	if err != nil {
		return err
	}
	defer a.Close()
	if o.key != "" {
		if err := pack.CheckSignature(a, o.key); err != nil {
			return err
		}
	}
	report, err := o.LoadArchive(ctx, app.Load{Archive: a, Delivery: &o.delivery, Jobs: o.jobs, DryRun: o.dryRun, Compression: o.compression, Staging: o.staging, Limits: o.limits.Limits})
	if report == nil {
		return err
	}
	return errors.Join(err, o.Print(result{report}))
}

// open opens the archive; with --spool-dir, standard input becomes a file
// without a name first, which is gone when it is closed.
func (o *loadOptions) open(ctx context.Context) (*archive.Archive, error) {
	if o.spool == "" {
		return archive.Open(o.archive, o.In)
	}
	if err := os.MkdirAll(o.spool, 0o700); err != nil {
		return nil, fault.New(fault.Other, "make folder", o.spool, err).WithHint("check --spool-dir")
	}
	f, err := os.CreateTemp(o.spool, "archive-")
	if err != nil {
		return nil, fault.New(fault.Other, "write into", o.spool, err).WithHint("check --spool-dir")
	}
	defer func() { _ = os.Remove(f.Name()) }()
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { _ = f.Close() }) // ends the copy
	defer stop()
	if _, err := io.Copy(f, o.In); err != nil {
		return nil, fault.New(fault.Other, "write into", o.spool, err).WithHint("is there room for the whole archive?")
	}
	return archive.Open(f.Name(), nil)
}

// result shows a report.
type result struct{ *push.Report }

// Table is one line an object, and a sum.
func (r result) Table() ([]string, [][]string) {
	var rows [][]string
	for _, o := range r.Objects {
		rows = append(rows, []string{o.Status, o.Kind, o.Target, o.Digest})
	}
	sent := "sent"
	if r.DryRun {
		sent = "to send"
	}
	rows = append(rows, []string{"", "", fmt.Sprintf("%.1f MiB %s: %d blobs; %d mounted, %d there already", float64(r.BytesSent)/(1<<20), sent, r.BlobsSent, r.BlobsMounted, r.BlobsPresent), ""})
	for _, w := range r.Warnings {
		rows = append(rows, []string{"warning", "", w, ""})
	}
	return []string{"STATUS", "KIND", "TARGET", "DIGEST"}, rows
}
