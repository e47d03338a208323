package connector_test

import (
	"bytes"
	"crypto/rand"
	"io"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// mover is a token that keys come from or go to.
type mover struct {
	name string
	o    func(t *testing.T) connector.Options
}

func softMover(t *testing.T) connector.Options {
	t.Helper()
	return options(t, "password")
}

// quirkMover is a SoftHSM token behind the quirk library.
func quirkMover(modes string) mover {
	return mover{"quirk library, mode " + modes, func(t *testing.T) connector.Options {
		t.Helper()
		o := options(t, "password")
		start(t, o).Close() // the token, which not every mode can make
		q := testkit.NewQuirk(t, strings.Fields(modes)...)
		o.Module, o.Env = q.Module, q.Env()
		return o
	}}
}

var cryptoki = mover{"openCryptoki", func(t *testing.T) connector.Options {
	t.Helper()
	testkit.OpenCryptokiToken(t)
	return connector.Options{Path: testkit.Connector(t), Module: testkit.OpenCryptoki, TokenLabel: testkit.OpenCryptokiLabel, PIN: secret.New([]byte(testkit.OpenCryptokiPIN)), Stderr: io.Discard}
}}

// moverIDs are two versions of the master keys of an installation of one test.
func moverIDs() (from, to hsm.MasterIDs) {
	b := make([]byte, 6*16)
	_, _ = rand.Read(b)
	from = hsm.MasterIDs{Install: rand.Text()[:8], Wrap: b[:16], Seal: b[16:32], Sign: b[32:48], Version: 1}
	return from, hsm.MasterIDs{Install: from.Install, Wrap: b[48:64], Seal: b[64:80], Sign: b[80:], Version: 2}
}

func openMover(t *testing.T, o connector.Options, ids hsm.MasterIDs) *connector.Client {
	t.Helper()
	c := start(t, o)
	if err := c.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.OpenMaster(t.Context(), ids, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n, err := c.Clear(t.Context(), ids.Install, nil); t.Context().Err() == nil && (err != nil || n == 0) {
			t.Errorf("cleared %d objects: %v", n, err)
		}
	})
	return c
}

// TestKeysPassFromTokenToToken: keys of every length and origin pass between
// tokens of different kinds, and open what they made before.
func TestKeysPassFromTokenToToken(t *testing.T) {
	soft := mover{"SoftHSM", softMover}
	for _, c := range []struct{ from, to mover }{
		{soft, soft},
		{soft, quirkMover("luna no-kw cbc-wrap iv-append16 no-import")},
		{soft, quirkMover("slots iv-write no-kw cbc-wrap nc-mac assurances no-import")},
		{quirkMover("luna no-kw cbc-wrap no-gcm"), soft},
		{quirkMover("luna no-kw cbc-wrap iv-append16"), quirkMover("slots iv-write no-kw cbc-wrap nc-mac assurances")},
		{cryptoki, soft},
		{cryptoki, quirkMover("luna no-kw cbc-wrap no-gcm")},
	} {
		t.Run(c.from.name+" to "+c.to.name, func(t *testing.T) { passes(t, c.from, c.to) })
	}
}

func passes(t *testing.T, from, to mover) {
	t.Helper()
	ctx := t.Context()
	one, two := moverIDs()
	o := from.o(t)
	o.GivesKeys = true
	c := openMover(t, o, one)
	next := openMover(t, to.o(t), two)
	c.Succeed(next, "the other")
	type made struct {
		hsm.NewKey
		sealed hsm.Sealed
	}
	var keys []made
	for _, n := range []int{0, 16, 24, 32} {
		k, err := c.CreateRootKey(ctx)
		if n > 0 {
			k, err = c.ImportRootKey(ctx, secret.New(bytes.Repeat([]byte{byte(n)}, n)))
		}
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.Wrap(ctx, k.Blob, []byte("dek"), []byte("aad"))
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, made{k, s})
	}
	secretText, err := c.Seal(ctx, []byte("secret"), []byte("purpose"))
	if err != nil {
		t.Fatal(err)
	}
	c.Moved("the other", 2, 2)
	for i, k := range keys {
		moved, err := c.Rewrap(ctx, k.Blob)
		if err != nil {
			t.Fatal(err)
		}
		if hsm.VersionOf(moved.Blob, nil) != 2 || !hsm.SameKey(moved.KCV, k.KCV) {
			t.Errorf("key %d: version %d, check values %x and %x", i, hsm.VersionOf(moved.Blob, nil), k.KCV, moved.KCV)
		}
		for _, blob := range [][]byte{k.Blob, moved.Blob} {
			if got, err := c.Unwrap(ctx, blob, k.sealed, []byte("aad")); err != nil || string(got) != "dek" {
				t.Errorf("key %d: %q %v", i, got, err)
			}
		}
		s, err := c.Wrap(ctx, moved.Blob, []byte("new dek"), []byte("aad"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := next.Unwrap(ctx, moved.Blob, s, []byte("aad")); err != nil || string(got) != "new dek" {
			t.Errorf("key %d: %q %v", i, got, err)
		}
	}
	resealed, err := c.Reseal(ctx, secretText, []byte("purpose"))
	if err != nil || hsm.VersionOf(nil, resealed) != 2 {
		t.Fatalf("sealed by version %d: %v", hsm.VersionOf(nil, resealed), err)
	}
	if got, err := next.Unseal(ctx, resealed, []byte("purpose")); err != nil || string(got) != "secret" {
		t.Errorf("%q %v", got, err)
	}
	if k, err := c.CreateRootKey(ctx); err != nil || hsm.VersionOf(k.Blob, nil) != 2 {
		t.Errorf("what is new is of version %d: %v", hsm.VersionOf(k.Blob, nil), err)
	}
}

// TestAKeyLeavesOnlyWhereThatWasAskedFor: a connector that was not started for
// a move gives no key, to nobody.
func TestAKeyLeavesOnlyWhereThatWasAskedFor(t *testing.T) {
	one, two := moverIDs()
	c, next := openMover(t, softMover(t), one), openMover(t, softMover(t), two)
	c.Succeed(next, "the other")
	k, err := c.CreateRootKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Carry(t.Context(), k.Blob); fault.KindOf(err) != fault.Denied || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
}
