package releasecmd_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	hc "helm.sh/helm/v3/pkg/chart"
	helm "helm.sh/helm/v3/pkg/release"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kmsctl/kmsctl/templates"
)

// TestBundle plants a canary in every input of the bundle: it writes what it
// may, and no canary.
func TestBundle(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	s.env["KMSCTL_PASSPHRASE"], s.env["KMSCTL_API_KEY"] = "canary-passphrase", "canary-api-key"
	for name, data := range map[string]map[string][]byte{
		"hsm-secret":                     {"hsm-pass": []byte("canary-pin"), "10.0.0.11-key": []byte("-----BEGIN RSA PRIVATE KEY-----\ncanary\n-----END RSA PRIVATE KEY-----\n")},
		"key-management-hsm-watcher-key": {"api-key": []byte("canary-watcher"), "hash.json": []byte(`{"Hash":"canary-hash"}`)},
		"somebody-else's":                {"token": []byte("canary-token")},
	} {
		if _, err := s.client.CoreV1().Secrets("kube-system").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{"a": "canary-annotation"}}, Data: data}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "key-management-hsm-oss-1", Labels: map[string]string{"app.kubernetes.io/instance": templates.ChartName}},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "oss", Env: []corev1.EnvVar{{Name: "X", Value: "canary-environment"}}, Args: []string{"--x", "canary-argument"}}}},
		Status: corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{{Name: "oss", State: corev1.ContainerState{
			Waiting: &corev1.ContainerStateWaiting{Reason: "CreateContainerError", Message: "login with canary-pin as password=canary-message"}}}}}}
	if _, err := s.client.CoreV1().Pods("kube-system").Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	err := s.cfg.Releases.Create(&helm.Release{Name: templates.ChartName, Namespace: "kube-system", Version: 1, Info: &helm.Info{Status: helm.StatusDeployed},
		Chart: &hc.Chart{Metadata: &hc.Metadata{Name: templates.ChartName, Version: "1.0.0"}}, Manifest: "canary-manifest",
		Config: map[string]any{"hsm": map[string]any{"hsm_model": "softhsm", "hsm_ip": "10.9.8.7", "hsm_pw": "canary-hsm-pw"}, "client_certs": []any{map[string]any{"key": "canary-client"}},
			"podAnnotations": map[string]any{"x": "canary-pod-annotation"}}})
	if err != nil {
		t.Fatal(err)
	}
	code, out, errs := s.run(t, "doctor", "--bundle", s.path("b.tar.gz"), "-o", "json")
	if code != 7 || !strings.Contains(out, `"check": "pods"`) {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	st, err := os.Stat(s.path("b.tar.gz"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	files := unpack(t, s.path("b.tar.gz"))
	for name, text := range files {
		if strings.Contains(strings.ToLower(text), "canary") || strings.Contains(text, "PRIVATE KEY") {
			t.Errorf("a secret is in %s: %s", name, text)
		}
	}
	for name, want := range map[string]string{"report.json": `"failed"`, "values.json": "10.9.8.7", "secrets.json": `"bytes": 10`, "pods.json": "CreateContainerError",
		"release.json": "deployed", "version.json": "test", "logs/key-management-hsm-oss-1/oss.log": "fake logs"} {
		if !strings.Contains(files["kmsctl-bundle/"+name], want) {
			t.Errorf("%s lacks %q: %s", name, want, files["kmsctl-bundle/"+name])
		}
	}
}

func unpack(t *testing.T, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = string(text)
	}
}
