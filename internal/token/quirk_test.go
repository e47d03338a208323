package token_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/internal/token"
)

// quirky opens a SoftHSM token behind the quirk library.
func quirky(t *testing.T, modes ...string) (*token.Token, *testkit.Quirk) {
	t.Helper()
	if err := token.MakeSoftToken(t.TempDir(), testkit.SoftHSM, "kms", pin("password")); err != nil {
		t.Fatal(err)
	}
	q := testkit.NewQuirk(t, modes...)
	tok, err := token.Open(token.Config{Module: q.Module, Label: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		q.Set(t)
		tok.Close()
	})
	return tok, q
}

// quirks are the modes of every kind of token that can be used.
func quirks() (out []fixture) {
	const pad, kw, lunaKW = "CKM_AES_KEY_WRAP_PAD (RFC 5649)", "CKM_AES_KEY_WRAP (RFC 3394)", "CKM_LUNA_AES_KW (RFC 3394)"
	const kwp, lunaKWP, cbc = "CKM_AES_KEY_WRAP_KWP (RFC 5649)", "CKM_LUNA_AES_KWP (RFC 5649)", "CKM_AES_CBC_PAD with HMAC-SHA-256"
	for _, c := range []struct {
		modes string
		suite uint8
		way   string
	}{
		{"", hsm.SuiteGCM, pad},
		{"iv-append12", hsm.SuiteGCMToken, pad},
		{"iv-append16", hsm.SuiteGCMToken, pad},
		{"iv-write", hsm.SuiteGCMToken, pad},
		{"iv-zero", hsm.SuiteCBCHMAC, pad},
		{"no-gcm", hsm.SuiteCBCHMAC, pad},
		{"luna", hsm.SuiteGCM, lunaKW},
		{"luna iv-append16", hsm.SuiteGCMToken, lunaKW},
		{"luna no-import", hsm.SuiteGCM, lunaKW},
		// What Luna 6.2 is expected to be: by CBC alone, in FIPS mode and not.
		{"luna no-kw cbc-wrap", hsm.SuiteGCM, cbc},
		{"luna no-kw cbc-wrap iv-append16 no-import", hsm.SuiteGCMToken, cbc},
		{"luna no-kw cbc-wrap no-gcm no-import", hsm.SuiteCBCHMAC, cbc},
		{"luna luna-kwp", hsm.SuiteGCM, lunaKWP}, // and Luna 7
		// What nShield 12.40.2 is expected to be: a card set's slot, and the
		// accelerator's, each also without AES-GCM.
		{"slots iv-write no-kw cbc-wrap nc-mac assurances no-import", hsm.SuiteGCMToken, cbc},
		{"slots no-gcm no-kw cbc-wrap nc-mac assurances no-import", hsm.SuiteCBCHMAC, cbc},
		{"slots iv-write no-kw cbc-wrap nc-mac assurances accelerator", hsm.SuiteGCMToken, cbc},
		{"slots no-gcm no-kw cbc-wrap nc-mac assurances accelerator", hsm.SuiteCBCHMAC, cbc},
		{"kwp", hsm.SuiteGCM, kwp},
		{"pad-lies", hsm.SuiteGCM, kw},
		{"slots", hsm.SuiteGCM, pad},
		{"slots64 iv-write", hsm.SuiteGCMToken, pad},
		{"unwrap-loose", hsm.SuiteGCM, pad},
		{"no-import", hsm.SuiteGCM, kw},
		{"no-import no-gcm", hsm.SuiteCBCHMAC, kw},
		{"few-sessions", hsm.SuiteGCM, pad},
		{"duplicates", hsm.SuiteGCM, pad},
		{"short-length", hsm.SuiteGCM, pad},
	} {
		out = append(out, fixture{name: "quirk library, mode " + cmp.Or(c.modes, "none"), pin: "password", suite: c.suite, way: c.way, open: func(t *testing.T) *token.Token {
			t.Helper()
			tok, _ := quirky(t, strings.Fields(c.modes)...)
			return tok
		}})
	}
	return out
}

// TestQuirks holds the contract on all of them.
func TestQuirks(t *testing.T) {
	for _, f := range quirks() {
		t.Run(f.name, func(t *testing.T) { contract(t, f) })
	}
}

