package releasecmd_test

import (
	"bytes"
	"context"
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
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kmsctl/kmsctl/internal/ask"
	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cli/releasecmd"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/internal/release"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/templates"
)

// site is a cluster of client-go's fake and Helm with its memory driver.
type site struct {
	client *fake.Clientset
	cfg    *action.Configuration
	env    map[string]string
	asker  app.Asker
	in     string
	dir    string
}

func newSite(t *testing.T) *site {
	t.Helper()
	memory := driver.NewMemory()
	memory.SetNamespace("kube-system")
	s := &site{client: fake.NewClientset(), dir: t.TempDir(), env: map[string]string{"KMSCTL_NO_INPUT": "1"}, cfg: &action.Configuration{
		Releases: storage.Init(memory), KubeClient: &kubefake.PrintingKubeClient{Out: io.Discard, LogOutput: io.Discard},
		Capabilities: &chartutil.Capabilities{KubeVersion: chartutil.KubeVersion{Version: "v1.37.2", Major: "1", Minor: "37"}}, Log: t.Logf}}
	ctx := context.Background()
	one := int32(1)
	labels := map[string]string{"app.kubernetes.io/instance": templates.ChartName}
	if _, err := s.client.AppsV1().StatefulSets("kube-system").Create(ctx, &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "key-management-hsm-oss", Labels: labels},
		Spec: appsv1.StatefulSetSpec{Replicas: &one}, Status: appsv1.StatefulSetStatus{ReadyReplicas: 1, UpdatedReplicas: 1}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.CoreV1().Pods("kube-system").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "key-management-hsm-oss-0", Labels: labels},
		Status: corev1.PodStatus{Phase: "Running", Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return s
}

// run runs kmsctl, and gives its exit code and what it wrote.
func (s *site) run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := app.New("test")
	a.In, a.Out, a.Err, a.Now, a.Asker = strings.NewReader(s.in), &out, &errs, time.Now, s.asker
	a.Getenv = func(k string) string { return s.env[k] }
	a.OpenCluster = func(*app.KubeFlags) (*kube.Cluster, error) { return kube.NewFor(s.client), nil }
	a.OpenHelm = func(f *app.KubeFlags) (*release.Helm, error) { return release.NewFor(s.cfg, f.Namespace), nil }
	code = cli.Main(t.Context(), cli.Program{Name: "kmsctl", Verbs: cli.Verbs{releasecmd.New}}, a, args)
	return code, out.String(), errs.String()
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(t *testing.T, name, text string) string {
	t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return s.path(name)
}

const chart = "../../../templates/key-management-hsm"

func (s *site) installArgs(t *testing.T, more ...string) []string {
	t.Helper()
	return append([]string{"install", "--chart", chart, "--model", "softhsm", "--hsm-password-file", s.write(t, "pw", "canary-pin"), "--admin-key-file", s.path("admin.key")}, more...)
}

