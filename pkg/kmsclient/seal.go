package kmsclient

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Seal encrypts material for import: it has the server make an import token,
// encrypts the material under its public key, and proves to hold the material
// by encrypting the token's nonce under it.
func (c *Client) Seal(ctx context.Context, material []byte, in *kmsapi.CreateKey) error {
	if err := c.Do(ctx, http.MethodPost, "/api/v2/import_token", kmsapi.ImportTokenRequest{}, nil); err != nil {
		return err
	}
	var t kmsapi.ImportToken
	if err := c.Do(ctx, http.MethodGet, "/api/v2/import_token", nil, &t); err != nil {
		return err
	}
	return SealUnder(t, material, in)
}

// SealUnder does the same under an import token that was fetched before,
// without a server: where the material is, there need be no network.
func SealUnder(t kmsapi.ImportToken, material []byte, in *kmsapi.CreateKey) error {
	key, err := publicKey(t.Payload)
	if err != nil {
		return fmt.Errorf("read the import token: %w", err)
	}
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, key, material, nil)
	if err != nil {
		return err
	}
	nonce, err := base64.StdEncoding.DecodeString(t.Nonce)
	if err != nil {
		return fmt.Errorf("read the import token: %w", err)
	}
	block, err := aes.NewCipher(material)
	if err != nil {
		return fmt.Errorf("the material is no AES key: %w", err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	iv := make([]byte, gcm.NonceSize())
	if _, err := rand.Read(iv); err != nil {
		return err
	}
	enc := base64.StdEncoding.EncodeToString
	in.Payload, in.EncryptedNonce, in.IV, in.EncryptionAlgorithm = enc(sealed), enc(gcm.Seal(nil, iv, nonce, nil)), enc(iv), kmsapi.OAEPSHA256
	return nil
}

func publicKey(payload string) (*rsa.PublicKey, error) {
	b, err := base64.StdEncoding.DecodeString(payload)
	if err != nil {
		return nil, err
	}
	p, _ := pem.Decode(b)
	if p == nil {
		return nil, errors.New("no PEM")
	}
	k, err := x509.ParsePKIXPublicKey(p.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := k.(*rsa.PublicKey)
	if !ok {
		return nil, errors.New("no RSA key")
	}
	return key, nil
}
