package token

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // OAEP by SHA-1 is all that some tokens know; collisions do not matter there
	"crypto/sha256"
	"fmt"
	"hash"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/hsm"
)

// Probe tries everything and reports it. It makes session objects only, and
// leaves nothing behind.
func (t *Token) Probe() (hsm.Report, error) {
	t.mu.Lock()
	logged := t.logged
	t.mu.Unlock()
	if !logged {
		return hsm.Report{}, ErrNotOpen
	}
	info, err := t.Info()
	if err != nil {
		return hsm.Report{}, err
	}
	a, err := t.explore(true)
	if err != nil {
		return hsm.Report{}, err
	}
	r := hsm.Report{Token: info, Capabilities: a.report, Usable: a.usable(t.module) == nil}
	for _, m := range a.mechanisms {
		mi, err := t.ctx.GetMechanismInfo(t.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)})
		if err != nil {
			continue // listed, and not known when asked: some do that
		}
		r.Mechanisms = append(r.Mechanisms, hsm.Mechanism{Number: fmt.Sprintf("0x%X", m), Name: mechanismNames[m], Flags: fmt.Sprintf("0x%X", mi.Flags), MinSize: mi.MinKeySize, MaxSize: mi.MaxKeySize})
	}
	return r, nil
}

// mechanismNames are those that matter here.
var mechanismNames = map[uint]string{
	pkcs11.CKM_AES_KEY_GEN: "CKM_AES_KEY_GEN", pkcs11.CKM_AES_ECB: "CKM_AES_ECB", pkcs11.CKM_AES_CBC: "CKM_AES_CBC", pkcs11.CKM_AES_CBC_PAD: "CKM_AES_CBC_PAD",
	pkcs11.CKM_AES_GCM: "CKM_AES_GCM", ckmLunaGCM: "CKM_LUNA_AES_GCM (old number)", ckmKW: "CKM_AES_KEY_WRAP", ckmKWPad: "CKM_AES_KEY_WRAP_PAD",
	ckmKWP: "CKM_AES_KEY_WRAP_KWP", ckmLunaKW: "CKM_LUNA_AES_KW", ckmLunaKWP: "CKM_LUNA_AES_KWP", pkcs11.CKM_SHA256_HMAC: "CKM_SHA256_HMAC",
	pkcs11.CKM_GENERIC_SECRET_KEY_GEN: "CKM_GENERIC_SECRET_KEY_GEN", ckmNCMac: "CKM_NC_SHA256_HMAC_KEY_GEN", pkcs11.CKM_RSA_PKCS_OAEP: "CKM_RSA_PKCS_OAEP",
	pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN: "CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKM_EC_KEY_PAIR_GEN: "CKM_EC_KEY_PAIR_GEN", pkcs11.CKM_ECDSA: "CKM_ECDSA",
}

// oaep tries to bring a key in by RSA-OAEP, which keeps it from this process.
func (x *explorer) oaep() error {
	names := []struct {
		name      string
		hash, mgf uint
		new       func() hash.Hash
	}{
		{"C_UnwrapKey, RSA-OAEP with SHA-256", pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, sha256.New},
		{"C_UnwrapKey, RSA-OAEP with SHA-1", pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, sha1.New},
	}
	if !x.a.has(pkcs11.CKM_RSA_PKCS_OAEP) || !x.a.has(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN) {
		for _, n := range names {
			x.a.report.Imports = append(x.a.report.Imports, hsm.Finding{Name: n.name, Why: notListed})
		}
		return nil
	}
	pub, priv, key, err := x.rsaPair()
	if err != nil {
		x.a.report.Imports = append(x.a.report.Imports, fails("make an RSA pair", err))
		return gone(err)
	}
	defer x.destroy(x.s, pub)
	defer x.destroy(x.s, priv)
	for _, n := range names {
		f := works(n.name, "a known AES key came in")
		if err := x.proveOAEP(priv, key, n.hash, n.mgf, n.new()); err != nil {
			if gone(err) != nil {
				return err
			}
			f = fails(n.name, err)
		}
		x.a.report.Imports = append(x.a.report.Imports, f)
	}
	return nil
}

func (x *explorer) rsaPair() (pub, priv pkcs11.ObjectHandle, key *rsa.PublicKey, err error) {
	x.objects.Lock()
	pub, priv, err = x.ctx.GenerateKeyPair(x.s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_MODULUS_BITS, 3072), attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}), attr(pkcs11.CKA_WRAP, true)},
		append(x.guarded(false, false), attr(pkcs11.CKA_UNWRAP, true), attr(pkcs11.CKA_DECRYPT, false)))
	x.objects.Unlock()
	if err != nil {
		return 0, 0, nil, err
	}
	v, err := x.ctx.GetAttributeValue(x.s, pub, []*pkcs11.Attribute{attr(pkcs11.CKA_MODULUS, nil), attr(pkcs11.CKA_PUBLIC_EXPONENT, nil)})
	if err != nil {
		return 0, 0, nil, err
	}
	return pub, priv, &rsa.PublicKey{N: new(big.Int).SetBytes(v[0].Value), E: int(new(big.Int).SetBytes(v[1].Value).Int64())}, nil
}

func (x *explorer) proveOAEP(priv pkcs11.ObjectHandle, key *rsa.PublicKey, hashMech, mgf uint, h hash.Hash) error {
	known, err := x.aesKey()
	if err != nil {
		return err
	}
	defer x.destroy(x.s, known.handle)
	text, err := rsa.EncryptOAEP(h, rand.Reader, key, known.value, nil)
	if err != nil {
		return err
	}
	mech := pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.NewOAEPParams(hashMech, mgf, pkcs11.CKZ_DATA_SPECIFIED, nil))
	x.objects.Lock()
	got, err := x.ctx.UnwrapKey(x.s, []*pkcs11.Mechanism{mech}, priv, text, unwrapTemplate(x.sessionTemplate(false), pkcs11.CKK_AES))
	x.objects.Unlock()
	if err != nil {
		return err
	}
	defer x.destroy(x.s, got)
	if err := x.tighten(x.s, got); err != nil {
		return err
	}
	same, err := x.sameKey(known.handle, got)
	if err == nil && !same {
		err = fmt.Errorf("another key came in")
	}
	return err
}
