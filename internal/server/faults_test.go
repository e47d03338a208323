package server_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// faulty is the real store, whose writes can be made to fail or to wait.
type faulty struct {
	*store.Store
	write   atomic.Pointer[func(context.Context) error]
	commits atomic.Int64
}

func (f *faulty) Commit(ctx context.Context, changes ...record.Change) error {
	if before := f.write.Load(); before != nil {
		if err := (*before)(ctx); err != nil {
			return err
		}
	}
	err := f.Store.Commit(ctx, changes...)
	if err == nil {
		f.commits.Add(1)
	}
	return err
}

func (f *faulty) fail(write func(context.Context) error) {
	if write == nil {
		f.write.Store(nil)
		return
	}
	f.write.Store(&write)
}

// writes are calls that write, each with what it needs made beforehand. KEY,
// DELETED and OLD stand for keys: an active one, one that was just deleted,
// and one whose deletion can be purged.
var writes = []struct{ method, path, body string }{
	{"POST", "/api/v2/keys", createBody(`"name":"new"`)},
	{"POST", "/api/v2/keys", createBody(`"name":"new","extractable":true,"aliases":["NEW"]`)},
	{"POST", "/api/v2/keys_with_policy_overrides", createBody(`"name":"new"`)},
	{"POST", "/api/v2/keys/KEY/actions/rotate", ""},
	{"POST", "/api/v2/keys/KEY/actions/disable", ""},
	{"DELETE", "/api/v2/keys/KEY", ""},
	{"POST", "/api/v2/keys/DELETED/restore", ""},
	{"DELETE", "/api/v2/keys/OLD/purge", ""},
	{"PATCH", "/api/v2/keys/KEY", `{"keyRingID":"blue"}`},
	{"PUT", "/api/v2/keys/KEY/policies?policy=rotation", policyBody(`"rotation":{"interval_month":1}`)},
	{"POST", "/api/v2/keys/KEY/aliases/NEW", ""},
	{"POST", "/api/v2/keys/KEY/registrations/crn:v1:x", "{}"},
	{"POST", "/api/v2/key_rings/NEW", ""},
	{"POST", "/api/v2/import_token", "{}"},
	{"POST", "/kmsctl/v1/instances", `{"name":"NEW"}`},
	{"POST", "/kmsctl/v1/iam/service-ids", `{"name":"NEW"}`},
	{"POST", "/kmsctl/v1/iam/api-keys", `{"name":"NEW","serviceId":"crew"}`},
	{"POST", "/kmsctl/v1/iam/policies", `{"serviceId":"crew","role":"Viewer","instance":"INSTANCE"}`},
	{"DELETE", "/kmsctl/v1/iam/service-ids/crew", ""},
}

// TestWritesThatFail meets every kind of write with a store that is full, away
// or too slow: each is refused for a while, nothing of it is done, reads and
// the use of keys go on, and the same call passes when the fault is over.
func TestWritesThatFail(t *testing.T) {
	for name, write := range map[string]func(context.Context) error{
		"full": func(context.Context) error {
			return fault.Newf(fault.Unreachable, "write in the store", "x", "it is full")
		},
		"away": func(context.Context) error {
			return fault.Newf(fault.Unreachable, "write in the store", "x", "no answer")
		},
		"too slow": func(context.Context) error {
			return fault.New(fault.Unreachable, "write in the store", "x", context.DeadlineExceeded)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			root := w.root(t, "shop")
			purger := root.service(t, "purger", "KeyPurge", "", "")
			root.do(t, "POST", "/api/v2/key_rings/blue", "")
			root.service(t, "crew", "Reader", "", "")
			root.service(t, "bucket", "Writer", "", "")
			old := root.create(t, `"name":"old"`)
			root.do(t, "DELETE", "/api/v2/keys/"+old.ID, "")
			w.advance(4 * time.Hour)
			root.token, purger.token = w.login(t, w.admin), w.login(t, string(w.anotherKey(t, "purger")))
			bucket := client{w: w, token: w.login(t, string(w.anotherKey(t, "bucket"))), instance: root.instance}
			deleted := root.create(t, `"name":"deleted"`)
			root.do(t, "DELETE", "/api/v2/keys/"+deleted.ID, "")
			w.advance(time.Minute)
			for i, e := range writes {
				key := root.create(t, `"name":"root"`)
				fill := strings.NewReplacer("KEY", key.ID, "DELETED", deleted.ID, "OLD", old.ID, "INSTANCE", root.instance, "NEW", fmt.Sprint("new-", i))
				path, body, by := fill.Replace(e.path), fill.Replace(e.body), root
				switch {
				case strings.HasSuffix(path, "/purge"):
					by = purger
				case strings.Contains(path, "/registrations/"):
					by = bucket
				}
				before := root.do(t, "GET", "/api/v2/keys?state=1,2,3,5", "").body
				w.store.fail(write)
				r := by.do(t, e.method, path, body)
				if r.status != 503 || r.code() != kmsapi.Unavailable || r.header.Get("Retry-After") == "" {
					t.Errorf("%s %s: %d %s", e.method, e.path, r.status, r.body)
				}
				if e := w.audit.last(); e.Status != 503 || e.Outcome != "failure" {
					t.Errorf("audit: %+v", e)
				}
				if r := root.act(t, key.ID, "wrap", ""); r.status != 200 {
					t.Errorf("wrap meanwhile: %d %s", r.status, r.body)
				}
				if after := root.do(t, "GET", "/api/v2/keys?state=1,2,3,5", "").body; after != before {
					t.Errorf("%s %s left something:\n%s\n%s", e.method, e.path, before, after)
				}
				w.store.fail(nil)
				if r := by.do(t, e.method, path, body); r.status/100 != 2 {
					t.Errorf("%s %s when the fault is over: %d %s", e.method, e.path, r.status, r.body)
				}
			}
		})
	}
}

