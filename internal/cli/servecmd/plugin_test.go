package servecmd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	kmsv2 "k8s.io/kms/apis/v2"

	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

var answering = regexp.MustCompile(`(?m)^ready +unix://`)

// plugin runs `kmsctl plugin` with an environment until the test ends, and
// gives the API server's client of it.
func plugin(t *testing.T, env map[string]string, flags ...string) kmsv2.KeyManagementServiceClient {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "kms.sock")
	ctx, cancel := context.WithCancel(t.Context())
	log, done := &buffer{}, make(chan int, 1)
	a := app.New("test")
	a.In, a.Out, a.Err = strings.NewReader(""), &bytes.Buffer{}, log
	a.Getenv = programsOf(t, env)
	go func() { done <- cli.Main(ctx, programs, a, append([]string{"plugin", "--socket", socket}, flags...)) }()
	t.Cleanup(func() {
		cancel()
		if code := <-done; code != 0 {
			t.Errorf("plugin ended with %d:\n%s", code, log)
		}
	})
	for until := time.Now().Add(time.Minute); !answering.MatchString(log.String()); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) || len(done) > 0 {
			t.Fatalf("the plugin is not ready:\n%s", log)
		}
	}
	c, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return kmsv2.NewKeyManagementServiceClient(c)
}

// TestPlugin drives the plugin as an API server does, against a KMS over
// SoftHSM: health, encryption, rotation, a key that is disabled, another key,
// a signing key that is withdrawn.
func TestPlugin(t *testing.T) {
	s := serve(t, t.TempDir(), "--window", "rotate=0s", "--window", "enable=0s")
	run := func(args ...string) string {
		t.Helper()
		errs := &buffer{}
		code, out := kmsctl(t, t.Context(), errs, append(args, "--data", s.data, "-o", "json")...)
		if code != 0 {
			t.Fatalf("%v: %d\n%s", args, code, errs)
		}
		return out
	}
	var made kmsapi.Onboarded
	if err := json.Unmarshal([]byte(run("onboard", "cluster", "--role", "Reader")), &made); err != nil {
		t.Fatal(err)
	}
	in := []string{"--instance", made.InstanceID}
	env := map[string]string{"KMSCTL_API_KEY": made.APIKey}
	flags := []string{"--server", s.url, "--ca-file", filepath.Join(s.data, "tls", "ca.pem"), "--instance", made.InstanceID}
	p := plugin(t, env, append(flags, "--key", made.KeyID)...)
	ctx := t.Context()
	health := func() *kmsv2.StatusResponse {
		t.Helper()
		st, err := p.Status(ctx, &kmsv2.StatusRequest{})
		if err != nil || st.Version != "v2" || st.KeyId == "" || len(st.KeyId) >= 1024 {
			t.Fatalf("%+v %v", st, err)
		}
		return st
	}
	seed := bytes.Repeat([]byte{7}, 32)
	encrypt := func() *kmsv2.EncryptResponse {
		t.Helper()
		e, err := p.Encrypt(ctx, &kmsv2.EncryptRequest{Plaintext: seed, Uid: "u"})
		if err != nil || len(e.Ciphertext) == 0 || len(e.Ciphertext) >= 1024 || bytes.Contains(e.Ciphertext, seed) {
			t.Fatalf("%+v %v", e, err)
		}
		return e
	}
	opens := func(c kmsv2.KeyManagementServiceClient, e *kmsv2.EncryptResponse) {
		t.Helper()
		d, err := c.Decrypt(ctx, &kmsv2.DecryptRequest{Ciphertext: e.Ciphertext, KeyId: e.KeyId, Annotations: e.Annotations, Uid: "u"})
		if err != nil || !bytes.Equal(d.Plaintext, seed) {
			t.Fatalf("%+v %v", d, err)
		}
	}
	first := encrypt()
	if st := health(); st.Healthz != "ok" || st.KeyId != first.KeyId {
		t.Errorf("%+v, encrypted by %s", st, first.KeyId)
	}
	opens(p, first)

	run(append([]string{"keys", "rotate", made.KeyID}, in...)...)
	second := encrypt()
	if st := health(); st.KeyId == first.KeyId || st.KeyId != second.KeyId {
		t.Errorf("after a rotation: %+v", st)
	}
	opens(p, first)
	opens(p, second)

	run("iam", "signing-key", "rotate", "--now")
	opens(p, second)

	// Touched, of another key id, nothing: refused, and not as an internal error.
	bad := bytes.Clone(first.Ciphertext)
	bad[len(bad)/2] ^= 1
	for name, c := range map[string]struct {
		in   *kmsv2.DecryptRequest
		want codes.Code
	}{
		"touched":  {&kmsv2.DecryptRequest{Ciphertext: bad, KeyId: first.KeyId}, codes.DataLoss},
		"foreign":  {&kmsv2.DecryptRequest{Ciphertext: first.Ciphertext, KeyId: "00000000-0000-4000-8000-000000000000/x"}, codes.PermissionDenied},
		"no id":    {&kmsv2.DecryptRequest{Ciphertext: first.Ciphertext}, codes.InvalidArgument},
		"no bytes": {&kmsv2.DecryptRequest{KeyId: first.KeyId}, codes.InvalidArgument},
	} {
		if _, err := p.Decrypt(ctx, c.in); status.Code(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := p.Encrypt(ctx, &kmsv2.EncryptRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("nothing to encrypt: %v", err)
	}

	run(append([]string{"keys", "disable", made.KeyID}, in...)...)
	if st := health(); st.Healthz == "ok" || !strings.Contains(st.Healthz, "KEY_ACTION_INVALID_STATE_ERR") {
		t.Errorf("a disabled key: %+v", st)
	}
	if _, err := p.Encrypt(ctx, &kmsv2.EncryptRequest{Plaintext: seed}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a disabled key: %v", err)
	}
	run(append([]string{"keys", "enable", made.KeyID}, in...)...)
	opens(p, second)

	// Another key from now on, by its alias; what the old one wrapped still opens.
	var fresh kmsapi.Key
	if err := json.Unmarshal([]byte(run(append([]string{"keys", "create", "next", "--alias", "etcd-root"}, in...)...)), &fresh); err != nil {
		t.Fatal(err)
	}
	run(append([]string{"iam", "policies", "create", "--service-id", "cluster", "--role", "Reader", "--key", fresh.ID}, in...)...)
	p2 := plugin(t, env, append(flags, "--key", "etcd-root")...)
	e, err := p2.Encrypt(ctx, &kmsv2.EncryptRequest{Plaintext: seed})
	if err != nil || !strings.HasPrefix(e.KeyId, fresh.ID+"/") {
		t.Fatalf("%+v %v", e, err)
	}
	opens(p2, e)
	opens(p2, second)

	// The KMS goes away: said, not hidden.
	s.stop()
	if st := health(); st.Healthz == "ok" {
		t.Error("healthy without a KMS")
	}
	if _, err := p.Encrypt(ctx, &kmsv2.EncryptRequest{Plaintext: seed}); status.Code(err) != codes.Unavailable {
		t.Errorf("without a KMS: %v", err)
	}

	// With the embedded KMS of a folder, which it starts itself.
	own := plugin(t, map[string]string{"KMSCTL_CONNECTOR": testkit.Connector(t)}, "--data", s.data, "--instance", made.InstanceID, "--key", "etcd-root")
	if st, err := own.Status(ctx, &kmsv2.StatusRequest{}); err != nil || st.Healthz != "ok" {
		t.Errorf("%+v %v", st, err)
	}
	opens(own, first)
}
