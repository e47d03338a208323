package addoncmd_test

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chartutil"
	kubefake "helm.sh/helm/v3/pkg/kube/fake"
	"helm.sh/helm/v3/pkg/storage"
	"helm.sh/helm/v3/pkg/storage/driver"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/addoncmd"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// site is a cluster folder, a real registry, a cluster of client-go's fake and
// Helm with its memory driver.
type site struct {
	dir, registry string
	client        *fake.Clientset
	helm          *action.Configuration
}

func newSite(t *testing.T) *site {
	t.Helper()
	memory := driver.NewMemory()
	memory.SetNamespace("shop")
	s := &site{dir: t.TempDir(), client: fake.NewClientset(), helm: &action.Configuration{Releases: storage.Init(memory),
		KubeClient:   &kubefake.PrintingKubeClient{Out: io.Discard, LogOutput: io.Discard},
		Capabilities: &chartutil.Capabilities{KubeVersion: chartutil.KubeVersion{Version: "v1.37.2", Major: "1", Minor: "37"}}, Log: t.Logf}}
	host, stop, err := testkit.StartRegistry(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	s.registry = host
	s.write(t, "app.tar.gz", string(testkit.Archives()["good"]))
	return s
}

func (s *site) write(t *testing.T, name, text string) string {
	t.Helper()
	p := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

type result struct {
	Resources []struct{ Object, Status string }
	Addons    []struct {
		Status string
		Charts []struct {
			Name, Version, Status string
			Revision              int
		}
	}
}

// apply runs addon apply on config.yaml.
func (s *site) apply(t *testing.T, config string) (int, result, string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := app.New("test")
	a.In, a.Out, a.Err, a.Now = strings.NewReader(""), &out, &errs, time.Now
	env := map[string]string{"KMSCTL_NO_INPUT": "1", "XDG_STATE_HOME": s.dir, "HOME": s.dir}
	a.Getenv = func(k string) string { return env[k] }
	a.OpenCluster = func(*app.KubeFlags) (*kube.Cluster, error) { return kube.NewFor(s.client), nil }
	a.OpenHelm = func(f *app.KubeFlags) (*release.Helm, error) { return release.NewFor(s.helm, f.Namespace), nil }
	code := cli.Main(t.Context(), cli.Program{Name: "kmsctl", Verbs: cli.Verbs{addoncmd.New}}, a, []string{"addon", "apply", "-f", s.write(t, "config.yaml", config), "--registry", s.registry,
		"--repo", filepath.Join(s.dir, "charts"), "-o", "json"})
	var r result
	if err := json.Unmarshal(out.Bytes(), &r); err != nil && code == 0 {
		t.Errorf("%v\n%s", err, out.String())
	}
	return code, r, errs.String()
}

func config(values string) string {
	return "archive_addons:\n  a:\n    namespace: shop\n    repo: mgmt-charts\n    path: app.tar.gz\n    charts:\n    - name: app\n      values: " + values + "\n"
}

// TestApplyInstallsUpgradesAndLeavesAlone brings a chart of others to what the
// folder says, whatever is there.
func TestApplyInstallsUpgradesAndLeavesAlone(t *testing.T) {
	s := newSite(t)
	s.write(t, "resources/hsm-Secret.yaml", "apiVersion: v1\nkind: Secret\ntype: Opaque\nmetadata: {name: hsm-secret}\nnamespace: shop\ndata: {hsm-pass: cGFzc3dvcmQ=}\n")
	for _, step := range []struct {
		values           string
		resource, status string
		revision         int
	}{
		{"{any: {key: 9007199254740993}}", "applied", "done", 1},
		{"{any: {key: 9007199254740993}}", "unchanged", "unchanged", 1},
		{"{any: {key: other}}", "unchanged", "done", 2},
	} {
		code, r, errs := s.apply(t, config(step.values))
		if code != 0 {
			t.Fatalf("exit %d\n%s", code, errs)
		}
		c := r.Addons[0].Charts[0]
		if r.Resources[0].Object != "Secret shop/hsm-secret" || r.Resources[0].Status != step.resource || c.Status != step.status || c.Revision != step.revision || c.Version != "1.0.0" {
			t.Errorf("%s: %+v", step.values, r)
		}
	}
	first, err := s.helm.Releases.Get("app", 1)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(first.Config); err != nil || string(b) != `{"any":{"key":9007199254740993}}` {
		t.Errorf("Helm got %s, %v", b, err)
	}
	sec, err := s.client.CoreV1().Secrets("shop").Get(t.Context(), "hsm-secret", metav1.GetOptions{})
	if err != nil || string(sec.Data["hsm-pass"]) != "password" {
		t.Errorf("%v", err)
	}
	if all, err := s.client.CoreV1().Secrets("shop").List(t.Context(), metav1.ListOptions{}); err != nil || len(all.Items) != 1 {
		t.Errorf("Secrets beside a chart of others: %v, %v", all.Items, err)
	}
}

// TestApplyBeginsNoArchiveWithoutResources stops when a resource fails, since
// the charts count on them.
func TestApplyBeginsNoArchiveWithoutResources(t *testing.T) {
	s := newSite(t)
	s.write(t, "resources/hsm-Secret.yaml", "apiVersion: v1\nkind: Secret\ntype: Opaque\nmetadata: {name: hsm-secret, namespace: shop}\ndata: {hsm-pass: cGFzc3dvcmQ=}\n")
	tls := sec("hsm-secret", "kubernetes.io/tls")
	if _, err := s.client.CoreV1().Secrets("shop").Create(t.Context(), tls, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	code, r, errs := s.apply(t, config("{}"))
	if code != 9 || !strings.Contains(errs, "a type cannot be changed") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	if r.Resources[0].Status != "failed" || r.Addons[0].Status != "not begun" || r.Addons[0].Charts[0].Status != "not begun" {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(filepath.Join(s.dir, "charts")); err == nil {
		t.Error("the archive was loaded")
	}
}

func sec(name, kind string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Type: corev1.SecretType(kind)}
}
