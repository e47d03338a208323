//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// site is a folder as an operator has it: the archive, certificates, and a
// kubeconfig of a cluster with two nodes and two storage classes.
type site struct {
	dir      string
	registry string
	env      []string
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{dir: t.TempDir()}
	s.write(t, "key-management-hsm-amd64.tar.gz", archiveWithChart(t))
	for _, ip := range []string{"10.0.0.11", "10.0.0.12"} {
		s.pair(t, "certs/"+ip, ip)
	}
	cert, _, err := hsm.NewLunaClient("127.0.0.1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s.write(t, "server.pem", cert)
	reg := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }))
	t.Cleanup(reg.Close)
	s.registry = strings.TrimPrefix(reg.URL, "http://")
	s.write(t, "kubeconfig", []byte(fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],
"clusters":[{"name":"c","cluster":{"server":%q}}],"users":[{"name":"u","user":{"token":"canary-token"}}]}`, apiServer(t))))
	bin, err := filepath.Abs("../../bin/kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("run `make build` first: %v", err)
	}
	s.env = []string{"PATH=" + filepath.Dir(bin) + ":" + os.Getenv("PATH"), "HOME=" + s.dir, "TERM=xterm", "KUBECONFIG=" + filepath.Join(s.dir, "kubeconfig"),
		"XDG_STATE_HOME=" + filepath.Join(s.dir, "state")}
	return s
}

// apiServer answers what the wizard asks a cluster.
func apiServer(t *testing.T) string {
	t.Helper()
	node := func(name, ip string) map[string]any {
		return map[string]any{"metadata": map[string]any{"name": name}, "status": map[string]any{"addresses": []any{map[string]string{"type": "InternalIP", "address": ip}}}}
	}
	class := func(name, def string) map[string]any {
		return map[string]any{"metadata": map[string]any{"name": name, "annotations": map[string]string{"storageclass.kubernetes.io/is-default-class": def}}}
	}
	lists := map[string]map[string]any{
		"/api/v1/nodes":                          {"kind": "NodeList", "apiVersion": "v1", "items": []any{node("n1", "10.0.0.11"), node("n2", "10.0.0.12")}},
		"/apis/storage.k8s.io/v1/storageclasses": {"kind": "StorageClassList", "apiVersion": "storage.k8s.io/v1", "items": []any{class("fast", "true"), class("slow", "")}},
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l, ok := lists[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(l); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

func archiveWithChart(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	add := func(name, content string) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	add("manifest.json", `{"charts": [{"archive": "charts/key-management-hsm-3.2.1.tgz"}], "images": []}`)
	add("charts/key-management-hsm-3.2.1.tgz", "a chart")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (s *site) pair(t *testing.T, base, ip string) {
	t.Helper()
	cert, key, err := hsm.NewLunaClient(ip, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s.write(t, base+".pem", cert)
	s.write(t, base+"Key.pem", key)
}

func (s *site) write(t *testing.T, name string, b []byte) {
	t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// start runs `kmsctl setup --dry-run` on a terminal.
func (s *site) start(t *testing.T, args ...string) (*testkit.Pty, *bytes.Buffer) {
	t.Helper()
	return s.program(t, append([]string{"setup", "--dry-run", "--insecure"}, args...)...)
}

// program runs kmsctl on a terminal, its standard output apart.
func (s *site) program(t *testing.T, args ...string) (*testkit.Pty, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	program, err := filepath.Abs("../../bin/kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Env, cmd.Stdout = s.dir, s.env, &out
	return testkit.StartPty(t, cmd), &out
}

// choose moves down to an option and takes it.
func choose(p *testkit.Pty, question, last string, down int) {
	p.Expect(question)
	p.Expect(last)
	p.Type(strings.Repeat("\x1b[B", down) + "\r")
}

const pin = "canary-pin-4711"

// ending answers the questions that all models share after their own.
func ending(p *testkit.Pty) {
	p.Answer("HSM password: ", "short\x15bad ")
	p.Expect("begins or ends with a blank")
	p.Answer("HSM password: ", pin)
	p.Answer("HSM password, again: ", "other-canary")
	p.Expect("the two entries differ")
	p.Answer("HSM password: ", pin)
	p.Answer("HSM password, again: ", pin)
	p.Expect("Storage class of the volumes")
	p.Expect("(fast)")
	p.Type("fsat\r")
	p.Expect("the cluster has fast, slow")
	p.Answer("Storage class of the volumes", "slow")
	p.Answer("File for the administrator's API key", "")
}

// beginning answers the questions before the model's own.
func (s *site) beginning(p *testkit.Pty, model int) {
	choose(p, "HSM model", "softhsm", model)
	p.Expect("(key-management-hsm-amd64.tar.gz)")
	p.Type("server.pem\r")
	p.Expect("server.pem")
	p.Answer("Archive with images and chart", "")
	p.Answer("Registry for the images", "https://reg")
	p.Expect("without a scheme")
	p.Answer("Registry for the images", s.registry)
	p.Expect("(oci://" + s.registry + "/charts)")
	p.Type("\r")
	p.Answer("Namespace of the release", "Kube")
	p.Expect("lower-case letters")
	p.Answer("Namespace of the release", "")
	p.Expect("(3.2.1)")
	p.Type("\r")
}

// TestSetupAsks goes through the wizard at a terminal for each model, with
// wrong answers, a step back and Ctrl-C before the end, goes on, and ends with the plan, the command and the answers file.
func TestSetupAsks(t *testing.T) {
	for model, c := range map[string]struct {
		index   int
		own     func(p *testkit.Pty)
		command []string
	}{
		"gemalto": {0, func(p *testkit.Pty) {
			p.Answer("Address of the HSM", "luna.example")
			p.Expect("give an IP address")
			p.Answer("Address of the HSM", "127.0.0.1")
			p.Expect("does not answer on port 1792 from here")
			p.Expect("(server.pem)")
			p.Type("kubeconfig\r")
			p.Expect("no certificate in PEM")
			p.Answer("File with the appliance's certificate", "")
			p.Expect("(10.0.0.11,10.0.0.12)")
			p.Type("10.0.0.11,10.0.0.12,10.0.0.13\r")
			p.Expect("(certs)")
			p.Type("\r")
			p.Expect("node 10.0.0.13 has no pair in certs: make it with `kmsctl hsm luna-cert create --node 10.0.0.13")
			p.Answer("Folder with the nodes' certificate pairs", "<")
			p.Answer("Addresses of the nodes", "fe80::1")
			p.Expect("IPv6")
			p.Answer("Addresses of the nodes", "10.0.0.11,10.0.0.12")
			p.Answer("Folder with the nodes' certificate pairs", "")
		}, []string{"--hsm-ip 127.0.0.1", "--node 10.0.0.11 --node 10.0.0.12", "--cert-dir certs", "--server-ca-file server.pem"}},
		"thales": {1, func(p *testkit.Pty) {
			p.Answer("Address of the HSM", "127.0.0.1")
			p.Expect("does not answer on port 9004")
			p.Answer("Address of the remote file system", "127.0.0.2")
			p.Answer("Slot", "0x1D")
			p.Expect("decimal digits")
			p.Answer("Slot", "?")
			p.Expect("nfkminfo")
			p.Answer("Slot", "492971158")
			p.Answer("Serial number of the Connect", "1111")
			p.Expect("has not the form of 1111-2222-3333")
			p.Answer("Serial number of the Connect", "1111-2222-3333")
			p.Answer("Key hash of the Connect", strings.Repeat("0a", 20))
		}, []string{"--rfs-ip 127.0.0.2", "--slot-id 492971158", "--esn 1111-2222-3333"}},
		"softhsm": {2, func(*testkit.Pty) {}, nil},
	} {
		t.Run(model, func(t *testing.T) {
			s := newSite(t)
			p, _ := s.start(t)
			s.beginning(p, c.index)
			c.own(p)
			p.Answer("HSM password: ", pin)
			p.Answer("HSM password, again: ", pin)
			p.Expect("Storage class of the volumes")
			p.Type("<\r")
			p.Expect("HSM password: ")
			p.Type("\x03")
			if code := p.Wait(); code != 130 || !strings.Contains(p.Screen(), "your answers are kept, but no secret") {
				t.Fatalf("exit %d\n%s", code, p.Screen())
			}
			s.noSecret(t, p.Screen())
			p, out := s.start(t) // goes on where it was stopped
			choose(p, "Go on with the", "no", 0)
			ending(p)
			p.Expect("1. load key-management-hsm-amd64.tar.gz")
			if code := p.Wait(); code != 0 {
				t.Fatalf("exit %d\n%s", code, p.Screen())
			}
			for _, want := range append(c.command, "kmsctl setup", "--model "+model, "--storage-class slow", "--hsm-password-file FILE --yes") {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
			s.again(t, model)
			s.noSecret(t, p.Screen()+out.String())
		})
	}
}

