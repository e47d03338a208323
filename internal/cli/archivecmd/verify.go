package archivecmd

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/pack"
)

func newVerifyCmd(a *app.App, run func(context.Context, *readOptions) error) *cobra.Command {
	o := &readOptions{App: a}
	if run == nil {
		run = runVerify
	}
	cmd := &cobra.Command{
		Use: "verify ARCHIVE", Short: "Read an archive and check every digest", Args: cobra.ExactArgs(1),
		Long: `Read an archive to its end and check it: that it is whole, that the manifests agree and
name what is there, and every digest: of blobs by their names, of layers by the diff IDs of
the images' configurations, and, in one of kmsctl's own, of every member by the index.`,
		Example: "  kmsctl archive verify key-management-hsm-amd64.tar.gz\n  kmsctl archive verify key-management-hsm-amd64.tar.gz --key minisign.pub",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.archive = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.limits.Add(cmd.Flags())
	cmd.Flags().StringVar(&o.key, "key", "", "minisign public key file by which the archive must be signed")
	return cmd
}

func runVerify(ctx context.Context, o *readOptions) error {
	a, err := archive.Open(o.archive, o.In)
	if err != nil {
		return err
	}
	defer a.Close()
	if o.key != "" {
		if err := pack.CheckSignature(a, o.key); err != nil {
			return err
		}
	}
	c, err := a.Verify(ctx, o.limits.Limits, func(name string, pkg []byte) error {
		_, err := chart.Open(name, pkg)
		return err
	})
	if err != nil {
		return err
	}
	return o.Print(describe(a, c, true))
}
