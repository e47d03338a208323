package kms_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// on is the world as a start meets it whose connectors are at these tokens.
func (w *clearWorld) on(ctx context.Context, tokens ...*testkit.Token) (*kms.Moved, error) {
	return kms.LeaveToken(ctx, w.plain, tokens)
}

// away is a token that does not answer.
type away struct{ *testkit.Token }

func (away) Describe(context.Context) (hsm.TokenInfo, error) {
	return hsm.TokenInfo{}, errors.New("away")
}

func other(serial string) *testkit.Token {
	t := testkit.NewToken("q", "q")
	t.Serial = serial
	return t
}

func (w *clearWorld) clear(t *testing.T) {
	t.Helper()
	if _, err := w.Begin(t.Context(), "me", w.confirm(t, kmsapi.ClearRequest{Name: "r"}), quietly); err != nil {
		t.Fatal(err)
	}
	if done, err := w.finish(t.Context()); err != nil || done == nil {
		t.Fatalf("%+v %v", done, err)
	}
	w.reopen(t)
}

// TestLeaveToken: a store goes to another token once after each clearing, with
// a new installation, and the old token cannot take it back.
func TestLeaveToken(t *testing.T) {
	w := newClearWorld(t)
	first, second := w.token, other("s2")
	if _, err := w.finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m, err := w.on(t.Context(), second); m != nil || err != nil {
		t.Errorf("never cleared: %+v %v", m, err)
	}
	w.fill(t)
	w.clear(t)
	old := w.Opened.Install
	if m, err := w.on(t.Context(), second, first); m != nil || err != nil {
		t.Errorf("its own token is there: %+v %v", m, err)
	}
	if m, err := w.on(t.Context(), first); m != nil || err != nil {
		t.Errorf("its own token: %+v %v", m, err)
	}
	if m, err := kms.LeaveToken(t.Context(), w.plain, []away{{second}}); m != nil || err != nil {
		t.Errorf("a token that does not answer: %+v %v", m, err)
	}
	// What a KMS that serves nobody writes by itself holds nothing up.
	key, id, hash, err := iam.NewAPIKey()
	if err != nil {
		t.Fatal(err)
	}
	key.Zero()
	if err := w.iam(t).EnsureAdmin(t.Context(), id, hash); err != nil {
		t.Fatal(err)
	}
	if err := w.open.Commit(t.Context(), record.Change{Path: "audit/me", Value: 1}); err != nil {
		t.Fatal(err)
	}
	m, err := w.on(t.Context(), second)
	if err != nil || m == nil || m.Install != old || m.From != "s1" || m.To != "s2" || m.By != "me" {
		t.Fatalf("%+v %v", m, err)
	}
	if err := w.open.Commit(t.Context(), record.Change{Path: "late", Value: 1}); fault.KindOf(err) != fault.NotReady {
		t.Errorf("a late write of a replica at the old token: %v", err)
	}
	w.token = second
	w.reopen(t)
	if w.Opened.Install == old || w.Opened.Token.Serial != "s2" {
		t.Errorf("%+v", w.Opened)
	}
	if m, err := w.on(t.Context(), first); m != nil || err != nil {
		t.Errorf("back: %+v %v", m, err)
	}
	if _, err := kms.Unlock(t.Context(), w.plain, first, w.clock); fault.KindOf(err) != fault.BadContent {
		t.Errorf("the old token: %v", err)
	}
	w.fill(t)
	w.clear(t)
	if m, err := w.on(t.Context(), first); err != nil || m == nil || m.To != "s1" {
		t.Errorf("cleared again: %+v %v", m, err)
	}
	w.token = first
	w.reopen(t)
}

// TestLeaveTokenNotEmpty: a store that holds anything since it was cleared
// stays, whatever it is.
func TestLeaveTokenNotEmpty(t *testing.T) {
	for path, v := range map[string]any{"instances/i": 1, "keys/i/k": 1, "iam/serviceids/s": 1, "iam/policies/s/p": 1, "iam/apikeys/k": map[string]bool{"admin": false}, "what/is/this": 1} {
		w := newClearWorld(t)
		w.fill(t)
		w.clear(t)
		if err := w.open.Commit(t.Context(), record.Change{Path: path, Value: v}); err != nil {
			t.Fatal(err)
		}
		if m, err := w.on(t.Context(), other("s2")); m != nil || fault.KindOf(err) != fault.BadContent || !strings.Contains(err.Error(), path) || fault.HintOf(err) == "" {
			t.Errorf("%s: %+v %v", path, m, err)
		}
		var got any
		if _, err := w.open.Get(t.Context(), path, &got); err != nil {
			t.Errorf("%s is gone: %v", path, err)
		}
	}
}
