package kube

import (
	"context"
	"errors"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// Timing of leader election, as controllers of Kubernetes have it.
const (
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
)

// Lead runs f while this process holds the lease, again after it was lost, and
// returns when ctx ends.
func (c *Cluster) Lead(ctx context.Context, namespace, name, identity string, f func(ctx context.Context)) error {
	lock := &resourcelock.LeaseLock{LeaseMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Client: c.client.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: identity}}
	var running sync.Mutex // f of the last term ends before the next one begins
	for ctx.Err() == nil {
		e, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: lock, Name: name, ReleaseOnCancel: true, LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(ctx context.Context) {
					running.Lock()
					defer running.Unlock()
					f(ctx)
				},
				OnStoppedLeading: func() {},
			},
		})
		if err != nil {
			return c.fault("lead by lease", namespace+"/"+name, err)
		}
		e.Run(ctx) // returns when the lease is lost, and ends the context of f
	}
	running.Lock()
	defer running.Unlock()
	return nil
}

// WatchAnnotated calls found for every Secret of the namespaces (none: all)
// that has the annotation, when it appears, when it changes and every few
// minutes. Secrets without the annotation are forgotten at once, so that their
// content does not stay in memory.
func (c *Cluster) WatchAnnotated(ctx context.Context, namespaces []string, annotation string, found func(cluster.Annotated)) error {
	if len(namespaces) == 0 {
		namespaces = []string{metav1.NamespaceAll}
	}
	strip := func(o any) (any, error) {
		s, ok := o.(*corev1.Secret)
		if !ok {
			return o, nil
		}
		small := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name, UID: s.UID, ResourceVersion: s.ResourceVersion}}
		if entry := s.Annotations[annotation]; entry != "" {
			small.Annotations = map[string]string{annotation: entry}
			if len(s.Data[entry]) > 0 {
				small.Data = map[string][]byte{entry: {1}}
			}
		}
		return small, nil
	}
	work := make(chan cluster.Annotated)
	send := func(o any) {
		s, ok := o.(*corev1.Secret)
		if !ok || s.Annotations[annotation] == "" {
			return
		}
		entry := s.Annotations[annotation]
		select {
		case work <- cluster.Annotated{Namespace: s.Namespace, Name: s.Name, Value: entry, Has: len(s.Data[entry]) > 0}:
		case <-ctx.Done():
		}
	}
	var running sync.WaitGroup
	defer running.Wait()
	for _, ns := range namespaces {
		// Not by package informers: it has an informer for every kind of object,
		// which made the program 10 MB larger.
		secrets := c.client.CoreV1().Secrets(ns)
		_, i := cache.NewInformerWithOptions(cache.InformerOptions{
			ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
				ListWithContextFunc:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return secrets.List(ctx, o) },
				WatchFuncWithContext: secrets.Watch,
			}, c.client),
			ObjectType: &corev1.Secret{}, ResyncPeriod: 2 * time.Minute, Transform: strip,
			Handler: cache.ResourceEventHandlerFuncs{AddFunc: send, UpdateFunc: func(_, o any) { send(o) }},
		})
		running.Go(func() { i.RunWithContext(ctx) })
	}
	for {
		select {
		case a := <-work:
			found(a)
		case <-ctx.Done():
			return nil
		}
	}
}

// FillSecret sets an entry that is absent or empty, by compare-and-set; false
// when it has a value already.
func (c *Cluster) FillSecret(ctx context.Context, namespace, name, entry string, value []byte) (bool, error) {
	for {
		s, err := c.client.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, c.fault("read Secret", namespace+"/"+name, err)
		}
		if len(s.Data[entry]) > 0 {
			return false, nil
		}
		if s.Data == nil {
			s.Data = map[string][]byte{}
		}
		s.Data[entry] = value
		_, err = c.client.CoreV1().Secrets(namespace).Update(ctx, s, metav1.UpdateOptions{FieldManager: manager})
		if apierrors.IsConflict(err) {
			continue // somebody changed it meanwhile: look again
		}
		return err == nil, c.fault("fill Secret", namespace+"/"+name, err)
	}
}

// UpdateSecret replaces the data of a Secret that is there.
func (c *Cluster) UpdateSecret(ctx context.Context, s cluster.Secret) error {
	have, err := c.client.CoreV1().Secrets(s.Namespace).Get(ctx, s.Name, metav1.GetOptions{})
	if err != nil {
		return c.fault("read Secret", s.Namespace+"/"+s.Name, err)
	}
	have.Data = s.Data
	_, err = c.client.CoreV1().Secrets(s.Namespace).Update(ctx, have, metav1.UpdateOptions{FieldManager: manager})
	return c.fault("update Secret", s.Namespace+"/"+s.Name, err)
}

var eventVersions = map[string]string{"Secret": "v1", "Pod": "v1", "StatefulSet": "apps/v1"}

// Event writes an event about an object.
func (c *Cluster) Event(ctx context.Context, e cluster.Event) error {
	kind := corev1.EventTypeNormal
	if e.Warning {
		kind = corev1.EventTypeWarning
	}
	now := metav1.Now()
	msg := e.Message
	if len(msg) > 1000 { // the API server refuses more than 1024
		msg = msg[:1000]
	}
	_, err := c.client.CoreV1().Events(e.Namespace).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{GenerateName: "kmsctl-", Namespace: e.Namespace},
		InvolvedObject: corev1.ObjectReference{APIVersion: eventVersions[e.Kind], Kind: e.Kind, Namespace: e.Namespace, Name: e.Name},
		Type:           kind, Reason: e.Reason, Message: msg, Source: corev1.EventSource{Component: manager},
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}, metav1.CreateOptions{})
	return c.fault("write event about", e.Namespace+"/"+e.Name, err)
}

// InCluster opens the cluster that this pod runs in.
func InCluster() (*Cluster, error) {
	c, err := Open(Config{})
	if err != nil {
		var f *fault.Error
		if errors.As(err, &f) {
			return nil, f.WithHint("`kmsctl run watcher` runs in a pod, or with KUBECONFIG set")
		}
	}
	return c, err
}
