package archivecmd

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/pack"
)

type readOptions struct {
	*app.App
	archive string
	limits  app.ArchiveLimits
	key     string // of verify
	sbom    bool   // of inspect
}

// Check holds the rules of the flags.
func (o *readOptions) Check() error { return o.limits.Check() }

func newInspectCmd(a *app.App, run func(context.Context, *readOptions) error) *cobra.Command {
	o := &readOptions{App: a}
	if run == nil {
		run = runInspect
	}
	cmd := &cobra.Command{
		Use: "inspect ARCHIVE", Short: "Show what an archive holds", Args: cobra.ExactArgs(1),
		Long: `Show the charts and images of an archive. One of kmsctl's own is shown from its index,
without reading the rest; any other is read once.

--sbom shows the bill of materials that kmsctl puts into what it builds or repacks: charts,
images and their layers, and of the product's own images the Debian packages and Go modules.
With -o json it is the CycloneDX document itself.`,
		Example: "  kmsctl archive inspect key-management-hsm-amd64.tar.gz\n  kmsctl archive inspect key-management-hsm-amd64.tar.gz --sbom -o json > sbom.cdx.json\n  kmsctl archive inspect key-management-hsm-amd64.tar.gz -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.archive = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.limits.Add(cmd.Flags())
	cmd.Flags().BoolVar(&o.sbom, "sbom", false, "show the archive's bill of materials")
	return cmd
}

// bill prints a bill of materials.
type bill struct{ *pack.Bill }

// MarshalJSON is the document as it stands in the archive.
func (b bill) MarshalJSON() ([]byte, error) { return b.Raw, nil }

// Table is one line a component.
func (b bill) Table() ([]string, [][]string) {
	var rows [][]string
	for _, c := range b.Components() {
		rows = append(rows, []string{c.Kind, c.Name, c.Version, c.In})
	}
	return []string{"KIND", "NAME", "VERSION", "IN"}, rows
}

func runInspect(ctx context.Context, o *readOptions) error {
	a, err := archive.Open(o.archive, o.In)
	if err != nil {
		return err
	}
	defer a.Close()
	if o.sbom {
		b, err := pack.ReadSBOM(ctx, a, o.limits.Limits)
		if err != nil {
			return err
		}
		return o.Print(bill{b})
	}
	c, err := a.Inspect(ctx, o.limits.Limits)
	if err != nil {
		return err
	}
	return o.Print(describe(a, c, false))
}
