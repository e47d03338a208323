//go:build e2e && linux

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// installByWizard installs a release on the real cluster as a person does at a
// terminal: with wrong answers, back, Ctrl-C and on from there.
func installByWizard(t *testing.T, bin, path string) {
	s := &site{dir: t.TempDir(), registry: os.Getenv("REGISTRY") + "/wizard"} // the scripts begin with an empty registry
	// Kubernetes' own descriptions, which client-go keeps at home, speak of canaries.
	s.env = []string{"PATH=" + path, "HOME=" + t.TempDir(), "TERM=xterm", "KUBECONFIG=" + os.Getenv("KUBECONFIG"), "XDG_STATE_HOME=" + filepath.Join(s.dir, "state"),
		"KMSCTL_CACHE=" + os.Getenv("KMSCTL_CACHE")}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(bin, "kmsctl"), args...)
		cmd.Dir, cmd.Env = s.dir, s.env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("kmsctl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	run("archive", "build", "--output-file", "key-management-hsm-amd64.tar.gz")

	p, _ := s.program(t, "setup")
	choose(p, "HSM model", "softhsm", 2)
	p.Answer("Archive with images and chart", "")
	p.Answer("Registry for the images", "https://"+s.registry)
	p.Expect("without a scheme")
	p.Answer("Registry for the images", s.registry)
	p.Answer("Chart repository", "<")
	p.Expect("(" + s.registry + ")")
	p.Type("\r")
	p.Answer("Chart repository", "none")
	p.Answer("Namespace of the release", "KMS")
	p.Expect("lower-case letters")
	p.Expect("(kube-system)") // it is asked again
	p.Type("\x03")
	if code := p.Wait(); code != 130 || !strings.Contains(p.Screen(), "your answers are kept, but no secret") {
		t.Fatalf("exit %d\n%s", code, p.Screen())
	}

	p, out := s.program(t, "setup")
	choose(p, "Go on with the 4 answers", "no", 0)
	p.Answer("Namespace of the release", "kms-wizard")
	p.Answer("Version of the chart", "")
	p.Answer("HSM password: ", "echoed ")
	p.Expect("begins or ends with a blank")
	p.Answer("HSM password: ", pin)
	p.Answer("HSM password, again: ", pin)
	p.Expect("Storage class of the volumes")
	p.Expect("(local)")
	p.Type("slow\r")
	p.Expect("the cluster has local")
	p.Answer("Storage class of the volumes", "local")
	p.Answer("File for the administrator's API key", "")
	p.Expect("install release key-management-hsm from chart in key-management-hsm-amd64.tar.gz")
	p.Expect("warn  hsm settings: SoftHSM is a token in software")
	choose(p, "Begin?", "no", 0)
	p.Expect("pushed")
	if code := p.Wait(); code != 0 || !strings.Contains(out.String(), "installed release key-management-hsm, revision 1") {
		t.Fatalf("exit %d\n%s%s", code, p.Screen(), out)
	}
	s.noSecret(t, p.Screen()+out.String())
	if status := run("status", "-n", "kms-wizard"); !strings.Contains(status, "deployed") {
		t.Error(status)
	}
	s.env = append(s.env, "KMSCTL_HSM_PASSWORD="+pin)
	if again := run("setup", "--answers", "kmsctl-answers.yaml", "--yes"); !strings.Contains(again, "unchanged  release key-management-hsm") {
		t.Error(again)
	}
	run("instances", "list", "--in-cluster-service", "--release-namespace", "kms-wizard", "--api-key-file", "admin.key")
	run("uninstall", "-n", "kms-wizard", "--yes", "--delete-secrets", "--delete-data")
}