// TestTokensThatMustNotBeUsed: each is refused, and the report says why.
func TestTokensThatMustNotBeUsed(t *testing.T) {
	for mode, why := range map[string]string{
		"readable":         "a sensitive key cannot be read: it was allowed",
		"wrap-any":         "a key that is not extractable cannot be wrapped: it was allowed",
		"unwrap-lies":      "it can wrap no key",
		"no-kw":            "it can wrap no key",
		"no-import no-kw":  "it can wrap no key",
		"no-gcm readable":  "a sensitive key cannot be read",
		"unwrap-lies luna": "it can wrap no key",
	} {
		t.Run(mode, func(t *testing.T) {
			tok, _ := quirky(t, strings.Fields(mode)...)
			if err := tok.Login(pin("password")); err != nil {
				t.Fatal(err)
			}
			if _, err := tok.OpenMaster(newIDs(), true); fault.KindOf(err) != fault.NotReady || !strings.Contains(err.Error(), why) || fault.HintOf(err) == "" {
				t.Errorf("%v", err)
			}
			r, err := tok.Probe()
			if err != nil || r.Usable {
				t.Errorf("%+v %v", r, err)
			}
		})
	}
}

// TestATokenThatTakesNoKeys: the algorithms are judged over the token's own
// AES-ECB, and what cannot be identified is not used.
func TestATokenThatTakesNoKeys(t *testing.T) {
	tok, _ := quirky(t, "no-import")
	if err := tok.Login(pin("password")); err != nil {
		t.Fatal(err)
	}
	m, err := tok.OpenMaster(newIDs(), true)
	if err != nil || m.Suite != hsm.SuiteGCM || m.WrapWay != "CKM_AES_KEY_WRAP (RFC 3394)" {
		t.Fatalf("%+v %v", m, err)
	}
	keysMadeHere(t, tok)
	for _, material := range []string{"0123456789abcdef", "0123456789abcdef01234567", "0123456789abcdef0123456789abcdef"} {
		k, err := tok.ImportRootKey(pin(material))
		if err != nil {
			t.Fatal(err)
		}
		sameMaterial(t, tok, k, []byte(material))
	}
	r, err := tok.Probe()
	if err != nil || !r.Usable || !strings.Contains(r.Capabilities.Suites[0].Why, "over the token's own AES-ECB") {
		t.Errorf("%+v %v", r, err)
	}
}

