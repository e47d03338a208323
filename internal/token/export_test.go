package token

import (
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/hsm"
)

func init() { pairBits, carryBits = 1024, 1024 } // RSA-4096 takes seconds each

// CacheSize is how many root keys stay in the session.
const CacheSize = cacheSize

// Objects counts what is in the token, and what lives as long as a session.
func (t *Token) Objects() (onToken, inSession int, err error) {
	err = t.with(func(s pkcs11.SessionHandle) error {
		all, err := t.listAll(s)
		if err != nil {
			return err
		}
		for _, h := range all {
			stays, err := t.flag(s, h, pkcs11.CKA_TOKEN)
			if err != nil {
				return err
			}
			if stays {
				onToken++
			} else {
				inSession++
			}
		}
		return nil
	})
	return onToken, inSession, err
}

// OpenOAEP is openOAEP, for its own test.
var OpenOAEP = openOAEP

// Combination is one way of using a token, of those that its probe found.
type Combination struct {
	Suite, WrapWay, Import string
	Sent, Sealed           bool // material travels encrypted; under a pair that is sealed
	can                    abilities
}

// Combinations are all that work, not only the first of each that is used.
func (t *Token) Combinations() (out []Combination, err error) {
	a, err := t.explore(true)
	if err != nil {
		return nil, err
	}
	for i, s := range a.report.Suites {
		for _, w := range ways {
			if !s.Works || !slices.ContainsFunc(a.report.WrapWays, func(f hsm.Finding) bool { return f.Works && f.Name == w.name }) {
				continue
			}
			add := func(how string, change func(c *Combination)) {
				c := Combination{Suite: s.Name, WrapWay: w.name, Import: how, can: *a}
				c.can.suite, c.can.way = uint8(i)+1, w
				change(&c)
				out = append(out, c)
			}
			if a.importable {
				add("C_CreateObject", func(*Combination) {})
			}
			if a.unwrapImport {
				add("C_UnwrapKey, wrapped here", func(c *Combination) { c.can.importable = false })
			}
			for _, way := range []oaepWay{oaepUnwrap, oaepRaw} {
				if way == a.oaep || way == oaepRaw && slices.ContainsFunc(a.report.Imports, func(f hsm.Finding) bool { return f.Works && strings.Contains(f.Name, "SHA-256 taken off") }) {
					add(map[oaepWay]string{oaepUnwrap: "RSA-OAEP, C_UnwrapKey", oaepRaw: "RSA-OAEP, C_Decrypt, padding taken off here"}[way], func(c *Combination) { c.Sent, c.can.oaep = true, way })
				}
			}
			add("RSA-OAEP under a sealed pair", func(c *Combination) { c.Sent, c.Sealed = true, true })
		}
	}
	return out, nil
}

// Use makes the token work by a combination, from the next OpenMaster on.
func (t *Token) Use(c Combination) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.can = &c.can
}
