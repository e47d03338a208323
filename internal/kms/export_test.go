package kms

import (
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// DecodeForTest and EncodeForTest are the two halves of the envelope.
var DecodeForTest = decodeCiphertext

func EncodeForTest(c kmsapi.Ciphertext) (string, error) {
	return encodeCiphertext(hsm.Sealed{Suite: c.Suite, IV: c.IV, Ciphertext: c.Ciphertext}, c.Handle)
}
