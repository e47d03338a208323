package kms

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// An import token is an RSA pair by which material travels encrypted, and a
// nonce by which the sender proves to hold that material. One per instance, at
// importtokens/<instance>. The HSM holds the private half, or sealed it; what
// was sent opens there and never here.
type tokenRecord struct {
	ID        string    `json:"id"`
	CreatedAt time.Time `json:"createdAt"`
	Expires   time.Time `json:"expires"`
	Max       int       `json:"max"`
	Left      int       `json:"left"`
	Public    []byte    `json:"public"`            // PKIX DER
	Private   []byte    `json:"private,omitempty"` // sealed
	Held      []byte    `json:"held,omitempty"`    // blob of what the HSM holds
	Nonce     []byte    `json:"nonce"`
}

const (
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
	var old tokenRecord
	err = s.making(ctx, func(e Epoch) error {
		pairID, end, err := s.announce(ctx, hsm.PairBlob)
		if err != nil {
			return err
		}
		if err := s.sealing(ctx, e); err != nil { // in the HSM, where it does not hold the pair
			return err
		}
		pair, err := s.hsm.NewImportPair(ctx, pairID, tokenAAD(instance, t.ID))
		if err != nil {
			return err
		}
		t.Public, t.Private, t.Held = pair.Public, pair.Sealed, pair.Held
		made, err := s.made(e, nil, t.Private)
		if err != nil {
			return s.unmake(ctx, t.Held, conflict(err))
		}
		rev, err := s.store.Get(ctx, importTokenDir+instance, &old)
		if err == nil || errors.Is(err, record.ErrNotFound) {
			err = conflict(s.store.Commit(ctx, append(made, alive, record.Change{Path: importTokenDir + instance, Value: t, Rev: rev}, end)...))
		}
		return s.unmake(ctx, t.Held, err)
	})
	if err != nil {
		return kmsapi.ImportToken{}, err
	}
	return t.show(), s.destroy(ctx, [][]byte{old.Held})
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
	if errors.Is(err, record.ErrNotFound) || err == nil && !s.Time().Before(t.Expires) {
		return nil, 0, refusal(fault.Conflict, "", kmsapi.TokenExpired)
	}
	return &t, rev, err
}

// dropEndedToken destroys the private key of a token that has expired.
func (s *Service) dropEndedToken(ctx context.Context, instance string) error {
	var t tokenRecord
	rev, err := s.store.Get(ctx, importTokenDir+instance, &t)
	if errors.Is(err, record.ErrNotFound) || err == nil && s.Time().Before(t.Expires) {
		return nil
	}
	if err == nil {
		err = s.destroy(ctx, [][]byte{t.Held}) // first, so that a record names it until it is gone
	}
	if err == nil {
		err = s.store.Commit(ctx, record.Change{Path: importTokenDir + instance, Rev: rev})
	}
	if errors.Is(err, record.ErrConflict) { // a new token took its place
		return nil
	}
	return err
}

// material is what a key is to be made of: nil when the HSM makes it.
type material struct {
	clear []byte
	sent  *hsm.Sent // instead, what travelled by an import token
	pair  hsm.ImportPair
	aad   []byte
}

// zero clears what is there in the clear.
func (m *material) zero() {
	if m != nil {
		clear(m.clear)
	}
}

// payload gives the material of a request to create, import or rotate. The
// caller zeroes it.
func (s *Service) payload(ctx context.Context, instance string, in kmsapi.CreateKey) (*material, error) {
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
		return &material{clear: b}, checkSize(in.Extractable, len(b))
	case secure < 3:
		return nil, invalid("encryptedNonce", "present together with iv and encryptionAlgorithm")
	case in.Extractable:
		return nil, invalid("encryptedNonce", "absent: an import token is for root keys")
	}
	return s.sent(ctx, instance, b, in)
}

func (s *Service) sent(ctx context.Context, instance string, sealed []byte, in kmsapi.CreateKey) (*material, error) {
	m := hsm.Sent{Material: sealed, SHA1: in.EncryptionAlgorithm == kmsapi.OAEPSHA1}
	if !m.SHA1 && in.EncryptionAlgorithm != kmsapi.OAEPSHA256 {
		return nil, invalid("encryptionAlgorithm", "%s or %s", kmsapi.OAEPSHA256, kmsapi.OAEPSHA1)
	}
	var err error
	if m.Nonce, err = base64.StdEncoding.DecodeString(in.EncryptedNonce); err != nil {
		return nil, invalid("encryptedNonce", "base64: %v", err)
	}
	m.IV = decodeIV(in.IV, gcmIV)
	if m.SHA1 {
		m.IV = decodeIV(in.IV, cbcIV)
	}
	t, _, err := s.importToken(ctx, instance)
	if err != nil {
		return nil, err
	}
	m.Want = t.Nonce
	return &material{sent: &m, pair: hsm.ImportPair{Held: t.Held, Sealed: t.Private}, aad: tokenAAD(instance, t.ID)}, nil
}

// Lengths of the IV of the nonce, by RSAES_OAEP_SHA_256 and by RSAES_OAEP_SHA_1.
const (
	gcmIV = 12
	cbcIV = 16
)

// refusedMaterial says in the API's words what was wrong with what was sent.
func refusedMaterial(err error) error {
	switch {
	case errors.Is(err, hsm.ErrMaterial):
		return invalid("payload", "key material that is encrypted by the import token's public key")
	case errors.Is(err, hsm.ErrSealedNonce):
		return refusal(fault.Usage, "", kmsapi.WrongNonceIV)
	case errors.Is(err, hsm.ErrNonce):
		return refusal(fault.Usage, "", kmsapi.WrongNonce)
	case fault.KindOf(err) == fault.NotFound: // it ended just now
		return refusal(fault.Conflict, "", kmsapi.TokenExpired)
	}
	return err
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
