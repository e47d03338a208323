package kms

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" //nolint:gosec // IBM's API has a variant with OAEP over SHA-1, where it is not weak
	_ "crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// An import token is an RSA key by which material travels encrypted, and a
// nonce by which the sender proves to hold that material. One per instance, at
// importtokens/<instance>. The private half is sealed; it opens here and not
// in the HSM, since few modules can do OAEP with SHA-256.
type tokenRecord struct {
	ID        string    `json:"id"`
	CreatedAt time.Time `json:"createdAt"`
	Expires   time.Time `json:"expires"`
	Max       int       `json:"max"`
	Left      int       `json:"left"`
	Public    []byte    `json:"public"` // PKIX DER
	Private   []byte    `json:"private"`
	Nonce     []byte    `json:"nonce"`
}

const (
	transportBits  = 4096
	nonceBytes     = 16
	defaultExpiry  = 600
	minExpiry      = 300
	maxExpiry      = 86400
	maxRetrievals  = 500
	importTokenDir = "importtokens/"
)

func tokenAAD(instance, id string) []byte {
	return []byte("kmsctl import token\x00" + instance + "\x00" + id)
}

func (t *tokenRecord) show() kmsapi.ImportToken {
	return kmsapi.ImportToken{ID: t.ID, CreationDate: &t.CreatedAt, ExpirationDate: &t.Expires, MaxAllowedRetrievals: t.Max, RemainingRetrievals: t.Left}
}

// CreateImportToken makes an import token; it replaces the one before.
func (s *Service) CreateImportToken(ctx context.Context, instance string, in kmsapi.ImportTokenRequest) (kmsapi.ImportToken, error) {
	alive, err := s.alive(ctx, instance)
	if err != nil {
		return kmsapi.ImportToken{}, err
	}
	seconds, times := defaultExpiry, 1
	if in.Expiration != nil {
		seconds = *in.Expiration
	}
	if in.MaxAllowedRetrievals != nil {
		times = *in.MaxAllowedRetrievals
	}
	if seconds < minExpiry || seconds > maxExpiry {
		return kmsapi.ImportToken{}, invalid("expiration", "an integer between %d and %d (inclusive)", minExpiry, maxExpiry)
	}
	if times < 1 || times > maxRetrievals {
		return kmsapi.ImportToken{}, invalid("maxAllowedRetrievals", "an integer between 1 and %d (inclusive)", maxRetrievals)
	}
	now := s.stamp()
	t := tokenRecord{ID: uuid.NewString(), CreatedAt: now, Expires: now.Add(time.Duration(seconds) * time.Second), Max: times, Left: times, Nonce: make([]byte, nonceBytes)}
	if _, err := rand.Read(t.Nonce); err != nil {
		return kmsapi.ImportToken{}, err
	}
	if err := s.newTransportKey(ctx, instance, &t); err != nil {
		return kmsapi.ImportToken{}, err
	}
	var old tokenRecord
	rev, err := s.store.Get(ctx, importTokenDir+instance, &old)
	if err != nil && !errors.Is(err, record.ErrNotFound) {
		return kmsapi.ImportToken{}, err
	}
	if err := conflict(s.store.Commit(ctx, alive, record.Change{Path: importTokenDir + instance, Value: t, Rev: rev})); err != nil {
		return kmsapi.ImportToken{}, err
	}
	return t.show(), nil
}

func (s *Service) newTransportKey(ctx context.Context, instance string, t *tokenRecord) error {
	key, err := rsa.GenerateKey(rand.Reader, transportBits)
	if err != nil {
		return err
	}
	if t.Public, err = x509.MarshalPKIXPublicKey(&key.PublicKey); err != nil {
		return err
	}
	der := x509.MarshalPKCS1PrivateKey(key)
	defer clear(der)
	t.Private, err = s.sealer.Seal(ctx, der, tokenAAD(instance, t.ID))
	return err
}

// ImportToken retrieves the public key and the nonce; each retrieval counts.
func (s *Service) ImportToken(ctx context.Context, instance string) (kmsapi.ImportToken, error) {
	if _, err := s.Instance(ctx, instance); err != nil {
		return kmsapi.ImportToken{}, err
	}
	for range maxTries {
		t, rev, err := s.importToken(ctx, instance)
		if err != nil {
			return kmsapi.ImportToken{}, err
		}
		if t.Left == 0 {
			return kmsapi.ImportToken{}, refusal(fault.Conflict, "", kmsapi.TokenExpired)
		}
		t.Left--
		err = s.store.Commit(ctx, record.Change{Path: importTokenDir + instance, Value: t, Rev: rev})
		if errors.Is(err, record.ErrConflict) {
			continue
		}
		out := t.show()
		out.Payload = base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: t.Public}))
		out.Nonce = base64.StdEncoding.EncodeToString(t.Nonce)
		return out, err
	}
	return kmsapi.ImportToken{}, refusal(fault.Conflict, "", kmsapi.Conflict)
}

func (s *Service) importToken(ctx context.Context, instance string) (*tokenRecord, int64, error) {
	var t tokenRecord
	rev, err := s.store.Get(ctx, importTokenDir+instance, &t)
	if errors.Is(err, record.ErrNotFound) || err == nil && !s.now().Before(t.Expires) {
		return nil, 0, refusal(fault.Conflict, "", kmsapi.TokenExpired)
	}
	return &t, rev, err
}

