package servecmd_test

import (
	"encoding/base64"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// TestImportTokensOfTwoReplicas: material that was sent under an import token
// of one replica comes in through the other, whether both use one token, each
// a clone of its own, or both both clones; and each uses what came in.
func TestImportTokensOfTwoReplicas(t *testing.T) {
	testkit.Connector(t)
	testkit.Server(t)
	for name, s := range map[string]struct {
		clone bool // the second replica's connector has a token of its own
		group bool // each replica uses both
		flags []string
	}{
		"one token":    {},
		"a token each": {clone: true, flags: []string{"--token-per-replica"}},
		"a group":      {clone: true, group: true},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			c.storage(t)
			key, admin := c.admin(t)
			flags := append([]string{"--admin-key-hash-file", admin}, s.flags...)
			client := func(r *running) *kmsclient.Client {
				k, err := kmsclient.New(kmsclient.Config{Server: r.url, CAFile: c.file("ca.pem"), APIKey: []byte(key)})
				if err != nil {
					t.Fatal(err)
				}
				await(t, "readiness", func() bool { return k.Do(t.Context(), http.MethodGet, "/readyz", nil, nil) == nil })
				return k
			}
			c.connector(t, "a-phrase")
			first := c.api(t, append(flags, "--name", "a")...)
			a := client(first)
			other := *c
			other.socket = filepath.Join(c.dir, "other.sock")
			if s.clone { // the master keys are there
				other.token = c.file("clone")
				if err := os.CopyFS(filepath.Join(other.token, "tokens"), os.DirFS(c.file("softhsm/tokens"))); err != nil {
					t.Fatal(err)
				}
			}
			stopOther := other.connector(t, "a-phrase")
			if s.group {
				flags = append(flags, "--connector-socket", c.socket)
				first.stop()
				first = c.api(t, append(flags, "--name", "a", "--connector-socket", other.socket)...)
				a = client(first)
			}
			b := client(other.api(t, append(flags, "--name", "b", "--audit-dir", c.file("audit-b"))...))

			var in kmsapi.Instance
			if err := a.Do(t.Context(), http.MethodPost, "/kmsctl/v1/instances", kmsapi.CreateInstance{Name: "shop"}, &in); err != nil {
				t.Fatal(err)
			}
			a.SetInstance(in.ID)
			b.SetInstance(in.ID)
			for makes, brings := range map[*kmsclient.Client]*kmsclient.Client{a: b, b: a} {
				sent := kmsapi.CreateKey{Type: kmsapi.TypeKey, Name: "sent"}
				if err := makes.Seal(t.Context(), []byte("0123456789abcdef0123456789abcdef"), &sent); err != nil {
					t.Fatal(err)
				}
				id := imported(t, brings, sent)
				wrapped := act(t, makes, id, "wrap", kmsapi.WrapRequest{})
				if got := act(t, brings, id, "unwrap", kmsapi.UnwrapRequest{Ciphertext: wrapped.Ciphertext}); got.Plaintext != wrapped.Plaintext {
					t.Error("another plaintext")
				}
			}
			if !s.group {
				return
			}
			// A member may go away between the two.
			sent := kmsapi.CreateKey{Type: kmsapi.TypeKey, Name: "sent"}
			if err := a.Seal(t.Context(), []byte("0123456789abcdef"), &sent); err != nil {
				t.Fatal(err)
			}
			stopOther()
			act(t, b, imported(t, b, sent), "wrap", kmsapi.WrapRequest{})
		})
	}
}

func imported(t *testing.T, c *kmsclient.Client, k kmsapi.CreateKey) (id string) {
	t.Helper()
	var made kmsapi.Keys
	if err := c.Do(t.Context(), http.MethodPost, "/api/v2/keys", kmsapi.Collection[kmsapi.CreateKey]{Metadata: kmsapi.Metadata{CollectionType: kmsapi.TypeKey, CollectionTotal: 1},
		Resources: []kmsapi.CreateKey{k}}, &made); err != nil {
		t.Fatal(err)
	}
	return made.Resources[0].ID
}

func act(t *testing.T, c *kmsclient.Client, id, verb string, in any) (out kmsapi.ActionAnswer) {
	t.Helper()
	if err := c.Do(t.Context(), http.MethodPost, "/api/v2/keys/"+id+"/actions/"+verb, in, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestAnImportTokenOutlivesARestart: material that was sealed before the server
// and its connector ended comes in after both were started again.
func TestAnImportTokenOutlivesARestart(t *testing.T) {
	data := t.TempDir()
	r := serve(t, data)
	var o struct{ InstanceID string }
	r.run(t, &o, "onboard", "orders")
	var crew struct{ ServiceID, APIKey string }
	r.run(t, &crew, "onboard", "brings", "--instance", o.InstanceID, "--role", "Manager")
	r.run(t, nil, "iam", "policies", "create", "--service-id", crew.ServiceID, "--instance", o.InstanceID, "--role", "Manager")
	client := func(r *running) *kmsclient.Client {
		k, err := kmsclient.New(kmsclient.Config{Server: r.url, CAFile: filepath.Join(data, "tls", "ca.pem"), APIKey: []byte(crew.APIKey)})
		if err != nil {
			t.Fatal(err)
		}
		k.SetInstance(o.InstanceID)
		return k
	}
	material := []byte("0123456789abcdef0123456789abcdef")
	sent := kmsapi.CreateKey{Type: kmsapi.TypeKey, Name: "sent"}
	if err := client(r).Seal(t.Context(), material, &sent); err != nil {
		t.Fatal(err)
	}
	r.stop()
	c := client(serve(t, data))
	wrapped := act(t, c, imported(t, c, sent), "wrap", kmsapi.WrapRequest{})
	twin := imported(t, c, kmsapi.CreateKey{Type: kmsapi.TypeKey, Name: "in the clear", Payload: base64.StdEncoding.EncodeToString(material)})
	if got := act(t, c, twin, "unwrap", kmsapi.UnwrapRequest{Ciphertext: wrapped.Ciphertext}); got.Plaintext != wrapped.Plaintext {
		t.Error("another material came in")
	}
}
