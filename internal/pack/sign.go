package pack

import (
	"errors"
	"fmt"
	"os"

	"aead.dev/minisign"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// Signer signs an archive's index by a minisign secret key file. The index has
// the digest of everything else, so that its signature is one over the whole.
func Signer(keyFile string, password []byte) (func(index []byte) ([]byte, error), error) {
	bad := func(err error) error {
		return fault.New(fault.BadContent, "read signing key", keyFile, err).WithHint("give a secret key of minisign, and its password")
	}
	text, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fault.New(fault.NotFound, "read signing key", keyFile, reason(err)).WithHint("check --sign-key")
	}
	var key minisign.PrivateKey
	if minisign.IsEncrypted(text) {
		if key, err = minisign.DecryptKey(string(password), text); err != nil {
			return nil, fault.New(fault.Denied, "read signing key", keyFile, err).WithHint("check the password of the signing key")
		}
	} else if err := key.UnmarshalText(text); err != nil {
		return nil, bad(err)
	}
	return func(index []byte) ([]byte, error) {
		// The comment says what was signed and no time, so that the same key and
		// content give the same archive.
		return minisign.SignWithComments(key, index, "file:"+archive.IndexName, "signature of a kmsctl archive"), nil
	}, nil
}

// Encrypted says whether a signing key needs a password.
func Encrypted(keyFile string) bool {
	text, err := os.ReadFile(keyFile)
	return err == nil && minisign.IsEncrypted(text)
}

// CheckSignature checks an archive's signature by a minisign public key file.
// No key is fetched and no other is believed.
func CheckSignature(a *archive.Archive, keyFile string) error {
	text, err := os.ReadFile(keyFile)
	if err != nil {
		return fault.New(fault.NotFound, "read public key", keyFile, reason(err)).WithHint("check --key")
	}
	var key minisign.PublicKey
	if err := key.UnmarshalText(text); err != nil {
		return fault.New(fault.BadContent, "read public key", keyFile, err).WithHint("give a public key of minisign")
	}
	refuse := func(err error) error {
		return fault.New(fault.BadContent, "check signature of", a.Name, err).WithHint("do not use the archive; ask its maker for one that is signed by this key")
	}
	switch {
	case a.Index == nil:
		return refuse(errors.New("it is not one of kmsctl's own, or standard input, and has no signature that can be checked first"))
	case a.Signature == nil:
		return refuse(errors.New("it is not signed"))
	case !minisign.Verify(key, a.Raw, a.Signature):
		return refuse(fmt.Errorf("the signature is not one of key %X over its index", key.ID()))
	}
	return nil
}
