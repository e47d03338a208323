package kube

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// lockFor is how long a lock lives without being renewed.
const lockFor = 30 * time.Second

// Lock takes a Lease, so that no two change the same thing at once. It is
// renewed until unlock; the context that it gives ends when the lock is lost.
// A lock whose holder died is taken over when it has run out.
func (c *Cluster) Lock(ctx context.Context, namespace, name string) (context.Context, func(), error) {
	l, err := c.take(ctx, namespace, name)
	if err != nil {
		return ctx, nil, err
	}
	locked, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(lockFor / 3)
		defer t.Stop()
		for {
			select {
			case <-locked.Done():
				return
			case <-t.C:
			}
			l.Spec.RenewTime = ptr.To(metav1.NowMicro())
			fresh, err := c.client.CoordinationV1().Leases(namespace).Update(locked, l, metav1.UpdateOptions{FieldManager: manager})
			switch {
			case err == nil:
				l = fresh
			case apierrors.IsConflict(err), apierrors.IsNotFound(err):
				cancel(fault.Newf(fault.Conflict, "keep lock", namespace+"/"+name, "another took it or removed it"))
				return
			} // else the next tick tries again, before it runs out
		}
	}()
	unlock := func() {
		cancel(nil)
		<-done
		free, stop := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer stop()
		// What stays when this fails runs out by itself.
		_ = c.client.CoordinationV1().Leases(namespace).Delete(free, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &l.UID, ResourceVersion: &l.ResourceVersion}})
	}
	return locked, unlock, nil
}

func (c *Cluster) take(ctx context.Context, namespace, name string) (*coordinationv1.Lease, error) {
	leases := c.client.CoordinationV1().Leases(namespace)
	now := metav1.NowMicro()
	spec := coordinationv1.LeaseSpec{HolderIdentity: ptr.To(holder()), AcquireTime: &now, RenewTime: &now, LeaseDurationSeconds: ptr.To(int32(lockFor.Seconds()))}
	l, err := leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: spec}, metav1.CreateOptions{FieldManager: manager})
	if !apierrors.IsAlreadyExists(err) {
		return l, c.fault("take lock", namespace+"/"+name, err)
	}
	old, err := leases.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) { // freed meanwhile
		return c.take(ctx, namespace, name)
	}
	if err != nil {
		return nil, c.fault("take lock", namespace+"/"+name, err)
	}
	until := ptr.Deref(old.Spec.RenewTime, metav1.MicroTime{}).Add(time.Duration(ptr.Deref(old.Spec.LeaseDurationSeconds, 0)) * time.Second)
	if left := until.Sub(now.Time); left > 0 {
		return nil, fault.Newf(fault.Conflict, "take lock", namespace+"/"+name, "%s changes the release", ptr.Deref(old.Spec.HolderIdentity, "somebody")).
			WithHint("try again when it is done; if it died, the lock runs out in %s", left.Round(time.Second))
	}
	old.Spec = spec
	l, err = leases.Update(ctx, old, metav1.UpdateOptions{FieldManager: manager})
	return l, c.fault("take lock", namespace+"/"+name, err)
}

// holder tells people who holds a lock.
func holder() string {
	name := "somebody"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	host, _ := os.Hostname() // only for people
	return fmt.Sprintf("%s@%s, process %d", name, host, os.Getpid())
}
