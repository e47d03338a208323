package hsm

import (
	"bytes"
	"crypto/cipher"
	"crypto/subtle"
	"errors"
)

// ImportPair is an RSA pair by which material travels into the HSM. Its private
// half is held by the token, or sealed.
type ImportPair struct {
	Held   []byte // blob of the half that the token holds: Destroy takes it
	Sealed []byte // where the token can hold none, or there are several
	Public []byte // PKIX DER
}

// Sent is material that travels encrypted, and the proof that the sender holds
// it.
type Sent struct {
	SHA1     bool   // OAEP over SHA-1, and the nonce by AES-CBC; else SHA-256 and AES-GCM
	Material []byte // by RSA-OAEP
	Nonce    []byte // encrypted by the material
	IV       []byte
	Want     []byte // the nonce that must come out
}

// What may be wrong with material that was sent.
var (
	ErrMaterial    = errors.New("the material does not open, or is no AES key")
	ErrSealedNonce = errors.New("the nonce does not open by the material")
	ErrNonce       = errors.New("it is another nonce")
)

// Refusals are those, numbered from 1 on where they travel.
var Refusals = []error{ErrMaterial, ErrSealedNonce, ErrNonce}

// Prove checks that who sent the material holds it. The cipher works by it.
func (m Sent) Prove(b cipher.Block) error {
	open := m.openGCM
	if m.SHA1 {
		open = m.openCBC
	}
	got, err := open(b)
	if err == nil && subtle.ConstantTimeCompare(got, m.Want) != 1 {
		err = ErrNonce
	}
	return err
}

const gcmIV = 12

func (m Sent) openGCM(b cipher.Block) ([]byte, error) {
	if len(m.IV) != gcmIV {
		return nil, ErrSealedNonce
	}
	g, err := cipher.NewGCM(b)
	if err != nil {
		return nil, err
	}
	out, err := g.Open(nil, m.IV, m.Nonce, nil)
	if err != nil {
		return nil, ErrSealedNonce
	}
	return out, nil
}

func (m Sent) openCBC(b cipher.Block) ([]byte, error) {
	size := b.BlockSize()
	if len(m.IV) != size || len(m.Nonce) == 0 || len(m.Nonce)%size != 0 {
		return nil, ErrSealedNonce
	}
	out := make([]byte, len(m.Nonce))
	cipher.NewCBCDecrypter(b, m.IV).CryptBlocks(out, m.Nonce)
	n := int(out[len(out)-1])
	if n == 0 || n > size || !bytes.Equal(out[len(out)-n:], bytes.Repeat([]byte{byte(n)}, n)) {
		return nil, ErrSealedNonce
	}
	return out[:len(out)-n], nil
}

// The blob of a private half that the token holds: format 3, its CKA_ID.
const pairFormat = 3

// PairBlob names the private half of an import pair in the token.
func PairBlob(id []byte) []byte { return append([]byte{pairFormat}, id...) }

// HeldID is the CKA_ID of what the token holds for a blob, of a key or of a
// pair; nil when it holds nothing.
func HeldID(blob []byte) []byte {
	if InToken(blob) {
		id, _ := ParsePlaced(blob)
		return id
	}
	id, _ := ParsePair(blob)
	return id
}

// ParsePair takes apart what PairBlob made; ok is false for any other blob.
func ParsePair(blob []byte) (id []byte, ok bool) {
	if len(blob) != 1+placedID || blob[0] != pairFormat {
		return nil, false
	}
	return blob[1:], true
}
