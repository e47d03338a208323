package release_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/templates"
)

func embedded(t *testing.T) *release.Chart {
	t.Helper()
	c, err := release.LoadFS(templates.Chart())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type values = map[string]any

// modelValues is what the manual sets for a model.
func modelValues(model string, more values) values {
	h := values{"hsm_model": model}
	if model != "softhsm" {
		h["hsm_ip"] = "10.0.0.1"
	}
	if model == "thales" {
		h["rfs_ip"], h["slotId"] = "10.0.0.2", "492971158"
	}
	v := values{"hsm": h}
	for k, x := range more {
		v[k] = x
	}
	return v
}

// objects decodes a manifest as strictly as the API server does with field
// validation.
func objects(t *testing.T, manifest string) []runtime.Object {
	t.Helper()
	d := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	var out []runtime.Object
	for _, doc := range strings.Split(manifest, "\n---\n") {
		if strings.TrimSpace(strings.ReplaceAll(doc, "---", "")) == "" {
			continue
		}
		o, _, err := d.Decode([]byte(doc), nil, nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, doc)
		}
		out = append(out, o)
	}
	return out
}

func podSpecs(objs []runtime.Object) map[string]corev1.PodSpec {
	out := map[string]corev1.PodSpec{}
	for _, o := range objs {
		switch o := o.(type) {
		case *appsv1.StatefulSet:
			out[o.Name] = o.Spec.Template.Spec
		case *appsv1.Deployment:
			out[o.Name] = o.Spec.Template.Spec
		}
	}
	return out
}

// TestManifests: for every model and kind of volume the manifests decode
// strictly, and every pod is locked down.
func TestManifests(t *testing.T) {
	volumes := map[string]values{
		"claims":    {},
		"hostPath":  {"persistence": values{"hostPath": "/srv/kms"}},
		"emptyDir":  {"persistence": values{"emptyDir": true}},
		"class":     {"persistence": values{"storageClass": "fast"}},
		"existing":  {"oss": values{"persistence": values{"existingClaim": "a"}}, "storage": values{"persistence": values{"existingClaim": "b"}}},
		"openshift": {"openshift": true, "imagePullSecrets": []any{values{"name": "pull"}}, "nodeSelector": values{"a": "b"}, "tolerations": []any{values{"operator": "Exists"}}},
		"watch":     {"watcher": values{"allNamespaces": true}, "podAnnotations": values{"x": "y"}},
		"others":    {"watcher": values{"namespaces": []any{"shop"}}, "service": values{"annotations": values{"x": "y"}}},
	}
	for _, model := range hsm.Names() {
		m, err := hsm.Lookup(model)
		if err != nil {
			t.Fatal(err)
		}
		for name, more := range volumes {
			t.Run(model+"/"+name, func(t *testing.T) {
				manifest, err := release.Template(embedded(t), "key-management-hsm", "kube-system", modelValues(model, more), "1.37.2")
				if err != nil {
					t.Fatal(err)
				}
				pods := podSpecs(objects(t, manifest))
				if len(pods) != 3 {
					t.Fatalf("%d workloads", len(pods))
				}
				for name, p := range pods {
					lockedDown(t, name, p)
				}
				oss := pods["key-management-hsm-oss"]
				i := slices.IndexFunc(oss.Containers, func(c corev1.Container) bool { return c.Name == "hsm" })
				if i < 0 || !strings.HasPrefix(oss.Containers[i].Image, "ibmcom/"+m.Image+":") {
					t.Errorf("no connector of %s", m.Image)
				}
				if !slices.Contains(oss.Containers[i].Args, "--module="+m.Module) {
					t.Errorf("args %q lack the module %s", oss.Containers[i].Args, m.Module)
				}
			})
		}
	}
}

