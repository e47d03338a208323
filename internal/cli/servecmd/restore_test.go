package servecmd_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/backup"
	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/seal"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/store"
)

// freshStorage is the same HSM with a store that has nothing.
func (c *cluster) freshStorage(t *testing.T) *cluster {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := *c
	n.etcd = l.Addr().String()
	l.Close()
	background(t, &buffer{}, "run", "storage", "--data-dir", t.TempDir(), "--listen-client", "https://"+n.etcd, "--advertise-host", "127.0.0.1",
		"--cert-file", c.file("etcd.pem"), "--key-file", c.file("etcd-key.pem"), "--ca-file", c.file("ca.pem"))
	return &n
}

// behind are the flags of what stands behind the API.
func (c *cluster) behind() []string {
	return []string{"--connector-socket", c.socket, "--etcd-endpoints", "https://" + c.etcd, "--etcd-ca-file", c.file("ca.pem"), "--etcd-cert-file", c.file("client.pem"), "--etcd-key-file", c.file("client-key.pem")}
}

// restore runs `run restore` over a backup in clear text, as it runs in a pod.
func (c *cluster) restore(t *testing.T, clearText []byte, flags ...string) (code int, out map[string]any, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	a := app.New("test")
	a.In, a.Out, a.Err, a.Getenv = bytes.NewReader(clearText), &o, &e, programsOf(t, nil)
	spool := t.TempDir()
	code = cli.Main(t.Context(), programs, a, append(append([]string{"run", "restore", "-o", "json", "--audit-dir", spool}, c.behind()...), flags...))
	if left, err := os.ReadDir(spool); err != nil || len(left) > 0 {
		t.Errorf("it left %v %v", left, err)
	}
	if code == 0 {
		if err := json.Unmarshal(o.Bytes(), &out); err != nil {
			t.Fatal(err)
		}
	}
	return code, out, e.String()
}

