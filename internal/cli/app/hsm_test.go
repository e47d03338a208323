package app_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/pki"
)

// TestLunaSecret reads real certificates of two nodes.
func TestLunaSecret(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	ca, err := pki.NewCA("luna", now)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	f := app.HSMFlags{}
	f.AddSecret(pflag.NewFlagSet("x", pflag.ContinueOnError)) // names --hsm-password, sets defaults
	f.Settings, f.Namespace, f.ServerCAFile = hsm.Settings{Model: "gemalto"}, "kube-system", write("ca", ca.Cert)
	f.Nodes = []string{"10.0.0.11", "10.0.0.12"}
	for _, ip := range f.Nodes {
		p, err := pki.Issue(ca, ip, pki.Client, nil, now)
		if err != nil {
			t.Fatal(err)
		}
		f.ClientCerts = append(f.ClientCerts, ip+"="+write(ip, p.Cert))
		f.ClientKeys = append(f.ClientKeys, ip+"="+write(ip+"-key", p.Key))
	}
	a := testApp(map[string]string{"KMSCTL_HSM_PASSWORD": "pw"}, "")
	if err := f.CheckSecret(); err != nil {
		t.Fatal(err)
	}
	s, err := f.Secret(a)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Clients) != 2 || len(s.Data()) != 6 || len(s.Warnings) != 0 {
		t.Errorf("%d pairs, %d entries, warnings %q", len(s.Clients), len(s.Data()), s.Warnings)
	}
	// The key of the other node.
	f.ClientKeys[0], f.ClientKeys[1] = "10.0.0.11="+filepath.Join(dir, "10.0.0.12-key"), "10.0.0.12="+filepath.Join(dir, "10.0.0.11-key")
	_, err = f.Secret(a)
	if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "node 10.0.0.11: tls: private key does not match") || !strings.Contains(err.Error(), "node 10.0.0.12") {
		t.Errorf("%v", err)
	}
}
