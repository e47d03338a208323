package kube

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// Pods lists the pods of a release, each with what is wrong with it.
func (c *Cluster) Pods(ctx context.Context, namespace, release string) ([]cluster.Pod, error) {
	l, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector(release)})
	if err != nil {
		return nil, c.fault("list pods in", namespace, err)
	}
	out := make([]cluster.Pod, 0, len(l.Items))
	for i := range l.Items {
		p := &l.Items[i]
		if p.DeletionTimestamp != nil {
			continue // on its way out
		}
		pod := cluster.Pod{Name: p.Name, Node: p.Spec.NodeName, Phase: string(p.Status.Phase), Ready: ready(p)}
		for _, s := range p.Status.ContainerStatuses {
			pod.Restarts += s.RestartCount
		}
		if !pod.Ready {
			pod.Trouble = c.trouble(ctx, p)
		}
		if pod.Trouble != nil && pod.Trouble.Final {
			pod.Trouble.Final = !c.replaced(ctx, p)
		}
		out = append(out, pod)
	}
	slices.SortFunc(out, func(a, b cluster.Pod) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// replaced says whether a pod's workload is on its way to another version than
// the pod's, so that the pod goes by itself. An account that may not look is
// told no.
func (c *Cluster) replaced(ctx context.Context, p *corev1.Pod) bool {
	owner := metav1.GetControllerOf(p)
	if owner == nil {
		return false
	}
	apps := c.client.AppsV1()
	switch owner.Kind {
	case "StatefulSet":
		s, err := apps.StatefulSets(p.Namespace).Get(ctx, owner.Name, metav1.GetOptions{})
		return err == nil && (s.Status.ObservedGeneration < s.Generation || s.Status.UpdateRevision != p.Labels[appsv1.ControllerRevisionHashLabelKey])
	case "ReplicaSet":
		r, err := apps.ReplicaSets(p.Namespace).Get(ctx, owner.Name, metav1.GetOptions{})
		if err != nil {
			return false
		}
		parent := metav1.GetControllerOf(r)
		if parent == nil {
			return false
		}
		d, err := apps.Deployments(p.Namespace).Get(ctx, parent.Name, metav1.GetOptions{})
		return err == nil && (d.Status.ObservedGeneration < d.Generation || d.Annotations[revision] != r.Annotations[revision])
	}
	return false
}

// revision is the annotation by which a Deployment and the ReplicaSet that it
// brings up name the same version.
const revision = "deployment.kubernetes.io/revision"

// trouble finds the first thing that keeps a pod from being ready: where it
// stands, a container that cannot start or ended, an event, a last log line.
func (c *Cluster) trouble(ctx context.Context, p *corev1.Pod) *cluster.Trouble {
	if t := scheduling(p); t != nil {
		return t
	}
	for _, s := range append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...) {
		if t := c.container(ctx, p, s); t != nil {
			return t
		}
	}
	if t := c.event(ctx, p); t != nil {
		return t
	}
	for _, s := range p.Status.ContainerStatuses {
		if s.State.Running != nil && !s.Ready {
			said := c.lastLine(ctx, p, s.Name, false)
			return &cluster.Trouble{Pod: p.Name, Container: s.Name, Reason: cluster.NotReady, Log: said.text, Cure: said.hint, Final: slices.Contains(finalKinds, said.kind)}
		}
	}
	return nil
}

func scheduling(p *corev1.Pod) *cluster.Trouble {
	for _, cond := range p.Status.Conditions {
		if cond.Type == corev1.PodScheduled && cond.Status == corev1.ConditionFalse {
			return &cluster.Trouble{Pod: p.Name, Reason: cond.Reason, Message: cond.Message, Cure: schedulingCure(cond.Message)}
		}
	}
	return nil
}

func schedulingCure(message string) string {
	switch {
	case strings.Contains(message, "PersistentVolumeClaim"), strings.Contains(message, "persistent volume"):
		return "no volume for its claim: name a storage class (--storage-class), or on a one-node site a folder of the node (--host-path)"
	case strings.Contains(message, "Insufficient"):
		return "the nodes have not enough free CPU or memory"
	case strings.Contains(message, "taint"):
		return "set tolerations in the values, or free a node"
	}
	return "see: kubectl describe pod"
}

// cures of the reasons that a container waits for.
var cures = map[string]struct {
	cure  string
	final bool
}{
	"ErrImagePull":               {"is the image in the registry, may the nodes reach it, and is a pull secret needed (imagePullSecrets)? `kmsctl load` pushes it", false},
	"ImagePullBackOff":           {"is the image in the registry, may the nodes reach it, and is a pull secret needed (imagePullSecrets)? `kmsctl load` pushes it", true},
	"InvalidImageName":           {"the image's repository or tag in the values is not a valid name", true},
	"CreateContainerConfigError": {"a Secret or ConfigMap that the pod names is absent or lacks a key; run `kmsctl install` again", true},
	"CreateContainerError":       {"the node could not make the container; see: kubectl describe pod", false},
	"RunContainerError":          {"the node could not start the container; see: kubectl describe pod", false},
	"CrashLoopBackOff":           {"the log line tells why it ends", true},
}

