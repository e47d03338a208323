package token

import (
	"fmt"

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
	pkcs11.CKM_GENERIC_SECRET_KEY_GEN: "CKM_GENERIC_SECRET_KEY_GEN", ckmNCMac: "CKM_NC_SHA256_HMAC_KEY_GEN", pkcs11.CKM_RSA_PKCS_OAEP: "CKM_RSA_PKCS_OAEP", pkcs11.CKM_RSA_X_509: "CKM_RSA_X_509",
	pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN: "CKM_RSA_PKCS_KEY_PAIR_GEN", pkcs11.CKM_EC_KEY_PAIR_GEN: "CKM_EC_KEY_PAIR_GEN", pkcs11.CKM_ECDSA: "CKM_ECDSA",
}
