package token

import (
	"bytes"
	"crypto/cipher"
	"crypto/hmac"
	"encoding/binary"
	"errors"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// form is what a wrapped key looks like, whatever number a token gives to the
// mechanism: blobs name the form, so that they outlive firmware and token.
type form uint8

const (
	formKW  form = 1 // RFC 3394
	formKWP form = 2 // RFC 5649
	formCBC form = 3 // IV, AES-CBC with PKCS#7 padding, HMAC-SHA-256 by the master's MAC key
)

// Mechanism numbers that the binding lacks. A number does not name an
// algorithm: 0x210A is RFC 5649 in SoftHSM and something else elsewhere.
const (
	ckmKW      = 0x2109
	ckmKWPad   = 0x210A
	ckmKWP     = 0x210B
	ckmLunaKW  = 0x80000170
	ckmLunaKWP = 0x80000171
	ckmLunaGCM = 0x8000011C // what old Luna clients call AES-GCM
	ckmNCMac   = 0xDE436997 // CKM_NC_SHA256_HMAC_KEY_GEN
)

// way is one mechanism that may wrap, with the form that it must show.
type way struct {
	name      string
	mechanism uint
	form      form
}

// ways in the order in which they are wanted.
var ways = []way{
	{"CKM_AES_KEY_WRAP_KWP (RFC 5649)", ckmKWP, formKWP},
	{"CKM_LUNA_AES_KWP (RFC 5649)", ckmLunaKWP, formKWP},
	{"CKM_AES_KEY_WRAP_PAD (RFC 5649)", ckmKWPad, formKWP},
	{"CKM_AES_KEY_WRAP (RFC 3394)", ckmKW, formKW},
	{"CKM_LUNA_AES_KW (RFC 3394)", ckmLunaKW, formKW},
	{"CKM_AES_CBC_PAD with HMAC-SHA-256", pkcs11.CKM_AES_CBC_PAD, formCBC},
}

// wrapKey takes key h out of the token.
func (t *Token) wrapKey(s pkcs11.SessionHandle, w way, mac macKind, kek keyPair, h pkcs11.ObjectHandle) ([]byte, error) {
	if w.form != formCBC {
		b, err := t.ctx.WrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(w.mechanism, nil)}, kek.enc, h)
		if err != nil {
			return nil, t.device("wrap a key on", err)
		}
		return b, nil
	}
	iv, err := t.ctx.GenerateRandom(s, blockLen)
	if err != nil {
		return nil, t.device("make random bytes on", err)
	}
	b, err := t.ctx.WrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(w.mechanism, bytes.Clone(iv))}, kek.enc, h)
	if err != nil {
		return nil, t.device("wrap a key on", err)
	}
	b = append(iv, b...)
	tag, err := t.shim.sign(s, kek.mac, mac.sign, wrapText(b))
	if err != nil {
		return nil, t.device("authenticate on", err)
	}
	return append(b, tag...), nil
}

func wrapText(b []byte) []byte { return append([]byte("kmsctl wrapped key\x00"), b...) }

// foreign says that C_UnwrapKey did not like what it was given.
var errForeign = errors.New("it was not wrapped by this master key, or was changed")

// unwrapKey brings a wrapped key back as an object with the attributes of tpl,
// which lives as long as the session owner; s does the rest of the work.
func (t *Token) unwrapKey(s, owner pkcs11.SessionHandle, w way, mac macKind, kek keyPair, b []byte, tpl []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	var param []byte
	if w.form == formCBC {
		n := len(b) - macLen
		if n < 2*blockLen {
			return 0, errForeign
		}
		tag, err := t.shim.sign(s, kek.mac, mac.sign, wrapText(b[:n]))
		if err != nil {
			return 0, t.device("authenticate on", err)
		}
		if !hmac.Equal(tag, b[n:]) {
			return 0, errForeign
		}
		param, b = bytes.Clone(b[:blockLen]), b[blockLen:n]
	}
	if len(b) < 16 { // the binding does not bear an empty text
		return 0, errForeign
	}
	t.objects.Lock()
	defer t.objects.Unlock()
	h, err := t.ctx.UnwrapKey(owner, []*pkcs11.Mechanism{pkcs11.NewMechanism(w.mechanism, param)}, kek.enc, b, tpl)
	switch {
	case err == nil:
		return h, nil
	case Lost(err) && !is(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED): // SoftHSM's answer to a foreign blob
		return 0, t.device("open a key on", err)
	case stale(err), is(err, pkcs11.CKR_TEMPLATE_INCOMPLETE, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_MECHANISM_INVALID):
		return 0, t.device("open a key on", err)
	}
	return 0, fault.New(fault.BadContent, "open a key on", t.module, errors.Join(errForeign, err))
}

// goKW is RFC 3394 over any block cipher, to judge what a token made.
func goKW(b cipher.Block, iv [8]byte, text []byte) []byte {
	n := len(text) / 8
	r := bytes.Clone(text)
	a := iv
	var block [blockLen]byte
	for j := range 6 {
		for i := range n {
			copy(block[:8], a[:])
			copy(block[8:], r[8*i:8*i+8])
			b.Encrypt(block[:], block[:])
			copy(a[:], block[:8])
			t := binary.BigEndian.Uint64(a[:]) ^ uint64(n*j+i+1)
			binary.BigEndian.PutUint64(a[:], t)
			copy(r[8*i:], block[8:])
		}
	}
	return append(a[:], r...)
}

// Initial values of RFC 3394 (2.2.3.1) and RFC 5649 (3).
func ivKW() (iv [8]byte) {
	copy(iv[:], bytes.Repeat([]byte{0xA6}, 8))
	return iv
}

func ivKWP(n int) (iv [8]byte) {
	copy(iv[:], []byte{0xA6, 0x59, 0x59, 0xA6})
	binary.BigEndian.PutUint32(iv[4:], uint32(n))
	return iv
}

// judgeWrap says what a wrapping of text under b looks like in a form; CBC's
// begins with the IV that the token used. text is a multiple of 8 bytes.
func judgeWrap(f form, b cipher.Block, text, got []byte) []byte {
	switch f {
	case formKW:
		return goKW(b, ivKW(), text)
	case formKWP:
		return goKW(b, ivKWP(len(text)), text)
	case formCBC:
		if len(got) < blockLen {
			return nil
		}
		return append(bytes.Clone(got[:blockLen]), goCBC(b, got[:blockLen], text)...)
	}
	return nil
}

func goCBC(b cipher.Block, iv, text []byte) []byte {
	pad := blockLen - len(text)%blockLen
	out := append(bytes.Clone(text), bytes.Repeat([]byte{byte(pad)}, pad)...)
	last := iv
	for i := 0; i < len(out); i += blockLen {
		for j := range blockLen {
			out[i+j] ^= last[j]
		}
		b.Encrypt(out[i:i+blockLen], out[i:i+blockLen])
		last = out[i : i+blockLen]
	}
	return out
}
