package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// kills is how often TestKilledUnderLoad kills; KMSCTL_KILLS sets it.
func kills(t *testing.T) int {
	t.Helper()
	s := os.Getenv("KMSCTL_KILLS")
	if s == "" {
		return 6
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// promised is what the server acknowledged of one key, and whether a call was
// on its way when the server was killed.
type promised struct {
	id        string
	wrapped   *kmsapi.ActionAnswer // by the first version; nil when the server died
	rotations int
	deleted   bool
	unsure    string // name of the call on its way
}

// worker calls one thing after the other, each on keys of its own.
type worker struct {
	c        *kmsclient.Client
	keys     []*promised
	services []string
	counts   map[string]int
}

// step makes one random call; an error is the server's death.
func (w *worker) step(ctx context.Context) error {
	switch n := rand.IntN(10); {
	case n < 3 || len(w.keys) == 0:
		k, err := w.c.CreateKey(ctx, kmsapi.CreateKey{Name: "killed under load"})
		if err != nil {
			return err
		}
		p := &promised{id: k.ID}
		w.keys = append(w.keys, p)
		w.counts["create"]++
		wrapped, err := w.c.Wrap(ctx, k.ID, kmsapi.WrapRequest{})
		if err != nil {
			return err
		}
		p.wrapped = &wrapped
	case n < 7:
		return w.onKey(ctx, "rotate", http.MethodPost, "/actions/rotate", func(p *promised) { p.rotations++ })
	case n < 8:
		return w.opens(ctx, w.keys[rand.IntN(len(w.keys))])
	case n < 9:
		return w.onKey(ctx, "delete", http.MethodDelete, "", func(p *promised) { p.deleted = true })
	default:
		name := fmt.Sprintf("svc-%d", rand.Uint64())
		if err := w.c.Do(ctx, http.MethodPost, "/kmsctl/v1/iam/service-ids", kmsapi.CreateServiceID{Name: name}, nil); err != nil {
			return err
		}
		p := kmsapi.CreatePolicy{ServiceID: name, Role: "Viewer", Instance: w.c.Instance()}
		if err := w.c.Do(ctx, http.MethodPost, "/kmsctl/v1/iam/policies", p, nil); err != nil {
			return err
		}
		w.services = append(w.services, name)
		w.counts["policy"]++
	}
	return nil
}

// opens fails when what a key wrapped first does not unwrap.
func (w *worker) opens(ctx context.Context, p *promised) error {
	if p.deleted || p.unsure != "" || p.wrapped == nil {
		return nil
	}
	got, err := w.c.Unwrap(ctx, p.id, kmsapi.UnwrapRequest{Ciphertext: p.wrapped.Ciphertext})
	if err == nil && got.Plaintext != p.wrapped.Plaintext {
		return &kmsclient.Error{Status: http.StatusOK, Message: "another plaintext"}
	}
	w.counts["unwrap"]++
	return err
}

func (w *worker) onKey(ctx context.Context, name, method, path string, acknowledged func(*promised)) error {
	p := w.keys[rand.IntN(len(w.keys))]
	if p.deleted || p.unsure != "" {
		return nil
	}
	p.unsure = name
	if err := w.c.Do(ctx, method, "/api/v2/keys/"+p.id+path, nil, nil); err != nil {
		return err
	}
	p.unsure = ""
	acknowledged(p)
	w.counts[name]++
	return nil
}

// check compares the server's state with what it promised.
func (w *worker) check(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	for _, p := range w.keys {
		var k kmsapi.Key
		err := patiently(func() (err error) { k, err = w.c.Key(ctx, p.id, true); return err })
		if err != nil {
			t.Errorf("key %s is lost: %v", p.id, err)
			continue
		}
		if deleted := k.State == 5; deleted != p.deleted && p.unsure != "delete" {
			t.Errorf("key %s: state %d, deleted %v was acknowledged", p.id, k.State, p.deleted)
		} else {
			p.deleted = deleted
		}
		var vs kmsapi.Collection[kmsapi.KeyVersion]
		if err := patiently(func() error {
			return w.c.Do(ctx, http.MethodGet, "/api/v2/keys/"+p.id+"/versions?allKeyStates=true&limit=5000", nil, &vs)
		}); err != nil {
			t.Error(err)
		}
		got := len(vs.Resources) - 1
		if got != p.rotations && (p.unsure != "rotate" || got != p.rotations+1) {
			t.Errorf("key %s: %d rotations, %d were acknowledged", p.id, got, p.rotations)
		}
		p.rotations, p.unsure = got, ""
		if err := patiently(func() error { return w.opens(ctx, p) }); err != nil {
			t.Errorf("key %s does not unwrap: %v", p.id, err)
		}
	}
	for _, name := range w.services {
		var ps kmsapi.Policies
		if err := patiently(func() error { return w.c.Do(ctx, http.MethodGet, "/kmsctl/v1/iam/policies/"+name, nil, &ps) }); err != nil || len(ps.Policies) != 1 {
			t.Errorf("policy of %s is lost: %v", name, err)
		}
	}
}

// served is a folder in which the KMS is served, by the real programs.
type served struct{ program, dir, data string }

func newServed(t *testing.T) served {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"sec.yaml": "apiVersion: v1\nkind: Secret\nmetadata: {name: hsm-secret, namespace: kube-system}\nstringData: {hsm-pass: a-phrase}\n",
		"val.yaml": "hsm: {hsm_model: softhsm}\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	program, err := filepath.Abs("../../bin/kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	return served{program, dir, filepath.Join(dir, "d")}
}

// start gives the server when it is ready.
func (s served) start(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(s.program, "serve", "--data", s.data, "--listen", "127.0.0.1:0", "--secret", filepath.Join(s.dir, "sec.yaml"), "--values", filepath.Join(s.dir, "val.yaml"), "--window", "rotate=0s")
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	go func() {
		var all strings.Builder
		sent := false
		for s := bufio.NewScanner(errs); s.Scan(); {
			if strings.HasPrefix(s.Text(), "ready") && !sent {
				ready <- ""
				sent = true
			}
			if !sent {
				all.WriteString(s.Text() + "\n")
			}
		}
		if !sent {
			ready <- all.String()
		}
	}()
	if why := <-ready; why != "" {
		t.Fatalf("it does not start again:\n%s", why)
	}
	return cmd
}

// client calls as the local administrator, on an instance where one is given.
func (s served) client(t *testing.T, instance string) *kmsclient.Client {
	t.Helper()
	c, err := kmsclient.New(kmsclient.Config{Socket: filepath.Join(s.data, "api.sock"), Instance: instance})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// rotated waits for the end of a change of the master keys. A server that is
// short of time, or of its connector, is unavailable for a while.
func rotated(t *testing.T, c *kmsclient.Client) kmsapi.MasterStatus {
	t.Helper()
	for { // go test's own limit is the last resort
		var s kmsapi.MasterStatus
		if err := patiently(func() error { return c.Do(t.Context(), http.MethodGet, "/kmsctl/v1/master", nil, &s) }); err != nil {
			t.Fatal(err)
		}
		if s.Rotation != nil && s.Rotation.State == kmsapi.RotationDone {
			return s
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func unavailable(err error) bool {
	var refused *kmsclient.Error
	return errors.As(err, &refused) && refused.Status == http.StatusServiceUnavailable
}

// patiently calls again while the server says that it is unavailable.
func patiently(f func() error) error {
	for {
		if err := f(); !unavailable(err) {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestKilledUnderLoad kills the KMS with SIGKILL again and again while it
// works and its master keys change, the old ones destroyed: no call is refused,
// whatever was acknowledged is there afterwards and opens, and the audit log
// is whole and has a line for each.
func TestKilledUnderLoad(t *testing.T) {
	k := newServed(t)
	cmd := k.start(t)
	admin := k.client(t, "")
	var in kmsapi.Instance
	if err := admin.Do(t.Context(), http.MethodPost, "/kmsctl/v1/instances", kmsapi.CreateInstance{Name: "shop"}, &in); err != nil {
		t.Fatal(err)
	}
	admin.SetInstance(in.ID)
	var workers []*worker
	for range 4 {
		workers = append(workers, &worker{c: k.client(t, in.ID), counts: map[string]int{}})
	}
	n := kills(t)
	for i := range n {
		if err := admin.Do(t.Context(), http.MethodPost, "/kmsctl/v1/master/rotate", kmsapi.MasterRotationRequest{DestroyOld: i >= n/2}, nil); err != nil {
			t.Error(err)
		}
		var wg sync.WaitGroup
		for _, w := range workers {
			wg.Go(func() {
				for {
					if err := w.step(t.Context()); err != nil {
						var refused *kmsclient.Error
						if errors.As(err, &refused) {
							t.Errorf("refused: %v", err)
						}
						return
					}
				}
			})
		}
		time.Sleep(time.Duration(50+rand.IntN(200)) * time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
		wg.Wait()
		cmd = k.start(t)
		for _, w := range workers {
			w.check(t)
		}
		if t.Failed() {
			break
		}
	}
	master := rotated(t, admin)
	if master.Version < 2 || len(master.Older) > 0 {
		t.Errorf("master keys: %+v", master)
	}
	for _, w := range workers {
		w.check(t)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("stopped: %v", err)
	}
	out, err := exec.Command(k.program, "audit", "verify", "--log", filepath.Join(k.data, "audit"), "-o", "json").CombinedOutput()
	if err != nil {
		t.Errorf("audit verify: %v\n%s", err, out)
	}
	total := map[string]int{}
	for _, w := range workers {
		for k, v := range w.counts {
			total[k] += v
		}
	}
	logged := map[string]int{}
	names, err := audit.Files(filepath.Join(k.data, "audit")) // the log is closed and begun anew when it is large
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			var e struct {
				Event *struct{ Action, Outcome string }
			}
			if json.Unmarshal([]byte(line), &e) == nil && e.Event != nil && e.Event.Outcome == "success" {
				logged[e.Event.Action]++
			}
		}
	}
	for name, action := range map[string]string{"create": "kms.secrets.create", "rotate": "kms.secrets.rotate", "delete": "kms.secrets.delete", "policy": "iam.policies.create"} {
		if logged[action] < total[name] {
			t.Errorf("%d acknowledged, %d lines of %s", total[name], logged[action], action)
		}
	}
	t.Logf("%d kills, master keys of version %d, %d files of the audit log; acknowledged and found again: %v", n, master.Version, len(names), total)
}

// connectorOf gives the process of the connector that a server started.
func connectorOf(t *testing.T, server int) int {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it ended meanwhile
		}
		var pid, parent int
		var comm, state string
		if _, err := fmt.Sscan(string(b), &pid, &comm, &state, &parent); err == nil && comm == "(kms-connector)" && parent == server && state != "Z" {
			return pid
		}
	}
	return 0
}

// TestConnectorKilledWhileMasterKeysChange: the connector alone is killed in
// the middle of changes of the master keys, while keys are made, some of which
// stay in the token. No call is refused but as unavailable; each change comes
// to its end, and every key that was acknowledged opens afterwards.
func TestConnectorKilledWhileMasterKeysChange(t *testing.T) {
	k := newServed(t)
	cmd := k.start(t)
	admin := k.client(t, "")
	var workers []*worker
	for _, placement := range []string{hsm.PlacementWrapped, hsm.PlacementToken} {
		var in kmsapi.Instance
		if err := admin.Do(t.Context(), http.MethodPost, "/kmsctl/v1/instances", kmsapi.CreateInstance{Name: placement, Placement: placement}, &in); err != nil {
			t.Fatal(err)
		}
		workers = append(workers, &worker{c: k.client(t, in.ID), counts: map[string]int{}})
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var refusals atomic.Int64
	for _, w := range workers {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := w.step(ctx); unavailable(err) {
					refusals.Add(1)
				} else if err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
			}
		})
	}
	n := max(kills(t)/6, 1)
	for i := range n {
		old := connectorOf(t, cmd.Process.Pid)
		if err := patiently(func() error {
			return admin.Do(t.Context(), http.MethodPost, "/kmsctl/v1/master/rotate", kmsapi.MasterRotationRequest{DestroyOld: true}, nil)
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond) // anywhere in the change
		if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if m := rotated(t, admin); int(m.Version) != i+2 || len(m.Older) > 0 {
			t.Errorf("change %d: %+v", i, m)
		}
		if now := connectorOf(t, cmd.Process.Pid); now == old || now == 0 {
			t.Errorf("connector %d, was %d", now, old)
		}
	}
	stop()
	wg.Wait()
	for _, w := range workers {
		w.check(t)
	}
	t.Logf("%d kills, %d calls were unavailable; wrapped: %v, in the token: %v", n, refusals.Load(), workers[0].counts, workers[1].counts)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("stopped: %v", err)
	}
}