// again runs with the answers file alone, as CI does.
func (s *site) again(t *testing.T, model string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "kmsctl-answers.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := yaml.Unmarshal(b, &doc); err != nil || doc["model"] != model || doc["admin-key-file"] != "admin.key" {
		t.Errorf("%v: %s", err, b)
	}
	cmd := exec.Command("kmsctl", "setup", "--answers", "kmsctl-answers.yaml", "--yes", "--dry-run", "-o", "json")
	cmd.Path, err = filepath.Abs("../../bin/kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Err = nil
	cmd.Dir, cmd.Env = s.dir, append(s.env, "KMSCTL_HSM_PASSWORD="+pin, "KMSCTL_NO_INPUT=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("load key-management-hsm-amd64.tar.gz")) {
		t.Errorf("%v: %s", err, out)
	}
	s.noSecret(t, string(out))
}

// noSecret looks for what was typed in all that was shown and written.
func (s *site) noSecret(t *testing.T, shown string) {
	t.Helper()
	if strings.Contains(shown, "canary") {
		t.Errorf("a secret was shown:\n%s", shown)
	}
	err := filepath.WalkDir(s.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "kubeconfig" {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte("canary")) {
			t.Errorf("a secret is in %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestSetupResumes: back, Ctrl-C, and on with the answers so far; a change of
// the model makes the answers to its questions void.
func TestSetupResumes(t *testing.T) {
	s := newSite(t)
	p, _ := s.start(t)
	s.beginning(p, 1)
	p.Answer("Address of the HSM", "127.0.0.1")
	p.Answer("Address of the remote file system", "127.0.0.2")
	p.Answer("Slot", "<")
	p.Expect("(127.0.0.2)")
	p.Type("\x03")
	if code := p.Wait(); code != 130 {
		t.Fatalf("exit %d\n%s", code, p.Screen())
	}
	if !strings.Contains(p.Screen(), "your answers are kept, but no secret") {
		t.Error(p.Screen())
	}
	s.noSecret(t, p.Screen())

	p, out := s.start(t)
	choose(p, "Go on with the", "no", 0)
	p.Answer("Address of the remote file system", "<") // where it was stopped
	p.Expect("(127.0.0.1)")
	p.Type("<\r")
	for range 5 { // version, namespace, repository, registry, archive: up to the model
		p.Expect("(")
		p.Type("<\r")
	}
	choose(p, "HSM model", "softhsm", 1)
	for range 5 {
		p.Expect("(")
		p.Type("\r")
	}
	p.Answer("HSM password: ", pin)
	p.Answer("HSM password, again: ", pin)
	p.Answer("Storage class of the volumes", "")
	p.Answer("File for the administrator's API key", "")
	if code := p.Wait(); code != 0 {
		t.Fatalf("exit %d\n%s", code, p.Screen())
	}
	if strings.Contains(out.String(), "hsm-ip") || !strings.Contains(out.String(), "--model softhsm") {
		t.Error(out)
	}
}

// TestSetupTakesValues: what a values file says is not asked, and stays in the
// file: the command and the answers name it.
func TestSetupTakesValues(t *testing.T) {
	s := newSite(t)
	s.write(t, "values.yaml", []byte("hsm: {hsm_model: thales, hsm_ip: 127.0.0.1, rfs_ip: 127.0.0.2, slotId: \"1\"}\npersistence: {storageClass: slow}\noss: {replicas: 2}\n"))
	p, out := s.start(t, "--values", "values.yaml", "--archive", "key-management-hsm-amd64.tar.gz")
	p.Answer("Registry for the images", s.registry)
	for _, q := range []string{"Chart repository", "Namespace of the release", "Version of the chart"} {
		p.Answer(q, "")
	}
	p.Answer("Serial number of the Connect", "") // the file has none
	p.Answer("Key hash of the Connect", "")
	p.Answer("HSM password: ", pin)
	p.Answer("HSM password, again: ", pin)
	p.Answer("File for the administrator's API key", "")
	p.Expect("for the model thales, in memory, with the values of values.yaml")
	if code := p.Wait(); code != 0 {
		t.Fatalf("exit %d\n%s", code, p.Screen())
	}
	answers, err := os.ReadFile(filepath.Join(s.dir, "kmsctl-answers.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{out.String(), string(answers)} {
		if !strings.Contains(text, "values.yaml") || strings.Contains(text, "thales") || strings.Contains(text, "storage-class") {
			t.Error(text)
		}
	}
	s.noSecret(t, p.Screen()+out.String())
}

// TestSetupBeginsOnlyWhenTold: after the plan comes a question, and no leaves
// everything as it was.
func TestSetupBeginsOnlyWhenTold(t *testing.T) {
	s := newSite(t)
	s.write(t, "pw", []byte(pin))
	p, out := s.program(t, "setup", "--model", "softhsm", "--archive", "", "--repo", "charts", "--namespace", "kms", "--version", "1", "--storage-class", "slow",
		"--hsm-password-file", "pw", "--admin-key-file", "admin.key")
	p.Expect("apply Secret kms/hsm-secret")
	p.Expect("fail  chart: ")
	p.Expect("cure: ")
	choose(p, "Begin all the same?", "yes", 1) // check again
	p.Expect("fail  chart: ")
	choose(p, "Begin all the same?", "yes", 0)
	if code := p.Wait(); code != 130 || out.Len() > 0 {
		t.Fatalf("exit %d\n%s%s", code, p.Screen(), out)
	}
	if _, err := os.Stat(filepath.Join(s.dir, "admin.key")); err == nil {
		t.Error("something was begun")
	}
}

// TestFetchServerAsks: the appliance's certificate is saved when the person
// has compared the fingerprint, and not otherwise.
func TestFetchServerAsks(t *testing.T) {
	s := newSite(t)
	cert, key, err := hsm.NewLunaClient("127.0.0.1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: tls.VersionTLS12})
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
			_ = c.(*tls.Conn).Handshake() // the client says how it went
			_ = c.Close()
		}
	}()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"hsm", "luna-cert", "fetch-server", "--hsm-ip", "127.0.0.1", "--port", port, "--output-file", "got.pem"}
	for answer, code := range []int{130, 0} { // no, yes
		p, _ := s.program(t, args...)
		p.Expect(hsm.Fingerprint(pair.Certificate[0]))
		choose(p, "Is that the fingerprint", "yes", answer)
		if got := p.Wait(); got != code {
			t.Errorf("exit %d, want %d\n%s", got, code, p.Screen())
		}
		_, err := os.Stat(filepath.Join(s.dir, "got.pem"))
		if (err == nil) != (code == 0) {
			t.Errorf("exit %d: %v", code, err)
		}
	}
}
