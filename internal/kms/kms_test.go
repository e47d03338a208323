package kms_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

type world struct {
	*kms.Service
	instance string
	token    *testkit.Token
	now      time.Time
	store    *store.Store
	etcd     store.EtcdClient
}

func newWorld(t *testing.T) *world {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := m.Client()
	codec, err := record.NewCodec(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(t.Context(), c, codec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close(); c.Close(); m.Close() })
	w := &world{token: testkit.NewToken("p", "p"), now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	w.store, w.etcd = st, c
	w.Service = kms.New(st, w.token, w.token, func() time.Time { return w.now }, kms.DefaultWindows())
	w.instance = w.newInstance(t, "shop")
	return w
}

func (w *world) newInstance(t *testing.T, name string) string {
	t.Helper()
	in, err := w.CreateInstance(t.Context(), kmsapi.CreateInstance{Name: name}, "me")
	if err != nil {
		t.Fatal(err)
	}
	return in.ID
}

func (w *world) key(t *testing.T, instance string, in kmsapi.CreateKey) kmsapi.Key {
	t.Helper()
	k, err := w.CreateKey(t.Context(), instance, "default", "me", in)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func reason(err error) string {
	var f *fault.Error
	if errors.As(err, &f) {
		return f.Reason
	}
	return ""
}

func TestWrapAndUnwrap(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	if k.Payload != "" || k.Extractable || k.State != 1 {
		t.Errorf("%+v", k)
	}
	dek := base64.StdEncoding.EncodeToString([]byte("a data encryption key"))
	ctx := t.Context()
	for _, aad := range [][]string{nil, {"a"}, {"a", "b"}, {"ab"}, {""}} {
		out, err := w.Wrap(ctx, w.instance, k.ID, kmsapi.WrapRequest{Plaintext: dek, AAD: aad})
		if err != nil || out.Plaintext != "" {
			t.Fatal(out, err)
		}
		back, err := w.Unwrap(ctx, w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: out.Ciphertext, AAD: aad})
		if err != nil || back.Plaintext != dek || back.KeyVersion.ID != k.KeyVersion.ID {
			t.Errorf("aad %q: %+v %v", aad, back, err)
		}
		for _, other := range [][]string{nil, {"a"}, {"a", "b"}, {"ab"}, {"b", "a"}, {""}} {
			if strings.Join(other, "|") == strings.Join(aad, "|") && len(other) == len(aad) {
				continue
			}
			if _, err := w.Unwrap(ctx, w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: out.Ciphertext, AAD: other}); reason(err) != kmsapi.BadCiphertext {
				t.Errorf("wrapped with %q, unwrapped with %q: %v", aad, other, err)
			}
		}
	}
	out, err := w.Wrap(ctx, w.instance, k.ID, kmsapi.WrapRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := base64.StdEncoding.DecodeString(out.Plaintext); len(b) != 32 {
		t.Errorf("made a DEK of %d bytes", len(b))
	}
}

func TestTouchedCiphertextIsRefused(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	out, err := w.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.StdEncoding.DecodeString(out.Ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	for i := range raw {
		bad := bytes.Clone(raw)
		bad[i] ^= 1
		_, err := w.Unwrap(t.Context(), w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: base64.StdEncoding.EncodeToString(bad)})
		if reason(err) != kmsapi.BadCiphertext {
			t.Fatalf("byte %d of %s flipped: %v", i, raw, err)
		}
	}
	for _, bad := range []string{"x", out.Ciphertext[1:], out.Ciphertext + "A", base64.StdEncoding.EncodeToString([]byte("{}")), strings.Repeat("A", 40000)} {
		if _, err := w.Unwrap(t.Context(), w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: bad}); reason(err) != kmsapi.BadCiphertext {
			t.Errorf("%.40s: %v", bad, err)
		}
	}
}