func lockedDown(t *testing.T, name string, p corev1.PodSpec) {
	t.Helper()
	if p.SecurityContext == nil || p.SecurityContext.RunAsNonRoot == nil || !*p.SecurityContext.RunAsNonRoot ||
		p.SecurityContext.SeccompProfile == nil || p.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || p.SecurityContext.RunAsUser != nil {
		t.Errorf("%s: pod security %+v", name, p.SecurityContext)
	}
	if automount := p.AutomountServiceAccountToken; automount == nil || *automount != strings.HasSuffix(name, "-watcher") {
		t.Errorf("%s: token mounted: %v", name, automount)
	}
	for _, c := range append(p.InitContainers, p.Containers...) {
		s := c.SecurityContext
		if s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem ||
			s.Capabilities == nil || !slices.Contains(s.Capabilities.Drop, "ALL") || len(s.Capabilities.Add) > 0 {
			t.Errorf("%s/%s: security %+v", name, c.Name, s)
		}
		if strings.HasSuffix(c.Image, ":") || strings.Contains(c.Image, " ") {
			t.Errorf("%s/%s: image %q", name, c.Name, c.Image)
		}
	}
	for _, c := range p.Containers {
		if c.Name != "hardserver" && (c.LivenessProbe == nil || (c.StartupProbe == nil && c.ReadinessProbe == nil)) {
			t.Errorf("%s/%s: probes are missing", name, c.Name)
		}
		for _, m := range c.VolumeMounts {
			if !slices.ContainsFunc(p.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) && !slices.Contains([]string{"etcd", "audit", "token", "kmdata"}, m.Name) {
				t.Errorf("%s/%s mounts %s, which is no volume", name, c.Name, m.Name)
			}
		}
	}
}

// TestReplicas: three members know each other and are what the API knows; what
// has several replicas is spread and drained one at a time.
func TestReplicas(t *testing.T) {
	manifest, err := release.Template(embedded(t), "kms", "ns", modelValues("gemalto", values{"storage": values{"replicas": 3}, "oss": values{"replicas": 2},
		"watcher": values{"replicas": 2}, "clusterDomain": "site.local"}), "1.37.2")
	if err != nil {
		t.Fatal(err)
	}
	objs := objects(t, manifest)
	pods := podSpecs(objs)
	members, endpoints := []string{}, []string{}
	for i := range 3 {
		pod := fmt.Sprint("kms-storage-", i)
		members = append(members, fmt.Sprintf("--member=%s=https://%s.kms-storage.ns.svc.site.local:2380", pod, pod))
		endpoints = append(endpoints, fmt.Sprintf("--etcd-endpoints=https://%s.kms-storage.ns.svc.site.local:2379", pod))
	}
	for pod, want := range map[string][]string{"kms-storage": members, "kms-oss": endpoints} {
		flag, _, _ := strings.Cut(want[0], "=")
		var got []string
		for _, a := range pods[pod].Containers[0].Args {
			if strings.HasPrefix(a, flag+"=") {
				got = append(got, a)
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", pod, d)
		}
	}
	var budgets []string
	for _, o := range objs {
		if b, ok := o.(*policyv1.PodDisruptionBudget); ok {
			budgets = append(budgets, fmt.Sprint(b.Name, " ", b.Spec.MaxUnavailable, " ", b.Spec.Selector.MatchLabels["app.kubernetes.io/component"]))
		}
	}
	slices.Sort(budgets)
	if d := cmp.Diff([]string{"kms-oss 1 oss", "kms-storage 1 storage", "kms-watcher 1 watcher"}, budgets); d != "" {
		t.Error(d)
	}
	for name, p := range pods {
		if p.Affinity == nil || len(p.Affinity.PodAntiAffinity.PreferredDuringSchedulingIgnoredDuringExecution) != 1 {
			t.Errorf("%s is not spread: %+v", name, p.Affinity)
		}
	}
	// The site's own affinity wins; single replicas need none.
	manifest, err = release.Template(embedded(t), "kms", "ns", modelValues("softhsm", values{"storage": values{"replicas": 3}, "affinity": values{"nodeAffinity": values{}}}), "1.37.2")
	if err != nil || strings.Contains(manifest, "podAntiAffinity") {
		t.Errorf("anti-affinity beside the site's: %v", err)
	}
	manifest, err = release.Template(embedded(t), "kms", "ns", modelValues("softhsm", nil), "1.37.2")
	if err != nil || strings.Contains(manifest, "podAntiAffinity") || strings.Contains(manifest, "PodDisruptionBudget") || strings.Count(manifest, "--member=") != 1 {
		t.Errorf("one replica of each: %v", err)
	}
}

// TestGCMLimit: the value is the flag's, digit by digit, by default the most
// that is safe.
func TestGCMLimit(t *testing.T) {
	for _, c := range []struct {
		own  values
		want string
	}{{nil, "--gcm-limit=4294967296"}, {values{"oss": values{"gcmLimit": int64(3000000000)}}, "--gcm-limit=3000000000"}, {values{"oss": values{"gcmLimit": 3e9}}, "--gcm-limit=3000000000"}} {
		manifest, err := release.Template(embedded(t), "kms", "ns", modelValues("softhsm", c.own), "1.37.2")
		if err != nil || !slices.Contains(podSpecs(objects(t, manifest))["kms-oss"].Containers[0].Args, c.want) {
			t.Errorf("%v: no %s, %v", c.own, c.want, err)
		}
	}
}

// TestLunaPod: the pair of the pod's own node is mounted, by the downward API.
func TestLunaPod(t *testing.T) {
	manifest, err := release.Template(embedded(t), "r", "n", modelValues("gemalto", nil), "1.37.2")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"fieldPath: status.hostIP", "subPathExpr: $(HOST_IP)", "subPathExpr: $(HOST_IP)-key", "ServerName00 = 10.0.0.1;", "ServerPort00 = 1792;"} {
		if !strings.Contains(manifest, want) {
			t.Errorf("no %q", want)
		}
	}
	if strings.Contains(manifest, "\t") {
		t.Error("a TAB, which Chrystoki.conf must not have")
	}
}

