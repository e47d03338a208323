package kube

import (
	"context"
	"io"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kmsctl/kmsctl/internal/cluster"
)

// PodsNamed lists the pods whose names begin with prefix, each with what is
// wrong with it.
func (c *Cluster) PodsNamed(ctx context.Context, namespace, prefix string) ([]cluster.Pod, error) {
	l, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, c.fault("list pods in", namespace, err)
	}
	var out []cluster.Pod
	for i := range l.Items {
		p := &l.Items[i]
		if !strings.HasPrefix(p.Name, prefix) || p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded {
			continue
		}
		pod := cluster.Pod{Name: p.Name, Node: p.Spec.NodeName, Phase: string(p.Status.Phase), Ready: ready(p)}
		if !pod.Ready {
			pod.Trouble = c.trouble(ctx, p)
		}
		out = append(out, pod)
	}
	return out, nil
}

// Containers lists the containers of a release's pods.
func (c *Cluster) Containers(ctx context.Context, namespace, release string) ([]cluster.Container, error) {
	l, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector(release)})
	if err != nil {
		return nil, c.fault("list pods in", namespace, err)
	}
	var out []cluster.Container
	for _, p := range l.Items {
		for _, k := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			out = append(out, cluster.Container{Pod: p.Name, Name: k.Name})
		}
	}
	return out, nil
}

// Logs are the last lines of a container, previous ones where it started
// again.
func (c *Cluster) Logs(ctx context.Context, namespace string, k cluster.Container, lines int64, previous bool) ([]byte, error) {
	rc, err := c.client.CoreV1().Pods(namespace).GetLogs(k.Pod, &corev1.PodLogOptions{Container: k.Name, TailLines: &lines, Previous: previous}).Stream(ctx)
	if err != nil {
		return nil, c.fault("read the log of", k.Pod+"/"+k.Name, err)
	}
	defer rc.Close()
	const most = 4 << 20
	b, err := io.ReadAll(io.LimitReader(rc, most))
	return b, c.fault("read the log of", k.Pod+"/"+k.Name, err)
}

// Jobs lists the Jobs of a namespace whose names begin with prefix.
func (c *Cluster) Jobs(ctx context.Context, namespace, prefix string) ([]cluster.Job, error) {
	l, err := c.client.BatchV1().Jobs(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, c.fault("list Jobs in", namespace, err)
	}
	var out []cluster.Job
	for _, j := range l.Items {
		if !strings.HasPrefix(j.Name, prefix) {
			continue
		}
		job := cluster.Job{Name: j.Name, Complete: j.Status.Succeeded > 0}
		for _, k := range j.Spec.Template.Spec.Containers {
			job.Images = append(job.Images, k.Image)
		}
		out = append(out, job)
	}
	return out, nil
}

// Secrets lists the Secrets of a namespace, but for Helm's records.
func (c *Cluster) Secrets(ctx context.Context, namespace string) ([]cluster.Secret, error) {
	l, err := c.client.CoreV1().Secrets(namespace).List(ctx, metav1.ListOptions{FieldSelector: "type!=helm.sh/release.v1"})
	if err != nil {
		return nil, c.fault("list Secrets in", namespace, err)
	}
	var out []cluster.Secret
	for _, s := range l.Items {
		out = append(out, cluster.Secret{Namespace: namespace, Name: s.Name, Type: string(s.Type), Data: s.Data})
	}
	return out, nil
}