func (c *Cluster) container(ctx context.Context, p *corev1.Pod, s corev1.ContainerStatus) *cluster.Trouble {
	if w := s.State.Waiting; w != nil && cures[w.Reason].cure != "" {
		t := &cluster.Trouble{Pod: p.Name, Container: s.Name, Reason: w.Reason, Message: w.Message, Cure: cures[w.Reason].cure, Final: cures[w.Reason].final}
		if w.Reason == "CrashLoopBackOff" {
			t.Final = s.RestartCount > 2
			said := c.lastLine(ctx, p, s.Name, true)
			if t.Log = said.text; said.hint != "" {
				t.Cure = said.hint
			}
			if end := s.LastTerminationState.Terminated; end != nil {
				t.Message = fmt.Sprintf("exited with %d (%s)", end.ExitCode, end.Reason)
			}
		}
		return t
	}
	if end := s.State.Terminated; end != nil && end.ExitCode != 0 {
		said := c.lastLine(ctx, p, s.Name, false)
		return &cluster.Trouble{Pod: p.Name, Container: s.Name, Reason: end.Reason, Message: fmt.Sprintf("exited with %d", end.ExitCode), Log: said.text, Cure: said.hint}
	}
	return nil
}

// event is the newest warning about a pod whose containers do not exist yet:
// a Secret or volume that is absent shows only there.
func (c *Cluster) event(ctx context.Context, p *corev1.Pod) *cluster.Trouble {
	if slices.ContainsFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool { return s.State.Running != nil }) {
		return nil
	}
	l, err := c.client.CoreV1().Events(p.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + p.Name + ",type=Warning"})
	if err != nil || len(l.Items) == 0 {
		return nil // without the right to read events the rest still tells
	}
	e := slices.MaxFunc(l.Items, func(a, b corev1.Event) int { return a.LastTimestamp.Compare(b.LastTimestamp.Time) })
	t := &cluster.Trouble{Pod: p.Name, Reason: e.Reason, Message: e.Message, Cure: "see: kubectl describe pod " + p.Name + " -n " + p.Namespace}
	if strings.Contains(e.Message, "not found") && e.Reason == "FailedMount" {
		t.Cure = "a Secret that the pod mounts is absent; run `kmsctl install` again"
	}
	return t
}

// say is what a container said last.
type say struct {
	text string
	hint string
	kind string // of the fault, in our own lines
}

// final kinds of faults: time alone does not cure them. A refused HSM
// password is not even tried again.
var finalKinds = []string{fault.Denied.String(), fault.Usage.String(), fault.BadContent.String()}

// lastLine is a container's last line of log.
func (c *Cluster) lastLine(ctx context.Context, p *corev1.Pod, container string, previous bool) say {
	n := int64(10)
	rc, err := c.client.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{Container: container, TailLines: &n, Previous: previous}).Stream(ctx)
	if err != nil {
		return say{}
	}
	defer rc.Close()
	var lines []string
	for s := bufio.NewScanner(rc); s.Scan(); {
		lines = append(lines, s.Text())
	}
	return lastSaid(lines)
}

// lastSaid finds the last line that says something. Our programs end with
// `kmsctl: error: …` and a hint, or log one JSON object a line.
func lastSaid(lines []string) say {
	var out say
	for _, line := range lines {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if _, hint, ok := strings.Cut(line, ": hint: "); ok && strings.HasPrefix(line, "kms") {
			out.hint = hint
			continue
		}
		var j struct{ Msg, Error, Hint, Kind string }
		if json.Unmarshal([]byte(line), &j) != nil || j.Msg == "" {
			out = say{text: line}
			continue
		}
		out = say{text: j.Msg, hint: j.Hint, kind: j.Kind}
		if j.Error != "" {
			out.text += ": " + j.Error
		}
	}
	return out
}

// Workloads lists the Deployments and StatefulSets of a release.
func (c *Cluster) Workloads(ctx context.Context, namespace, release string) ([]cluster.Workload, error) {
	opts := metav1.ListOptions{LabelSelector: selector(release)}
	sets, err := c.client.AppsV1().StatefulSets(namespace).List(ctx, opts)
	if err != nil {
		return nil, c.fault("list StatefulSets in", namespace, err)
	}
	deployments, err := c.client.AppsV1().Deployments(namespace).List(ctx, opts)
	if err != nil {
		return nil, c.fault("list Deployments in", namespace, err)
	}
	var out []cluster.Workload
	for _, s := range sets.Items {
		out = append(out, cluster.Workload{Kind: "StatefulSet", Name: s.Name, Want: ptr.Deref(s.Spec.Replicas, 1), Ready: s.Status.ReadyReplicas,
			Updated: s.Status.UpdatedReplicas, Seen: s.Status.ObservedGeneration >= s.Generation})
	}
	for _, d := range deployments.Items {
		out = append(out, cluster.Workload{Kind: "Deployment", Name: d.Name, Want: ptr.Deref(d.Spec.Replicas, 1), Ready: d.Status.ReadyReplicas,
			Updated: d.Status.UpdatedReplicas, Seen: d.Status.ObservedGeneration >= d.Generation})
	}
	return out, nil
}
