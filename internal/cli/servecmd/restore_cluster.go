package servecmd

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
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

// apiContainer is the API in its pods.
const apiContainer = "oss"

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

// run gives what `run restore` says in a pod, or its error.
func (o inPod) run(ctx context.Context, pod string, in io.Reader, result any, flags ...string) error {
	var out, errs bytes.Buffer
	code, err := o.cluster.Run(ctx, kube.Exec{Namespace: o.kube.Namespace, Service: install.API(o.kube.Release), Pod: pod, Container: apiContainer, Stdin: in, Stdout: &out, Stderr: &errs,
		Command: func(args []string) []string { return inPodCommand(args, flags) }})
	said := o.passOn(errs.String())
	if err != nil {
		return fault.New(fault.KindOf(err), "restore into release", o.kube.Release, err).WithHint("%s", cutOffHint(err))
	}
	if code != 0 {
		return fault.New(fault.KindNamed(said.Kind), "restore into release", o.kube.Release, said.Err())
	}
	if err := json.Unmarshal(out.Bytes(), result); err != nil {
		return fault.New(fault.Other, "restore into release", o.kube.Release, fmt.Errorf("its answer is not understood: %w", err)).WithHint("kmsctl and the release must be of one version")
	}
	return nil
}

// cutOffHint is for who does not know how far it got.
func cutOffHint(err error) string {
	if h := fault.HintOf(err); h != "" {
		return h
	}
	return "the same command again goes on where it was; --undo takes back what it did"
}

// inPodCommand is `run restore` with what the API was told about what stands
// behind it.
func inPodCommand(args, flags []string) []string {
	cmd := []string{"/kms-server", "run", "restore", "-o", "json"}
	for _, a := range args {
		name, _, _ := strings.Cut(a, "=")
		if name == "--connector-socket" || name == "--audit-dir" || strings.HasPrefix(name, "--etcd-") {
			cmd = append(cmd, a)
		}
	}
	return append(cmd, flags...)
}

// passOn prints what the pod warned of, and gives its error.
func (o inPod) passOn(stderr string) fault.Said {
	last := fault.Said{Message: "it said nothing"}
	for line := range strings.Lines(stderr) {
		var s fault.Said
		if json.Unmarshal([]byte(line), &s) == nil && s.Message != "" {
			last = s
			continue
		}
		last.Message = strings.TrimSpace(line)
		fmt.Fprint(o.Err, line)
	}
	return last
}
