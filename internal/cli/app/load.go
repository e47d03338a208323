package app

import (
	"context"
	"errors"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/push"
)

// Load is one archive's way to its site. What is zero has the default.
type Load struct {
	Archive     *archive.Archive
	Delivery    *DeliveryFlags
	Jobs        int
	DryRun      bool
	Compression string // of layers that stand raw
	Staging     string // repository for layers whose own is known late
	Limits      archive.Limits
}

// Defaults of a load.
const (
	DefaultJobs        = 4
	DefaultCompression = "gzip"
)

// LoadArchive brings an archive's images into the registry of the flags and
// its charts into the chart repository. The report is there also when an error
// is, unless nothing was begun.
func (a *App) LoadArchive(ctx context.Context, l Load) (*push.Report, error) {
	if l.Jobs == 0 {
		l.Jobs = DefaultJobs
	}
	if l.Compression == "" {
		l.Compression = DefaultCompression
	}
	if l.Limits == (archive.Limits{}) {
		l.Limits = archive.DefaultLimits
	}
	registry, err := a.OpenRegistry(ctx, l.Delivery, a.Uploads())
	if err != nil {
		return nil, err
	}
	charts, err := a.OpenCharts(ctx, l.Delivery)
	if err != nil {
		return nil, err
	}
	progress := a.Progress()
	defer progress.Close()
	report, err := push.Load(ctx, push.Options{Archive: l.Archive, Registry: registry, Host: l.Delivery.Host(), Repository: l.Delivery.Repository,
		RegistryValue: l.Delivery.RegistryValue(), Charts: charts, Jobs: l.Jobs, DryRun: l.DryRun, Compression: l.Compression,
		Staging: l.Staging, Known: a.Layers(), Limits: l.Limits, Progress: progress})
	if err != nil && len(report.Objects) == 0 {
		return nil, err
	}
	return report, err
}

// ArchiveLimits bound what an archive may ask of us.
type ArchiveLimits struct{ archive.Limits }

// Add puts the flags into fs.
func (l *ArchiveLimits) Add(fs *pflag.FlagSet) {
	fs.Int64Var(&l.Unpacked, "max-unpacked-size", archive.DefaultLimits.Unpacked, "bytes that the archive may unpack to")
	fs.IntVar(&l.Entries, "max-entries", archive.DefaultLimits.Entries, "members that the archive may have, and files in the tar of an image")
}

// Check holds the rules of the flags.
func (l *ArchiveLimits) Check() error {
	var errs []error
	if l.Unpacked <= 0 {
		errs = append(errs, fault.Usagef("--max-unpacked-size: %d is not a size", l.Unpacked))
	}
	if l.Entries <= 0 {
		errs = append(errs, fault.Usagef("--max-entries: %d is not a number of files", l.Entries))
	}
	return errors.Join(errs...)
}