// TestASlowDiskHoldsUpWritesOnly: while a write waits for the disk, wrap and
// unwrap, lists and log-ins answer; the write is answered when it is done.
func TestASlowDiskHoldsUpWritesOnly(t *testing.T) {
	w := newWorldWith(t, server.Limits{Running: 4, Waiting: 4, Wait: time.Second})
	root := w.root(t, "shop")
	key := root.create(t, `"name":"root"`)
	waits, disk := make(chan struct{}), make(chan struct{})
	w.store.fail(func(context.Context) error { waits <- struct{}{}; <-disk; return nil })
	created := make(chan reply, 1)
	go func() { created <- root.do(t, "POST", "/api/v2/keys", createBody(`"name":"slow"`)) }()
	<-waits
	var a kmsapi.ActionAnswer
	r := root.act(t, key.ID, "wrap", "")
	if r.into(t, &a); r.status != 200 {
		t.Error(r)
	}
	if r := root.act(t, key.ID, "unwrap", `{"ciphertext":"`+a.Ciphertext+`"}`); r.status != 200 {
		t.Error(r)
	}
	if r := root.do(t, "GET", "/api/v2/keys", ""); r.status != 200 || strings.Contains(r.body, `"slow"`) {
		t.Error(r)
	}
	w.login(t, w.admin)
	select {
	case r := <-created:
		t.Errorf("answered before the disk had it: %+v", r)
	default:
	}
	w.store.fail(nil)
	close(disk)
	if r := <-created; r.status != 201 {
		t.Error(r)
	}
	if r := root.do(t, "GET", "/api/v2/keys", ""); !strings.Contains(r.body, `"slow"`) {
		t.Error(r)
	}
}

