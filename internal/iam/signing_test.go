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