// TestClientFiles: what archive build looks for in a vendor's client is what
// the chart names.
func TestClientFiles(t *testing.T) {
	for _, name := range hsm.Names() {
		m, err := hsm.Lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		manifest, err := release.Template(embedded(t), "r", "n", modelValues(name, nil), "1.37.2")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range append([]string{m.Module}, m.Files...) {
			if !strings.Contains(manifest, f) {
				t.Errorf("%s: no %s", name, f)
			}
		}
	}
}

func TestShieldPod(t *testing.T) {
	v := modelValues("thales", nil)
	v["hsm"].(values)["esn"], v["hsm"].(values)["keyhash"] = "1111-2222-3333", strings.Repeat("ab", 20)
	manifest, err := release.Template(embedded(t), "r", "n", v, "1.37.2")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"syntax-version=1", "remote_esn=1111-2222-3333", "keyhash=" + strings.Repeat("ab", 20), "remote_ip=10.0.0.1", "CKNFAST_LOADSHARING=1", "--slot=492971158"} {
		if !strings.Contains(manifest, want) {
			t.Errorf("no %q", want)
		}
	}
	// Several pods have key files of their own each; Luna's partition is on the network.
	for model, own := range map[string]bool{"thales": true, "gemalto": false} {
		for n := range 2 {
			manifest, err := release.Template(embedded(t), "r", "n", modelValues(model, values{"oss": values{"replicas": n + 1}}), "1.37.2")
			if err != nil || strings.Contains(manifest, "--token-per-replica") != (own && n > 0) {
				t.Errorf("%s, %d replicas: %v", model, n+1, err)
			}
		}
	}
	// An empty field would stop the hardserver: it is left out.
	if manifest, err = release.Template(embedded(t), "r", "n", modelValues("thales", nil), "1.37.2"); err != nil || strings.Contains(manifest, "remote_esn") {
		t.Errorf("remote_esn without a value, %v", err)
	}
}