func TestOtherKeysDoNotUnwrap(t *testing.T) {
	w := newWorld(t)
	a, b := w.key(t, w.instance, kmsapi.CreateKey{Name: "aa"}), w.key(t, w.instance, kmsapi.CreateKey{Name: "bb"})
	out, err := w.Wrap(t.Context(), w.instance, a.ID, kmsapi.WrapRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Unwrap(t.Context(), w.instance, b.ID, kmsapi.UnwrapRequest{Ciphertext: out.Ciphertext}); reason(err) != kmsapi.BadCiphertext {
		t.Errorf("%v", err)
	}
}

func TestSameImportedMaterialUnwrapsElsewhere(t *testing.T) {
	w := newWorld(t)
	material := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{9}, 32))
	a := w.key(t, w.instance, kmsapi.CreateKey{Name: "aa", Payload: material})
	other := w.newInstance(t, "duplicate")
	b := w.key(t, other, kmsapi.CreateKey{Name: "bb", Payload: material})
	if !a.Imported || !b.Imported || a.Payload != "" {
		t.Errorf("%+v", a)
	}
	out, err := w.Wrap(t.Context(), w.instance, a.ID, kmsapi.WrapRequest{})
	if err != nil {
		t.Fatal(err)
	}
	back, err := w.Unwrap(t.Context(), other, b.ID, kmsapi.UnwrapRequest{Ciphertext: out.Ciphertext})
	if err != nil || back.Plaintext != out.Plaintext {
		t.Errorf("%v", err)
	}
}

func TestStandardKeys(t *testing.T) {
	w := newWorld(t)
	payload := base64.StdEncoding.EncodeToString([]byte("imported"))
	for _, in := range []kmsapi.CreateKey{{Name: "made", Extractable: true}, {Name: "brought", Extractable: true, Payload: payload}} {
		k := w.key(t, w.instance, in)
		got, err := w.Key(t.Context(), w.instance, k.ID, true)
		if err != nil || got.Payload == "" || got.Payload != k.Payload || (in.Payload != "" && got.Payload != in.Payload) {
			t.Errorf("%s: %+v %v", in.Name, got, err)
		}
		if meta, _ := w.Key(t.Context(), w.instance, k.ID, false); meta.Payload != "" {
			t.Error("metadata has the payload")
		}
		if _, err := w.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{}); reason(err) != kmsapi.RootRequired {
			t.Errorf("wrap with a standard key: %v", err)
		}
	}
}

func TestExpiredKeyUnwrapsButDoesNotWrap(t *testing.T) {
	w := newWorld(t)
	at := w.now.Add(time.Hour)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root", ExpirationDate: &at})
	out, err := w.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{})
	if err != nil {
		t.Fatal(err)
	}
	w.now = at
	if _, err := w.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{}); reason(err) != kmsapi.KeyExpired {
		t.Errorf("wrap: %v", err)
	}
	if _, err := w.Unwrap(t.Context(), w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: out.Ciphertext}); err != nil {
		t.Errorf("unwrap: %v", err)
	}
	if got, _ := w.Key(t.Context(), w.instance, k.ID, false); got.State != 3 {
		t.Errorf("state %d", got.State)
	}
}

