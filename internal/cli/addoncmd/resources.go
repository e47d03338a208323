package addoncmd

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/push"
	"github.com/kmsctl/kmsctl/internal/render"
)

// secretFile is where hsm-secret stands below the folder resources.
const secretFile = "hsm-Secret.yaml"

// resource is an object of the folder resources.
type resource struct {
	kube.Object
	file   string
	secret *render.Secret // when it is hsm-secret
	scc    string         // when it binds a security context constraint
}

// String is kind and name, with the namespace that hsm-secret goes to.
func (r resource) String() string {
	if r.secret != nil {
		return "Secret " + r.secret.Namespace + "/" + render.SecretName
	}
	return r.Object.String()
}

// kubectlDefault is the namespace of an object that names none, as kubectl
// has it.
const kubectlDefault = "default"

// readResources reads every file of the folder; what render encrypted is
// opened. Definitions that others need come first, over all files.
func (j *job) readResources() error {
	files, err := resourceFiles(filepath.Join(filepath.Dir(j.file), resourcesFolder))
	if err != nil {
		return err
	}
	of := map[string]string{}
	var all []kube.Object
	var errs []error
	for _, f := range files {
		objects, err := j.readResource(f)
		errs = append(errs, err)
		for _, o := range objects {
			key := o.Kind() + " " + o.Namespace() + "/" + o.Name()
			if was, twice := of[key]; twice {
				errs = append(errs, fault.Newf(fault.Usage, "read", f, "%s is there twice, also in %q", o, was).WithHint("take one of them away: the later would undo the earlier at each run"))
			}
			of[key] = f
			all = append(all, o)
		}
	}
	kube.SortObjects(all)
	for _, o := range all {
		r := resource{Object: o, file: of[o.Kind()+" "+o.Namespace()+"/"+o.Name()]}
		if o.Kind() == "Secret" && o.Name() == render.SecretName {
			errs = append(errs, j.readSecret(&r))
		}
		j.resources = append(j.resources, r)
	}
	return errors.Join(errs...)
}

func (j *job) readResource(file string) ([]kube.Object, error) {
	raw, err := j.ReadInput("--file", file, 4<<20)
	if err != nil {
		return nil, err
	}
	text, err := j.pass.Open(j.App, file, raw)
	if err != nil {
		return nil, err
	}
	objects, err := kube.ReadObjects(text)
	if err != nil {
		return nil, fault.New(fault.Usage, "read", file, err).WithHint("the folder %s is for Kubernetes objects, as kubectl apply reads them", resourcesFolder)
	}
	return objects, nil
}

// readSecret checks hsm-secret as install does, and takes the manual's samples.
func (j *job) readSecret(r *resource) error {
	s, err := render.ParseSecret(r.Text)
	if err != nil {
		return fault.New(fault.Usage, "read", r.file, err).WithHint("%s", hintOr(err, "make it with `kmsctl render secret`"))
	}
	if s.Namespace == "" {
		s.Namespace = j.secretNamespace()
	}
	for _, a := range j.addons {
		if slices.ContainsFunc(a.Charts, chart.ours) && a.Namespace != s.Namespace {
			j.warn("%s: %s is in namespace %s, and addon %s installs into %s, where the pods look for it", r.file, render.SecretName, s.Namespace, a.Name, a.Namespace)
		}
	}
	if err := errors.Join(app.CheckPassword(s.Password, r.file), j.CheckCertificates(&s)); err != nil {
		return err
	}
	for _, w := range s.Warnings {
		j.warn("%s: %s", r.file, w)
	}
	r.secret = &s
	return nil
}

// secretNamespace is where hsm-secret belongs when it does not say so.
func (j *job) secretNamespace() string {
	for _, a := range j.addons {
		if slices.ContainsFunc(a.Charts, chart.ours) {
			return a.Namespace
		}
	}
	return "kube-system"
}

// applyResources applies every object, and says whether all went well.
func (j *job) applyResources(ctx context.Context) bool {
	if len(j.resources) == 0 {
		return true
	}
	lines := make([]resourceLine, len(j.resources))
	for n, r := range j.resources {
		lines[n] = resourceLine{File: r.file, Object: r.String(), Status: notBegun}
		if j.dryRun {
			lines[n].Status = wouldApply
		}
	}
	j.report.Resources = lines
	if j.dryRun {
		return true
	}
	c, err := j.openFor(ctx)
	if err != nil {
		j.errs = append(j.errs, err)
		return false
	}
	bind, err := j.hasSCC(ctx, c)
	if err != nil {
		j.errs = append(j.errs, err)
		return false
	}
	whole := true
	for n, r := range j.resources {
		if r.scc != "" && !bind {
			lines[n].Status = notNeeded
			continue
		}
		changed, err := r.apply(ctx, c)
		switch {
		case err != nil:
			lines[n].Status, lines[n].Error = push.Failed, err.Error()
			j.errs = append(j.errs, fmt.Errorf("%w (%s)", err, r.file))
			whole = false
		case changed:
			lines[n].Status = applied
		default:
			lines[n].Status = unchanged
		}
		j.Progress().Line(lines[n].Status, lines[n].Object)
	}
	return whole
}

// openFor opens the cluster, and sees to the namespaces of the addons that need
// one, where the objects may belong.
func (j *job) openFor(ctx context.Context) (*kube.Cluster, error) {
	c, err := j.Cluster(&j.kube)
	if err != nil {
		return nil, err
	}
	for _, a := range j.addons {
		if len(a.Charts) == 0 && a.SCC == "" {
			continue
		}
		made, err := c.EnsureNamespace(ctx, a.Namespace)
		if err != nil {
			return nil, err
		}
		if made {
			j.Progress().Line("made", "namespace "+a.Namespace)
		}
	}
	return c, nil
}

func (r resource) apply(ctx context.Context, c *kube.Cluster) (changed bool, err error) {
	if r.secret == nil {
		return c.Apply(ctx, r.Object, kubectlDefault)
	}
	return c.ApplySecret(ctx, cluster.Secret{Namespace: r.secret.Namespace, Name: render.SecretName, Data: r.secret.Data()})
}
