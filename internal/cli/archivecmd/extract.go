package archivecmd

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
)

type extractOptions struct {
	*app.App
	archive string
	members []string
	dir     string
	limits  app.ArchiveLimits
}

func newExtractCmd(a *app.App, run func(context.Context, *extractOptions) error) *cobra.Command {
	o := &extractOptions{App: a}
	if run == nil {
		run = runExtract
	}
	cmd := &cobra.Command{
		Use: "extract ARCHIVE [MEMBER...]", Short: "Unpack members of an archive, or all of it", Args: cobra.MinimumNArgs(1),
		Long: `Unpack members of an archive, or all of it, below --directory. Names that lead above it, links
and devices are refused before anything of that member is written.`,
		Example: "  kmsctl archive extract key-management-hsm-amd64.tar.gz charts/key-management-hsm-1.0.0.tgz --directory out",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.archive, o.members = args[0], args[1:]
			return app.Run(cmd.Context(), o, run)
		},
	}
	cmd.Flags().StringVar(&o.dir, "directory", ".", "folder to unpack into")
	o.limits.Add(cmd.Flags())
	return cmd
}

// Check holds the rules of the flags.
func (o *extractOptions) Check() error { return o.limits.Check() }

// extracted lists what was written.
type extracted struct {
	Directory string       `json:"directory"`
	Members   []memberLine `json:"members"`
}

// Table is one line a member.
func (e extracted) Table() ([]string, [][]string) {
	var rows [][]string
	for _, m := range e.Members {
		rows = append(rows, []string{m.Name, bytesText(m.Size)})
	}
	return []string{"NAME", "SIZE"}, rows
}

func runExtract(ctx context.Context, o *extractOptions) error {
	a, err := archive.Open(o.archive, o.In)
	if err != nil {
		return err
	}
	defer a.Close()
	wanted := map[string]bool{}
	for _, m := range o.members {
		wanted[filepath.ToSlash(filepath.Clean(m))] = true
	}
	out := extracted{Directory: o.dir, Members: []memberLine{}}
	all := len(wanted) == 0
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return fault.New(fault.Other, "make folder", o.dir, err)
	}
	// A root that is opened keeps everything below it, whatever links stand
	// there already.
	root, err := os.OpenRoot(o.dir)
	if err != nil {
		return fault.New(fault.Other, "open folder", o.dir, err)
	}
	defer func() { _ = root.Close() }() // nothing is written through it any more
	err = a.Walk(ctx, o.limits.Limits, nil, func(name string, size int64, r io.Reader) error {
		if !all && !wanted[name] {
			return nil
		}
		delete(wanted, name)
		out.Members = append(out.Members, memberLine{Name: name, Size: size})
		return writeMember(root, name, r)
	})
	if err != nil {
		return err
	}
	for m := range wanted {
		return fault.Newf(fault.NotFound, "extract", m, "it is not in %q", o.archive).WithHint("see: kmsctl archive inspect %s -o json", o.archive)
	}
	return o.Print(out)
}

// writeMember writes under a temporary name first.
func writeMember(root *os.Root, name string, r io.Reader) error {
	fail := func(err error) error {
		var f *fault.Error
		if errors.As(err, &f) {
			return err
		}
		return fault.New(fault.Other, "write", name, err)
	}
	if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fail(err)
	}
	tmp := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".part")
	f, err := root.Create(tmp)
	if err != nil {
		return fail(err)
	}
	_, err = io.Copy(f, r)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = root.Rename(tmp, name)
	}
	if err != nil {
		_ = root.Remove(tmp) // what is half must not stay
		return fail(err)
	}
	return nil
}
