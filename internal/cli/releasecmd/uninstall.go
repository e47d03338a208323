package releasecmd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/render"
)

type uninstallOptions struct {
	*app.App
	kube          app.KubeFlags
	confirm       app.ConfirmFlags
	deleteSecrets bool
	deleteData    bool
	deleteStore   bool
	dryRun        bool
	wait          bool
	timeout       time.Duration
}

func newUninstallCmd(a *app.App, run func(context.Context, *uninstallOptions) error) *cobra.Command {
	o := &uninstallOptions{App: a}
	if run == nil {
		run = runUninstall
	}
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Remove the release", Args: cobra.NoArgs,
		Long: `Remove the release. Volumes, hsm-secret, certificates and API keys stay, so that a later
install goes on with the same keys, unless --delete-data and --delete-secrets say otherwise.

--delete-store gives up every key where the HSM is away, so that nothing can be cleared on it:
the volumes of the store go, and a later install, with whatever HSM, begins anew. The audit log
stays. So do the objects on the old token: who has it, its password and a backup of the store
can bring the keys back. When it is there again, clear it with "kmsctl hsm clear --leftovers"
and --installation, from a KMS that has it, or initialise it by its vendor's means.`,
		Example: "  kmsctl uninstall\n  kmsctl uninstall --delete-data --delete-secrets --yes\n  kmsctl uninstall --delete-store --dry-run",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	o.kube.Add(fs)
	o.confirm.Add(fs, app.WithDryRun)
	fs.BoolVar(&o.deleteSecrets, "delete-secrets", false, "delete hsm-secret, certificates and API keys as well")
	fs.BoolVar(&o.deleteData, "delete-data", false, "delete the volumes as well: every key that is kept there is lost")
	fs.BoolVar(&o.deleteStore, "delete-store", false, "delete the store's volumes alone: every key is lost, the audit log and the token's objects stay")
	fs.BoolVar(&o.dryRun, "dry-run", false, "only show what would go")
	addWait(fs, &o.wait)
	addTimeout(fs, &o.timeout)
	return cmd
}

// Check holds the rules of the flags.
func (o *uninstallOptions) Check() error {
	if o.timeout <= 0 {
		return fault.Usagef("--timeout: %s is not positive", o.timeout)
	}
	if o.deleteData && o.deleteStore {
		return fault.Usagef("--delete-data, --delete-store: only one of them").WithHint("--delete-data takes the audit log and a SoftHSM token along")
	}
	return nil
}

// claims are the volumes that go. A store that is on none of its own is not
// taken for one that is gone.
func (o *uninstallOptions) claims(ctx context.Context, c *kube.Cluster) ([]string, error) {
	switch {
	case o.deleteData:
		return c.Claims(ctx, o.kube.Namespace, o.kube.Release, "")
	case !o.deleteStore:
		return nil, nil
	}
	found, err := c.Claims(ctx, o.kube.Namespace, o.kube.Release, "storage")
	if err == nil && len(found) == 0 {
		err = fault.Newf(fault.NotFound, "delete the store of", o.kube.Release, "no volume was claimed for it in namespace %s", o.kube.Namespace).
			WithHint("with persistence.hostPath remove its folder on the node, with storage.persistence.existingClaim delete that claim; nothing was done")
	}
	return found, err
}

// removed is what uninstall took away.
type removed struct {
	Release string   `json:"release"`
	Secrets []string `json:"secrets"`
	Claims  []string `json:"claims"`
	DryRun  bool     `json:"dryRun"`
}

// Table is one line a thing.
func (r removed) Table() ([]string, [][]string) {
	rows := [][]string{{"release", r.Release}}
	for _, s := range r.Secrets {
		rows = append(rows, []string{"secret", s})
	}
	for _, c := range r.Claims {
		rows = append(rows, []string{"claim", c})
	}
	return nil, rows
}

func runUninstall(ctx context.Context, o *uninstallOptions) error {
	c, h, err := o.OpenRelease(&o.kube)
	if err != nil {
		return err
	}
	_, err = h.Get(o.kube.Release)
	gone := fault.KindOf(err) == fault.NotFound
	if err != nil && (!gone || (!o.deleteSecrets && !o.deleteData && !o.deleteStore)) {
		return err
	}
	r := removed{Release: o.kube.Release, Secrets: []string{}, Claims: []string{}, DryRun: o.dryRun}
	goes := []string{fmt.Sprintf("release %s in namespace %s", o.kube.Release, o.kube.Namespace)}
	if o.deleteSecrets {
		r.Secrets = install.SecretNames(o.kube.Release, render.SecretName)
		for _, s := range r.Secrets {
			goes = append(goes, "Secret "+s)
		}
	}
	claims, err := o.claims(ctx, c)
	if err != nil {
		return err
	}
	for _, p := range claims {
		r.Claims = append(r.Claims, p)
		goes = append(goes, "volume claim "+p+", with every key and record in it")
	}
	if o.dryRun {
		return o.Print(r)
	}
	if err := o.Confirm(&o.confirm, o.kube.Release, goes); err != nil {
		return err
	}
	ctx, unlock, err := c.Lock(ctx, o.kube.Namespace, o.kube.Release+"-kmsctl")
	if err != nil {
		return err
	}
	defer unlock()
	if !gone {
		if err := h.Uninstall(ctx, o.kube.Release, release.Options{Wait: o.wait, Timeout: o.timeout}); err != nil {
			return err
		}
	}
	o.Progress().Line("removed", "release "+o.kube.Release)
	if err := o.sweep(ctx, c, r); err != nil {
		return err
	}
	return o.Print(r)
}

func (o *uninstallOptions) sweep(ctx context.Context, c *kube.Cluster, r removed) error {
	var errs []error
	for _, s := range r.Secrets {
		errs = append(errs, c.DeleteSecret(ctx, o.kube.Namespace, s))
	}
	for _, p := range r.Claims {
		errs = append(errs, c.DeleteClaim(ctx, o.kube.Namespace, p))
	}
	return errors.Join(errs...)
}
