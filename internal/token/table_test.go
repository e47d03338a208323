package token_test

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/token"
)

// TestEveryCombination uses each token in every way that its probe calls
// possible, and not only in the one that would be chosen. With -v it prints a
// table of what was done.
func TestEveryCombination(t *testing.T) {
	var rows [][2]string // token, suite and wrap way; ways to import
	for _, f := range append(fixtures(), quirks()...) {
		t.Run(f.name, func(t *testing.T) {
			tok := f.open(t)
			if err := tok.Login(pin(f.pin)); err != nil {
				t.Fatal(err)
			}
			all, err := tok.Combinations()
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(all, func(c token.Combination) bool { return c.WrapWay == f.way && c.Suite[0] == '0'+f.suite }) {
				t.Errorf("suite %d by %s is not among them", f.suite, f.way)
			}
			for _, c := range all {
				t.Run(strings.Join([]string{c.Suite, c.WrapWay, c.Import}, "/"), func(t *testing.T) {
					combination(t, tok, c)
					if !t.Failed() {
						rows = entered(rows, fmt.Sprintf("| %s | %s | %s |", f.name, c.Suite, c.WrapWay), c.Import)
					}
				})
			}
		})
	}
	if testing.Verbose() {
		fmt.Print("| token | suite | wrap way | import ways |\n| --- | --- | --- | --- |\n")
		for _, r := range rows {
			fmt.Println(r[0], r[1], "|")
		}
	}
}

// entered adds a way to import to the last line, or begins another.
func entered(rows [][2]string, line, how string) [][2]string {
	if n := len(rows) - 1; n >= 0 && rows[n][0] == line {
		rows[n][1] += "; " + how
		return rows
	}
	return append(rows, [2]string{line, how})
}

// combination makes, imports, wraps, unwraps and destroys keys of both
// placements.
func combination(t *testing.T, tok *token.Token, c token.Combination) {
	t.Helper()
	tok.Use(c)
	ids := newIDs()
	if _, err := tok.OpenMaster(ids, true); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if n, err := tok.Clear(ids.Install, nil); err != nil || n < 3 {
			t.Errorf("%d objects cleared: %v", n, err)
		}
	}()
	keysMadeHere(t, tok)
	material, brought, placed := make([]byte, 32), hsm.NewKey{}, hsm.NewKey{}
	_, _ = rand.Read(material)
	var err error
	if !c.Sent {
		if brought, err = tok.ImportRootKey(pin(string(material))); err == nil {
			placed, err = tok.ImportPlacedKey([]byte("placed-id-123456"), pin(string(material)))
		}
	} else {
		id := []byte("pair-id-16-bytes")
		if c.Sealed {
			id = nil
		}
		p, perr := tok.NewImportPair(id, nil)
		if perr != nil || (p.Held == nil) != c.Sealed {
			t.Fatalf("held %v: %v", p.Held != nil, perr)
		}
		m := send(t, p.Public, material, false)
		if brought, _, err = tok.ImportSent(p, nil, m, nil); err == nil {
			placed, _, err = tok.ImportSent(p, nil, m, []byte("placed-id-123456"))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := tok.Wrap(brought.Blob, []byte("dek"), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tok.Unwrap(placed.Blob, sealed, []byte("aad")); err != nil || string(got) != "dek" {
		t.Errorf("the same material in the token: %q %v", got, err)
	}
	sameMaterial(t, tok, brought, material)
	tok.Evict(brought.Blob)
	if got, err := tok.Unwrap(brought.Blob, sealed, []byte("aad")); err != nil || string(got) != "dek" {
		t.Errorf("brought back: %q %v", got, err)
	}
	if err := tok.Destroy(placed.Blob); err != nil {
		t.Error(err)
	}
}
