// Package kube reaches a Kubernetes cluster: Secrets, pods and what is wrong
// with them, nodes, rights. client-go lives here. It owns the kubeconfig and
// hands out the getter that Helm wants.
package kube

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"sync"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// quietly drops what client-go prints by itself; faults reach us as errors.
var quietly = sync.OnceFunc(func() { klog.SetLogger(logr.Discard()) })

// manager is our name as a field manager of server-side apply.
const manager = "kmsctl"

// Config says which cluster.
type Config struct {
	Kubeconfig string // empty: as kubectl finds it, or the pod's own account
	Context    string
	Namespace  string
}

// Cluster is one cluster. Safe for concurrent use.
type Cluster struct {
	client kubernetes.Interface
	flags  *genericclioptions.ConfigFlags
	server string
}

// Open reads the kubeconfig; it does not call the cluster yet.
func Open(c Config) (*Cluster, error) {
	quietly()
	flags := genericclioptions.NewConfigFlags(true)
	flags.WrapConfigFn = func(r *rest.Config) *rest.Config {
		r.WarningHandler, r.QPS, r.Burst = rest.NoWarnings{}, 50, 100
		return r
	}
	flags.KubeConfig, flags.Context, flags.Namespace = &c.Kubeconfig, &c.Context, &c.Namespace
	cfg, err := flags.ToRESTConfig()
	if err == nil {
		err = names(flags)
	}
	if err != nil {
		return nil, fault.New(fault.Usage, "read the kubeconfig", c.Kubeconfig, err).
			WithHint("set KUBECONFIG or --kubeconfig to the cluster's, and --context to one of its contexts")
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fault.New(fault.Usage, "read the kubeconfig", c.Kubeconfig, err).WithHint("set KUBECONFIG or --kubeconfig to the cluster's")
	}
	return &Cluster{client: client, flags: flags, server: cfg.Host}, nil
}

// names says whether a kubeconfig or the pod's own account names a cluster;
// without either, client-go would try localhost:8080.
func names(flags *genericclioptions.ConfigFlags) error {
	raw, err := flags.ToRawKubeConfigLoader().RawConfig()
	if err != nil || len(raw.Clusters) > 0 {
		return err
	}
	if _, err := rest.InClusterConfig(); err != nil {
		return errors.New("it names no cluster")
	}
	return nil
}

// NewFor is a cluster by a client that is there already.
func NewFor(client kubernetes.Interface) *Cluster {
	return &Cluster{client: client, server: "the given client"}
}

// Getter is what Helm reaches the cluster by.
func (c *Cluster) Getter() genericclioptions.RESTClientGetter { return c.flags }

// Server is the API server's address.
func (c *Cluster) Server() string { return c.server }

// Version asks the API server for its version, as in v1.37.2.
func (c *Cluster) Version(context.Context) (string, error) {
	v, err := c.client.Discovery().ServerVersion()
	if err != nil {
		return "", c.fault("ask the version of cluster", c.server, err)
	}
	return v.GitVersion, nil
}

// fault gives an API error its kind.
func (c *Cluster) fault(op, object string, err error) error {
	if err == nil {
		return nil
	}
	var known *fault.Error
	var ue *url.Error
	var ne net.Error
	switch {
	case errors.As(err, &known):
		return fault.New(known.Kind, op, object, err).WithHint("%s", known.Hint)
	case apierrors.IsNotFound(err):
		return fault.New(fault.NotFound, op, object, err)
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fault.New(fault.Denied, op, object, err).WithHint("the account of the kubeconfig needs more rights; `kmsctl preflight` lists which")
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
		return fault.New(fault.Conflict, op, object, err)
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return fault.New(fault.Usage, op, object, err).WithHint("the API server refuses the object as it is: correct it")
	case apierrors.IsTimeout(err), apierrors.IsServerTimeout(err), apierrors.IsServiceUnavailable(err), apierrors.IsTooManyRequests(err),
		errors.As(err, &ue), errors.As(err, &ne), errors.Is(err, context.DeadlineExceeded):
		return fault.New(fault.Unreachable, op, object, err).WithHint("is the cluster of the kubeconfig running, and reachable from here?")
	}
	return fault.New(fault.Other, op, object, err)
}

// EnsureNamespace makes the namespace when it is absent.
func (c *Cluster) EnsureNamespace(ctx context.Context, name string) (made bool, err error) {
	_, err = c.client.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		if apierrors.IsForbidden(err) {
			return false, nil // an account with rights in one namespace only; what follows tells
		}
		return false, c.fault("find namespace", name, err)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err = c.client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{FieldManager: manager}); apierrors.IsAlreadyExists(err) {
		return false, nil
	}
	return err == nil, c.fault("make namespace", name, err)
}

// Secret reads a Secret; fault.NotFound when it is absent.
func (c *Cluster) Secret(ctx context.Context, namespace, name string) (cluster.Secret, error) {
	s, err := c.client.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return cluster.Secret{}, c.fault("read Secret", namespace+"/"+name, err)
	}
	return cluster.Secret{Namespace: namespace, Name: name, Type: string(s.Type), Labels: s.Labels, Data: s.Data}, nil
}

