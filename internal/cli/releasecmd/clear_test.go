package releasecmd_test

import (
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kmsctl/kmsctl/templates"
)

// TestClearDataAsksFirst: before anything is changed it wants the release's
// name typed, --yes, and, of a release that is there, an API key; only the flag
// asks for it, and it stays in no values.
func TestClearDataAsksFirst(t *testing.T) {
	s := newSite(t)
	nothing := func(when string) {
		t.Helper()
		l, err := s.client.CoreV1().Secrets("kube-system").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(l.Items) != 0 {
			t.Errorf("%s: %d Secrets, %v", when, len(l.Items), err)
		}
	}
	if code, _, errs := s.run(t, s.installArgs(t, "--clear-data")...); code != 2 || !strings.Contains(errs, "--yes: missing") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	nothing("nobody to ask")
	if code, _, errs := s.run(t, s.installArgs(t, "--clear-data", "--wait=false", "--yes")...); code != 2 || !strings.Contains(errs, "--clear-data: needs --wait") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	s.asker = typed("yes")
	if code, _, errs := s.run(t, s.installArgs(t, "--clear-data")...); code != 130 || !strings.Contains(errs, "nothing was done") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	nothing("another name typed")

	if code, _, errs := s.run(t, s.installArgs(t)...); code != 0 {
		t.Fatal(errs)
	}
	for _, how := range []string{"--yes", "--dry-run"} {
		if code, _, errs := s.run(t, "upgrade", "--chart", chart, "--host-path", "/srv/other", "--clear-data", how); code != 2 || !strings.Contains(errs, "--api-key-file") {
			t.Errorf("%s: exit %d\n%s", how, code, errs)
		}
	}
	// The KMS does not answer: it may have kept whatever it had.
	key := s.write(t, "admin.key", "a key")
	const kept = "whatever an earlier release of this name kept: every key"
	code, out, errs := s.run(t, "upgrade", "--chart", chart, "--host-path", "/srv/other", "--clear-data", "--dry-run", "--api-key-file", key)
	if code != 0 || !strings.Contains(out, "would go") || !strings.Contains(out, kept) {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	s.asker = typed("yes")
	if code, _, errs := s.run(t, "upgrade", "--chart", chart, "--host-path", "/srv/other", "--clear-data", "--api-key-file", key); code != 130 || !strings.Contains(errs, kept) {
		t.Errorf("exit %d\n%s", code, errs)
	}
	values := s.write(t, "o.yaml", "hsm:\n  hsm_model: softhsm\n  clear_data: true\n")
	if code, _, errs := s.run(t, "upgrade", "--chart", chart, "--values", values); code != 0 || !strings.Contains(errs, "clear_data is in the settings, and a file clears nothing") {
		t.Errorf("exit %d\n%s", code, errs)
	}
	rel, err := s.cfg.Releases.Last(templates.ChartName)
	if err != nil || rel.Version > 2 {
		t.Errorf("revision %d, %v", rel.Version, err)
	}
}