// TestTheClockJumps: a clock that is set forward or back lets no token live
// longer, gives no right, ends no window, lets nothing be destroyed, and locks
// nobody out for as long as it jumped.
func TestTheClockJumps(t *testing.T) {
	const year = 365 * 24 * time.Hour
	early, ahead := kmsapi.TooEarly, kmsapi.ClockAhead
	for _, c := range []struct {
		jump    time.Duration
		old     int    // status of a call with a token from before the jump
		enable  int    // at once
		purge   string // code of the refusal, of a key deleted just before
		expired int    // state of a key that was to expire in a day
	}{
		{0, 200, 409, early, 1},
		{5 * time.Second, 200, 409, early, 1},
		{-5 * time.Second, 200, 409, early, 1},
		{30 * time.Minute, 200, 204, early, 1}, // as much as is believed
		{2 * time.Hour, 401, 409, early, 1},
		{-2 * time.Hour, 401, 409, early, 1},
		{6 * 24 * time.Hour, 401, 409, ahead, 3},
		{-6 * 24 * time.Hour, 401, 409, early, 1},
		{year, 401, 409, ahead, 3},
		{-year, 401, 409, early, 1},
		{20 * year, 401, 409, ahead, 3},
		{-20 * year, 401, 409, early, 1},
	} {
		t.Run(c.jump.String(), func(t *testing.T) {
			w := newWorld(t)
			root := w.root(t, "shop")
			second := root.service(t, "second", "Manager", "", "")
			purger := root.service(t, "purger", "KeyPurge", "", "")
			var k [8]kmsapi.Key
			for i := range k {
				k[i] = root.create(t, `"name":"root"`)
			}
			k[5] = root.create(t, `"name":"root","expirationDate":"`+w.now().Add(24*time.Hour).Format(time.RFC3339)+`"`)
			root.act(t, k[0].ID, "rotate", "")
			root.act(t, k[1].ID, "disable", "")
			for _, d := range []kmsapi.Key{k[2], k[3], k[7]} {
				root.do(t, "DELETE", "/api/v2/keys/"+d.ID, "")
			}
			root.do(t, "PUT", "/api/v2/keys/"+k[4].ID+"/policies?policy=dualAuthDelete", policyBody(`"dualAuthDelete":{"enabled":true}`))
			if r := root.act(t, k[4].ID, "setKeyForDeletion", ""); r.status != 204 {
				t.Fatal(r)
			}
			check := func(what string, r reply, want int) {
				t.Helper()
				if r.status != want {
					t.Errorf("%s: %d %s, want %d", what, r.status, r.body, want)
				}
			}
			login := func() {
				root.token = w.login(t, w.admin)
				second.token, purger.token = w.login(t, string(w.anotherKey(t, "second"))), w.login(t, string(w.anotherKey(t, "purger")))
			}
			purge := func(id string) reply { return purger.do(t, "DELETE", "/api/v2/keys/"+id+"/purge", "") }
			sweep := func() {
				t.Helper()
				acts, err := w.kms.Sweep(t.Context())
				if err != nil || slices.ContainsFunc(acts, func(a kms.Swept) bool { return a.Key != "" }) {
					t.Errorf("swept %+v %v", acts, err)
				}
			}
			w.jump(c.jump)
			sweep()
			check("old token", root.do(t, "GET", "/api/v2/keys", ""), c.old)
			login()
			check("new token", root.do(t, "GET", "/api/v2/keys", ""), 200)
			check("wrap", root.act(t, k[6].ID, "wrap", ""), 200)
			check("rotate again", root.act(t, k[0].ID, "rotate", ""), 409)
			check("enable", root.act(t, k[1].ID, "enable", ""), c.enable)
			if r := purge(k[3].ID); r.status != 409 || r.code() != c.purge {
				t.Errorf("purge: %d %s, want %s", r.status, r.body, c.purge)
			}
			check("second authorization", second.do(t, "DELETE", "/api/v2/keys/"+k[4].ID, ""), 204)
			if got := root.do(t, "GET", "/api/v2/keys/"+k[5].ID+"/metadata", "").key(t).State; got != c.expired {
				t.Errorf("a key that ends in a day: state %d, want %d", got, c.expired)
			}
			// The windows end when their time has passed, wrong as the clock may be.
			w.advance(30 * time.Second)
			if c.enable == 409 {
				check("enable after its window", root.act(t, k[1].ID, "enable", ""), 204)
			}
			check("restore after its window", root.do(t, "POST", "/api/v2/keys/"+k[2].ID+"/restore", ""), 201)
			w.advance(4 * time.Hour)
			login()
			check("rotate after its window", root.act(t, k[0].ID, "rotate", ""), 204)
			check("purge after its window", purge(k[3].ID), 204)
			// Set right again, everything is as if nothing had been.
			w.jump(-c.jump)
			login()
			sweep()
			check("new token, set right", root.do(t, "GET", "/api/v2/keys", ""), 200)
			check("a rotation, set right", root.act(t, k[6].ID, "rotate", ""), 204)
			check("wrap, set right", root.act(t, k[6].ID, "wrap", ""), 200)
			check("purge, set right", purge(k[7].ID), 204)
			if got := root.do(t, "GET", "/api/v2/keys/"+k[5].ID+"/metadata", "").key(t).State; got != 1 {
				t.Errorf("set right, a key that ends in a day is in state %d", got)
			}
		})
	}
}

