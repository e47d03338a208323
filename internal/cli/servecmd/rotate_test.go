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

// replicas are two of the API over one store, each with connectors of its own,
// and what an administrator does by them.
type replicas struct {
	t    *testing.T
	a, b *running
	h    *http.Client
	root string
	in   kmsapi.Instance
}

// stop ends both while the store is there.
func (r *replicas) stop() {
	r.a.stop()
	r.b.stop()
}

// newReplicas starts them; aside runs further connectors beside each, and gives
// their flags for the API.
func newReplicas(t *testing.T, aside func(c *cluster) []string, flags ...string) (*replicas, *cluster) {
	t.Helper()
	c := newCluster(t)
	c.storage(t)
	other := *c
	other.socket = filepath.Join(c.dir, "other.sock")
	key, admin := c.admin(t)
	c.connector(t, "a-phrase", flags...)
	r := &replicas{t: t, a: c.api(t, append(aside(c), "--admin-key-hash-file", admin)...)}
	r.h = r.a.client(t)
	r.ready(r.a)
	other.connector(t, "a-phrase", flags...) // the token is there
	r.b = other.api(t, append(aside(&other), "--admin-key-hash-file", admin, "--audit-dir", c.file("audit-b"), "--name", "b")...)
	r.ready(r.b)
	r.root = login(t, r.h, r.a.url, key)
	if err := r.do(r.a, "POST", "/kmsctl/v1/instances", kmsapi.CreateInstance{Name: "shop"}, &r.in); err != nil {
		t.Fatal(err)
	}
	return r, c
}

func (r *replicas) ready(one *running) {
	r.t.Helper()
	awaitReady(r.t, r.h, one)
}

func (r *replicas) do(by *running, method, path string, body, out any) error {
	raw, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(r.t.Context(), method, by.url+path, bytes.NewReader(raw))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+r.root)
	req.Header.Set("Bluemix-Instance", r.in.ID)
	res, err := r.h.Do(req)
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

type wrapped struct{ id, plain, cipher string }

// open unwraps what either wrapped.
func (r *replicas) open(by *running, w wrapped) error {
	var out kmsapi.ActionAnswer
	err := r.do(by, "POST", "/api/v2/keys/"+w.id+"/actions/unwrap", kmsapi.UnwrapRequest{Ciphertext: w.cipher}, &out)
	if err == nil && out.Plaintext != w.plain {
		err = fmt.Errorf("key %s: another plaintext", w.id)
	}
	return err
}

// use makes a key, wraps, and has the other replica unwrap.
func (r *replicas) use(by, opens *running) (w wrapped, err error) {
	var made kmsapi.Keys
	if err := r.do(by, "POST", "/api/v2/keys", kmsapi.Collection[kmsapi.CreateKey]{Metadata: kmsapi.Metadata{CollectionType: kmsapi.TypeKey, CollectionTotal: 1},
		Resources: []kmsapi.CreateKey{{Type: kmsapi.TypeKey, Name: "rotated under"}}}, &made); err != nil {
		return w, err
	}
	w.id = made.Resources[0].ID
	var sealed kmsapi.ActionAnswer
	if err := r.do(by, "POST", "/api/v2/keys/"+w.id+"/actions/wrap", kmsapi.WrapRequest{}, &sealed); err != nil {
		return w, err
	}
	w.plain, w.cipher = sealed.Plaintext, sealed.Ciphertext
	return w, r.open(opens, w)
}

// busy makes some keys, and uses them by both, until stop gives what was made.
func (r *replicas) busy(some int) (stop func() []wrapped) {
	var mu sync.Mutex
	var all []wrapped
	over := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		by, opens := r.a, r.b
		if i%2 == 1 {
			by, opens = r.b, r.a
		}
		wg.Go(func() {
			for made := 0; ; made++ {
				w, err := r.use(by, opens)
				if err != nil {
					r.t.Error(err)
					return
				}
				mu.Lock()
				all = append(all, w)
				mu.Unlock()
				for made >= some && err == nil && r.t.Context().Err() == nil { // enough; only use it
					select {
					case <-over:
						return
					default:
						err = r.open(opens, w)
					}
				}
				if err != nil {
					r.t.Error(err)
					return
				}
				select {
				case <-over:
					return
				default:
				}
			}
		})
	}
	return func() []wrapped { close(over); wg.Wait(); return all }
}

