package kms

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// DecodeForTest and EncodeForTest are the two halves of the envelope.
var DecodeForTest = decodeCiphertext

func EncodeForTest(c kmsapi.Ciphertext) (string, error) {
	return encodeCiphertext(hsm.Sealed{Suite: c.Suite, IV: c.IV, Ciphertext: c.Ciphertext}, c.Handle)
}

// RecordsForTest are n keys of an instance as they lie in the store.
func RecordsForTest(instance string, n int) []record.Change {
	var out []record.Change
	for i := range n {
		at := time.Date(2026, 1, 1, 0, 0, i, 0, time.UTC)
		k := keyRecord{ID: uuid.NewString(), Instance: instance, Kind: kindRoot, Name: fmt.Sprintf("key number %d", i), KeyRing: "default", State: stateActive, Bits: 256,
			CreatedAt: at, CreatedBy: "me", UpdatedAt: at, Version: versionRecord{ID: uuid.NewString(), CreatedAt: at, Blob: make([]byte, 60), KCV: make([]byte, 3)}}
		out = append(out, record.Change{Path: k.path(), Value: k})
	}
	return out
}
