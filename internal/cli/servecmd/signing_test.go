package servecmd_test

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// TestSigningKeyOfTwoReplicas: the key that signs access tokens is rotated by
// itself while tokens are used, each time by one replica, which writes it down.
func TestSigningKeyOfTwoReplicas(t *testing.T) {
	c := newCluster(t)
	c.storage(t)
	c.connector(t, "a-phrase")
	key, admin := c.admin(t)
	flags := []string{"--admin-key-hash-file", admin, "--signing-key-period", "1s", "--window", "expiry=1s"}
	a := c.api(t, flags...)
	b := c.api(t, append(flags, "--audit-dir", c.file("audit-b"), "--name", "b")...)
	h := a.client(t)
	awaitReady(t, h, a, b)
	root := login(t, h, a.url, key)
	var all kmsapi.SigningKeys
	await(t, "four rotations", func() bool {
		req, err := http.NewRequestWithContext(t.Context(), "GET", b.url+"/kmsctl/v1/iam/signing-keys", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+root) // signed by the first of them
		res, err := h.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if res.StatusCode == http.StatusServiceUnavailable {
			return false // a busy machine: its view of the store is too old for now
		}
		all = kmsapi.SigningKeys{}
		if err := json.NewDecoder(res.Body).Decode(&all); err != nil || res.StatusCode != 200 {
			t.Fatal(res.StatusCode, err)
		}
		return len(all.SigningKeys) > 4
	})
	a.stop()
	b.stop()
	made := map[string]int{}
	for _, dir := range []string{"audit", "audit-b"} {
		files, err := filepath.Glob(filepath.Join(c.file(dir), "*"))
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(text)) {
				var l struct {
					Event struct{ Action, Principal, Outcome, Key string }
				}
				if json.Unmarshal([]byte(line), &l) == nil && l.Event.Action == "iam.signing-keys.rotate" {
					if l.Event.Principal != "life-cycle" || l.Event.Outcome != "success" {
						t.Errorf("%s", line)
					}
					made[l.Event.Key]++
				}
			}
		}
	}
	signs := 0
	for _, k := range all.SigningKeys {
		if k.Signs {
			signs++
		}
		if first := k.CreatedBy == ""; made[k.ID] != 1 && !first || first && made[k.ID] != 0 {
			t.Errorf("key %s stands %d times in the audit logs", k.ID, made[k.ID])
		}
	}
	if signs != 1 {
		t.Errorf("%d keys sign", signs)
	}
}