// TestShieldPodGolden pins the pod of model thales whole, with the container
// that fetches the Security World.
func TestShieldPodGolden(t *testing.T) {
	v := modelValues("thales", values{"thales": values{"rfsSync": values{"enabled": true}}})
	v["hsm"].(values)["esn"], v["hsm"].(values)["keyhash"] = "1111-2222-3333", strings.Repeat("ab", 20)
	manifest, err := release.Template(embedded(t), "kms", "kube-system", v, "1.37.2")
	if err != nil {
		t.Fatal(err)
	}
	pod := podSpecs(objects(t, manifest))["kms-oss"]
	if len(pod.InitContainers) != 1 || pod.InitContainers[0].Name != "rfs-sync" {
		t.Fatalf("init containers %+v", pod.InitContainers)
	}
	lockedDown(t, "kms-oss", pod)
	got, err := yaml.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "../../testdata/golden/pod-thales.yaml", string(got))

	// On a node's folder it comes after the folder is opened to the group.
	v["persistence"] = values{"hostPath": "/srv/kms"}
	v["thales"].(values)["rfsSync"].(values)["command"] = []any{"/site/fetch", "--world"}
	if manifest, err = release.Template(embedded(t), "kms", "kube-system", v, "1.37.2"); err != nil {
		t.Fatal(err)
	}
	pod = podSpecs(objects(t, manifest))["kms-oss"]
	if len(pod.InitContainers) != 2 || pod.InitContainers[0].Name != "prepare" || !slices.Equal(pod.InitContainers[1].Command, []string{"/site/fetch", "--world"}) {
		t.Errorf("init containers %+v", pod.InitContainers)
	}
}

// TestAccountTokens: only when asked for, only in the API's own container, and
// with one right.
func TestAccountTokens(t *testing.T) {
	manifest, err := release.Template(embedded(t), "kms", "ns", modelValues("softhsm", values{"oss": values{"serviceAccountTokens": true}}), "1.37.2")
	if err != nil {
		t.Fatal(err)
	}
	objs := objects(t, manifest)
	for _, c := range podSpecs(objs)["kms-oss"].Containers {
		mounted := slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == "account" })
		if mounted != (c.Name == "oss") || slices.Contains(c.Args, "--service-account-tokens") != (c.Name == "oss") {
			t.Errorf("%s: token mounted: %v, args %q", c.Name, mounted, c.Args)
		}
	}
	lockedDown(t, "kms-oss", podSpecs(objs)["kms-oss"])
	var rules []string
	for _, o := range objs {
		if r, ok := o.(*rbacv1.ClusterRole); ok {
			rules = append(rules, fmt.Sprint(r.Name, r.Rules))
		}
	}
	if want := []string{"ns-kms-oss-tokenreviews[{[create] [authentication.k8s.io] [tokenreviews] [] []}]"}; !slices.Equal(rules, want) {
		t.Errorf("%q, want %q", rules, want)
	}
	manifest, err = release.Template(embedded(t), "kms", "ns", modelValues("softhsm", values{"oss": values{"serviceAccountTokens": true, "tokenAudiences": []any{"kms", "https://kms.example"}}}), "1.37.2")
	if err != nil || !strings.Contains(manifest, "- --token-audience=kms\n") || !strings.Contains(manifest, "- --token-audience=https://kms.example\n") {
		t.Errorf("audiences: %v", err)
	}
	// A release that reuses the values of an older chart has none.
	for want, period := range map[string]any{"- --signing-key-period=24h\n": "24h", "": nil} {
		manifest, err := release.Template(embedded(t), "kms", "ns", modelValues("softhsm", values{"oss": values{"signingKeyPeriod": period}}), "1.37.2")
		if err != nil || !strings.Contains(manifest, want) || want == "" && strings.Contains(manifest, "signing-key-period") {
			t.Errorf("period %v: %v", period, err)
		}
	}
	if manifest, err = release.Template(embedded(t), "kms", "ns", modelValues("softhsm", nil), "1.37.2"); err != nil || !strings.Contains(manifest, "- --signing-key-period=2160h\n") || strings.Contains(manifest, "tokenreviews") || strings.Contains(manifest, "service-account-tokens") {
		t.Errorf("not asked for: %v", err)
	}
}

