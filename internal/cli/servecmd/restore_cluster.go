package servecmd

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"io"
	"maps"
	"time"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/kube"
)

// runInCluster runs `run restore` in a pod of the release's API, and decrypts
// the backup into it, after what the logs of all pods say was removed since.
func (o *restoreOptions) runInCluster(ctx context.Context) error {
	cluster, err := o.Cluster(&o.kube)
	if err != nil {
		return err
	}
	pod := inPod{o.App, cluster, o.kube}
	if o.undo {
		var res undoResult
		if err := pod.run(ctx, "", nil, &res, "--undo"); err != nil {
			return err
		}
		res.Release = o.kube.Release
		return o.Print(res)
	}
	c, err := o.open()
	if err != nil {
		return err
	}
	defer c.close()
	r, err := c.read()
	if err != nil {
		return err
	}
	all, err := pod.removedSince(ctx, r.Header.CreatedAt)
	if err != nil {
		return err
	}
	told, err := json.Marshal(all)
	if err != nil {
		return err
	}
	in, err := c.clear()
	if err != nil {
		return err
	}
	flags := []string{"--by", "kubernetes:" + cmp.Or(cluster.WhoAmI(ctx), "unknown")}
	if o.removals.revive {
		flags = append(flags, "--revive")
	}
	if o.removals.leaveOut {
		flags = append(flags, "--leave-out")
	}
	var res restoreResult
	if err := pod.run(ctx, "", io.MultiReader(bytes.NewReader(append(told, '\n')), in), &res, flags...); err != nil {
		return err
	}
	res.Release = o.kube.Release
	return o.Print(res)
}

// inPod runs `run restore` in pods of a release's API.
type inPod struct {
	*app.App
	cluster *kube.Cluster
	kube    app.KubeFlags
}

// removedSince joins what the logs of all pods say. A key is removed through
// any of them, and a store that is empty does not show it.
func (o inPod) removedSince(ctx context.Context, since time.Time) (removed, error) {
	all := removed{map[string]string{}}
	pods, err := o.cluster.PodsBehind(ctx, o.kube.Namespace, install.API(o.kube.Release))
	if err != nil {
		return all, err
	}
	workloads, err := o.cluster.Workloads(ctx, o.kube.Namespace, o.kube.Release)
	if err != nil {
		return all, err
	}
	for _, w := range workloads {
		if w.Name == install.API(o.kube.Release) && int(w.Want) > len(pods) {
			o.Warn("%d of %d replicas of the API run: what was removed through the others since, their audit logs cannot tell now", len(pods), w.Want)
		}
	}
	for _, p := range pods {
		var r removed
		if err := o.run(ctx, p.Name, nil, &r, "--removed-since", since.Format(time.RFC3339Nano)); err != nil {
			o.Warn("the audit log of pod %s was not looked at, so what was removed through it may come back: %v", p.Name, err)
		}
		maps.Copy(all.Removed, r.Removed)
	}
	return all, nil
}

// run gives what `run restore` says in a pod, which knows what stands behind
// it, or its error.
func (o inPod) run(ctx context.Context, pod string, in io.Reader, result any, flags ...string) error {
	return o.RunInPod(ctx, &o.kube, "restore into release", "the same command again goes on where it was; --undo takes back what it did", app.PodRun{
		Service: install.API(o.kube.Release), Pod: pod, Container: "oss", Verb: "restore", Stdin: in, Flags: flags,
		Keep: []string{"--connector-socket=", "--audit-dir=", "--etcd-"}}, result)
}