// done waits for the end of a change of the master keys, as one replica sees it.
func (r *replicas) done(by *running) (s kmsapi.MasterStatus) {
	r.t.Helper()
	await(r.t, "the end of the change", func() bool {
		s = kmsapi.MasterStatus{}
		return r.do(by, "GET", "/kmsctl/v1/master", nil, &s) == nil && s.Rotation.State == kmsapi.RotationDone
	})
	return s
}

// TestMasterKeysOfTwoReplicas: the master keys change thrice, and then the old
// ones go, while both replicas make and use keys: no call is refused, and each
// opens what the other wrapped.
func TestMasterKeysOfTwoReplicas(t *testing.T) {
	r, _ := newReplicas(t, func(*cluster) []string { return nil })
	defer r.stop()
	end := r.busy(50)
	var s kmsapi.MasterStatus
	for i, by := range []*running{r.b, r.a, r.b} {
		if err := r.do(by, "POST", "/kmsctl/v1/master/rotate", kmsapi.MasterRotationRequest{DestroyOld: i == 2}, &s); err != nil {
			t.Fatal(err)
		}
		s = r.done(r.a)
	}
	all := end()
	if s.Version != 4 || len(s.Older) > 0 {
		t.Errorf("%+v", s)
	}
	for _, w := range all {
		for _, by := range []*running{r.a, r.b} {
			if err := r.open(by, w); err != nil {
				t.Error(err)
			}
		}
	}
	t.Logf("%d keys made and opened by two replicas while the master keys came to version %d", len(all), s.Version)
}

// besideNext runs the connector of a second token beside a replica.
func besideNext(t *testing.T) func(c *cluster) []string {
	t.Helper()
	return func(c *cluster) []string {
		next := *c
		next.socket, next.pin = c.socket+".next", c.pin+".next"
		next.connector(t, "another-phrase", "--token-label", "next")
		return []string{"--to-socket", next.socket}
	}
}

// TestAMoveByTwoReplicas: all keys move to a second token while both make and
// use keys. Either says how far it is, no call is refused, and each opens what
// the other wrapped, also what the token holds that it did not know of yet.
func TestAMoveByTwoReplicas(t *testing.T) {
	r, c := newReplicas(t, besideNext(t), "--gives-keys")
	defer r.stop()
	end := r.busy(6)
	var s kmsapi.MasterStatus
	if err := r.do(r.b, "POST", "/kmsctl/v1/master/migrate", kmsapi.MigrationRequest{}, &s); err != nil {
		t.Fatal(err)
	}
	s = r.done(r.a)
	all := end()
	if s.Version != 2 || len(s.Older) > 0 || s.Rotation.To == nil || s.Rotation.To.Label != "next" || s.Token != s.Rotation.To.Serial {
		t.Errorf("%+v", s)
	}
	if again := r.done(r.b); again.Token != s.Token || again.Rotation.Done != s.Rotation.Done {
		t.Errorf("%+v and %+v", again, s)
	}
	// A replica of the new token alone, as after the move.
	alone := *c
	alone.socket = c.socket + ".next"
	n := alone.api(t, "--audit-dir", c.file("audit-c"), "--name", "c")
	r.ready(n)
	for _, w := range all {
		for i, by := range []*running{r.a, r.b, n} {
			if err := r.open(by, w); err != nil {
				t.Fatalf("replica %d: %v\n%s", i, err, by.log)
			}
		}
	}
	t.Logf("%d keys made and opened by two replicas while all moved", len(all))
}

// TestAMoveWhoseReplicaIsGone: the replica that works on a move ends, and the
// other goes on with it.
func TestAMoveWhoseReplicaIsGone(t *testing.T) {
	r, _ := newReplicas(t, besideNext(t), "--gives-keys")
	defer r.stop()
	var all []wrapped
	for range 16 {
		w, err := r.use(r.a, r.b)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, w)
	}
	var s kmsapi.MasterStatus
	if err := r.do(r.a, "POST", "/kmsctl/v1/master/migrate", kmsapi.MigrationRequest{}, &s); err != nil {
		t.Fatal(err)
	}
	r.a.stop()
	s = r.done(r.b)
	if s.Version != 2 || len(s.Older) > 0 || s.Token != s.Rotation.To.Serial {
		t.Errorf("%+v", s)
	}
	for _, w := range all {
		if err := r.open(r.b, w); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d records moved, the last by %s", s.Rotation.Done, s.Rotation.Worker)
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