// TestAJumpIsShownAndConfirmed: /readyz warns and stays ready, the metrics count
// it, the refusal names the way out, only an administrator takes it, and it is
// written down.
func TestAJumpIsShownAndConfirmed(t *testing.T) {
	w := newWorld(t)
	root := w.root(t, "shop")
	crew := root.service(t, "crew", "Manager", "", "")
	k := root.create(t, `"name":"root"`)
	root.do(t, "DELETE", "/api/v2/keys/"+k.ID, "")
	look := func(state string) (s kmsapi.ClockStatus) {
		t.Helper()
		root.do(t, "GET", "/kmsctl/v1/clock", "").into(t, &s)
		var h kmsapi.Health
		r := root.do(t, "GET", "/readyz", "")
		r.into(t, &h)
		m := root.do(t, "GET", "/metrics", "").body
		right := state == kmsapi.ClockRight
		if s.State != state || r.status != 200 || !h.Ready || (len(h.Warnings) == 0) != right || strings.Contains(m, "kmsctl_clock_wrong 0") != right {
			t.Errorf("%+v %+v %s", s, h, m)
		}
		if c := h.Clock; (c == nil) != right || c != nil && (c.State != state || c.AheadSeconds <= 0) {
			t.Errorf("%+v, not %+v", c, s)
		}
		return s
	}
	look(kmsapi.ClockRight)
	w.jump(10 * 365 * 24 * time.Hour)
	root.token, crew.token = w.login(t, w.admin), w.login(t, string(w.anotherKey(t, "crew")))
	s := look(kmsapi.ClockIsAhead)
	if r := root.do(t, "GET", "/metrics", ""); s.Purges != 1 || !strings.Contains(r.body, "kmsctl_clock_ahead_seconds 3.1536e+08") {
		t.Errorf("%+v %s", s, r.body)
	}
	body := func(s kmsapi.ClockStatus) string {
		b, err := json.Marshal(kmsapi.ConfirmClock{Machine: s.Machine})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	const confirm = "/kmsctl/v1/clock/confirm"
	for _, x := range []struct {
		by     client
		body   string
		status int
		code   string
	}{
		{crew, body(s), 403, kmsapi.Forbidden},
		{root, "", 409, kmsapi.ClockAhead},
		{root, body(kmsapi.ClockStatus{Machine: start}), 409, kmsapi.ClockAhead},
		{root, `{"machine":"soon"}`, 400, kmsapi.BadBody},
	} {
		if r := x.by.do(t, "POST", confirm, x.body); r.status != x.status || r.code() != x.code {
			t.Errorf("%s: %d %s, want %d %s", x.body, r.status, r.body, x.status, x.code)
		}
	}
	if r := crew.do(t, "GET", "/kmsctl/v1/clock", ""); r.status != 403 {
		t.Errorf("%d %s", r.status, r.body)
	}
	look(kmsapi.ClockIsAhead)
	r := root.do(t, "POST", confirm, body(s))
	var out kmsapi.ClockStatus
	if r.into(t, &out); r.status != 200 || !out.Changed || out.State != kmsapi.ClockRight || out.ConfirmedBy == "" {
		t.Errorf("%d %s", r.status, r.body)
	}
	if e := w.audit.last(); e.Action != "kmsctl.clock.confirm" || e.Outcome != "success" || e.Principal != out.ConfirmedBy {
		t.Errorf("audit: %+v", e)
	}
	look(kmsapi.ClockRight)
	if acts, err := w.kms.Sweep(t.Context()); err != nil || len(acts) != 1 || acts[0].Action != "kms.secrets.purge" || acts[0].Key != k.ID {
		t.Errorf("%+v %v", acts, err)
	}
}

// TestLimitsAndAClockThatJumps: a limit neither opens nor closes for longer
// when the clock is set.
func TestLimitsAndAClockThatJumps(t *testing.T) {
	for _, jump := range []time.Duration{time.Hour, -time.Hour, -8760 * time.Hour} {
		w := newWorldWith(t, server.Limits{Rate: 2, Burst: 4})
		root := w.root(t, "shop")
		calls := func() (passed int) {
			for range 12 {
				if r := root.do(t, "GET", "/api/v2/keys", ""); r.status != 429 {
					passed++
				}
			}
			return passed
		}
		calls()
		w.jump(jump)
		if got := calls(); got > 4 {
			t.Errorf("after %s: %d calls at once", jump, got)
		}
		w.advance(2 * time.Second)
		if got := calls(); got != 4 {
			t.Errorf("2 s after %s: %d calls, want 4", jump, got)
		}
	}
}

// TestReviewsAndAClockThatJumps: Kubernetes' word on a token does not count
// for longer because the clock was set back.
func TestReviewsAndAClockThatJumps(t *testing.T) {
	w := newWorld(t)
	root := w.root(t, "shop")
	root.do(t, "POST", "/kmsctl/v1/iam/service-ids", `{"name":"pod","subjects":["serviceaccount:shop:orders"]}`)
	root.do(t, "POST", "/kmsctl/v1/iam/policies", `{"serviceId":"pod","role":"Reader","instance":"`+root.instance+`"}`)
	pod := client{w: w, token: "a.b.c", instance: root.instance}
	w.accounts.Store("a.b.c", "shop:orders")
	if r := pod.do(t, "GET", "/api/v2/keys", ""); r.status != 200 {
		t.Fatal(r)
	}
	w.accounts.Delete("a.b.c")
	w.jump(-time.Hour)
	if r := pod.do(t, "GET", "/api/v2/keys", ""); r.status != 401 {
		t.Errorf("%d %s", r.status, r.body)
	}
}

// TestAuditAndAClockThatJumps: lines keep their order by number, whatever the
// clock says, the log is whole, and it shows that the clock was set back.
func TestAuditAndAClockThatJumps(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	l, err := audit.Open(dir, audit.Config{Sign: w.token.Sign, PublicKey: w.token.PublicKey(), Now: w.now})
	if err != nil {
		t.Fatal(err)
	}
	for _, jump := range []time.Duration{0, time.Hour, -2 * time.Hour, 8760 * time.Hour, -2 * 8760 * time.Hour} {
		w.jump(jump)
		if err := l.Append(t.Context(), audit.Event{Action: "x", Outcome: "success"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := audit.Files(dir)
	if err != nil {
		t.Fatal(err)
	}
	r, err := audit.Verify(slices.Collect(func(yield func(audit.File) bool) {
		for _, n := range names {
			if !yield(audit.File{Name: n, Reader: open(t, n)}) {
				return
			}
		}
	}), [][]byte{w.token.PublicKey()}, nil, false)
	if err != nil || r.Events != 5 || r.SetBack != 2 {
		t.Errorf("%+v %v", r, err)
	}
}

func open(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestAKeyWhoseRecordWasChanged: whoever can write to the store is not believed.
// The key is refused as corrupted by everything that needs it, other keys work
// on, and the HSM is not asked.
func TestAKeyWhoseRecordWasChanged(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	path := "/kmsctl/v1/rec/keys/" + c.instance + "/" + k.ID
	was, err := w.etcd.Get(t.Context(), path)
	if err != nil || len(was.Kvs) != 1 {
		t.Fatal(was, err)
	}
	changed := strings.Replace(string(was.Kvs[0].Value), `"imported":`, `"Imported":`, 1)
	if changed == string(was.Kvs[0].Value) {
		changed += " "
	}
	if _, err := w.etcd.Put(t.Context(), path, changed); err != nil {
		t.Fatal(err)
	}
	other := c.create(t, `"name":"other"`) // when it is there, the view has the change
	calls := w.token.Calls.Load()
	for _, x := range []struct{ method, path, body string }{
		{"GET", "", ""}, {"GET", "/metadata", ""}, {"POST", "/actions/wrap", ""}, {"POST", "/actions/unwrap", `{"ciphertext":"e30="}`}, {"POST", "/actions/rotate", ""}, {"DELETE", "", ""},
	} {
		r := c.do(t, x.method, "/api/v2/keys/"+k.ID+x.path, x.body)
		var e kmsapi.Errors
		if r.into(t, &e); r.status != 500 || r.code() != kmsapi.IncompleteMetadata || !strings.HasPrefix(e.Resources[0].Reasons[0].Message, "Key metadata became corrupted") {
			t.Errorf("%s %s: %d %s", x.method, x.path, r.status, r.body)
		}
	}
	if n := w.token.Calls.Load(); n != calls {
		t.Errorf("the HSM was asked %d times", n-calls)
	}
	if r := c.act(t, other.ID, "wrap", ""); r.status != 200 {
		t.Errorf("another key: %+v", r)
	}
}