// ApplySecret applies a Secret by server-side apply and reads it back: what
// the cluster holds afterwards is what was given, and nothing else.
func (c *Cluster) ApplySecret(ctx context.Context, s cluster.Secret) (changed bool, err error) {
	object := s.Namespace + "/" + s.Name
	if s.Type == "" {
		s.Type = string(corev1.SecretTypeOpaque)
	}
	before, err := c.Secret(ctx, s.Namespace, s.Name)
	switch {
	case err == nil && before.Type != s.Type:
		return false, fault.Newf(fault.Conflict, "apply Secret", object, "it is there with type %s, and a type cannot be changed to %s", before.Type, s.Type).
			WithHint("look at it, then delete it: kubectl delete secret %s -n %s", s.Name, s.Namespace)
	case err == nil && sameData(before.Data, s.Data):
		return false, nil
	case err != nil && fault.KindOf(err) != fault.NotFound:
		return false, err
	}
	if err := c.apply(ctx, s, before); err != nil {
		return false, c.fault("apply Secret", object, err)
	}
	after, err := c.Secret(ctx, s.Namespace, s.Name)
	if err != nil {
		return true, err
	}
	if !sameData(after.Data, s.Data) {
		return true, fault.Newf(fault.Conflict, "verify Secret", object, "the cluster holds other data than was applied").
			WithHint("does another tool write it? compare: kubectl get secret %s -n %s -o yaml --show-managed-fields", s.Name, s.Namespace)
	}
	return true, nil
}

// apply takes over every field. Entries that were there under another manager
// and are not wanted any more are removed with an update, which
// server-side apply does not do.
func (c *Cluster) apply(ctx context.Context, s, before cluster.Secret) error {
	for k := range before.Data {
		if _, keep := s.Data[k]; !keep {
			return c.replace(ctx, s)
		}
	}
	a := applycorev1.Secret(s.Name, s.Namespace).WithType(corev1.SecretType(s.Type)).WithData(s.Data).WithLabels(s.Labels)
	_, err := c.client.CoreV1().Secrets(s.Namespace).Apply(ctx, a, metav1.ApplyOptions{FieldManager: manager, Force: true})
	if apierrors.IsUnsupportedMediaType(err) { // before Kubernetes 1.16
		return c.replace(ctx, s)
	}
	return err
}

// replace sets the data by compare-and-set.
func (c *Cluster) replace(ctx context.Context, s cluster.Secret) error {
	have, err := c.client.CoreV1().Secrets(s.Namespace).Get(ctx, s.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = c.client.CoreV1().Secrets(s.Namespace).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: s.Name, Namespace: s.Namespace, Labels: s.Labels},
			Type: corev1.SecretType(s.Type), Data: s.Data}, metav1.CreateOptions{FieldManager: manager})
		return err
	}
	if err != nil {
		return err
	}
	have.Data = s.Data
	if have.Labels == nil {
		have.Labels = map[string]string{}
	}
	maps.Copy(have.Labels, s.Labels)
	_, err = c.client.CoreV1().Secrets(s.Namespace).Update(ctx, have, metav1.UpdateOptions{FieldManager: manager})
	return err
}

func sameData(a, b map[string][]byte) bool {
	return maps.EqualFunc(a, b, func(x, y []byte) bool { return string(x) == string(y) })
}

// DeleteSecret removes a Secret; one that is absent is no error.
func (c *Cluster) DeleteSecret(ctx context.Context, namespace, name string) error {
	err := c.client.CoreV1().Secrets(namespace).Delete(ctx, name, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return c.fault("delete Secret", namespace+"/"+name, err)
}

// Claims lists the volume claims of a release, or of one component of it.
func (c *Cluster) Claims(ctx context.Context, namespace, release, component string) ([]string, error) {
	which := selector(release)
	if component != "" {
		which += ",app.kubernetes.io/component=" + component
	}
	l, err := c.client.CoreV1().PersistentVolumeClaims(namespace).List(ctx, metav1.ListOptions{LabelSelector: which})
	if err != nil {
		return nil, c.fault("list volume claims in", namespace, err)
	}
	var out []string
	for _, p := range l.Items {
		out = append(out, p.Name)
	}
	return out, nil
}

// DeleteClaim removes a volume claim, and with it what it holds.
func (c *Cluster) DeleteClaim(ctx context.Context, namespace, name string) error {
	err := c.client.CoreV1().PersistentVolumeClaims(namespace).Delete(ctx, name, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return c.fault("delete volume claim", namespace+"/"+name, err)
}

func selector(release string) string { return "app.kubernetes.io/instance=" + release }

// NodeAddresses lists the internal IPs of the nodes that a label chooses, all
// with "".
func (c *Cluster) NodeAddresses(ctx context.Context, label string) ([]string, error) {
	l, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: label})
	if err != nil {
		return nil, c.fault("list nodes", label, err)
	}
	var out []string
	for _, n := range l.Items {
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				out = append(out, a.Address)
			}
		}
	}
	if len(out) == 0 {
		return nil, fault.New(fault.NotFound, "list nodes", label, fmt.Errorf("no node has this label and an internal address"))
	}
	return out, nil
}
