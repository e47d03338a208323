package install

import (
	"context"
	"fmt"
	"time"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pki"
)

// RenewBefore is how long before its end a certificate is made anew.
const RenewBefore = 60 * 24 * time.Hour

// maxMembers is how many etcd members the certificates have names for.
const maxMembers = 3

// Leaf is one certificate of a release, and the Secret that keeps it.
type Leaf struct {
	Secret string
	Name   string
	Use    pki.Usage
	Hosts  []string
}

// CASecret is the name of the Secret with the CA of a release.
func CASecret(release string) string { return release + "-ca" }

// Leaves lists the certificates of a release.
func Leaves(release, namespace, domain string, sans []string) []Leaf {
	api := []string{"localhost", "127.0.0.1"}
	for _, n := range []string{"kms-api", release + "-oss"} {
		api = append(api, n, n+"."+namespace, n+"."+namespace+".svc", n+"."+namespace+".svc."+domain)
	}
	storage := []string{"localhost", "127.0.0.1"}
	for i := range maxMembers {
		n := fmt.Sprintf("%s-storage-%d.%s-storage.%s.svc", release, i, release, namespace)
		storage = append(storage, n, n+"."+domain)
	}
	return []Leaf{
		{release + "-api-tls", "kms-api", pki.Server, append(api, sans...)},
		{release + "-storage-tls", pki.StorageName, pki.Peer, storage},
		{release + "-storage-client-tls", "oss", pki.Client, nil},
	}
}

// certificates makes the CA and the leaves, or reuses those that are still
// good.
func (j Job) certificates(ctx context.Context, o Options) error {
	ca, made, err := j.ca(ctx, o)
	if err != nil {
		return err
	}
	for _, l := range Leaves(o.Release, o.Namespace, o.Domain, o.SANs) {
		have, err := j.Cluster.Secret(ctx, o.Namespace, l.Secret)
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return err
		}
		old := pki.Pair{Cert: have.Data["tls.crt"], Key: have.Data["tls.key"]}
		if string(have.Data["ca.crt"]) == string(ca.Cert) && pki.Valid(ca.Cert, old, l.Hosts, j.Now(), RenewBefore) == nil {
			continue
		}
		leaf, err := pki.Issue(ca, l.Name, l.Use, l.Hosts, j.Now())
		if err != nil {
			return err
		}
		if _, err := j.Cluster.ApplySecret(ctx, TLSSecret(o.Namespace, l.Secret, labels(o), ca.Cert, leaf)); err != nil {
			return err
		}
		made = true
	}
	j.report(made, "certificates of the API and etcd")
	return nil
}

// TLSSecret is the Secret of a leaf.
func TLSSecret(namespace, name string, labels map[string]string, ca []byte, leaf pki.Pair) cluster.Secret {
	return cluster.Secret{Namespace: namespace, Name: name, Type: "kubernetes.io/tls", Labels: labels,
		Data: map[string][]byte{"tls.crt": leaf.Cert, "tls.key": leaf.Key, "ca.crt": ca}}
}

func (j Job) ca(ctx context.Context, o Options) (ca pki.Pair, made bool, err error) {
	name := CASecret(o.Release)
	have, err := j.Cluster.Secret(ctx, o.Namespace, name)
	if err == nil {
		return pki.Pair{Cert: have.Data["ca.crt"], Key: have.Data["ca.key"]}, false, nil
	}
	if fault.KindOf(err) != fault.NotFound {
		return ca, false, err
	}
	if ca, err = pki.NewCA("kmsctl "+o.Release+" in "+o.Namespace, j.Now()); err != nil {
		return ca, false, err
	}
	_, err = j.Cluster.ApplySecret(ctx, cluster.Secret{Namespace: o.Namespace, Name: name, Labels: labels(o), Data: map[string][]byte{"ca.crt": ca.Cert, "ca.key": ca.Key}})
	return ca, true, err
}