// TestSCC: on OpenShift each account may use the constraint of its pods, and no
// other; elsewhere none.
func TestSCC(t *testing.T) {
	for name, c := range map[string]struct {
		model string
		more  values
		want  []string
	}{
		"elsewhere":       {"gemalto", values{}, nil},
		"as they are":     {"gemalto", values{"openshift": true}, []string{"kms-oss restricted-v2", "kms-storage restricted-v2", "kms-watcher restricted-v2"}},
		"node's network":  {"gemalto", values{"openshift": true, "hsm": values{"hsm_model": "gemalto", "hsm_ip": "192.0.2.1", "hostNetwork": true}}, []string{"kms-oss hostnetwork-v2", "kms-storage restricted-v2", "kms-watcher restricted-v2"}},
		"without an HSM":  {"softhsm", values{"openshift": true, "hsm": values{"hsm_model": "softhsm", "hostNetwork": true}}, []string{"kms-oss restricted-v2", "kms-storage restricted-v2", "kms-watcher restricted-v2"}},
		"the site's own":  {"gemalto", values{"openshift": true, "scc": "site", "persistence": values{"hostPath": "/srv"}}, []string{"kms-oss site", "kms-storage site", "kms-watcher site"}},
		"the site's, not": {"gemalto", values{"scc": "site"}, nil},
	} {
		manifest, err := release.Template(embedded(t), "kms", "ns", modelValues(c.model, c.more), "1.37.2")
		if err != nil {
			t.Fatal(err)
		}
		rules := map[string]string{}
		var got []string
		for _, o := range objects(t, manifest) {
			if r, ok := o.(*rbacv1.Role); ok && strings.HasSuffix(r.Name, "-scc") {
				rules[r.Name] = fmt.Sprint(r.Rules)
			}
		}
		for _, o := range objects(t, manifest) {
			b, ok := o.(*rbacv1.RoleBinding)
			if !ok || !strings.HasSuffix(b.Name, "-scc") {
				continue
			}
			scc := strings.TrimSuffix(strings.TrimPrefix(rules[b.RoleRef.Name], "[{[use] [security.openshift.io] [securitycontextconstraints] ["), "] []}]")
			if len(b.Subjects) != 1 || b.Subjects[0].Kind != "ServiceAccount" || b.Subjects[0].Namespace != "ns" || b.RoleRef.Kind != "Role" {
				t.Errorf("%s: %+v", name, b)
			}
			got = append(got, b.Subjects[0].Name+" "+scc)
		}
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// TestWatcherRights: no other account than the watcher's has any right, and it
// may not write more than it must.
func TestWatcherRights(t *testing.T) {
	manifest, err := release.Template(embedded(t), "key-management-hsm", "kube-system", modelValues("softhsm", values{"watcher": values{"namespaces": []any{"shop", "kube-system"}}}), "1.37.2")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, o := range objects(t, manifest) {
		switch o := o.(type) {
		case *rbacv1.Role:
			for _, r := range o.Rules {
				got = append(got, fmt.Sprintf("%s/%s %v %v %v", o.Namespace, o.Name, r.Resources, r.ResourceNames, r.Verbs))
			}
		case *rbacv1.ClusterRole:
			t.Errorf("cluster role %s", o.Name)
		case *rbacv1.RoleBinding:
			for _, s := range o.Subjects {
				if s.Name != "key-management-hsm-watcher" {
					t.Errorf("%s binds %s", o.Name, s.Name)
				}
			}
		}
	}
	want := []string{
		"/key-management-hsm-watcher [secrets] [key-management-hsm-ca] [get]",
		"/key-management-hsm-watcher [secrets] [key-management-hsm-api-tls key-management-hsm-storage-tls key-management-hsm-storage-client-tls] [get update]",
		"/key-management-hsm-watcher [leases] [] [create]",
		"/key-management-hsm-watcher [leases] [key-management-hsm-watcher] [get update]",
		"/key-management-hsm-watcher [events] [] [create patch]",
		"kube-system/key-management-hsm-watcher-instances [secrets] [] [get list watch update]",
		"shop/key-management-hsm-watcher-instances [secrets] [] [get list watch update]",
	}
	slices.Sort(got)
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestValuesRefused: what cannot work is said before anything is applied.
func TestValuesRefused(t *testing.T) {
	for want, v := range map[string]values{
		"hsm_model":            {"hsm": values{"hsm_model": "luna"}},
		"hsm.hsm_ip: missing":  {"hsm": values{"hsm_model": "gemalto"}},
		"hsm.slotId: missing":  {"hsm": values{"hsm_model": "thales", "hsm_ip": "10.0.0.1", "rfs_ip": "10.0.0.2"}},
		"slotid":               {"hsm": values{"slotid": "1"}},
		"watchr":               {"watchr": values{}},
		"client_certs":         {"client_certs": []any{}},
		"hsm_pw":               {"hsm": values{"hsm_pw": "x"}},
		"oss.replicas":         {"oss": values{"replicas": 3}},
		"persistence.emptyDir": {"storage": values{"replicas": 3}, "persistence": values{"emptyDir": true}},
		"persistence.hostPath": {"openshift": true, "persistence": values{"hostPath": "/srv"}},
		"oss.tokenAudiences":   {"oss": values{"tokenAudiences": []any{"kms"}}},
		"signingKeyPeriod":     {"oss": values{"signingKeyPeriod": "90d"}},
		"/oss/gcmLimit":        {"oss": values{"gcmLimit": 1<<32 + 1}},
		"storage.replicas":     {"storage": values{"replicas": 2}},
		"several members":      {"storage": values{"replicas": 3, "persistence": values{"existingClaim": "a"}}},
		"exclude each other":   {"persistence": values{"hostPath": "/a", "emptyDir": true}},
		"not an absolute path": {"persistence": values{"hostPath": "a"}},
		"between two HSMs of":  {"migration": values{"hsm": values{"hsm_model": "gemalto", "hsm_ip": "10.0.0.1"}}},
		"label of its own":     {"migration": values{"hsm": values{"hsm_model": "softhsm"}}},
	} {
		_, err := release.Template(embedded(t), "r", "n", v, "1.37.2")
		if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", v, err, want)
		}
	}
}

// TestMigration: while keys move the pod of the API has a connector of each
// HSM, with a password and a configuration of its own; without that nothing
// may leave.
func TestMigration(t *testing.T) {
	for model, more := range map[string]values{
		"softhsm": {"hsm_model": "softhsm", "tokenLabel": "other"},
		"gemalto": {"hsm_model": "gemalto", "hsm_ip": "10.0.0.9", "secretName": "second"},
	} {
		t.Run(model, func(t *testing.T) {
			render := func(v values) (pod corev1.PodSpec, manifest string) {
				t.Helper()
				m, err := release.Template(embedded(t), "r", "n", v, "1.37.2")
				if err != nil {
					t.Fatal(err)
				}
				return podSpecs(objects(t, m))["r-oss"], m
			}
			v := modelValues(model, nil)
			before, manifest := render(v)
			if len(before.Containers) != 2 || strings.Contains(manifest, "gives-keys") || strings.Contains(manifest, "to-socket") || strings.Contains(manifest, "-next") {
				t.Errorf("without a second HSM:\n%s", manifest)
			}
			v["migration"] = values{"hsm": more}
			pod, manifest := render(v)
			lockedDown(t, "r-oss", pod)
			if len(pod.Containers) != 3 || !slices.Contains(pod.Containers[0].Args, "--to-socket=/run/kms/next.sock") || !slices.Contains(pod.Containers[1].Args, "--gives-keys") {
				t.Fatalf("%s", manifest)
			}
			next := pod.Containers[2]
			if next.Name != "hsm-next" || next.Image != pod.Containers[1].Image || next.Args[0] != "--socket=/run/kms/next.sock" || slices.Contains(next.Args, "--gives-keys") {
				t.Errorf("%+v", next)
			}
			for _, m := range next.VolumeMounts {
				if shared := slices.Contains([]string{"connector", "tmp", "token"}, m.Name); shared == strings.HasSuffix(m.Name, "-next") {
					t.Errorf("it mounts %s", m.Name)
				}
			}
			pin := pod.Volumes[slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == "pin-next" })]
			if want := map[string]string{"softhsm": "hsm-secret-next", "gemalto": "second"}[model]; pin.Secret.SecretName != want {
				t.Errorf("password of %s", pin.Secret.SecretName)
			}
			if model == "softhsm" && !slices.Contains(next.Args, "--token-label=other") {
				t.Errorf("%v", next.Args)
			}
			if model == "gemalto" && (!strings.Contains(manifest, "name: r-hsm-config-next") || !strings.Contains(manifest, "ServerName00 = 10.0.0.9;")) {
				t.Errorf("%s", manifest)
			}
		})
	}
}

