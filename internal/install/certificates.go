package install

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
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

// API is the name of a release's API, its StatefulSet and the Service of its pods.
func API(release string) string { return release + "-oss" }

// Storage is the name of a release's storage, its StatefulSet and the Service of
// its pods.
func Storage(release string) string { return release + "-storage" }

// StorageMembers are the names that the members of a release's store may have,
// which are those of their pods.
func StorageMembers(release string) (names []string) {
	for i := range maxMembers {
		names = append(names, fmt.Sprintf("%s-%d", Storage(release), i))
	}
	return names
}

func apiSecret(release string) string { return release + "-api-tls" }

// Leaves lists the certificates of a release.
func Leaves(release, namespace, domain, service string) []Leaf {
	api := []string{"localhost", "127.0.0.1"}
	for _, n := range []string{service, API(release)} {
		api = append(api, n, n+"."+namespace, n+"."+namespace+".svc", n+"."+namespace+".svc."+domain)
	}
	storage := []string{"localhost", "127.0.0.1"}
	for _, member := range StorageMembers(release) {
		n := fmt.Sprintf("%s.%s.%s.svc", member, Storage(release), namespace)
		storage = append(storage, n, n+"."+domain)
	}
	return []Leaf{
		{apiSecret(release), "kms-api", pki.Server, api},
		{Storage(release) + "-tls", pki.StorageName, pki.Peer, storage},
		{Storage(release) + "-client-tls", "oss", pki.Client, nil},
	}
}

// certificates makes the CA and the leaves, or reuses those that are still
// good.
func (j Job) certificates(ctx context.Context, o Options) error {
	ca, made, err := j.ca(ctx, o)
	if err != nil {
		return err
	}
	for _, l := range Leaves(o.Release, o.Namespace, o.Domain, o.Service) {
		have, err := j.Cluster.Secret(ctx, o.Namespace, l.Secret)
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return err
		}
		old := pki.Pair{Cert: have.Data["tls.crt"], Key: have.Data["tls.key"]}
		surplus := false
		if l.Secret == apiSecret(o.Release) {
			l.Hosts, surplus = j.apiHosts(o, l.Hosts, old.Cert)
		}
		if !surplus && string(have.Data["ca.crt"]) == string(ca.Cert) && pki.Valid(ca.Cert, old, l.Hosts, j.Now(), RenewBefore) == nil {
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

// apiHosts is what the API's certificate is for: its own names, those that it
// was given before, and those that are given now, without the ones to drop.
// surplus says that the present certificate has one that is to go.
func (j Job) apiHosts(o Options, own []string, present []byte) (hosts []string, surplus bool) {
	had, err := pki.Hosts(present)
	if err != nil && len(present) > 0 {
		j.Line("note", "the API's certificate cannot be read, and so not the names that --san gave it: give them again")
	}
	hosts = own
	for _, h := range append(had, o.SANs...) {
		switch {
		case holds(o.DropSANs, h):
			surplus = true
		case !holds(hosts, h):
			hosts = append(hosts, h)
		}
	}
	return hosts, surplus
}

// checkSANs holds the rules of the names to drop.
func checkSANs(o Options) error {
	own := Leaves(o.Release, o.Namespace, o.Domain, o.Service)[0].Hosts
	for _, h := range o.DropSANs {
		switch {
		case holds(o.SANs, h):
			return fault.Usagef("--san, --drop-san: %q is in both", h).WithHint("a name is either wanted or not")
		case holds(own, h):
			return fault.Usagef("--drop-san: %q is a name of the API's own Service", h).WithHint("only names that --san gave can be dropped")
		}
	}
	return nil
}

// holds says whether a name or address is in the list, however it is written.
func holds(list []string, host string) bool {
	return slices.ContainsFunc(list, func(h string) bool {
		a, b := net.ParseIP(h), net.ParseIP(host)
		return strings.EqualFold(h, host) || (a != nil && a.Equal(b))
	})
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
