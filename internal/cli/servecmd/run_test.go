package servecmd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/pki"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// cluster is what the chart's pods have: certificates, an etcd, a connector
// beside the API.
type cluster struct {
	dir, etcd, socket, pin string
	token                  string // folder of the SoftHSM token
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	testkit.Connector(t) // here, where nobody waits for what they start
	testkit.Server(t)
	c := &cluster{dir: t.TempDir()}
	c.socket, c.pin, c.token = filepath.Join(c.dir, "c.sock"), filepath.Join(c.dir, "pin"), filepath.Join(c.dir, "softhsm")
	ca, err := pki.NewCA("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(c.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ca.pem", ca.Cert)
	for name, use := range map[string]pki.Usage{"api": pki.Server, "etcd": pki.Peer, "client": pki.Client} {
		p, err := pki.Issue(ca, name, use, []string{"127.0.0.1", "localhost"}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		write(name+".pem", p.Cert)
		write(name+"-key.pem", p.Key)
	}
	if err := os.Mkdir(filepath.Join(c.dir, "tls"), 0o700); err != nil { // where running.client looks
		t.Fatal(err)
	}
	write("tls/ca.pem", ca.Cert)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.etcd = l.Addr().String()
	l.Close()
	return c
}

func (c *cluster) file(name string) string { return filepath.Join(c.dir, name) }

// background runs the program until the test ends, or stop is called.
func background(t *testing.T, log *buffer, args ...string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int, 1)
	go func() {
		code, _ := kmsctl(t, ctx, log, args...)
		done <- code
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		if code := <-done; code != 0 {
			t.Errorf("kmsctl %s ended with %d:\n%s", args[:2], code, log)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (c *cluster) storage(t *testing.T) (stop func()) {
	t.Helper()
	return background(t, &buffer{}, "run", "storage", "--data-dir", c.file("etcd"), "--listen-client", "https://"+c.etcd, "--advertise-host", "127.0.0.1",
		"--cert-file", c.file("etcd.pem"), "--key-file", c.file("etcd-key.pem"), "--ca-file", c.file("ca.pem"))
}

// admin makes an administrator: the API key, and the file of its hash.
func (c *cluster) admin(t *testing.T) (key, file string) {
	t.Helper()
	key, hash := adminKey(t)
	file = c.file("admin.json")
	if err := os.WriteFile(file, []byte(hash), 0o600); err != nil {
		t.Fatal(err)
	}
	return key, file
}

// awaitReady waits until each of them is ready.
func awaitReady(t *testing.T, h *http.Client, all ...*running) {
	t.Helper()
	for _, r := range all {
		await(t, "readiness", func() bool {
			res, err := h.Get(r.url + "/readyz")
			if err != nil {
				return false
			}
			res.Body.Close()
			return res.StatusCode == http.StatusOK
		})
	}
}

// connector runs the sidecar with a password.
func (c *cluster) connector(t *testing.T, pin string, flags ...string) (stop func()) {
	t.Helper()
	if err := app.WriteFile(c.pin, []byte(pin), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testkit.Connector(t), append([]string{"--socket", c.socket, "--pin-file", c.pin, "--module", testkit.SoftHSM, "--token-label", "kms", "--softhsm-dir", c.token}, flags...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(os.Interrupt) // it may have ended
		_ = cmd.Wait()
	})
	t.Cleanup(stop)
	return stop
}

var listening = regexp.MustCompile(`"msg":"listening","listen":"([^"]+)"`)

func (c *cluster) api(t *testing.T, flags ...string) *running {
	t.Helper()
	r := &running{data: c.dir, log: &buffer{}}
	r.stop = background(t, r.log, append([]string{"run", "api", "--listen", "127.0.0.1:0", "--connector-socket", c.socket, "--etcd-endpoints", "https://" + c.etcd,
		"--etcd-ca-file", c.file("ca.pem"), "--etcd-cert-file", c.file("client.pem"), "--etcd-key-file", c.file("client-key.pem"),
		"--tls-cert-file", c.file("api.pem"), "--tls-key-file", c.file("api-key.pem"), "--audit-dir", c.file("audit")}, flags...)...)
	await(t, "the API listens", func() bool {
		m := listening.FindStringSubmatch(r.log.String())
		if m != nil {
			r.url = "https://" + m[1]
		}
		return m != nil
	})
	return r
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for until := time.Now().Add(90 * time.Second); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("not seen: %s", what)
		}
	}
}

// TestRunAPIStaysUpWhileSomethingIsWrong: no etcd, no connector, a refused
// password, then all is well, without a restart of the API.
func TestRunAPIStaysUpWhileSomethingIsWrong(t *testing.T) {
	c := newCluster(t)
	made := c.connector(t, "the-right-phrase") // makes the token when it starts
	await(t, "the token", func() bool { return exec.Command(testkit.Connector(t), "check", "--socket", c.socket).Run() == nil })
	made()
	r := c.api(t)
	h := r.client(t)
	get := func(path string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", r.url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := h.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	unready := func(why string) {
		t.Helper()
		await(t, why, func() bool {
			status, body := get("/readyz")
			return status == 503 && strings.Contains(body, why)
		})
		if status, _ := get("/livez"); status != 200 {
			t.Errorf("%s: livez %d", why, status)
		}
		if status, body := get("/api/v2/keys"); status != 503 || !strings.Contains(body, "UNAVAILABLE_ERR") {
			t.Errorf("%s: %d %s", why, status, body)
		}
	}
	unready("connector") // neither etcd nor the sidecar is there
	stop := c.connector(t, "a-wrong-phrase")
	unready("store") // no etcd
	c.storage(t)
	unready("CKR_PIN_INCORRECT")
	unready("refused before")
	stop()
	c.connector(t, "the-right-phrase")
	await(t, "readiness", func() bool { status, _ := get("/readyz"); return status == 200 })
	if n := strings.Count(r.log.String(), "CKR_PIN_INCORRECT"); n != 1 {
		t.Errorf("the wrong password was tried %d times:\n%s", n, r.log)
	}
	if status, _ := get("/api/v2/keys"); status != 401 {
		t.Errorf("open now, but %d", status)
	}
}

// TestTwoReplicas: what one does the other honours at once.
func TestTwoReplicas(t *testing.T) {
	c := newCluster(t)
	c.storage(t)
	c.connector(t, "a-phrase")
	key, admin := c.admin(t)
	a := c.api(t, "--admin-key-hash-file", admin)
	b := c.api(t, "--admin-key-hash-file", admin, "--audit-dir", c.file("audit-b"))
	h := a.client(t)
	awaitReady(t, h, a, b)
	root := login(t, h, a.url, key)
	do := func(r *running, token, method, path, instance, body string, out any) int {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, r.url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Bluemix-Instance", instance)
		res, err := h.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if out != nil {
			if err := json.NewDecoder(res.Body).Decode(out); err != nil {
				t.Fatal(err)
			}
		}
		return res.StatusCode
	}
	for i := range 10 {
		var o struct{ InstanceID, APIKey, KeyID, ServiceID, PolicyID string }
		if s := do(a, root, "POST", "/kmsctl/v1/onboard", "", `{"name":"svc-`+string(rune('a'+i))+`"}`, &o); s != 201 {
			t.Fatal(s)
		}
		token := login(t, h, b.url, o.APIKey) // the other replica, at once
		wrap := "/api/v2/keys/" + o.KeyID + "/actions/wrap"
		if s := do(b, token, "POST", wrap, o.InstanceID, "", nil); s != 200 {
			t.Errorf("wrap by the other replica: %d", s)
		}
		if s := do(a, root, "DELETE", "/kmsctl/v1/iam/policies/"+o.ServiceID+"/"+o.PolicyID, "", "", nil); s != 204 {
			t.Fatal(s)
		}
		await(t, "the revocation", func() bool { return do(b, token, "POST", wrap, o.InstanceID, "", nil) == 403 })
	}
}

// adminKey is a key and the JSON of its hash, as install makes them.
func adminKey(t *testing.T) (key, hash string) {
	t.Helper()
	v, id, sum, err := iam.NewAPIKey()
	if err != nil {
		t.Fatal(err)
	}
	return string(v.Reveal()), `{"id":"` + id + `","hash":"` + sum + `"}`
}

// TestStorageOnAFullDisk: where no more can be written, the member ends, and
// its last line says why; with room again, what it acknowledged is there.
func TestStorageOnAFullDisk(t *testing.T) {
	c := newCluster(t)
	etcd, err := store.Dial(t.Context(), store.Remote{Endpoints: []string{"https://" + c.etcd}, CAFile: c.file("ca.pem"), CertFile: c.file("client.pem"), KeyFile: c.file("client-key.pem")})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	// 140,000 blocks are 68 MiB, a little more than a piece of etcd's log: its file meets the limit first.
	cmd := exec.Command("sh", "-c", `ulimit -f 140000; exec "$@"`, "sh", testkit.Server(t), "run", "storage", "--data-dir", c.file("etcd"), "--listen-client", "https://"+c.etcd,
		"--advertise-host", "127.0.0.1", "--cert-file", c.file("etcd.pem"), "--key-file", c.file("etcd-key.pem"), "--ca-file", c.file("ca.pem"))
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { <-ended; cancel() }()
	big := strings.Repeat("x", 200<<10)
	acked := 0
	for ctx.Err() == nil {
		if _, err := etcd.Put(ctx, fmt.Sprint("big/", acked), big); err == nil {
			acked++
		}
	}
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	last := lines[len(lines)-1]
	if acked < 100 || !strings.Contains(last, "file too large") || !strings.Contains(last, `"hint":"is the disk of its folder full`) {
		t.Fatalf("%d acknowledged; it ended with %s", acked, last)
	}
	c.storage(t)
	res, err := etcd.Get(t.Context(), "big/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil || res.Count < int64(acked) {
		t.Errorf("%d acknowledged, %v there: %v", acked, res, err)
	}
	t.Logf("%d acknowledged", acked)
}
