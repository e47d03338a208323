package archivecmd

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pack"
)

// signFlags say by which key an archive is signed.
type signFlags struct {
	key      string
	password app.SecretInput
}

func (f *signFlags) add(fs *pflag.FlagSet) {
	f.password = app.SecretInput{Name: "sign-key-password", Title: "password of the signing key"}
	fs.StringVar(&f.key, "sign-key", "", "minisign secret key file by which the archive is signed")
	f.password.Add(fs)
}

// signer is nil when nothing is to be signed.
func (f *signFlags) signer(a *app.App) (func([]byte) ([]byte, error), error) {
	if f.key == "" {
		return nil, nil
	}
	if !pack.Encrypted(f.key) {
		return pack.Signer(f.key, nil)
	}
	p, err := f.password.Read(a, false)
	if err != nil {
		return nil, err
	}
	defer p.Zero()
	return pack.Signer(f.key, p.Reveal())
}

type repackOptions struct {
	*app.App
	archive    string
	outputFile string
	batch      bool
	temp       string
	level      int
	limits     app.ArchiveLimits
	sign       signFlags
}

func newRepackCmd(a *app.App, run func(context.Context, *repackOptions) error) *cobra.Command {
	o := &repackOptions{App: a}
	if run == nil {
		run = runRepack
	}
	cmd := &cobra.Command{
		Use: "repack ARCHIVE", Short: "Make an archive of kmsctl's own of any other", Args: cobra.ExactArgs(1),
		Long: `Make an archive of kmsctl's own of any other: the same charts and images, every layer
compressed once, an index first. It loads much faster, and any site that has it is asked only
for what it lacks. The layers stand in --temp-dir until the file is written, in a file without
a name.`,
		Example: "  kmsctl archive repack old.tar.gz --output-file new.tar.gz\n  kmsctl archive repack old.tar.gz --output-file new.tar.gz --sign-key minisign.key",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.archive = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&o.outputFile, "output-file", "", "file to write")
	fs.BoolVar(&o.batch, "batch-images", false, "put all images into one member, each layer once")
	fs.StringVar(&o.temp, "temp-dir", "", "folder for the layers meanwhile; without it, that of the output file")
	fs.IntVar(&o.level, "level", 6, "gzip level of layers that stand uncompressed, 1 to 9")
	o.limits.Add(fs)
	o.sign.add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *repackOptions) Check() error {
	errs := []error{o.limits.Check(), o.sign.password.Check()}
	if o.outputFile == "" {
		errs = append(errs, fault.Usagef("--output-file: missing"))
	}
	if o.level < 1 || o.level > 9 {
		errs = append(errs, fault.Usagef("--level: %d is not between 1 and 9", o.level))
	}
	return errors.Join(errs...)
}

func runRepack(ctx context.Context, o *repackOptions) error {
	a, err := archive.Open(o.archive, o.In)
	if err != nil {
		return err
	}
	defer a.Close()
	if o.temp == "" {
		o.temp = filepath.Dir(o.outputFile)
	}
	p := &pack.Repack{Limits: o.limits.Limits, Batch: o.batch, Temp: o.temp, Level: o.level}
	defer p.Close()
	b, err := p.Build(ctx, a)
	if err != nil {
		return err
	}
	return write(o.App, o.outputFile, &o.sign, b, nil)
}

// write signs and writes an archive and prints what it is.
func write(a *app.App, file string, sign *signFlags, b archive.Build, warnings []string) error {
	var err error
	if b.Sign, err = sign.signer(a); err != nil {
		return err
	}
	w, err := pack.WriteFile(file, b)
	if err != nil {
		return err
	}
	return a.Print(built(w, b, warnings))
}

type diffOptions struct {
	*app.App
	base, archive string
	outputFile    string
	sign          signFlags
}

func newDiffCmd(a *app.App, run func(context.Context, *diffOptions) error) *cobra.Command {
	o := &diffOptions{App: a}
	if run == nil {
		run = runDiff
	}
	cmd := &cobra.Command{
		Use: "diff OLD NEW", Short: "Make a delta: what a new archive has and an old one lacks", Args: cobra.ExactArgs(2),
		Long: `Make a delta of two archives of kmsctl's own: the new one's charts and manifests, and of its
layers only those that the old one lacks. It loads onto a site that has the old archive; on any
other, load says what is missing before it changes anything.`,
		Example: "  kmsctl archive diff key-management-hsm-1.0.tar.gz key-management-hsm-1.1.tar.gz --output-file delta.tar.gz",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.base, o.archive = args[0], args[1]
			return app.Run(cmd.Context(), o, run)
		},
	}
	cmd.Flags().StringVar(&o.outputFile, "output-file", "", "file to write")
	o.sign.add(cmd.Flags())
	return cmd
}

// Check holds the rules of the flags.
func (o *diffOptions) Check() error {
	errs := []error{o.sign.password.Check()}
	if o.outputFile == "" {
		errs = append(errs, fault.Usagef("--output-file: missing"))
	}
	return errors.Join(errs...)
}

func runDiff(_ context.Context, o *diffOptions) error {
	base, err := archive.Open(o.base, o.In)
	if err != nil {
		return err
	}
	defer base.Close()
	a, err := archive.Open(o.archive, o.In)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := pack.Delta(base, a)
	if err != nil {
		return err
	}
	return write(o.App, o.outputFile, &o.sign, b, nil)
}
