package kube

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// Clock is the API server's time, by the Date header of an answer.
func (c *Cluster) Clock(ctx context.Context) (time.Time, error) {
	if c.flags == nil {
		return time.Time{}, fault.Newf(fault.Other, "ask the time of cluster", c.server, "there is no connection to ask by")
	}
	cfg, err := c.flags.ToRESTConfig()
	if err != nil {
		return time.Time{}, c.fault("ask the time of cluster", c.server, err)
	}
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return time.Time{}, c.fault("ask the time of cluster", c.server, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(cfg.Host, "/")+"/version", nil)
	if err != nil {
		return time.Time{}, c.fault("ask the time of cluster", c.server, err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return time.Time{}, c.fault("ask the time of cluster", c.server, err)
	}
	defer resp.Body.Close()
	t, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return t, fault.New(fault.BadContent, "ask the time of cluster", c.server, err)
	}
	return t, nil
}

// Denied gives those of the rights that the account does not have.
func (c *Cluster) Denied(ctx context.Context, rights []cluster.Right) ([]cluster.Right, error) {
	denied := make([]bool, len(rights))
	errs := make([]error, len(rights))
	var wg sync.WaitGroup
	limit := make(chan struct{}, 8)
	for i, r := range rights {
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			review := &authv1.SelfSubjectAccessReview{Spec: authv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authv1.ResourceAttributes{
				Verb: r.Verb, Group: r.Group, Resource: r.Resource, Subresource: r.Subresource, Name: r.Name, Namespace: r.Namespace}}}
			out, err := c.client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
			if err != nil {
				errs[i] = err
				return
			}
			denied[i] = !out.Status.Allowed
		})
	}
	wg.Wait()
	var out []cluster.Right
	for i, r := range rights {
		if errs[i] != nil {
			return nil, c.fault("ask for rights on", r.Object(), errs[i])
		}
		if denied[i] {
			out = append(out, r)
		}
	}
	return out, nil
}

// NamespacePhase is Active or Terminating.
func (c *Cluster) NamespacePhase(ctx context.Context, name string) (string, error) {
	ns, err := c.client.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", c.fault("find namespace", name, err)
	}
	return string(ns.Status.Phase), nil
}

// StorageClasses lists the classes.
func (c *Cluster) StorageClasses(ctx context.Context) ([]cluster.StorageClass, error) {
	l, err := c.client.StorageV1().StorageClasses().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, c.fault("list storage classes", "", err)
	}
	var out []cluster.StorageClass
	for _, s := range l.Items {
		out = append(out, cluster.StorageClass{Name: s.Name, Provisioner: s.Provisioner, Default: s.Annotations["storageclass.kubernetes.io/is-default-class"] == "true"})
	}
	return out, nil
}

// Nodes lists the nodes.
func (c *Cluster) Nodes(ctx context.Context) ([]cluster.Node, error) {
	l, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, c.fault("list nodes", "", err)
	}
	var out []cluster.Node
	for _, n := range l.Items {
		node := cluster.Node{Name: n.Name, Arch: n.Status.NodeInfo.Architecture, Unschedulable: n.Spec.Unschedulable, Labels: n.Labels}
		for _, a := range n.Status.Addresses {
			// A dual-stack node has two; the first is its main one.
			if a.Type == corev1.NodeInternalIP && node.IP == "" {
				node.IP = a.Address
			}
		}
		for _, cond := range n.Status.Conditions {
			if cond.Type == corev1.NodeReady {
				node.Ready = cond.Status == corev1.ConditionTrue
			}
		}
		out = append(out, node)
	}
	return out, nil
}

// tillerNamespace is where Helm 2 keeps its records.
const tillerNamespace = "kube-system"

// Helm2 lists releases of Helm 2 by name, from Tiller's records. Those of a
// release that was deleted and not purged are history.
func (c *Cluster) Helm2(ctx context.Context) ([]string, error) {
	opts := metav1.ListOptions{LabelSelector: "OWNER=TILLER"}
	maps, err := c.client.CoreV1().ConfigMaps(tillerNamespace).List(ctx, opts)
	if err != nil {
		return nil, c.fault("list Tiller's records in", tillerNamespace, err)
	}
	var out []string
	live := func(labels map[string]string) {
		if s := labels["STATUS"]; s != "DELETED" && s != "SUPERSEDED" {
			out = append(out, labels["NAME"])
		}
	}
	for _, m := range maps.Items {
		live(m.Labels)
	}
	// Tiller can be told to keep them as Secrets.
	secrets, err := c.client.CoreV1().Secrets(tillerNamespace).List(ctx, opts)
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, c.fault("list Tiller's records in", tillerNamespace, err)
	}
	if err == nil {
		for _, s := range secrets.Items {
			live(s.Labels)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// Deployments lists the Deployments of a namespace.
func (c *Cluster) Deployments(ctx context.Context, namespace string) ([]cluster.Labelled, error) {
	l, err := c.client.AppsV1().Deployments(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, c.fault("list deployments in", namespace, err)
	}
	var out []cluster.Labelled
	for _, d := range l.Items {
		out = append(out, cluster.Labelled{Name: d.Name, Labels: d.Labels})
	}
	return out, nil
}

// Groups lists the API groups.
func (c *Cluster) Groups(context.Context) ([]string, error) {
	l, err := c.client.Discovery().ServerGroups()
	if err != nil {
		return nil, c.fault("list the API groups of cluster", c.server, err)
	}
	var out []string
	for _, g := range l.Groups {
		out = append(out, g.Name)
	}
	return out, nil
}

// RegistryRoute is the host name of OpenShift's own registry, "" without a
// route.
func (c *Cluster) RegistryRoute(ctx context.Context) (string, error) {
	const path = "/apis/route.openshift.io/v1/namespaces/openshift-image-registry/routes/default-route"
	var route struct {
		Spec struct {
			Host string `json:"host"`
		} `json:"spec"`
	}
	b, err := c.client.Discovery().RESTClient().Get().AbsPath(path).DoRaw(ctx)
	switch {
	case apierrors.IsNotFound(err):
		return "", nil
	case err != nil:
		return "", c.fault("find the route of the internal registry of cluster", c.server, err)
	}
	if err := json.Unmarshal(b, &route); err != nil {
		return "", fault.New(fault.BadContent, "read the route of the internal registry of cluster", c.server, err)
	}
	return route.Spec.Host, nil
}
