package iam_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
)

// TestSigningKeyRotation: the old key signs no more and its tokens live on
// until they end, in every replica; withdrawn, they are worth nothing at once.
func TestSigningKeyRotation(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	replica := iam.New(w.store, w.config)
	o, _, first := w.onboard(t, "orders", "Viewer")
	fetch := func(s *iam.Service) string {
		t.Helper()
		tok, err := s.Issue(ctx, o.APIKey)
		if err != nil {
			t.Fatal(err)
		}
		return tok.AccessToken
	}
	expect := func(when, token string, good bool) {
		t.Helper()
		for name, s := range map[string]*iam.Service{"here": w.Service, "replica": replica, "started later": iam.New(w.store, w.config)} {
			if _, err := s.Authenticate(ctx, token); (err == nil) != good || err != nil && fault.KindOf(err) != fault.Denied {
				t.Errorf("%s, %s: %v", when, name, err)
			}
		}
	}
	expect("before", first, true)
	w.now = w.now.Add(10 * time.Minute)
	if _, err := w.RotateSigningKey(ctx, iam.LocalAdmin(), false); err != nil {
		t.Fatal(err)
	}
	second := fetch(replica)
	expect("old token after a rotation", first, true)
	expect("new token after a rotation", second, true)
	w.now = w.now.Add(51 * time.Minute)
	expect("old token after its hour", first, false)
	expect("new token then", second, true)
	third := fetch(w.Service)
	if _, err := replica.RotateSigningKey(ctx, iam.LocalAdmin(), true); err != nil {
		t.Fatal(err)
	}
	for _, tok := range []string{first, second, third} {
		expect("withdrawn", tok, false)
	}
	fourth := fetch(w.Service)
	expect("new token after a withdrawal", fourth, true)

	// A key that ended long ago is removed, but for the first one's record,
	// without which it would sign again.
	w.now = w.now.Add(48 * time.Hour)
	if _, err := w.RotateSigningKey(ctx, iam.LocalAdmin(), false); err != nil {
		t.Fatal(err)
	}
	all, err := w.SigningKeys(ctx)
	if err != nil || len(all) != 3 || all[0].RetiredAt != nil || all[1].RetiredAt == nil || !all[2].Withdrawn && all[2].RetiredAt == nil {
		t.Errorf("%+v %v", all, err)
	}
	expect("a token of the first key", first, false)
	w.now = w.now.Add(-48*time.Hour - 50*time.Minute) // a clock that jumps back
	expect("second, after the clock jumped back", second, false)
}

// TestSigningKeyWithoutHSM: a replica whose HSM is away checks tokens of a new
// key, and refuses to make some.
func TestSigningKeyWithoutHSM(t *testing.T) {
	w := newWorld(t)
	o, _, _ := w.onboard(t, "orders", "Viewer")
	if _, err := w.RotateSigningKey(t.Context(), iam.LocalAdmin(), true); err != nil {
		t.Fatal(err)
	}
	tok, err := w.Issue(t.Context(), o.APIKey)
	if err != nil {
		t.Fatal(err)
	}
	w.away = fault.New(fault.Unreachable, "", "", errors.New("no HSM"))
	replica := iam.New(w.store, w.config)
	if _, err := replica.Authenticate(t.Context(), tok.AccessToken); err != nil {
		t.Error(err)
	}
	if _, err := replica.Issue(t.Context(), o.APIKey); fault.KindOf(err) != fault.Unreachable {
		t.Error(err)
	}
	if _, err := replica.RotateSigningKey(t.Context(), iam.LocalAdmin(), false); fault.KindOf(err) != fault.Unreachable {
		t.Error(err)
	}
}

// TestSigningKeyRotatedByTwo: of rotations at the same moment each leaves one
// key that signs.
func TestSigningKeyRotatedByTwo(t *testing.T) {
	w := newWorld(t)
	services := []*iam.Service{w.Service, iam.New(w.store, w.config)}
	for range 5 {
		var wg sync.WaitGroup
		errs := make([]error, len(services))
		for i, s := range services {
			wg.Go(func() { _, errs[i] = s.RotateSigningKey(t.Context(), iam.LocalAdmin(), false) })
		}
		wg.Wait()
		done := 0
		for _, err := range errs {
			if err == nil {
				done++
			} else if fault.KindOf(err) != fault.Conflict {
				t.Fatal(err)
			}
		}
		all, err := w.SigningKeys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sign := 0
		for _, k := range all {
			if k.RetiredAt == nil {
				sign++
			}
		}
		if done == 0 || sign != 1 {
			t.Fatalf("%d rotations done, %d keys sign", done, sign)
		}
	}
}

// period is how long a key signs in these tests.
const period = 90 * 24 * time.Hour

// aged gives replicas that rotate by a time of their own, which is not the
// machine's clock, and what moves it.
func aged(w *world, n int) (replicas []*iam.Service, pass func(time.Duration)) {
	now := w.now
	w.config.Period, w.config.Time = period, func() time.Time { return now }
	for range n {
		replicas = append(replicas, iam.New(w.store, w.config))
	}
	return replicas, func(d time.Duration) { now, w.now = now.Add(d), w.now.Add(d) }
}