// store is a client of the cluster's etcd, and what is in it of installations
// and records.
func (c *cluster) store(t *testing.T) (to *store.Restorer, records func() map[string]string) {
	t.Helper()
	client, err := store.Dial(t.Context(), store.Remote{Endpoints: []string{"https://" + c.etcd}, CAFile: c.file("ca.pem"), CertFile: c.file("client.pem"), KeyFile: c.file("client-key.pem")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	to = store.NewRestorer(client)
	return to, func() map[string]string {
		all := map[string]string{}
		in, _, err := to.Present(t.Context(), func(r record.Raw) error {
			if !strings.HasPrefix(r.Path, "audit/") && !strings.HasPrefix(r.Path, record.RestoredDir) { // an API writes and takes them by itself
				all[r.Path] = string(r.Value)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		all["(installation)"] = string(in)
		return all
	}
}

// replica is an API, and somebody who asks it.
type replica struct {
	*running
	t     *testing.T
	h     *http.Client
	token string
}

func (r *replica) do(method, path, instance, body string) (status int, reply map[string]any, text string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.url+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+r.token)
	req.Header.Set("Bluemix-Instance", instance)
	res, err := r.h.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	_ = json.Unmarshal(b, &reply) // not every body is JSON
	return res.StatusCode, reply, string(b)
}

// awaitReady waits until a replica has opened for the nth time, which it tells
// once it lets calls in: before that it may still answer from the time before
// it was closed.
func (r *replica) awaitReady(nth int) {
	r.t.Helper()
	await(r.t, "readiness", func() bool {
		if strings.Count(r.log.String(), `"msg":"ready"`) < nth {
			return false
		}
		s, _, _ := r.do("GET", "/readyz", "", "")
		return s == 200
	})
}

// awaitClosed waits until a replica refuses everything, and says why.
func (r *replica) awaitClosed() {
	r.t.Helper()
	for _, path := range []string{"/readyz", "/api/v2/keys"} {
		await(r.t, path+" answers 503 and says why", func() bool {
			s, _, text := r.do("GET", path, "", "")
			return s == 503 && strings.Contains(text, "restore")
		})
	}
}

// open starts an API and waits until it is ready.
func (c *cluster) open(t *testing.T, key, hash string, flags ...string) *replica {
	t.Helper()
	if err := os.WriteFile(c.file("admin.json"), []byte(hash), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &replica{running: c.api(t, append([]string{"--admin-key-hash-file", c.file("admin.json")}, flags...)...), t: t}
	r.h = r.client(t)
	r.awaitReady(1)
	r.token = login(t, r.h, r.url, key)
	return r
}

// onboarded is a service with a key, and something that the key wrapped.
type onboarded struct {
	InstanceID, APIKey, KeyID, ServiceID, PolicyID string
	dek, ciphertext                                string
}

func (r *replica) onboard(name string) (o onboarded) {
	r.t.Helper()
	s, _, text := r.do("POST", "/kmsctl/v1/onboard", "", `{"name":"`+name+`"}`)
	if err := json.Unmarshal([]byte(text), &o); s != 201 || err != nil {
		r.t.Fatal(s, text, err)
	}
	s, reply, text := r.do("POST", "/api/v2/keys/"+o.KeyID+"/actions/wrap", o.InstanceID, "")
	if s != 200 {
		r.t.Fatal(s, text)
	}
	o.dek, o.ciphertext = reply["plaintext"].(string), reply["ciphertext"].(string)
	return o
}

func (r *replica) unwraps(o onboarded) {
	r.t.Helper()
	s, reply, text := r.do("POST", "/api/v2/keys/"+o.KeyID+"/actions/unwrap", o.InstanceID, `{"ciphertext":"`+o.ciphertext+`"}`)
	if s != 200 || reply["plaintext"] != o.dek {
		r.t.Errorf("unwrap: %d %s", s, text)
	}
}

// backup gives a backup in clear text.
func (c *cluster) backup(t *testing.T, r *replica, key string) []byte {
	t.Helper()
	pass, file := c.file("pass"), c.file("copy.age")
	for path, text := range map[string]string{pass: "a long pass phrase", c.file("admin.key"): key} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	errs := &buffer{}
	if code, _ := kmsctl(t, t.Context(), errs, "backup", "--server", r.url, "--ca-file", c.file("ca.pem"), "--api-key-file", c.file("admin.key"), "--output-file", file, "--backup-passphrase-file", pass); code != 0 {
		t.Fatal(errs)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	in, err := seal.NewReader(f, nil, secret.New([]byte("a long pass phrase")))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(in)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRestoreUnderRunningReplicas: a restore closes every replica from its
// begin to its end, also when it is killed; it can be gone on with or undone;
// what was revoked since does not come back in passing.
func TestRestoreUnderRunningReplicas(t *testing.T) {
	c := newCluster(t)
	c.storage(t)
	c.connector(t, "a-phrase")
	key, hash := adminKey(t)
	replicas := []*replica{c.open(t, key, hash), c.open(t, key, hash, "--audit-dir", c.file("audit-b"))}
	a := replicas[0]
	orders := a.onboard("orders")
	copied := c.backup(t, a, key)
	if s, _, text := a.do("DELETE", "/kmsctl/v1/iam/policies/"+orders.ServiceID+"/"+orders.PolicyID, "", ""); s != 204 {
		t.Fatal(s, text)
	}
	later := a.onboard("later")
	to, records := c.store(t)
	before := records()
	same := func(when string, openings int) {
		t.Helper()
		for _, r := range replicas {
			r.awaitReady(openings)
			r.unwraps(orders)
			r.unwraps(later)
		}
		for path, v := range before {
			if now := records()[path]; now != v {
				t.Errorf("%s: %s is not what it was", when, path)
			}
		}
		if len(records()) != len(before) {
			t.Errorf("%s: %d records, were %d", when, len(records()), len(before))
		}
	}

	code, _, errs := c.restore(t, copied)
	if code != 9 || !strings.Contains(errs, "iam/policies/") || !strings.Contains(errs, "--revive") {
		t.Fatalf("nobody was asked: %d %s", code, errs)
	}
	same("refused", 2)

	begin := func(choice backup.Choice) {
		t.Helper()
		r, err := backup.NewReader(bytes.NewReader(copied))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := backup.Begin(t.Context(), r, to, choice); err != nil {
			t.Fatal(err)
		}
	}
	begin(backup.Revive) // and killed
	late := &replica{running: c.api(t, "--audit-dir", c.file("audit-c")), t: t}
	late.h = late.client(t)
	for _, r := range append(replicas, late) {
		r.awaitClosed()
	}
	if now := records(); now["(installation)"] != "" {
		t.Error("a replica made an installation meanwhile")
	}
	code, out, errs := c.restore(t, nil, "--undo")
	if code != 0 || out["undone"] != true {
		t.Fatalf("undo: %d %v %s", code, out, errs)
	}
	late.awaitReady(1)
	same("undone", 3)
	if code, out, errs := c.restore(t, nil, "--undo"); code != 0 || out["undone"] != false {
		t.Errorf("undo again: %d %v %s", code, out, errs)
	}

	begin(backup.Ask)
	code, out, errs = c.restore(t, copied, "--revive", "--by", "kubernetes:me")
	if code != 0 || out["goneOn"] != true || len(out["revived"].([]any)) != 1 {
		t.Fatalf("gone on: %d %v %s", code, out, errs)
	}
	for _, r := range replicas {
		r.awaitReady(4)
		r.unwraps(orders)
		r.unwraps(later)
		service := *r
		service.token = login(t, r.h, r.url, orders.APIKey)
		service.unwraps(orders)
	}
	// One replica at least wrote it down, and none that was undone.
	logs := ""
	for _, dir := range []string{c.file("audit"), c.file("audit-b"), c.file("audit-c")} {
		b, err := os.ReadFile(dir + "/audit.log")
		if err != nil {
			t.Fatal(err)
		}
		logs += string(b)
	}
	if n := strings.Count(logs, `"action":"kmsctl.restore",`); n < 1 || n > 3 || strings.Count(logs, `"action":"kmsctl.restore.revive",`) != n || !strings.Contains(logs, `"principal":"kubernetes:me"`) {
		t.Errorf("%d lines of a restore", n)
	}
}

// TestRemovedThroughAnotherReplica: each API's log tells what was removed
// through it, and a restore in a pod is told by those that are elsewhere.
func TestRemovedThroughAnotherReplica(t *testing.T) {
	c := newCluster(t)
	c.storage(t)
	c.connector(t, "a-phrase")
	key, hash := adminKey(t)
	r := c.open(t, key, hash)
	orders := r.onboard("orders")
	copied := c.backup(t, r, key)
	h, err := backup.NewReader(bytes.NewReader(copied))
	if err != nil {
		t.Fatal(err)
	}
	if s, _, text := r.do("DELETE", "/kmsctl/v1/iam/policies/"+orders.ServiceID+"/"+orders.PolicyID, "", ""); s != 204 {
		t.Fatal(s, text)
	}
	r.stop()
	tell := func(since time.Time) map[string]any {
		t.Helper()
		var o, e bytes.Buffer
		a := app.New("test")
		a.Out, a.Err, a.Getenv = &o, &e, programsOf(t, nil)
		if code := cli.Main(t.Context(), programs, a, append([]string{"run", "restore", "-o", "json", "--audit-dir", c.file("audit"), "--removed-since", since.Format(time.RFC3339Nano)}, c.behind()...)); code != 0 {
			t.Fatal(e.String())
		}
		var out struct{ Removed map[string]any }
		if err := json.Unmarshal(o.Bytes(), &out); err != nil {
			t.Fatal(err)
		}
		return out.Removed
	}
	if got := tell(time.Now()); len(got) != 0 {
		t.Errorf("%v", got)
	}
	got := tell(h.Header.CreatedAt)
	if why, _ := got[orders.PolicyID].(string); len(got) != 1 || !strings.Contains(why, "iam.policies.delete") {
		t.Fatalf("%v", got)
	}
	told, err := json.Marshal(map[string]any{"removed": got})
	if err != nil {
		t.Fatal(err)
	}
	fresh := c.freshStorage(t)
	if code, _, errs := fresh.restore(t, append(append(told, '\n'), copied...)); code != 9 || !strings.Contains(errs, orders.PolicyID) {
		t.Errorf("nobody was asked: %d %s", code, errs)
	}
	if code, out, errs := fresh.restore(t, append(append(told, '\n'), copied...), "--leave-out"); code != 0 || len(out["leftOut"].([]any)) != 1 {
		t.Errorf("%d %v %s", code, out, errs)
	}
}

// TestRestoreIntoANewInstallation: of the same HSM. One that nobody has used
// is replaced, and its administrator stays; a used one goes on as it was, with
// its own master keys; so does one that the backup turns out not to fit.
func TestRestoreIntoANewInstallation(t *testing.T) {
	c := newCluster(t)
	c.storage(t)
	c.connector(t, "a-phrase")
	oldKey, hash := adminKey(t)
	old := c.open(t, oldKey, hash)
	orders := old.onboard("orders")
	copied := c.backup(t, old, oldKey)
	old.stop()

	used := c.freshStorage(t)
	key, hash := adminKey(t)
	r := used.open(t, key, hash, "--audit-dir", c.file("audit-used"))
	own := r.onboard("own")
	_, records := used.store(t)
	before := records()["(installation)"]
	if code, _, errs := used.restore(t, copied, "--leave-out"); code != 9 || !strings.Contains(errs, "another installation") || !strings.Contains(errs, "hsm clear") {
		t.Errorf("a used installation: %d %s", code, errs)
	}
	r.awaitReady(2)
	r.unwraps(own)
	if now := records(); now["(installation)"] != before || now["instances/"+orders.InstanceID] != "" {
		t.Errorf("%v", now)
	}
	r.stop()

	fresh := c.freshStorage(t)
	r = fresh.open(t, key, hash, "--audit-dir", c.file("audit-fresh"))
	_, records = fresh.store(t)
	before = records()["(installation)"]
	broken := copied[:len(copied)-20]
	if code, _, errs := fresh.restore(t, broken); code != 6 || records()["(installation)"] != before {
		t.Errorf("cut off: %d %s", code, errs)
	}
	code, out, errs := fresh.restore(t, copied)
	if code != 0 || out["replaced"] == nil || len(out["revived"].([]any)) != 0 {
		t.Fatalf("%d %v %s", code, out, errs)
	}
	r.awaitReady(2)
	for _, k := range []string{oldKey, key} {
		r.token = login(t, r.h, r.url, k)
		r.unwraps(orders)
	}
}

// TestRestoreWithAnotherHSM: nothing is written.
func TestRestoreWithAnotherHSM(t *testing.T) {
	c := newCluster(t)
	c.storage(t)
	c.connector(t, "a-phrase")
	key, hash := adminKey(t)
	r := c.open(t, key, hash)
	r.onboard("orders")
	copied := c.backup(t, r, key)
	r.stop()
	other := newCluster(t)
	other.storage(t)
	other.connector(t, "a-phrase")
	code, _, errs := other.restore(t, copied)
	if code != 6 || !strings.Contains(errs, "belongs to the token") {
		t.Errorf("%d %s", code, errs)
	}
	if _, records := other.store(t); len(records()) != 1 || records()["(installation)"] != "" {
		t.Errorf("it wrote: %v", records())
	}
	// An encrypted backup is not for the pod.
	sealed, err := os.ReadFile(c.file("copy.age"))
	if err != nil {
		t.Fatal(err)
	}
	if code, _, errs := c.restore(t, sealed); code != 2 || !strings.Contains(errs, "the backup is encrypted") {
		t.Errorf("%d %s", code, errs)
	}
}
