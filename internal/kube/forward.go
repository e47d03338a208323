package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// Forward makes a ready pod of a service reachable on a port of this host's
// loopback, through the API server, until stop.
func (c *Cluster) Forward(ctx context.Context, namespace, service string, port int) (addr string, stop func(), err error) {
	pod, err := c.readyPod(ctx, namespace, service)
	if err != nil {
		return "", nil, err
	}
	return c.ForwardPod(ctx, namespace, pod, port)
}

// ForwardPod is Forward for a pod by its name.
func (c *Cluster) ForwardPod(ctx context.Context, namespace, pod string, port int) (addr string, stop func(), err error) {
	object := namespace + "/" + pod
	cfg, err := c.flags.ToRESTConfig()
	if err != nil {
		return "", nil, c.fault("reach pod", object, err)
	}
	transport, upgrader, err := spdy.RoundTripperFor(cfg)
	if err != nil {
		return "", nil, c.fault("reach pod", object, err)
	}
	url := c.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("portforward").URL()
	end, ready, failed := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	f, err := portforward.NewOnAddresses(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url),
		[]string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, end, ready, io.Discard, io.Discard)
	if err != nil {
		return "", nil, c.fault("reach pod", object, err)
	}
	go func() { failed <- f.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-failed:
		return "", nil, c.fault("reach pod", object, err)
	case <-ctx.Done():
		close(end)
		return "", nil, c.fault("reach pod", object, ctx.Err())
	}
	ports, err := f.GetPorts()
	if err != nil || len(ports) != 1 {
		close(end)
		return "", nil, c.fault("reach pod", object, errors.Join(err, errors.New("no port was opened")))
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0].Local), func() { close(end) }, nil
}

// readyPod picks a ready pod of a service.
func (c *Cluster) readyPod(ctx context.Context, namespace, service string) (string, error) {
	pods, err := c.podsOf(ctx, namespace, service)
	if err != nil {
		return "", err
	}
	for i := range pods {
		if p := &pods[i]; ready(p) && p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning {
			return p.Name, nil
		}
	}
	return "", fault.Newf(fault.NotReady, "reach service", namespace+"/"+service, "none of its %d pods is ready", len(pods)).WithHint("see `kmsctl status`")
}

// PodsBehind lists the pods of a service that run, ready or not.
func (c *Cluster) PodsBehind(ctx context.Context, namespace, service string) (out []cluster.Pod, err error) {
	pods, err := c.podsOf(ctx, namespace, service)
	for i := range pods {
		if p := &pods[i]; p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning {
			out = append(out, cluster.Pod{Name: p.Name, Node: p.Spec.NodeName, Phase: string(p.Status.Phase), Ready: ready(p)})
		}
	}
	return out, err
}

// podsOf lists the pods of a service.
func (c *Cluster) podsOf(ctx context.Context, namespace, service string) ([]corev1.Pod, error) {
	object := namespace + "/" + service
	svc, err := c.client.CoreV1().Services(namespace).Get(ctx, service, metav1.GetOptions{})
	if err != nil {
		return nil, c.fault("find service", object, err)
	}
	l, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.FormatLabels(svc.Spec.Selector)})
	if err != nil {
		return nil, c.fault("list pods of service", object, err)
	}
	return l.Items, nil
}