func sweep(t *testing.T, s *iam.Service) *iam.SigningKey {
	t.Helper()
	k, err := s.SweepSigningKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// signing gives the one key that signs.
func signing(t *testing.T, s *iam.Service) iam.SigningKey {
	t.Helper()
	all, err := s.SigningKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var found []iam.SigningKey
	for _, k := range all {
		if k.RetiredAt == nil {
			found = append(found, k)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d keys sign: %+v", len(found), all)
	}
	return found[0]
}

// TestSigningKeyRotatesByItself: when its period is over by the time of the
// KMS, one of two replicas makes a new key, and what the old one signed is good
// until it ends. The machine's clock alone rotates nothing.
func TestSigningKeyRotatesByItself(t *testing.T) {
	w := newWorld(t)
	replicas, pass := aged(w, 2)
	a, b := replicas[0], replicas[1]
	o, _, _ := w.onboard(t, "orders", "Viewer")
	first := signing(t, a)
	if first.CreatedAt != (time.Time{}) || a.SigningKeyAge(first) != 0 || !a.SigningKeyDue(first).IsZero() {
		t.Errorf("before its age is counted: %+v", first)
	}
	if sweep(t, a) != nil || sweep(t, b) != nil {
		t.Fatal("rotated at once")
	}
	if k := signing(t, b); k.ID != first.ID || !b.SigningKeyDue(k).Equal(w.now.Add(period)) {
		t.Fatalf("%+v, due on %s", k, b.SigningKeyDue(k))
	}
	pass(period - time.Second)
	w.now = w.now.Add(10 * 365 * 24 * time.Hour) // set wrong
	if sweep(t, a) != nil || sweep(t, b) != nil {
		t.Fatal("rotated by the machine's clock")
	}
	w.now = w.now.Add(-10 * 365 * 24 * time.Hour)
	tok, err := a.Issue(t.Context(), o.APIKey)
	if err != nil {
		t.Fatal(err)
	}
	pass(time.Second)
	if k := signing(t, a); a.SigningKeyAge(k) != period {
		t.Errorf("age %s", a.SigningKeyAge(k))
	}
	second := sweep(t, b)
	if second == nil || second.CreatedBy != "life-cycle" || sweep(t, a) != nil || sweep(t, b) != nil || signing(t, a).ID != second.ID {
		t.Fatalf("%+v", second)
	}
	for when, good := range map[time.Duration]bool{0: true, 59 * time.Minute: true, 61 * time.Minute: false} {
		at := w.now
		w.now = at.Add(when)
		for i, s := range replicas {
			if _, err := s.Authenticate(t.Context(), tok.AccessToken); (err == nil) != good {
				t.Errorf("a token of the old key in replica %d, %s after the rotation: %v", i, when, err)
			}
		}
		w.now = at
	}
	pass(period)
	if third := sweep(t, a); third == nil || signing(t, b).ID != third.ID {
		t.Errorf("%+v", third)
	}
}

// TestSigningKeyRotatesOnceForAll: replicas that find the period over at the
// same moment make one key between them.
func TestSigningKeyRotatesOnceForAll(t *testing.T) {
	w := newWorld(t)
	replicas, pass := aged(w, 3)
	sweep(t, replicas[0])
	for range 5 {
		pass(period)
		var wg sync.WaitGroup
		made, errs := make([]*iam.SigningKey, len(replicas)), make([]error, len(replicas))
		for i, s := range replicas {
			wg.Go(func() { made[i], errs[i] = s.SweepSigningKey(t.Context()) })
		}
		wg.Wait()
		n := 0
		for i := range replicas {
			if errs[i] != nil {
				t.Fatal(errs[i])
			}
			if made[i] != nil {
				n++
			}
		}
		if n != 1 {
			t.Fatalf("%d replicas rotated", n)
		}
		signing(t, replicas[0])
	}
}

// TestSigningKeyOfAWrongTime: a key that was made while the time was wrong, and
// years ahead, does not sign for years.
func TestSigningKeyOfAWrongTime(t *testing.T) {
	w := newWorld(t)
	replicas, pass := aged(w, 1)
	s := replicas[0]
	const years = 5 * 365 * 24 * time.Hour
	pass(years)
	if _, err := s.RotateSigningKey(t.Context(), iam.LocalAdmin(), false); err != nil {
		t.Fatal(err)
	}
	pass(-years)
	if sweep(t, s) != nil {
		t.Fatal("rotated")
	}
	pass(period)
	if sweep(t, s) == nil {
		t.Error("not rotated when its period was over")
	}
}

// TestSigningKeyKeptByHand: without a period, and while the HSM is away, the
// key signs on; the latter is said.
func TestSigningKeyKeptByHand(t *testing.T) {
	w := newWorld(t)
	first := signing(t, w.Service)
	replicas, pass := aged(w, 1)
	sweep(t, replicas[0])
	pass(2 * period)
	if sweep(t, w.Service) != nil {
		t.Error("rotated without a period")
	}
	w.away = fault.New(fault.Unreachable, "", "", errors.New("no HSM"))
	if k, err := replicas[0].SweepSigningKey(t.Context()); k != nil || fault.KindOf(err) != fault.Unreachable {
		t.Errorf("%+v %v", k, err)
	}
	if k := signing(t, replicas[0]); k.ID != first.ID {
		t.Errorf("%+v", k)
	}
	w.away = nil
	if sweep(t, replicas[0]) == nil {
		t.Error("not rotated when the HSM was back")
	}
}