func TestBadInput(t *testing.T) {
	w := newWorld(t)
	past := w.now.Add(-time.Second)
	for name, c := range map[string]struct {
		in   kmsapi.CreateKey
		want string
	}{
		"short name":       {kmsapi.CreateKey{Name: "x"}, kmsapi.InvalidField},
		"wrong type":       {kmsapi.CreateKey{Name: "xx", Type: "y"}, kmsapi.InvalidField},
		"expired":          {kmsapi.CreateKey{Name: "xx", ExpirationDate: &past}, kmsapi.InvalidField},
		"not base64":       {kmsapi.CreateKey{Name: "xx", Payload: "%"}, kmsapi.InvalidField},
		"root of 31 bytes": {kmsapi.CreateKey{Name: "xx", Payload: base64.StdEncoding.EncodeToString(make([]byte, 31))}, kmsapi.InvalidField},
		"large standard":   {kmsapi.CreateKey{Name: "xx", Extractable: true, Payload: base64.StdEncoding.EncodeToString(make([]byte, 7501))}, kmsapi.InvalidField},
		"short alias":      {kmsapi.CreateKey{Name: "xx", Aliases: []string{"a"}}, kmsapi.InvalidField},
		"alias a word":     {kmsapi.CreateKey{Name: "xx", Aliases: []string{"policies"}}, kmsapi.InvalidField},
		"alias an id":      {kmsapi.CreateKey{Name: "xx", Aliases: []string{"00000000-0000-4000-8000-000000000000"}}, kmsapi.InvalidField},
		"alias twice":      {kmsapi.CreateKey{Name: "xx", Aliases: []string{"aa", "aa"}}, kmsapi.InvalidField},
		"six aliases":      {kmsapi.CreateKey{Name: "xx", Aliases: []string{"aa", "bb", "cc", "dd", "ee", "ff"}}, kmsapi.InvalidField},
		"tag with comma":   {kmsapi.CreateKey{Name: "xx", Tags: []string{"a,b"}}, kmsapi.InvalidField},
		"iv alone":         {kmsapi.CreateKey{Name: "xx", IV: "AAAA"}, kmsapi.InvalidField},
		"half secure":      {kmsapi.CreateKey{Name: "xx", Payload: "AAAA", IV: "AAAA"}, kmsapi.InvalidField},
	} {
		if _, err := w.CreateKey(t.Context(), w.instance, "default", "me", c.in); reason(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx := t.Context()
	for _, id := range []string{"", "x", "../keys", strings.ToUpper(w.instance)} {
		if _, err := w.CreateKey(ctx, id, "default", "me", kmsapi.CreateKey{Name: "xx"}); reason(err) != kmsapi.InvalidInstance {
			t.Errorf("instance %q: %v", id, err)
		}
	}
	if _, err := w.Key(ctx, w.instance, "00000000-0000-4000-8000-000000000000", true); reason(err) != kmsapi.KeyNotFound {
		t.Errorf("%v", err)
	}
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	for name, in := range map[string]kmsapi.WrapRequest{
		"not base64": {Plaintext: "%"}, "large": {Plaintext: base64.StdEncoding.EncodeToString(make([]byte, 4097))},
		"many aad": {AAD: make([]string, 127)}, "long aad": {AAD: []string{strings.Repeat("ä", 256)}},
	} {
		if _, err := w.Wrap(ctx, w.instance, k.ID, in); reason(err) != kmsapi.InvalidField {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHSMFailureIsNotACiphertextError(t *testing.T) {
	w := newWorld(t)
	k := w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
	out, err := w.Wrap(t.Context(), w.instance, k.ID, kmsapi.WrapRequest{})
	if err != nil {
		t.Fatal(err)
	}
	w.token.DeviceErr = fault.Newf(fault.Unreachable, "unwrap", "fake", "CKR_DEVICE_REMOVED")
	if _, err := w.Unwrap(t.Context(), w.instance, k.ID, kmsapi.UnwrapRequest{Ciphertext: out.Ciphertext}); fault.KindOf(err) != fault.Unreachable {
		t.Errorf("%v", err)
	}
}

func TestListAndInstances(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	for range 3 {
		w.key(t, w.instance, kmsapi.CreateKey{Name: "root"})
		w.key(t, w.instance, kmsapi.CreateKey{Name: "standard", Extractable: true})
	}
	p, err := w.Keys(ctx, w.instance, kms.Query{Limit: 4, Offset: 1})
	if err != nil || p.Total != 6 || len(p.Keys) != 4 {
		t.Fatalf("%d of %d: %v", len(p.Keys), p.Total, err)
	}
	for i, k := range p.Keys {
		if k.Payload != "" || (i > 0 && p.Keys[i-1].ID >= k.ID) {
			t.Errorf("payload in a list, or wrong order: %+v", k)
		}
	}
	yes := true
	if p, _ := w.Keys(ctx, w.instance, kms.Query{Extractable: &yes}); p.Total != 3 {
		t.Errorf("%d standard keys", p.Total)
	}
	if _, err := w.CreateInstance(ctx, kmsapi.CreateInstance{Name: "shop"}, "me"); fault.KindOf(err) != fault.Conflict {
		t.Errorf("same name twice: %v", err)
	}
	if err := w.DeleteInstance(ctx, w.instance, nothing); fault.KindOf(err) != fault.Conflict {
		t.Errorf("delete with keys: %v", err)
	}
	empty := w.newInstance(t, "empty")
	if err := w.DeleteInstance(ctx, empty, nothing); err != nil {
		t.Error(err)
	}
	if all, _ := w.Instances(ctx); len(all) != 1 {
		t.Errorf("%d instances left", len(all))
	}
	w.newInstance(t, "empty") // the name is free again
}

func FuzzUnwrap(f *testing.F) {
	good, err := json.Marshal(kmsapi.Ciphertext{Ciphertext: make([]byte, 48), IV: make([]byte, 12), Version: kmsapi.CiphertextVersion, Handle: "h", Suite: 1})
	if err != nil {
		f.Fatal(err)
	}
	text := base64.StdEncoding.EncodeToString(good)
	f.Add(text)
	f.Add(text[:20] + "\n" + text[20:])
	f.Add("e30=")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := kms.DecodeForTest(text)
		if err != nil {
			return
		}
		if again, err := kms.EncodeForTest(c); err != nil || again != text {
			t.Errorf("%q reads as %+v and writes as %q (%v)", text, c, again, err)
		}
	})
}

func plainStore(t *testing.T) *store.Plain {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := m.Client()
	t.Cleanup(func() { c.Close(); m.Close() })
	return store.NewPlain(c)
}

func TestUnlockMakesMasterKeysOnceAndFindsThemAgain(t *testing.T) {
	p, tok := plainStore(t), testkit.NewToken("pin", "pin")
	a, err := kms.Unlock(t.Context(), p, tok, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	tok.LoggedIn = false
	b, err := kms.Unlock(t.Context(), p, tok, time.Now)
	if err != nil || !bytes.Equal(a.RecordKey, b.RecordKey) || !bytes.Equal(a.TokenKey, b.TokenKey) || a.Install != b.Install || len(a.RecordKey) != 32 {
		t.Errorf("%v", err)
	}
	if bytes.Equal(a.RecordKey, a.TokenKey) || len(tok.Masters) != 1 {
		t.Errorf("%d master keys", len(tok.Masters))
	}
}

func TestUnlockRefusesAnotherToken(t *testing.T) {
	p := plainStore(t)
	if _, err := kms.Unlock(t.Context(), p, testkit.NewToken("pin", "pin"), time.Now); err != nil {
		t.Fatal(err)
	}
	other := testkit.NewToken("pin", "pin")
	other.Serial = "s2"
	if _, err := kms.Unlock(t.Context(), p, other, time.Now); fault.KindOf(err) != fault.BadContent {
		t.Errorf("another serial: %v", err)
	}
	if len(other.Masters) != 0 {
		t.Error("a master key was made on the wrong token")
	}
	cleared := testkit.NewToken("pin", "pin")
	if _, err := kms.Unlock(t.Context(), p, cleared, time.Now); fault.KindOf(err) != fault.NotFound {
		t.Errorf("the same token without its keys: %v", err)
	}
}

func TestAWrongPINIsTriedOnce(t *testing.T) {
	p, tok := plainStore(t), testkit.NewToken("wrong", "right")
	for range 3 {
		if _, err := kms.Unlock(t.Context(), p, tok, time.Now); fault.KindOf(err) != fault.Denied {
			t.Fatalf("%v", err)
		}
	}
	if tok.Logins != 1 {
		t.Fatalf("%d logins with a wrong PIN", tok.Logins)
	}
	tok.PIN = "right" // the secret has changed
	if _, err := kms.Unlock(t.Context(), p, tok, time.Now); err != nil || tok.Logins != 2 {
		t.Errorf("%d logins: %v", tok.Logins, err)
	}
	tok.LoggedIn = false // a restart with a known good PIN
	if _, err := kms.Unlock(t.Context(), p, tok, time.Now); err != nil {
		t.Error(err)
	}
}

func TestAnAttemptWhoseEndNobodySaw(t *testing.T) {
	p, tok := plainStore(t), testkit.NewToken("wrong", "right")
	tok.DeviceErr = fault.New(fault.Unreachable, "log in", "fake", context.DeadlineExceeded)
	if _, err := kms.Unlock(t.Context(), p, tok, time.Now); fault.KindOf(err) != fault.Unreachable {
		t.Fatal(err)
	}
	tok.DeviceErr = nil
	tok.CountLow = true // the token says that the attempt failed
	if _, err := kms.Unlock(t.Context(), p, tok, time.Now); fault.KindOf(err) != fault.Denied || tok.Logins != 0 {
		t.Errorf("%d logins: %v", tok.Logins, err)
	}
	tok.CountLow = false // the attempt never reached it
	if _, err := kms.Unlock(t.Context(), p, tok, time.Now); fault.KindOf(err) != fault.Denied || tok.Logins != 1 {
		t.Errorf("%d logins: %v", tok.Logins, err)
	}
}
