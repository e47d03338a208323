package servecmd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cli/auditcmd"
	"github.com/kmsctl/kmsctl/internal/cli/backupcmd"
	"github.com/kmsctl/kmsctl/internal/cli/hsmcmd"
	"github.com/kmsctl/kmsctl/internal/cli/keyscmd"
	"github.com/kmsctl/kmsctl/internal/cli/servecmd"
	"github.com/kmsctl/kmsctl/internal/pki"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

func TestMain(m *testing.M) {
	code := m.Run()
	testkit.Cleanup()
	os.Exit(code)
}

// buffer may be read while the program writes.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// programs are kms-server and what asks it, in one.
var programs = cli.Program{Name: "kmsctl", Verbs: cli.Verbs{servecmd.New, keyscmd.New, hsmcmd.New, backupcmd.New, auditcmd.New}}

// kmsctl runs the programs in this process.
func kmsctl(t *testing.T, ctx context.Context, errs io.Writer, args ...string) (code int, out string) { //nolint:revive // a test comes first
	t.Helper()
	var o bytes.Buffer
	a := app.New("test")
	a.In, a.Out, a.Err = strings.NewReader(""), &o, errs
	a.Getenv = programsOf(t, nil)
	return cli.Main(ctx, programs, a, args), o.String()
}

var named sync.Once

// programsOf is an environment that names the programs beside this one; what
// they start in turn is named by this process's.
func programsOf(t *testing.T, env map[string]string) func(string) string {
	t.Helper()
	connector, server := testkit.Connector(t), testkit.Server(t)
	named.Do(func() {
		os.Setenv("KMSCTL_CONNECTOR", connector) //nolint:usetesting // for the whole program, whose tests run commands side by side
		os.Setenv("KMSCTL_KMS_SERVER", server)   //nolint:usetesting // as above
	})
	return func(k string) string {
		if v, ok := env[k]; ok || !strings.HasPrefix(k, "KMSCTL_") {
			return v
		}
		return os.Getenv(k)
	}
}

// files writes the two files of the manual.
func files(t *testing.T, pin string) (secret, values string) {
	t.Helper()
	dir := t.TempDir()
	secret, values = filepath.Join(dir, "hsm-Secret.yaml"), filepath.Join(dir, "overrides_hsm.yaml")
	y := "apiVersion: v1\nkind: Secret\nmetadata:\n  name: hsm-secret\n  namespace: kube-system\ntype: Opaque\nstringData:\n  hsm-pass: " + pin + "\n"
	for path, text := range map[string]string{secret: y, values: "hsm:\n  hsm_model: softhsm\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return secret, values
}

type running struct {
	url, data string
	log       *buffer
	stop      func()
}

var ready = regexp.MustCompile(`(?m)^ready +(\S+)`)

// serve runs `kmsctl serve` over SoftHSM until the test ends.
func serve(t *testing.T, data string, flags ...string) *running {
	t.Helper()
	testkit.Connector(t) // here, where a failure can end the test
	secret, values := files(t, "a-pass-phrase")
	r := &running{data: data, log: &buffer{}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int, 1)
	args := append([]string{"serve", "--data", data, "--listen", "127.0.0.1:0", "--secret", secret, "--values", values}, flags...)
	go func() {
		code, _ := kmsctl(t, ctx, r.log, args...)
		done <- code
	}()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if code := <-done; code != 0 {
			t.Errorf("serve ended with %d:\n%s", code, r.log)
		}
	})
	t.Cleanup(r.stop)
	for until := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if m := ready.FindStringSubmatch(r.log.String()); m != nil {
			r.url = m[1]
			return r
		}
		select {
		case code := <-done:
			done <- code
			t.Fatalf("serve ended with %d:\n%s", code, r.log)
		default:
		}
		if time.Now().After(until) {
			t.Fatalf("serve is not ready:\n%s", r.log)
		}
	}
}

