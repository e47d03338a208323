package diagnose_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"
	discovery "k8s.io/client-go/discovery/fake"
	"k8s.io/client-go/kubernetes/fake"
	ktest "k8s.io/client-go/testing"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/kube"
)

// world is a cluster where everything is right, for one thing to be put wrong.
type world struct {
	objects []runtime.Object
	version string
	groups  []string
	denied  func(r *authv1.ResourceAttributes) bool
	skew    time.Duration
	log     string
	broken  error // what the API server answers to everything
	pre     diagnose.Preflight

	replicas func(context.Context) ([]diagnose.Replica, error)
}

// clocked has what a fake client lacks: a clock, logs; and no route.
type clocked struct {
	*kube.Cluster
	skew   time.Duration
	log    string
	broken error
}

func (c clocked) logged(pods []cluster.Pod, err error) ([]cluster.Pod, error) {
	for _, p := range pods {
		if p.Trouble != nil && p.Trouble.Log != "" {
			p.Trouble.Log = c.log
		}
	}
	return pods, err
}

func (c clocked) Pods(ctx context.Context, namespace, release string) ([]cluster.Pod, error) {
	return c.logged(c.Cluster.Pods(ctx, namespace, release))
}

func (c clocked) PodsNamed(ctx context.Context, namespace, prefix string) ([]cluster.Pod, error) {
	return c.logged(c.Cluster.PodsNamed(ctx, namespace, prefix))
}

func (c clocked) Clock(context.Context) (time.Time, error)      { return time.Now().Add(c.skew), c.broken }
func (c clocked) RegistryRoute(context.Context) (string, error) { return "", nil }

func meta(name string, labels map[string]string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Namespace: "kube-system", Labels: labels}
}

func node(name, ip, arch string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"management": "true"}}, Status: corev1.NodeStatus{
		Addresses:  []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: ip}},
		NodeInfo:   corev1.NodeSystemInfo{Architecture: arch},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}}}
}

func class(name string, isDefault string) *storagev1.StorageClass {
	return &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{"storageclass.kubernetes.io/is-default-class": isDefault}}, Provisioner: "example/disk"}
}

func pair(t *testing.T, ip string, at time.Time) (cert, key []byte) {
	t.Helper()
	cert, key, err := hsm.NewLunaClient(ip, at)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// appliance answers as a Luna does, and knows the client.
func appliance(t *testing.T, client []byte) (port string, cert []byte) {
	t.Helper()
	cert, key := pair(t, "127.0.0.1", time.Now())
	return serve(t, cert, key, client), cert
}

// usual are the pairs of a good world, made once: RSA keys take their time.
var usual = sync.OnceValue(func() (p [2][2][]byte) {
	for i, ip := range []string{"10.0.0.11", "127.0.0.1"} {
		cert, key, err := hsm.NewLunaClient(ip, time.Now())
		if err != nil {
			panic(err)
		}
		p[i] = [2][]byte{cert, key}
	}
	return p
})

func serve(t *testing.T, cert, key, client []byte) (port string) {
	t.Helper()
	p, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(client)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{p}, ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if !bytes.Equal(raw[0], block.Bytes) {
				return errors.New("unknown client")
			}
			return nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _ = c.(*tls.Conn).Handshake(); _ = c.Close() }()
		}
	}()
	_, port, err = net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func good(t *testing.T) *world {
	t.Helper()
	model, err := hsm.Lookup("gemalto")
	if err != nil {
		t.Fatal(err)
	}
	cert, key, server := usual()[0][0], usual()[0][1], usual()[1][0]
	port := serve(t, server, usual()[1][1], cert)
	return &world{
		version: "v1.37.2", groups: []string{"apps/v1"},
		objects: []runtime.Object{
			&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system"}, Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive}},
			class("fast", "true"), class("slow", "false"), node("n1", "10.0.0.11", "amd64"),
			&corev1.Secret{ObjectMeta: meta("pull", nil), Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{".dockerconfigjson": []byte(`{"auths":{"reg.site:5000":{}}}`)}},
		},
		pre: diagnose.Preflight{Release: "key-management-hsm", Namespace: "kube-system", SCCs: []string{"restricted-v2"}, NodeLabel: "management=true", PullSecrets: []string{"pull"},
			Registry: "reg.site:5000", Model: model, Settings: hsm.Settings{Model: "gemalto", HSMIP: "127.0.0.1"}, HSMPort: port, Now: time.Now,
			HSMSecret: &diagnose.Secret{Password: []byte("canary-pin"), ServerCA: server, Cert: map[string][]byte{"10.0.0.11": cert}, Key: map[string][]byte{"10.0.0.11": key}},
			Images: func(context.Context) ([]diagnose.Image, error) {
				return []diagnose.Image{{Ref: "reg.site:5000/ibmcom/kms-oss:1", Architectures: []string{"amd64"}}}, nil
			},
			Chart: func(context.Context) (string, string, error) { return "key-management-hsm", "1.0.0", nil },
			Current: func(context.Context) (cluster.Release, error) {
				return cluster.Release{}, fault.Newf(fault.NotFound, "find release", "key-management-hsm", "it is not there")
			}},
	}
}

