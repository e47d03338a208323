package releasecmd

import (
	"context"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/kube"
)

// clearing is --clear-data of a change: the manual's way to clear the HSM's
// application data. Only the flag asks for it. A clear_data that was left in a
// values file, in the values of the release or in an earlier revision never
// does.
type clearing struct {
	asked   bool
	api     app.ClientFlags
	confirm app.ConfirmFlags
}

func (o *changeOptions) addClear(fs *pflag.FlagSet) {
	fs.Lookup("clear-data").Usage = "when the change is up, clear the HSM's application data: every key goes; it asks first, and counts once for a release: run again, it clears nothing"
	o.clear.api.AddKey(fs, "--clear-data: file with an administrator's API key")
	o.clear.confirm.Add(fs, app.WithDryRun)
	fs.Lookup("yes").Usage = "--clear-data: do not ask"
}

// takeClear takes the flag's own value before the values file is read, whose
// clear_data counts for nothing.
func (o *changeOptions) takeClear() {
	o.clear.asked, o.hsm.ClearData = o.hsm.ClearData, false
}

func (o *changeOptions) checkClear() error {
	if o.hsm.ClearData && !o.wait {
		return fault.Usagef("--clear-data: needs --wait, since a KMS that is not ready cannot be cleared").WithHint("leave --wait=false out, or clear later with %s", o.kube.ClearCommand())
	}
	return nil
}

func (o *changeOptions) clearJob(ctx context.Context) (app.ClearJob, error) {
	if !o.clear.api.HasKey(o.App) {
		o.clear.api.APIKeyFile = o.rel.AdminKeyFile // of a first installation, just written
	}
	c, err := o.Client(ctx, o.clear.api.At(o.kube))
	return app.ClearJob{App: o.App, Client: c, Release: o.kube.Release, Confirm: o.clear.confirm, Timeout: o.rel.Timeout}, err
}

// wouldClear tells what --clear-data takes. A KMS that is not there, or not
// ready, may have kept its data.
func (o *changeOptions) wouldClear(ctx context.Context, c *kube.Cluster) (app.OnceResult, error) {
	object := o.kube.Namespace + "/" + o.kube.Release
	if !o.clear.api.HasKey(o.App) {
		_, err := c.Secret(ctx, o.kube.Namespace, install.AdminSecret(o.kube.Release))
		if err == nil {
			return app.OnceResult{}, fault.Usagef("--clear-data: release %q has an administrator, whose API key is needed", object).WithHint("give --api-key-file, or set KMSCTL_API_KEY")
		}
		if fault.KindOf(err) != fault.NotFound {
			return app.OnceResult{}, err
		}
	} else if job, err := o.clearJob(ctx); err == nil {
		return job.Would(ctx)
	} else if k := fault.KindOf(err); k != fault.NotFound && k != fault.NotReady && k != fault.Unreachable {
		return app.OnceResult{}, err
	}
	return app.OnceResult{Unseen: "whatever an earlier release of this name kept: every key, instance, service ID and policy, and the master keys on the token"}, nil
}

// askClear has the release's name typed before anything is changed, unless the
// KMS says that nothing will go. What comes there after a look that saw nothing
// is not confirmed by it.
func (o *changeOptions) askClear(ctx context.Context, c *kube.Cluster) error {
	if !o.clear.asked {
		return nil
	}
	would, err := o.wouldClear(ctx, c)
	if err != nil || len(would.Goes()) == 0 {
		return err
	}
	err = o.Confirm(&o.clear.confirm, o.kube.Release, would.Goes())
	o.clear.confirm.Yes = err == nil
	return err
}

// clearOnce clears the release that is up.
func (o *changeOptions) clearOnce(ctx context.Context) (*app.OnceResult, error) {
	if !o.clear.asked {
		return nil, nil
	}
	job, err := o.clearJob(ctx)
	if err != nil {
		return nil, err
	}
	res, err := job.Once(ctx)
	return &res, err
}