func keysMadeHere(t *testing.T, tok *token.Token) {
	t.Helper()
	k, err := tok.CreateRootKey()
	if err != nil {
		t.Fatal(err)
	}
	c, err := tok.Wrap(k.Blob, []byte("dek"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tok.Unwrap(k.Blob, c, nil); err != nil || string(got) != "dek" {
		t.Errorf("%q %v", got, err)
	}
}

// TestCiphertextsOutliveAProfile: what one rule for IVs made opens under
// another, on the same keys.
func TestCiphertextsOutliveAProfile(t *testing.T) {
	if err := token.MakeSoftToken(t.TempDir(), testkit.SoftHSM, "kms", pin("password")); err != nil {
		t.Fatal(err)
	}
	ids := newIDs()
	var blob []byte
	made := map[string]hsm.Sealed{}
	for i, mode := range []string{"", "iv-append16", "iv-write", "iv-append12", ""} {
		q := testkit.NewQuirk(t, strings.Fields(mode)...)
		tok, err := token.Open(token.Config{Module: q.Module, Label: "kms"})
		if err != nil {
			t.Fatal(err)
		}
		if err := tok.Login(pin("password")); err != nil {
			t.Fatal(err)
		}
		if _, err := tok.OpenMaster(ids, i == 0); err != nil {
			t.Fatal(mode, err)
		}
		if blob == nil {
			k, err := tok.CreateRootKey()
			if err != nil {
				t.Fatal(err)
			}
			blob = k.Blob
		}
		for from, c := range made {
			if got, err := tok.Unwrap(blob, c, nil); err != nil || string(got) != "dek" {
				t.Errorf("made under %q, opened under %q: %q %v", from, mode, got, err)
			}
		}
		if made[mode], err = tok.Wrap(blob, []byte("dek"), nil); err != nil {
			t.Fatal(err)
		}
		tok.Close()
	}
}

func TestPINsReachTheTokenOnce(t *testing.T) {
	tok, q := quirky(t)
	for range 5 {
		if err := tok.Login(pin("wrong")); fault.KindOf(err) != fault.Denied {
			t.Fatal(err)
		}
	}
	if got := q.Logins(); !slices.Equal(got, []string{"wrong"}) {
		t.Errorf("logins: %q", got)
	}
	for _, flag := range []string{"locked", "final-try"} {
		q.Set(t, flag)
		if err := tok.Login(pin("another")); fault.KindOf(err) != fault.Denied || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", flag, err)
		}
	}
	if got := q.Logins(); len(got) != 1 {
		t.Errorf("a login in spite of the token's flags: %q", got)
	}
	q.Set(t)
	if err := tok.Login(pin("password")); err != nil {
		t.Error(err)
	}
}

// TestALockedPINIsLeftAlone: the token is there, and no login is tried with a
// PIN that it refused for being locked.
func TestALockedPINIsLeftAlone(t *testing.T) {
	tok, q := quirky(t, "lock-after-ten")
	for i := range 10 {
		if err := tok.Login(pin(fmt.Sprintf("wrong %d", i))); fault.KindOf(err) != fault.Denied {
			t.Fatal(err)
		}
	}
	for range 5 {
		if err := tok.Login(pin("password")); fault.KindOf(err) != fault.Denied || token.CKR(err) != "pkcs11: 0xA4: CKR_PIN_LOCKED" || token.Lost(err) || fault.HintOf(err) == "" {
			t.Fatal(err)
		}
	}
	if got := q.Logins(); len(got) != 11 || got[9] != "wrong" || got[10] != "locked" {
		t.Errorf("logins: %q", got)
	}
}

func TestStaleSessionsAreOpenedAnew(t *testing.T) {
	tok, q := quirky(t)
	if err := tok.Login(pin("password")); err != nil {
		t.Fatal(err)
	}
	if _, err := tok.OpenMaster(newIDs(), true); err != nil {
		t.Fatal(err)
	}
	k, err := tok.CreateRootKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tok.Wrap(k.Blob, []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	q.Set(t, "drop-sessions")
	for range 2 * token.DefaultSessions {
		if _, err := tok.Random(8); err != nil {
			t.Fatalf("%v", err)
		}
		if _, err := tok.Wrap(k.Blob, []byte("x"), nil); err != nil {
			t.Fatalf("%v", err)
		}
	}
	// A key that must be brought back belongs to the session of the login,
	// which is stale too: that needs a new opening.
	tok.Evict(k.Blob)
	if _, err := tok.Wrap(k.Blob, []byte("x"), nil); !token.Lost(err) {
		t.Errorf("%v", err)
	}
}

// TestALostLineNeedsANewOpening: nothing but C_Finalize helps, and the keys
// are found again by their ids.
func TestALostLineNeedsANewOpening(t *testing.T) {
	if err := token.MakeSoftToken(t.TempDir(), testkit.SoftHSM, "kms", pin("password")); err != nil {
		t.Fatal(err)
	}
	q, ids := testkit.NewQuirk(t), newIDs()
	open := func() (*token.Token, error) {
		tok, err := token.Open(token.Config{Module: q.Module, Label: "kms"})
		if err != nil {
			return nil, err
		}
		if err := tok.Login(pin("password")); err != nil {
			return tok, err
		}
		_, err = tok.OpenMaster(ids, true)
		return tok, err
	}
	tok, err := open()
	if err != nil {
		t.Fatal(err)
	}
	k, err := tok.CreateRootKey()
	if err != nil {
		t.Fatal(err)
	}
	c, err := tok.Wrap(k.Blob, []byte("dek"), nil)
	if err != nil {
		t.Fatal(err)
	}
	q.Set(t, "gone")
	if _, err := tok.Unwrap(k.Blob, c, nil); !token.Lost(err) || fault.KindOf(err) != fault.Unreachable || token.CKR(err) == "" {
		t.Errorf("%v", err)
	}
	q.Set(t)
	if _, err := tok.Unwrap(k.Blob, c, nil); !token.Lost(err) {
		t.Errorf("the line came back by itself: %v", err)
	}
	q.Set(t, "gone")
	tok.Close()
	if _, err := open(); fault.KindOf(err) != fault.Unreachable {
		t.Errorf("%v", err)
	}
	q.Set(t)
	if tok, err = open(); err != nil {
		t.Fatal(err)
	}
	defer tok.Close()
	if got, err := tok.Unwrap(k.Blob, c, nil); err != nil || string(got) != "dek" {
		t.Errorf("%q %v", got, err)
	}
}