// cluster is a real client of a cluster in memory that has the world's objects.
func (w *world) cluster() clocked {
	client := fake.NewClientset(w.objects...)
	client.Discovery().(*discovery.FakeDiscovery).FakedServerVersion = &version.Info{GitVersion: w.version}
	for _, g := range w.groups {
		client.Resources = append(client.Resources, &metav1.APIResourceList{GroupVersion: g})
	}
	client.PrependReactor("create", "selfsubjectaccessreviews", func(a ktest.Action) (bool, runtime.Object, error) {
		r := a.(ktest.CreateAction).GetObject().(*authv1.SelfSubjectAccessReview)
		r.Status.Allowed = w.denied == nil || !w.denied(r.Spec.ResourceAttributes)
		return true, r, nil
	})
	if w.broken != nil {
		client.PrependReactor("*", "*", func(ktest.Action) (bool, runtime.Object, error) { return true, nil, w.broken })
	}
	return clocked{kube.NewFor(client), w.skew, w.log, w.broken}
}

func (w *world) run(t *testing.T) diagnose.Report {
	t.Helper()
	if w.pre.Cluster == nil && w.pre.ClusterErr == nil {
		w.pre.Cluster = w.cluster()
	}
	return note(diagnose.Run(t.Context(), w.pre.Checks()))
}

func find(r diagnose.Report, check string) (out []diagnose.Finding) {
	for _, f := range r.Findings {
		if f.Check == check {
			out = append(out, f)
		}
	}
	return out
}

func TestAllWell(t *testing.T) {
	r := good(t).run(t)
	if r.Failed != 0 || r.Warned != 0 || r.Fault("preflight") != nil {
		t.Errorf("%d failed, %d warned: %+v", r.Failed, r.Warned, r.Findings)
	}
	for _, f := range r.Findings {
		if f.Verdict == diagnose.Skip && f.Check != "openshift" {
			t.Errorf("skipped: %+v", f)
		}
		if f.Reason == "" {
			t.Errorf("no reason: %+v", f)
		}
	}
}

var forbidden = apierrors.NewForbidden(schema.GroupResource{Resource: "things"}, "", errors.New("ask the administrator"))

// TestAnAPIThatRefuses: no check takes a question that was not answered for an
// answer; what the account may not see is skipped or wrong, and says so.
func TestAnAPIThatRefuses(t *testing.T) {
	asks := map[string]bool{}
	for _, name := range []string{"cluster", "clock", "rights", "namespace", "storage", "pull secret", "architectures", "hsm secret", "release", "helm 2", "old product", "openshift", "pods",
		"old api key", "old cleanup job", "old pods"} {
		asks[name] = true
	}
	for text, broken := range map[string]error{"the disk of etcd is full": apierrors.NewInternalError(errors.New("the disk of etcd is full")), "ask the administrator": forbidden} {
		w := good(t)
		w.broken, w.pre.HSMSecret = broken, nil
		w.pre.Current = func(context.Context) (cluster.Release, error) { return cluster.Release{}, broken }
		none := func(context.Context) (cluster.Release, error) { return cluster.Release{}, broken }
		for _, f := range append(w.run(t).Findings, w.doctor(t, none).Findings...) {
			switch {
			case !asks[f.Check]:
			case f.Verdict == diagnose.Fail && strings.Contains(f.Reason, text):
			case f.Verdict == diagnose.Skip && errors.Is(broken, forbidden) && strings.HasPrefix(f.Reason, "may not look at"):
			default:
				t.Errorf("%s: %+v", text, f)
			}
		}
	}
}

