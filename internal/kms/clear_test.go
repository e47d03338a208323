package kms_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// clearWorld is a KMS over a real etcd whose data can be cleared.
type clearWorld struct {
	token  *testkit.Token
	plain  *store.Plain
	client store.EtcdClient
	now    time.Time
	open   *store.Store
	kms.Clearing
}

func newClearWorld(t *testing.T) *clearWorld {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := m.Client()
	w := &clearWorld{token: testkit.NewToken("p", "p"), plain: store.NewPlain(c), client: c, now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	w.reopen(t)
	t.Cleanup(func() { w.open.Close(); c.Close(); m.Close() })
	return w
}

func (w *clearWorld) clock() time.Time { return w.now }

// reopen opens the KMS as a start does, but for the clearing that was begun.
func (w *clearWorld) reopen(t *testing.T) {
	t.Helper()
	opened, err := kms.Unlock(t.Context(), w.plain, w.token, w.clock)
	if err != nil {
		t.Fatal(err)
	}
	codec, err := record.NewCodec(opened.RecordKey)
	if err != nil {
		t.Fatal(err)
	}
	if w.open != nil {
		w.open.Close()
	}
	if w.open, err = store.Open(t.Context(), w.client, codec); err != nil {
		t.Fatal(err)
	}
	w.Clearing = kms.Clearing{Store: w.open, Plain: w.plain, Sealer: w.token, Tokens: []kms.Inventory{w.token}, Opened: opened, Now: w.clock}
}

// fill makes an instance with a key, and a service that may use it.
func (w *clearWorld) fill(t *testing.T) {
	t.Helper()
	s := kms.New(w.open, w.token, w.token, w.clock, kms.DefaultWindows())
	in, err := s.CreateInstance(t.Context(), kmsapi.CreateInstance{Name: "shop"}, "me")
	if err != nil {
		t.Fatal(err)
	}
	k, err := s.CreateKey(t.Context(), in.ID, "default", "me", kmsapi.CreateKey{Name: "root"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.iam(t).Onboard(t.Context(), iam.LocalAdmin(), "orders", in.ID, k.ID, "Writer"); err != nil {
		t.Fatal(err)
	}
}

func (w *clearWorld) iam(t *testing.T) *iam.Service {
	t.Helper()
	signing, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return iam.New(w.open, iam.Config{SigningKey: signing, Now: w.clock})
}

func (w *clearWorld) confirm(t *testing.T, in kmsapi.ClearRequest) kmsapi.ClearRequest {
	t.Helper()
	p, err := w.Confirm(t.Context(), "me", in)
	if err != nil || p.Confirmation == "" || p.Expires == nil {
		t.Fatalf("%+v %v", p, err)
	}
	in.Confirmation = p.Confirmation
	return in
}

func quietly(string, string) error { return nil }

func (w *clearWorld) finish(ctx context.Context) (*kmsapi.Cleared, error) {
	return kms.FinishClear(ctx, w.plain, []*testkit.Token{w.token}, w.clock)
}

func TestClear(t *testing.T) {
	w := newClearWorld(t)
	old := w.Opened.Install
	if p, err := w.Confirm(t.Context(), "me", kmsapi.ClearRequest{Name: "r"}); err != nil || p.Confirmation != "" || !p.Empty() {
		t.Errorf("an empty KMS: %+v %v", p, err)
	}
	w.fill(t)
	p, err := w.Plan(t.Context())
	if err != nil || p.Installation != old || len(p.Objects) != 3 || p.Instances != 1 || p.RootKeys != 1 || p.ServiceIDs != 1 || p.APIKeys != 1 || p.Policies != 1 || p.StandardKeys != 0 {
		t.Errorf("%+v %v", p, err)
	}
	in := w.confirm(t, kmsapi.ClearRequest{Name: "r"})
	var noted string
	if _, err := w.Begin(t.Context(), "me", in, func(target, serial string) error { noted = target + serial; return nil }); err != nil || noted != old+"s1" {
		t.Fatalf("%v, noted %q", err, noted)
	}
	select {
	case <-w.open.Ended():
	default:
		t.Error("the store goes on")
	}
	logins := w.token.Logins
	done, err := w.finish(t.Context())
	if err != nil || done == nil || done.Installation != old || done.By != "me" || done.Objects != 3 {
		t.Fatalf("%+v %v", done, err)
	}
	// The old KMS, which has not noticed yet, is fenced off.
	if err := w.open.Commit(t.Context(), record.Change{Path: "late", Value: 1}); fault.KindOf(err) != fault.NotReady || fault.HintOf(err) == "" {
		t.Errorf("a late write: %v", err)
	}
	w.reopen(t)
	if w.Opened.Install == old || w.token.Logins != logins {
		t.Errorf("installation %s, %d logins more", w.Opened.Install, w.token.Logins-logins)
	}
	p, err = w.Plan(t.Context())
	if err != nil || !p.Empty() || len(p.Others) != 0 || p.Cleared == nil || p.Cleared.Installation != old {
		t.Errorf("%+v %v", p, err)
	}
	if again, err := w.finish(t.Context()); err != nil || again != nil {
		t.Errorf("again: %+v %v", again, err)
	}
	if got, err := w.Settle(t.Context(), "other"); err != nil || got.By != "me" || got.Nothing {
		t.Errorf("%+v %v", got, err)
	}
}

// TestConfirmationCountsOnce: for one name, one installation, one person, ten
// minutes, and once.
func TestConfirmationCountsOnce(t *testing.T) {
	w := newClearWorld(t)
	w.fill(t)
	good := w.confirm(t, kmsapi.ClearRequest{Name: "r"})
	for name, f := range map[string]func(in *kmsapi.ClearRequest) (by string){
		"another name":         func(in *kmsapi.ClearRequest) string { in.Name = "other"; return "me" },
		"another installation": func(in *kmsapi.ClearRequest) string { in.Installation = "00000000"; return "me" },
		"another value":        func(in *kmsapi.ClearRequest) string { in.Confirmation = "0" + in.Confirmation[1:] + "0"; return "me" },
		"none":                 func(in *kmsapi.ClearRequest) string { in.Confirmation = ""; return "me" },
		"another person":       func(*kmsapi.ClearRequest) string { return "you" },
	} {
		in := good
		by := f(&in)
		if _, err := w.Begin(t.Context(), by, in, quietly); fault.KindOf(err) != fault.Conflict {
			t.Errorf("%s: %v", name, err)
		}
	}
	newer := w.confirm(t, kmsapi.ClearRequest{Name: "r"})
	if _, err := w.Begin(t.Context(), "me", good, quietly); fault.KindOf(err) != fault.Conflict {
		t.Errorf("an older one: %v", err)
	}
	w.now = w.now.Add(10 * time.Minute)
	if _, err := w.Begin(t.Context(), "me", newer, quietly); fault.KindOf(err) != fault.Conflict {
		t.Errorf("an old one: %v", err)
	}
	in := w.confirm(t, kmsapi.ClearRequest{Name: "r"})
	refused := errors.New("the log is full")
	if _, err := w.Begin(t.Context(), "me", in, func(string, string) error { return refused }); !errors.Is(err, refused) {
		t.Errorf("what is not written down: %v", err)
	}
	if _, err := w.finish(t.Context()); err != nil {
		t.Error(err)
	}
	if p, err := w.Plan(t.Context()); err != nil || p.Empty() || len(p.Objects) != 3 {
		t.Errorf("something went: %+v %v", p, err)
	}
	if _, err := w.Begin(t.Context(), "me", in, quietly); err != nil {
		t.Errorf("a good one: %v", err)
	}
	if _, err := w.Begin(t.Context(), "me", in, quietly); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a second time: %v", err)
	}
}

func TestClearLeftovers(t *testing.T) {
	w := newClearWorld(t)
	w.token.Installed = append(w.token.Installed, hsm.Installation{ID: "0ldeadbe", Objects: []string{"mkek:v1"}})
	p, err := w.Plan(t.Context())
	if err != nil || len(p.Others) != 1 || p.Others[0].Installation != "0ldeadbe" {
		t.Errorf("%+v %v", p, err)
	}
	if _, err := w.Confirm(t.Context(), "me", kmsapi.ClearRequest{Name: "x", Installation: "x"}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("one that is not there: %v", err)
	}
	in := w.confirm(t, kmsapi.ClearRequest{Name: "0ldeadbe", Installation: "0ldeadbe"})
	done, err := w.Begin(t.Context(), "me", in, quietly)
	if err != nil || done.Objects != 1 || done.Installation != "0ldeadbe" {
		t.Errorf("%+v %v", done, err)
	}
	if _, err := w.Begin(t.Context(), "me", in, quietly); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a second time: %v", err)
	}
	if p, err := w.Plan(t.Context()); err != nil || len(p.Others) != 0 || len(p.Objects) != 3 {
		t.Errorf("%+v %v", p, err)
	}
	if _, err := w.finish(t.Context()); err != nil {
		t.Error(err)
	}
	w.reopen(t)
}

// TestForgedMark: whoever can write the store cannot have the keys destroyed.
func TestForgedMark(t *testing.T) {
	w := newClearWorld(t)
	w.fill(t)
	var m struct {
		Install string    `json:"install"`
		Serial  string    `json:"serial"`
		By      string    `json:"by"`
		At      time.Time `json:"at"`
		Proof   []byte    `json:"proof"`
	}
	forger, err := record.NewCodec(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(){
		"no proof": func() { m.Proof = nil }, "a proof of nothing": func() { m.Proof = make([]byte, 60) }, "another installation": func() { m.Install = "00000000" },
	} {
		m.Install, m.Serial, m.By, m.At, m.Proof = w.Opened.Install, "s1", "me", w.now, []byte("x")
		f()
		b, err := forger.Encode(record.EndPath, m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.client.Put(t.Context(), "/kmsctl/v1/rec/"+record.EndPath, string(b)); err != nil {
			t.Fatal(err)
		}
		if _, err := w.finish(t.Context()); fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s: %v", name, err)
		}
		if len(w.token.Installed) != 1 {
			t.Errorf("%s: the keys went", name)
		}
	}
	select {
	case <-w.open.Ended():
		t.Error("a forged record ended the store")
	default:
	}
}

var errCrash = errors.New("killed here")

// cutter lets a number of steps through.
type cutter struct{ left int }

func (c *cutter) step() error {
	if c.left--; c.left < 0 {
		return errCrash
	}
	return nil
}

// cutToken is a token that destroys object by object, and may be cut off.
type cutToken struct {
	*testkit.Token
	*cutter
}

func (c cutToken) Clear(ctx context.Context, install string, proof *hsm.Proof) (n int, err error) {
	for _, i := range c.Installed {
		if i.ID != install {
			continue
		}
		if _, err := c.Unseal(ctx, proof.Sealed, proof.AAD); err != nil {
			return 0, err
		}
	}
	for i := range c.Installed {
		for c.Installed[i].ID == install && len(c.Installed[i].Objects) > 0 {
			if err := c.step(); err != nil {
				return n, err
			}
			c.Installed[i].Objects = c.Installed[i].Objects[1:]
			n++
		}
	}
	c.Installed = slices.DeleteFunc(c.Installed, func(i hsm.Installation) bool { return i.ID == install })
	return n, c.step()
}

// cutStore may be cut off before and after the reset.
type cutStore struct {
	*store.Plain
	*cutter
}

func (c cutStore) Reset(ctx context.Context, rev int64, cleared any) error {
	if err := c.step(); err != nil {
		return err
	}
	if err := c.Plain.Reset(ctx, rev, cleared); err != nil {
		return err
	}
	return c.step()
}

// TestClearCutOffAtEveryStep: wherever it is cut off, the next opening ends it.
func TestClearCutOffAtEveryStep(t *testing.T) {
	for steps := 0; ; steps++ {
		w := newClearWorld(t)
		w.fill(t)
		old := w.Opened.Install
		in := w.confirm(t, kmsapi.ClearRequest{Name: "r"})
		if _, err := w.Begin(t.Context(), "me", in, quietly); err != nil {
			t.Fatal(err)
		}
		cut := &cutter{left: steps}
		_, err := kms.FinishClear(t.Context(), cutStore{w.plain, cut}, []cutToken{{w.token, cut}}, w.clock)
		if err != nil && !errors.Is(err, errCrash) {
			t.Fatalf("after %d steps: %v", steps, err)
		}
		whole := err == nil
		if _, err := w.finish(t.Context()); err != nil {
			t.Errorf("after %d steps, again: %v", steps, err)
		}
		w.reopen(t)
		p, err := w.Plan(t.Context())
		if err != nil || !p.Empty() || len(p.Others) != 0 || p.Installation == old || p.Cleared == nil || p.Cleared.Installation != old {
			t.Errorf("after %d steps: %+v %v", steps, p, err)
		}
		if whole {
			if steps < 6 {
				t.Errorf("it took %d steps", steps)
			}
			return
		}
	}
}

// TestClearWaitsForItsToken: another token is not touched, and one that is
// away leaves everything for the next opening.
func TestClearWaitsForItsToken(t *testing.T) {
	w := newClearWorld(t)
	w.fill(t)
	if _, err := w.Begin(t.Context(), "me", w.confirm(t, kmsapi.ClearRequest{Name: "r"}), quietly); err != nil {
		t.Fatal(err)
	}
	w.token.Serial = "s2"
	if _, err := w.finish(t.Context()); fault.KindOf(err) != fault.NotReady || fault.HintOf(err) == "" || len(w.token.Installed) != 1 {
		t.Errorf("another token: %v", err)
	}
	w.token.Serial, w.token.DeviceErr = "s1", fault.Newf(fault.Unreachable, "x", "", "away")
	if _, err := w.finish(t.Context()); fault.KindOf(err) != fault.Unreachable {
		t.Errorf("a token that is away: %v", err)
	}
	w.token.DeviceErr, w.token.LoggedIn = nil, false
	if done, err := w.finish(t.Context()); err != nil || done == nil {
		t.Errorf("back: %+v %v", done, err)
	}
}