// TestSchema holds values.schema.json to values.yaml.
func TestSchema(t *testing.T) {
	s := schemaOf(embedded(t).Values(), "")
	s["$schema"] = "http://json-schema.org/draft-07/schema#"
	want, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, filepath.Join("../../templates", templates.ChartName, "values.schema.json"), string(want)+"\n")
}

// golden compares with a file, or writes it when told.
func golden(t *testing.T, path, want string) {
	t.Helper()
	if os.Getenv("KMSCTL_UPDATE") != "" {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Errorf("run with KMSCTL_UPDATE=1 (-want +got):\n%s", d)
	}
}

func schemaOf(v any, path string) values {
	switch v := v.(type) {
	case map[string]any:
		if len(v) == 0 {
			return values{"type": "object"}
		}
		props := values{}
		for k, x := range v {
			props[k] = schemaOf(x, path+"."+k)
		}
		if path == "" {
			props["global"] = values{"type": "object"} // Helm's own
		}
		return values{"type": "object", "properties": props, "additionalProperties": false}
	case []any:
		return values{"type": "array"}
	case bool:
		return values{"type": "boolean"}
	case string:
		switch path {
		case ".hsm.hsm_model":
			return values{"enum": hsm.Names()}
		case ".migration.hsm.hsm_model":
			return values{"enum": append([]string{""}, hsm.Names()...)}
		case ".imagePullPolicy":
			return values{"enum": []string{"IfNotPresent", "Always", "Never"}}
		case ".service.type":
			return values{"enum": []string{"ClusterIP", "NodePort", "LoadBalancer"}}
		case ".oss.signingKeyPeriod":
			return values{"type": "string", "pattern": "^(0|([0-9]+(h|m|s))+)$"} // as Go reads a duration
		}
		return values{"type": "string"}
	}
	whole := values{"type": "integer", "minimum": 1}
	if path == ".oss.gcmLimit" {
		whole["maximum"] = 1 << 32
	}
	return whole
}

// TestVersionsAgree: the constant that names the default tag is the chart's.
func TestVersionsAgree(t *testing.T) {
	c := embedded(t)
	if c.Name() != templates.ChartName || c.Version() != templates.ChartVersion || c.AppVersion() != templates.ChartVersion {
		t.Errorf("chart %s %s (%s), constants %s %s", c.Name(), c.Version(), c.AppVersion(), templates.ChartName, templates.ChartVersion)
	}
	if _, err := fs.Stat(templates.Chart(), "values.schema.json"); err != nil {
		t.Error(err)
	}
}