// TestInstallStatusUninstall goes the whole way of a release.
func TestInstallStatusUninstall(t *testing.T) {
	s := newSite(t)
	code, out, errs := s.run(t, s.installArgs(t, "--host-path", "/srv/kms", "-o", "json")...)
	if code != 0 {
		t.Fatalf("exit %d\n%s", code, errs)
	}
	var res struct {
		Release struct{ Name, Status string }
		Changed bool
		Pods    []struct{ Ready bool }
	}
	if err := json.Unmarshal([]byte(out), &res); err != nil || res.Release.Name != templates.ChartName || res.Release.Status != "deployed" || !res.Changed || len(res.Pods) != 1 {
		t.Errorf("%v\n%s", err, out)
	}
	if st, err := os.Stat(s.path("admin.key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	// The password is in hsm-secret, and nowhere in what Helm keeps.
	sec, err := s.client.CoreV1().Secrets("kube-system").Get(t.Context(), "hsm-secret", metav1.GetOptions{})
	if err != nil || string(sec.Data["hsm-pass"]) != "canary-pin" {
		t.Errorf("%v", err)
	}
	rel, err := s.cfg.Releases.Last(templates.ChartName)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(rel)
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(s.path("admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"Helm's release": string(b), "stdout": out, "stderr": errs} {
		if strings.Contains(text, "canary") || strings.Contains(text, string(key)) || strings.Contains(text, "PRIVATE KEY") {
			t.Errorf("%s holds a secret", name)
		}
	}
	// Again: nothing to do.
	if code, out, errs = s.run(t, s.installArgs(t, "--host-path", "/srv/kms", "-o", "json")...); code != 0 || !strings.Contains(out, `"changed": false`) {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	if code, _, errs = s.run(t, s.installArgs(t, "--storage-class", "other")...); code != 9 || !strings.Contains(errs, "kmsctl upgrade") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	if code, out, errs = s.run(t, "status"); code != 0 || !strings.Contains(out, "deployed") {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	// Uninstall wants the name typed, or --yes.
	if code, _, errs = s.run(t, "uninstall"); code != 2 || !strings.Contains(errs, "--yes") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	s.asker = typed("kube-system")
	if code, _, errs = s.run(t, "uninstall"); code != 130 || !strings.Contains(errs, "nothing was done") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	s.asker = typed(templates.ChartName)
	if code, _, errs = s.run(t, "uninstall", "--delete-secrets"); code != 0 {
		t.Errorf("exit %d\n%s", code, errs)
	}
	left, err := s.client.CoreV1().Secrets("kube-system").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(left.Items) != 0 {
		t.Errorf("%d Secrets left, %v", len(left.Items), err)
	}
	if code, _, _ = s.run(t, "status"); code != 5 {
		t.Errorf("status of nothing: exit %d", code)
	}
}

// TestDeleteStore: the volumes of the store go by the release's name, the
// others stay; a store that is on no volume of its own is not said to be gone.
func TestDeleteStore(t *testing.T) {
	s := newSite(t)
	if code, _, errs := s.run(t, s.installArgs(t)...); code != 0 {
		t.Fatal(errs)
	}
	if code, _, errs := s.run(t, "uninstall", "--delete-store", "--yes"); code != 5 || !strings.Contains(errs, "no volume was claimed for it") || !strings.Contains(errs, "nothing was done") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	for name, component := range map[string]string{"etcd-key-management-hsm-storage-0": "storage", "audit-key-management-hsm-oss-0": "oss"} {
		claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app.kubernetes.io/instance": templates.ChartName, "app.kubernetes.io/component": component}}}
		if _, err := s.client.CoreV1().PersistentVolumeClaims("kube-system").Create(t.Context(), claim, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if code, _, errs := s.run(t, "uninstall", "--delete-store", "--delete-data", "--yes"); code != 2 || !strings.Contains(errs, "--delete-data, --delete-store: only one of them") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	s.asker = typed("another")
	if code, _, errs := s.run(t, "uninstall", "--delete-store"); code != 130 || !strings.Contains(errs, "volume claim etcd-key-management-hsm-storage-0") || strings.Contains(errs, "audit-") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	if code, _, errs := s.run(t, "uninstall", "--delete-store", "--yes"); code != 0 {
		t.Errorf("exit %d\n%s", code, errs)
	}
	left, err := s.client.CoreV1().PersistentVolumeClaims("kube-system").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(left.Items) != 1 || left.Items[0].Name != "audit-key-management-hsm-oss-0" {
		t.Errorf("%+v %v", left.Items, err)
	}
	secrets, err := s.client.CoreV1().Secrets("kube-system").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(secrets.Items) == 0 {
		t.Errorf("the Secrets went, too: %v", err)
	}
}

// TestStatusUnhealthy: exit 7, and the cure as the hint.
func TestStatusUnhealthy(t *testing.T) {
	s := newSite(t)
	if code, _, errs := s.run(t, s.installArgs(t)...); code != 0 {
		t.Fatal(errs)
	}
	p, err := s.client.CoreV1().Pods("kube-system").Get(t.Context(), "key-management-hsm-oss-0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.Status.Conditions = nil
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "hsm", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "not found"}}}}
	if _, err := s.client.CoreV1().Pods("kube-system").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	set, err := s.client.AppsV1().StatefulSets("kube-system").Get(t.Context(), "key-management-hsm-oss", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	set.Status.ReadyReplicas = 0
	if _, err := s.client.AppsV1().StatefulSets("kube-system").UpdateStatus(t.Context(), set, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	code, out, errs := s.run(t, "status")
	if code != 7 || !strings.Contains(out, "ImagePullBackOff") || !strings.Contains(errs, "kmsctl load") {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
}

// TestOldSecrets: what the manual has people put into the values file moves
// into hsm-secret, and Helm never sees it.
func TestOldSecrets(t *testing.T) {
	s := newSite(t)
	values := s.write(t, "o.yaml", "hsm:\n  hsm_model: softhsm\n  clear_data: false\n  hsm_pw: canary-pw\n")
	code, out, errs := s.run(t, "install", "--chart", chart, "--values", values, "--admin-key-file", s.path("admin.key"))
	if code != 0 || !strings.Contains(errs, "warning: hsm.hsm_pw: moved into the Secret") {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	sec, err := s.client.CoreV1().Secrets("kube-system").Get(t.Context(), "hsm-secret", metav1.GetOptions{})
	if err != nil || string(sec.Data["hsm-pass"]) != "canary-pw" {
		t.Errorf("%v", err)
	}
	rel, err := s.cfg.Releases.Last(templates.ChartName)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(rel.Config); err != nil || strings.Contains(string(b), "canary") || strings.Contains(string(b), "clear_data") {
		t.Errorf("Helm got %s, %v", b, err)
	}
}

// typed answers each question with the same line.
type typed string

func (t typed) Ask(ask.Question) (string, error) { return string(t), nil }
func (t typed) Close() error                     { return nil }

func (t typed) Password(ask.Question) (secret.Value, error) { return secret.New([]byte(t)), nil }

// TestUpgrade: without settings those of the release stay, single flags change
// them, --dry-run tells what would change and changes nothing.
func TestUpgrade(t *testing.T) {
	s := newSite(t)
	if code, _, errs := s.run(t, "upgrade", "--chart", chart); code != 5 {
		t.Errorf("exit %d\n%s", code, errs)
	}
	if code, _, errs := s.run(t, s.installArgs(t, "--ephemeral")...); code != 0 {
		t.Fatal(errs)
	}
	code, out, errs := s.run(t, "upgrade", "--chart", chart, "--registry", "reg.example:5000", "--dry-run")
	if code != 0 || !strings.Contains(out, "changed StatefulSet/key-management-hsm-oss") || !strings.Contains(out, "+         image: reg.example:5000/ibmcom/kms-oss:1.0.0") {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	if code, out, errs = s.run(t, "upgrade", "--chart", chart, "--dry-run"); code != 0 || !strings.Contains(out, "nothing would change") {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	if code, out, errs = s.run(t, "upgrade", "--chart", chart, "--registry", "reg.example:5000", "-o", "json"); code != 0 || !strings.Contains(out, `"revision": 2`) {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	rel, err := s.cfg.Releases.Last(templates.ChartName)
	if err != nil {
		t.Fatal(err)
	}
	if p, _ := rel.Config["persistence"].(map[string]any); p["emptyDir"] != true {
		t.Errorf("the settings did not stay: %v", rel.Config)
	}
	if code, out, errs = s.run(t, "rollback", "-o", "json"); code != 0 || !strings.Contains(out, `"revision": 3`) {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	if code, _, errs = s.run(t, "rollback", "7"); code != 5 || !strings.Contains(errs, "revisions: ") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	if code, _, errs = s.run(t, "rollback", "x"); code != 2 {
		t.Errorf("exit %d\n%s", code, errs)
	}
	if code, _, errs = s.run(t, "upgrade", "--chart", chart, "--atomic", "--wait=false"); code != 2 || !strings.Contains(errs, "--atomic") {
		t.Errorf("exit %d\n%s", code, errs)
	}
}