// dropEndedToken destroys the private key of a token that has expired.
func (s *Service) dropEndedToken(ctx context.Context, instance string) error {
	var t tokenRecord
	rev, err := s.store.Get(ctx, importTokenDir+instance, &t)
	if errors.Is(err, record.ErrNotFound) || err == nil && s.now().Before(t.Expires) {
		return nil
	}
	if err == nil {
		err = s.store.Commit(ctx, record.Change{Path: importTokenDir + instance, Rev: rev})
	}
	if errors.Is(err, record.ErrConflict) { // a new token took its place
		return nil
	}
	return err
}

// payload gives the material of a request to create, import or rotate: nil
// when none is given, else decoded, and decrypted when it came by an import
// token. The caller clears it.
func (s *Service) payload(ctx context.Context, instance string, in kmsapi.CreateKey) ([]byte, error) {
	secure := 0
	for _, f := range []string{in.EncryptedNonce, in.IV, in.EncryptionAlgorithm} {
		if f != "" {
			secure++
		}
	}
	if in.Payload == "" {
		if secure > 0 {
			return nil, invalid("payload", "present when encryptedNonce, iv or encryptionAlgorithm is")
		}
		return nil, nil
	}
	b, err := base64.StdEncoding.DecodeString(in.Payload)
	if err != nil {
		return nil, invalid("payload", "a base64 encoded key material: %v", err)
	}
	switch {
	case secure == 0:
		return b, checkSize(in.Extractable, len(b))
	case secure < 3:
		return nil, invalid("encryptedNonce", "present together with iv and encryptionAlgorithm")
	case in.Extractable:
		return nil, invalid("encryptedNonce", "absent: an import token is for root keys")
	}
	return s.openTransport(ctx, instance, b, in)
}

func (s *Service) openTransport(ctx context.Context, instance string, sealed []byte, in kmsapi.CreateKey) ([]byte, error) {
	h := crypto.SHA256
	switch in.EncryptionAlgorithm {
	case kmsapi.OAEPSHA256:
	case kmsapi.OAEPSHA1:
		h = crypto.SHA1
	default:
		return nil, invalid("encryptionAlgorithm", "%s or %s", kmsapi.OAEPSHA256, kmsapi.OAEPSHA1)
	}
	nonce, err := base64.StdEncoding.DecodeString(in.EncryptedNonce)
	if err != nil {
		return nil, invalid("encryptedNonce", "base64: %v", err)
	}
	t, _, err := s.importToken(ctx, instance)
	if err != nil {
		return nil, err
	}
	der, err := s.sealer.Unseal(ctx, t.Private, tokenAAD(instance, t.ID))
	if err != nil {
		return nil, err
	}
	defer clear(der)
	key, err := x509.ParsePKCS1PrivateKey(der)
	if err != nil {
		return nil, err
	}
	material, err := key.Decrypt(nil, sealed, &rsa.OAEPOptions{Hash: h, MGFHash: h})
	if err != nil {
		return nil, invalid("payload", "key material that is encrypted by the import token's public key")
	}
	if err := checkSize(false, len(material)); err != nil {
		clear(material)
		return nil, err
	}
	got, err := openNonce(material, nonce, in)
	if err == nil && subtle.ConstantTimeCompare(got, t.Nonce) != 1 {
		err = refusal(fault.Usage, "", kmsapi.WrongNonce)
	}
	if err != nil {
		clear(material)
		return nil, err
	}
	return material, nil
}

// openNonce decrypts the nonce under the material itself, which proves that
// the sender holds it.
func openNonce(material, sealed []byte, in kmsapi.CreateKey) ([]byte, error) {
	wrong := refusal(fault.Usage, "", kmsapi.WrongNonceIV)
	block, err := aes.NewCipher(material)
	if err != nil {
		return nil, err
	}
	if in.EncryptionAlgorithm == kmsapi.OAEPSHA256 {
		g, err := cipher.NewGCM(block)
		iv := decodeIV(in.IV, 12)
		if err != nil || iv == nil {
			return nil, errors.Join(err, wrong)
		}
		out, err := g.Open(nil, iv, sealed, nil)
		if err != nil {
			return nil, wrong
		}
		return out, nil
	}
	iv := decodeIV(in.IV, aes.BlockSize)
	if iv == nil || len(sealed) == 0 || len(sealed)%aes.BlockSize != 0 {
		return nil, wrong
	}
	out := make([]byte, len(sealed))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(out, sealed)
	n := int(out[len(out)-1])
	if n == 0 || n > aes.BlockSize || !bytes.Equal(out[len(out)-n:], bytes.Repeat([]byte{byte(n)}, n)) {
		return nil, wrong
	}
	return out[:len(out)-n], nil
}

// decodeIV takes base64, and also the bytes themselves: IBM's Go client sends
// an iv that it was given as it is.
func decodeIV(s string, n int) []byte {
	if b, err := base64.StdEncoding.DecodeString(s); err == nil && len(b) == n {
		return b
	}
	if len(s) == n {
		return []byte(s)
	}
	return nil
}
