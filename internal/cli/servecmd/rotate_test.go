package servecmd_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// TestMasterKeysOfTwoReplicas: each replica has a connector of its own. The
// master keys change thrice, and then the old ones go, while both make
// and use keys: no call is refused, and each opens what the other wrapped.
func TestMasterKeysOfTwoReplicas(t *testing.T) {
	c := newCluster(t)
	c.storage(t)
	other := *c
	other.socket = filepath.Join(c.dir, "other.sock")
	admin := c.file("admin.json")
	key, hash := adminKey(t)
	if err := os.WriteFile(admin, []byte(hash), 0o600); err != nil {
		t.Fatal(err)
	}
	c.connector(t, "a-phrase")
	a := c.api(t, "--admin-key-hash-file", admin)
	h := a.client(t)
	ready := func(r *running) func() bool {
		return func() bool {
			res, err := h.Get(r.url + "/readyz")
			if err != nil {
				return false
			}
			res.Body.Close()
			return res.StatusCode == 200
		}
	}
	await(t, "readiness", ready(a))
	other.connector(t, "a-phrase") // the token is there
	b := other.api(t, "--admin-key-hash-file", admin, "--audit-dir", c.file("audit-b"), "--name", "b")
	await(t, "readiness", ready(b))
	root := login(t, h, a.url, key)
	var in kmsapi.Instance
	do := func(r *running, method, path string, body, out any) error {
		raw, err := json.Marshal(body)
		if err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(t.Context(), method, r.url+path, bytes.NewReader(raw))
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+root)
		req.Header.Set("Bluemix-Instance", in.ID)
		res, err := h.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode >= 300 {
			var text bytes.Buffer
			_, _ = text.ReadFrom(res.Body)
			return fmt.Errorf("%s %s: %d %s", method, path, res.StatusCode, &text)
		}
		return json.NewDecoder(res.Body).Decode(out)
	}
	if err := do(a, "POST", "/kmsctl/v1/instances", kmsapi.CreateInstance{Name: "shop"}, &in); err != nil {
		t.Fatal(err)
	}
	type wrapped struct{ id, plain, cipher string }
	open := func(r *running, w wrapped) error {
		var out kmsapi.ActionAnswer
		err := do(r, "POST", "/api/v2/keys/"+w.id+"/actions/unwrap", kmsapi.UnwrapRequest{Ciphertext: w.cipher}, &out)
		if err == nil && out.Plaintext != w.plain {
			err = fmt.Errorf("key %s: another plaintext", w.id)
		}
		return err
	}
	// use makes a key, wraps, and has the other replica unwrap.
	use := func(by, opens *running) (w wrapped, err error) {
		var made kmsapi.Keys
		if err := do(by, "POST", "/api/v2/keys", kmsapi.Collection[kmsapi.CreateKey]{Metadata: kmsapi.Metadata{CollectionType: kmsapi.TypeKey, CollectionTotal: 1},
			Resources: []kmsapi.CreateKey{{Type: kmsapi.TypeKey, Name: "rotated under"}}}, &made); err != nil {
			return w, err
		}
		w.id = made.Resources[0].ID
		var sealed kmsapi.ActionAnswer
		if err := do(by, "POST", "/api/v2/keys/"+w.id+"/actions/wrap", kmsapi.WrapRequest{}, &sealed); err != nil {
			return w, err
		}
		w.plain, w.cipher = sealed.Plaintext, sealed.Ciphertext
		return w, open(opens, w)
	}
	var mu sync.Mutex
	var all []wrapped
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		by, opens := a, b
		if i%2 == 1 {
			by, opens = b, a
		}
		wg.Go(func() {
			for made := 0; ; made++ {
				w, err := use(by, opens)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				all = append(all, w)
				mu.Unlock()
				for made >= 50 && err == nil && t.Context().Err() == nil { // enough; only use it
					select {
					case <-stop:
						return
					default:
						err = open(opens, w)
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	var s kmsapi.MasterStatus
	for i, r := range []*running{b, a, b} {
		if err := do(r, "POST", "/kmsctl/v1/master/rotate", kmsapi.MasterRotationRequest{DestroyOld: i == 2}, &s); err != nil {
			t.Fatal(err)
		}
		await(t, "the end of the rotation", func() bool {
			s = kmsapi.MasterStatus{}
			return do(a, "GET", "/kmsctl/v1/master", nil, &s) == nil && s.Rotation.State == kmsapi.RotationDone
		})
	}
	close(stop)
	wg.Wait()
	if s.Version != 4 || len(s.Older) > 0 {
		t.Errorf("%+v", s)
	}
	for _, w := range all {
		for _, r := range []*running{a, b} {
			if err := open(r, w); err != nil {
				t.Error(err)
			}
		}
	}
	t.Logf("%d keys made and opened by two replicas while the master keys came to version %d", len(all), s.Version)
}

// TestWaitingOutlivesARestart: who waits for a change of the master keys waits
// on while the API has no HSM, and gets the answer when it is there.
func TestWaitingOutlivesARestart(t *testing.T) {
	c := newCluster(t)
	c.storage(t)
	admin, keyFile := c.file("admin.json"), c.file("admin.key")
	key, hash := adminKey(t)
	for file, text := range map[string]string{admin: hash, keyFile: key} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a := c.api(t, "--admin-key-hash-file", admin) // answers 503: there is no connector
	waits := &buffer{}
	status := func(more ...string) (int, string) {
		return kmsctl(t, t.Context(), waits, append([]string{"hsm", "rotate-master", "status", "--server", a.url, "--ca-file", c.file("ca.pem"), "--api-key-file", keyFile}, more...)...)
	}
	if code, _ := status(); code != 8 || !strings.Contains(waits.String(), "503") {
		t.Errorf("without --wait: %d\n%s", code, waits)
	}
	if code, _ := status("--wait", "--timeout", "1ms"); code != 7 {
		t.Errorf("for a moment: %d\n%s", code, waits)
	}
	type ended struct {
		code int
		out  string
	}
	done := make(chan ended, 1)
	before := strings.Count(waits.String(), "waits")
	go func() {
		code, out := status("--wait")
		done <- ended{code, out}
	}()
	await(t, "somebody waits", func() bool { return strings.Count(waits.String(), "waits") > before })
	c.connector(t, "a-phrase")
	if e := <-done; e.code != 0 || !strings.Contains(e.out, "none yet") {
		t.Errorf("%+v\n%s", e, waits)
	}
}