// client trusts the CA of the data folder.
func (r *running) client(t *testing.T) *http.Client {
	t.Helper()
	pem, err := os.ReadFile(filepath.Join(r.data, "tls", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		t.Fatal("no CA")
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

// run runs another command on the folder, and reads its JSON.
func (r *running) run(t *testing.T, out any, args ...string) {
	t.Helper()
	errs := &buffer{}
	code, text := kmsctl(t, t.Context(), errs, append(args, "--data", r.data, "-o", "json")...)
	if code != 0 {
		t.Fatalf("kmsctl %s: %d\n%s", args, code, errs)
	}
	if out != nil {
		if err := json.Unmarshal([]byte(text), out); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
}

// TestAServerThatWasStoppedLosesNothing stops while calls are on their way:
// each gets its answer, and the audit log is whole.
func TestAServerThatWasStoppedLosesNothing(t *testing.T) {
	r := serve(t, t.TempDir())
	var o struct{ InstanceID, APIKey, KeyID string }
	r.run(t, &o, "onboard", "orders")
	h := r.client(t)
	token := login(t, h, r.url, o.APIKey)
	var wg sync.WaitGroup
	var mu sync.Mutex
	count := map[int]int{}
	for range 4 {
		wg.Go(func() {
			for range 50 {
				req, _ := http.NewRequestWithContext(t.Context(), "POST", r.url+"/api/v2/keys/"+o.KeyID+"/actions/wrap", nil)
				req.Header.Set("Authorization", "Bearer "+token)
				req.Header.Set("Bluemix-Instance", o.InstanceID)
				res, err := h.Do(req)
				if err != nil {
					return // the server is gone
				}
				res.Body.Close()
				mu.Lock()
				count[res.StatusCode]++
				mu.Unlock()
			}
		})
	}
	for {
		mu.Lock()
		n := count[200]
		mu.Unlock()
		if n > 5 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	r.stop()
	wg.Wait()
	if len(count) != 1 || count[200] < 5 {
		t.Errorf("answers by status: %v", count)
	}
	var rep struct{ Events int }
	r.run(t, &rep, "audit", "verify")
	if rep.Events < count[200] {
		t.Errorf("%d answers, %d events", count[200], rep.Events)
	}
}

func login(t *testing.T, h *http.Client, base, key string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", base+"/identity/token",
		strings.NewReader("grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey="+key))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	res, err := h.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var tok struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.NewDecoder(res.Body).Decode(&tok); err != nil || tok.AccessToken == "" {
		t.Fatalf("%d %v", res.StatusCode, err)
	}
	return tok.AccessToken
}

// TestAWrongPasswordIsTriedOnce counts by the token's own flag and by the
// ledger's words: a restart does not try again.
func TestAWrongPasswordIsTriedOnce(t *testing.T) {
	data := t.TempDir()
	serve(t, data).stop()
	secret, values := files(t, "a-wrong-phrase")
	for i, want := range []string{"CKR_PIN_INCORRECT", "refused before", "refused before"} {
		errs := &buffer{}
		code, _ := kmsctl(t, t.Context(), errs, "serve", "--data", data, "--listen", "127.0.0.1:0", "--secret", secret, "--values", values)
		if code != 4 || !strings.Contains(errs.String(), want) || (i > 0 && strings.Contains(errs.String(), "CKR_PIN")) {
			t.Errorf("start %d: %d\n%s", i+1, code, errs)
		}
		if i > 0 && !strings.Contains(errs.String(), "1 refused so far") {
			t.Errorf("start %d tried again:\n%s", i+1, errs)
		}
	}
	serve(t, data).stop() // the right one is not spoiled
}

// TestCommandsStartTheKMSForOneCall: two at the same time wait for each other.
func TestCommandsStartTheKMSForOneCall(t *testing.T) {
	data := t.TempDir()
	serve(t, data).stop()
	r := &running{data: data}
	r.run(t, nil, "instances", "create", "shop")
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() { r.run(t, nil, "keys", "create", fmt.Sprint("key-", i), "--instance", "shop") })
	}
	wg.Wait()
	var l struct{ Keys []struct{ ID string } }
	r.run(t, &l, "keys", "list", "--instance", "shop")
	if len(l.Keys) != 3 {
		t.Errorf("%+v", l)
	}
	r.run(t, nil, "audit", "verify")
}

// TestClientCertificates: a certificate of the CA for clients proves the
// service ID that names it; another one does not.
func TestClientCertificates(t *testing.T) {
	dir := t.TempDir()
	ca, err := pki.NewCA("clients", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := pki.NewCA("foreign", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	caFile := filepath.Join(dir, "clients.pem")
	if err := os.WriteFile(caFile, ca.Cert, 0o600); err != nil {
		t.Fatal(err)
	}
	r := serve(t, filepath.Join(dir, "d"), "--client-ca-file", caFile)
	var in, key struct{ ID string }
	r.run(t, &in, "instances", "create", "shop")
	r.run(t, &key, "keys", "create", "root", "--instance", "shop")
	r.run(t, nil, "iam", "service-ids", "create", "orders", "--client-cert", "orders-client")
	r.run(t, nil, "iam", "policies", "create", "--service-id", "orders", "--instance", "shop", "--role", "Viewer", "--key", key.ID)
	wrap := func(ca pki.Pair, name string) (int, error) {
		h := r.client(t)
		if name != "" {
			p, err := pki.Issue(ca, name, pki.Client, nil, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			cert, err := tls.X509KeyPair(p.Cert, p.Key)
			if err != nil {
				t.Fatal(err)
			}
			h.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{cert}
		}
		req, err := http.NewRequestWithContext(t.Context(), "POST", r.url+"/api/v2/keys/"+key.ID+"/actions/wrap", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Bluemix-Instance", in.ID)
		res, err := h.Do(req)
		if err != nil {
			return 0, err
		}
		res.Body.Close()
		return res.StatusCode, nil
	}
	for name, want := range map[string]int{"orders-client": 200, "billing-client": 401, "": 401} {
		if got, err := wrap(ca, name); err != nil || got != want {
			t.Errorf("%q: %d %v, want %d", name, got, err, want)
		}
	}
	if got, err := wrap(foreign, "orders-client"); err == nil && got == 200 {
		t.Errorf("a certificate of another CA: %d", got)
	}
}