// TestEachCheckFails puts one thing wrong at a time: the check says it, with a
// cure, and no other check fails with it.
func TestEachCheckFails(t *testing.T) {
	secret := func(w *world) *diagnose.Secret { return w.pre.HSMSecret }
	for name, c := range map[string]struct {
		wrong   func(t *testing.T, w *world)
		check   string
		verdict diagnose.Verdict
		reason  string
		cure    string
	}{
		"no cluster":  {func(_ *testing.T, w *world) { w.pre.ClusterErr = errors.New("connection refused") }, "cluster", diagnose.Fail, "connection refused", "KUBECONFIG"},
		"old cluster": {func(_ *testing.T, w *world) { w.version = "v1.19.16" }, "cluster", diagnose.Fail, "v1.19.16; the chart needs 1.21", "upgrade the cluster"},
		"odd version": {func(_ *testing.T, w *world) { w.version = "main" }, "cluster", diagnose.Warn, "of no known form", "kubectl version"},
		"clock":       {func(_ *testing.T, w *world) { w.skew = -5 * time.Minute }, "clock", diagnose.Warn, "-5m0s off", "NTP"},
		"rights": {func(_ *testing.T, w *world) {
			w.denied = func(r *authv1.ResourceAttributes) bool { return r.Resource == "statefulsets" && r.Verb != "get" }
		}, "rights", diagnose.Fail, "may not list, create, patch, delete statefulsets.apps in namespace kube-system", "bind a Role"},
		"rights of replicas": {func(_ *testing.T, w *world) {
			w.pre.Replicated = true
			w.denied = func(r *authv1.ResourceAttributes) bool { return r.Resource == "poddisruptionbudgets" }
		}, "rights", diagnose.Fail, "delete poddisruptionbudgets.policy", "bind a Role"},
		"rights of the lock": {func(_ *testing.T, w *world) {
			w.denied = func(r *authv1.ResourceAttributes) bool { return r.Resource == "leases" }
		}, "rights", diagnose.Fail, "may not get, create, update, delete leases.coordination.k8s.io in namespace kube-system", "bind a Role"},
		"rights elsewhere": {func(_ *testing.T, w *world) {
			w.pre.Watched = []string{"kube-system", "shop"}
			w.denied = func(r *authv1.ResourceAttributes) bool { return r.Namespace == "shop" && r.Resource == "secrets" }
		}, "rights", diagnose.Fail, "may not get, list, watch, update secrets in namespace shop", "bind a Role"},
		"rights everywhere": {func(_ *testing.T, w *world) {
			w.pre.WatchAll = true
			w.denied = func(r *authv1.ResourceAttributes) bool { return r.Namespace == "" && r.Resource == "secrets" }
		}, "rights", diagnose.Fail, "may not get, list, watch, update secrets in the whole cluster", "bind a Role"},
		"rights of token reviews": {func(_ *testing.T, w *world) {
			w.pre.AccountTokens = true
			w.denied = func(r *authv1.ResourceAttributes) bool { return r.Resource == "tokenreviews" }
		}, "rights", diagnose.Fail, "may not create tokenreviews.authentication.k8s.io", "bind a Role"},
		"namespace": {func(_ *testing.T, w *world) {
			w.pre.Namespace, w.pre.PullSecrets = "kms", nil
			w.denied = func(r *authv1.ResourceAttributes) bool { return r.Resource == "namespaces" }
		}, "namespace", diagnose.Fail, "kms is not there, and you may not make it", "kubectl create namespace kms"},
		"namespace ends": {func(_ *testing.T, w *world) {
			w.objects[0].(*corev1.Namespace).Status.Phase = corev1.NamespaceTerminating
		}, "namespace", diagnose.Fail, "kube-system is Terminating", "wait until it is gone"},
		"no default class": {func(_ *testing.T, w *world) { w.objects[1] = class("fast", "false") }, "storage", diagnose.Fail, "no default class; the cluster has fast, slow", "--storage-class"},
		"no such class":    {func(_ *testing.T, w *world) { w.pre.StorageClass = "fsat" }, "storage", diagnose.Fail, "no class fsat", "--host-path"},
		"registry": {func(_ *testing.T, w *world) {
			w.pre.Images = func(context.Context) ([]diagnose.Image, error) {
				return nil, fault.Newf(fault.NotFound, "find image", "reg.site:5000/x:1", "it is not in the registry").WithHint("load the archive")
			}
		}, "registry", diagnose.Fail, "it is not in the registry", "load the archive"},
		"pull secret": {func(_ *testing.T, w *world) { w.pre.PullSecrets = []string{"absent"} }, "pull secret", diagnose.Fail, "absent", "kubectl create secret docker-registry absent"},
		"pull secret's type": {func(_ *testing.T, w *world) {
			w.objects[4].(*corev1.Secret).Type = corev1.SecretTypeOpaque
		}, "pull secret", diagnose.Fail, "is of type Opaque", "docker-registry pull"},
		"pull secret's registry": {func(_ *testing.T, w *world) { w.pre.Registry = "other:5000" }, "pull secret", diagnose.Fail, "no entry for other:5000", "--docker-server=other:5000"},
		"architecture":           {func(_ *testing.T, w *world) { w.objects[3] = node("n1", "10.0.0.11", "s390x") }, "architectures", diagnose.Fail, "is for amd64, the nodes are 1 s390x", "load the archive"},
		"node not ready": {func(_ *testing.T, w *world) {
			w.objects[3].(*corev1.Node).Status.Conditions[0].Status = corev1.ConditionFalse
		}, "architectures", diagnose.Fail, "none of the 1 nodes is ready", "kubectl get nodes"},
		"chart": {func(_ *testing.T, w *world) {
			w.pre.Chart = func(context.Context) (string, string, error) { return "", "", errors.New("no such repository") }
		}, "chart", diagnose.Fail, "no such repository", "kmsctl load --repo"},
		"settings": {func(_ *testing.T, w *world) { w.pre.SettingsErr = errors.New("--hsm-ip: missing") }, "hsm settings", diagnose.Fail, "--hsm-ip: missing", "render overrides"},
		"IPv6":     {func(_ *testing.T, w *world) { w.pre.Settings.RFSIP = "fe80::1" }, "hsm settings", diagnose.Warn, "rfs_ip is the IPv6 address fe80::1", "IPv4"},
		"no key hash": {func(_ *testing.T, w *world) {
			w.pre.Model, _ = hsm.Lookup("thales")
			w.pre.Settings.HSMIP, w.pre.Settings.RFSIP = "127.0.0.1", "127.0.0.1"
		}, "hsm settings", diagnose.Warn, "trusted on first use", "--key-hash"},
		"softhsm":         {func(_ *testing.T, w *world) { w.pre.Model, _ = hsm.Lookup("softhsm") }, "hsm settings", diagnose.Warn, "for trials", "gemalto or thales"},
		"secret":          {func(_ *testing.T, w *world) { w.pre.SecretErr = errors.New("data.hsm-pas is unknown") }, "hsm secret", diagnose.Fail, "data.hsm-pas is unknown", "render secret"},
		"echoed password": {func(_ *testing.T, w *world) { secret(w).Password = []byte("canary-pin\n") }, "hsm secret", diagnose.Fail, "control character", "echo | base64"},
		"other password": {func(_ *testing.T, w *world) {
			w.objects = append(w.objects, &corev1.Secret{ObjectMeta: meta("hsm-secret", nil), Data: map[string][]byte{"hsm-pass": []byte("canary-other")}})
		}, "hsm secret", diagnose.Warn, "with another password", "start again"},
		"expired": {func(t *testing.T, w *world) {
			t.Helper()
			secret(w).Cert["10.0.0.11"], secret(w).Key["10.0.0.11"] = pair(t, "10.0.0.11", time.Now().AddDate(-11, 0, 0))
		}, "hsm certificates", diagnose.Fail, "10.0.0.11 expired on", "luna-cert create"},
		"other name": {func(t *testing.T, w *world) {
			t.Helper()
			cert, key := pair(t, "10.0.0.12", time.Now())
			w.pre.HSMPort, secret(w).ServerCA = appliance(t, cert)
			secret(w).Cert["10.0.0.11"], secret(w).Key["10.0.0.11"] = cert, key
		}, "hsm certificates", diagnose.Warn, `is for "10.0.0.12"`, "luna-cert create"},
		"other key":      {func(t *testing.T, w *world) { _, secret(w).Key["10.0.0.11"] = pair(t, "10.0.0.11", time.Now()) }, "hsm certificates", diagnose.Fail, "does not match", "luna-cert create"},
		"no certificate": {func(t *testing.T, w *world) { _, secret(w).Key["10.0.0.12"] = pair(t, "10.0.0.12", time.Now()) }, "hsm certificates", diagnose.Fail, "10.0.0.12 has a key and no certificate", "luna-cert create"},
		"server CA":      {func(_ *testing.T, w *world) { secret(w).ServerCA = []byte("canary") }, "hsm certificates", diagnose.Fail, "no certificate in PEM", "fetch-server"},
		"node without a pair": {func(_ *testing.T, w *world) { w.objects = append(w.objects, node("n2", "10.0.0.12", "amd64")) }, "hsm certificates", diagnose.Fail,
			"node n2 (10.0.0.12) has no certificate pair", "--node 10.0.0.12"},
		"IPv6 node":       {func(_ *testing.T, w *world) { w.objects = append(w.objects, node("n2", "fd00::2", "amd64")) }, "hsm certificates", diagnose.Fail, "n2 has only the IPv6 address fd00::2", "IPv4"},
		"no appliance":    {func(_ *testing.T, w *world) { w.pre.HSMPort = "1" }, "hsm reachable", diagnose.Fail, "127.0.0.1:1 does not answer", "firewall"},
		"other appliance": {func(t *testing.T, w *world) { w.pre.HSMPort, _ = appliance(t, secret(w).Cert["10.0.0.11"]) }, "hsm reachable", diagnose.Fail, "not in ServerCAFile", "fetch-server"},
		"unregistered": {func(t *testing.T, w *world) {
			t.Helper()
			secret(w).Cert["10.0.0.11"], secret(w).Key["10.0.0.11"] = pair(t, "10.0.0.11", time.Now())
		}, "hsm reachable", diagnose.Warn, "refuses the client certificate", "client register -client 10.0.0.11"},
		"no Connect": {func(_ *testing.T, w *world) {
			w.pre.Model, _ = hsm.Lookup("thales")
			w.pre.Settings = hsm.Settings{HSMIP: "127.0.0.1", RFSIP: "127.0.0.1", ESN: "x", KeyHash: "x"}
			w.pre.HSMPort = "1"
		}, "hsm reachable", diagnose.Fail, "the Connect does not answer at 127.0.0.1:1", "firewall"},
		"pending release": {func(_ *testing.T, w *world) {
			w.pre.Current = func(context.Context) (cluster.Release, error) {
				return cluster.Release{Status: cluster.PendingUpgrade, Revision: 3}, nil
			}
		}, "release", diagnose.Fail, "revision 3 is pending-upgrade", "--repair"},
		"pending release to be repaired": {func(_ *testing.T, w *world) {
			w.pre.Repair = true
			w.pre.Current = func(context.Context) (cluster.Release, error) {
				return cluster.Release{Status: cluster.PendingUpgrade, Revision: 3}, nil
			}
		}, "release", diagnose.Warn, "revision 3 is pending-upgrade", "no other kmsctl"},
		"registry to be loaded": {func(_ *testing.T, w *world) {
			w.pre.Images, w.pre.Answers = nil, func(context.Context) error { return errors.New("connection refused") }
		}, "registry", diagnose.Fail, "connection refused", "is the registry running"},
		"failed release": {func(_ *testing.T, w *world) {
			w.pre.Current = func(context.Context) (cluster.Release, error) {
				return cluster.Release{Status: cluster.Failed, Revision: 3, Note: "timed out"}, nil
			}
		}, "release", diagnose.Warn, "revision 3 failed: timed out", "doctor"},
		"installed": {func(_ *testing.T, w *world) {
			w.pre.Current = func(context.Context) (cluster.Release, error) {
				return cluster.Release{Status: cluster.Deployed, Revision: 2, Version: "1.0.0", Values: map[string]any{"hsm": map[string]any{"hsm_model": "gemalto"}}}, nil
			}
		}, "release", diagnose.Warn, "is installed: revision 2", "upgrade"},
		"another model": {func(_ *testing.T, w *world) {
			w.pre.Current = func(context.Context) (cluster.Release, error) {
				return cluster.Release{Status: cluster.Deployed, Revision: 2, Version: "1.0.0"}, nil
			}
		}, "release", diagnose.Fail, "is installed for softhsm", "go on with softhsm"},
		"architecture of some": {func(_ *testing.T, w *world) {
			w.objects = append(w.objects, node("n2", "10.0.0.11", "s390x"))
		}, "architectures", diagnose.Warn, "is for amd64 and runs on 1 of 2 nodes", "nodeSelector"},
		"no Luna, no secret": {func(_ *testing.T, w *world) {
			w.pre.HSMSecret, w.pre.HSMPort = nil, "1"
		}, "hsm reachable", diagnose.Fail, "no answer from 127.0.0.1:1", "firewall"},
		// What cannot be looked at is said, and taken for neither good nor bad.
		"nothing given": {func(_ *testing.T, w *world) {
			w.pre = diagnose.Preflight{Release: w.pre.Release, Namespace: w.pre.Namespace, NoVolumes: true, Now: w.pre.Now}
		}, "hsm settings", diagnose.Skip, "no HSM model was given", ""},
		"no address":      {func(_ *testing.T, w *world) { w.pre.Settings.HSMIP = "" }, "hsm reachable", diagnose.Skip, "no address of the HSM", ""},
		"no secret":       {func(_ *testing.T, w *world) { w.pre.HSMSecret = nil }, "hsm secret", diagnose.Skip, "install wants one", ""},
		"nodes not known": {func(_ *testing.T, w *world) { w.broken = forbidden }, "hsm certificates", diagnose.Skip, "may not look at nodes", ""},
		"Helm 2": {func(_ *testing.T, w *world) {
			w.objects = append(w.objects, &corev1.ConfigMap{ObjectMeta: meta("key-management-hsm.v1", map[string]string{"OWNER": "TILLER", "NAME": "key-management-hsm"})})
		}, "helm 2", diagnose.Fail, "Helm 2 has a release key-management-hsm", "2to3"},
		"old product": {func(_ *testing.T, w *world) {
			w.objects = append(w.objects, &appsv1.Deployment{ObjectMeta: meta("key-management-pep", nil)},
				&appsv1.Deployment{ObjectMeta: meta("key-management-hsm-oss", map[string]string{"app.kubernetes.io/instance": "key-management-hsm"})})
		}, "old product", diagnose.Warn, "workloads of the old product are in kube-system: key-management-pep", "export hsm-secret"},
		"OpenShift registry": {func(_ *testing.T, w *world) {
			w.groups = append(w.groups, "project.openshift.io/v1")
			w.pre.Registry = "docker-registry.default.svc:5000"
			w.pre.PullSecrets = nil
		}, "openshift", diagnose.Warn, "has no route", "defaultRoute"},
		"OpenShift SCC": {func(_ *testing.T, w *world) {
			w.groups = append(w.groups, "security.openshift.io/v1")
			w.denied = func(r *authv1.ResourceAttributes) bool { return r.Resource == "securitycontextconstraints" }
		}, "openshift", diagnose.Fail, "use the SCC restricted-v2, and you may not", "add-scc-to-user restricted-v2"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := good(t)
			c.wrong(t, w)
			r := w.run(t)
			got := find(r, c.check)
			seen := false
			for _, f := range got {
				seen = seen || f.Verdict == c.verdict && strings.Contains(f.Reason, c.reason) && strings.Contains(f.Cure, c.cure)
			}
			if !seen {
				t.Errorf("want %s %q, cure %q; got %+v", c.verdict, c.reason, c.cure, got)
			}
			for _, f := range r.Findings {
				if strings.Contains(f.Reason+f.Cure, "canary") {
					t.Errorf("a secret is in %+v", f)
				}
			}
			if (r.Fault("preflight") != nil) != (r.Failed > 0) {
				t.Errorf("%d failed, and %v", r.Failed, r.Fault("preflight"))
			}
			if c.verdict == diagnose.Fail && (r.Failed == 0 || fault.KindOf(r.Fault("preflight")) != fault.NotReady) {
				t.Errorf("%v", r.Fault("preflight"))
			}
		})
	}
}
