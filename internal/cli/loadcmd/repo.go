package loadcmd

import (
	"context"
	"errors"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
)

func newRepoCmd(a *app.App) *cobra.Command {
	cmd := &cobra.Command{Use: "repo", Short: "Chart repositories, in Helm's own list", Long: `Add, list and remove chart repositories in Helm's own list (repositories.yaml), so that helm
and kmsctl know the same ones: load --repo takes their names.`}
	cmd.AddCommand(newRepoAddCmd(a, nil), newRepoListCmd(a), newRepoRemoveCmd(a))
	return cmd
}

// repoList shows repositories; a password is never among them.
type repoList struct {
	Repositories []repoLine `json:"repositories"`
}

type repoLine struct {
	Name     string `json:"name"`
	URL      string `json:"url"`
	CAFile   string `json:"caFile,omitempty"`
	CertFile string `json:"certFile,omitempty"`
}

// Table is one line a repository.
func (l repoList) Table() ([]string, [][]string) {
	rows := make([][]string, 0, len(l.Repositories))
	for _, r := range l.Repositories {
		rows = append(rows, []string{r.Name, r.URL})
	}
	return []string{"NAME", "URL"}, rows
}

type repoAddOptions struct {
	*app.App
	repo chart.HelmRepo
}

func newRepoAddCmd(a *app.App, run func(context.Context, *repoAddOptions) error) *cobra.Command {
	o := &repoAddOptions{App: a}
	if run == nil {
		run = runRepoAdd
	}
	cmd := &cobra.Command{
		Use: "add NAME URL", Short: "Put a chart repository into Helm's list", Args: cobra.ExactArgs(2),
		Long: `Put a chart repository into Helm's list, with the CA and the client certificate by which it is
reached, and its index into Helm's cache. Run again, it replaces the entry of that name.`,
		Example: "  kmsctl repo add mgmt-charts https://mycluster.icp:8443/mgmt-repo/charts --ca-file ca.pem --cert-file cert.pem --key-file key.pem",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.repo.Name, o.repo.URL = args[0], args[1]
			return app.Run(cmd.Context(), o, run)
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&o.repo.CAFile, "ca-file", "", "PEM file of the CA that signed the repository's certificate")
	fs.StringVar(&o.repo.CertFile, "cert-file", "", "PEM file of a client certificate")
	fs.StringVar(&o.repo.KeyFile, "key-file", "", "PEM file of that certificate's key")
	fs.BoolVar(&o.repo.Insecure, "insecure", false, "allow a certificate that nobody vouches for")
	return cmd
}

// Check holds the rules of the flags.
func (o *repoAddOptions) Check() error {
	var errs []error
	if o.repo.Name == "" || strings.ContainsAny(o.repo.Name, "/\\:") {
		errs = append(errs, fault.Usagef("NAME: %q has a slash or a colon", o.repo.Name))
	}
	if !strings.HasPrefix(o.repo.URL, "https://") && !strings.HasPrefix(o.repo.URL, "http://") {
		errs = append(errs, fault.Usagef("URL: %q is not http:// or https://", o.repo.URL).WithHint("an oci:// repository needs no entry: give it to --repo as it is"))
	}
	if (o.repo.CertFile == "") != (o.repo.KeyFile == "") {
		errs = append(errs, fault.Usagef("--cert-file, --key-file: give both or none"))
	}
	return errors.Join(errs...)
}

func runRepoAdd(ctx context.Context, o *repoAddOptions) error {
	for _, p := range []*string{&o.repo.CAFile, &o.repo.CertFile, &o.repo.KeyFile} {
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p) // helm may run in another folder
		if err != nil {
			return fault.New(fault.Other, "find", *p, err)
		}
		*p = abs
	}
	h, err := o.HelmHTTP(o.repo)
	if err != nil {
		return err
	}
	if err := chart.FindHelmFiles(o.Getenv).Add(ctx, o.repo, h, o.Now()); err != nil {
		return err
	}
	return o.Print(repoList{[]repoLine{line(o.repo)}})
}

func line(r chart.HelmRepo) repoLine { return repoLine{r.Name, r.URL, r.CAFile, r.CertFile} }

func newRepoListCmd(a *app.App) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the chart repositories of Helm's list", Args: cobra.NoArgs, Example: "  kmsctl repo list -o json",
		RunE: func(*cobra.Command, []string) error {
			all, err := chart.FindHelmFiles(a.Getenv).List()
			if err != nil {
				return err
			}
			out := repoList{[]repoLine{}}
			for _, r := range all {
				out.Repositories = append(out.Repositories, line(r))
			}
			return a.Print(out)
		},
	}
}

func newRepoRemoveCmd(a *app.App) *cobra.Command {
	return &cobra.Command{
		Use: "remove NAME", Short: "Take a chart repository out of Helm's list", Args: cobra.ExactArgs(1), Example: "  kmsctl repo remove mgmt-charts",
		RunE: func(_ *cobra.Command, args []string) error {
			return chart.FindHelmFiles(a.Getenv).Remove(args[0], a.Now())
		},
	}
}
