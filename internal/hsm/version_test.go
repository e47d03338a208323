package hsm_test

import (
	"bytes"
	"testing"

	"github.com/kmsctl/kmsctl/internal/hsm"
)

func TestVersionsAreNamed(t *testing.T) {
	for _, v := range []uint16{1, 2, 255, 256, 65535} {
		b := append(hsm.BlobHead(3, v), "wrapped"...)
		if form, got, rest, ok := hsm.ParseBlob(b); !ok || form != 3 || got != v || string(rest) != "wrapped" {
			t.Errorf("blob of version %d: %d, %d, %q, %v", v, form, got, rest, ok)
		}
		if got, rest := hsm.ParseSeal(append(hsm.SealHead(v), "sealed"...)); got != v || string(rest) != "sealed" {
			t.Errorf("seal of version %d: %d, %q", v, got, rest)
		}
	}
}

// TestOldSealsAreOfVersion1: what was sealed before versions were named begins
// with its suite, and stays as it is.
func TestOldSealsAreOfVersion1(t *testing.T) {
	for _, suite := range []uint8{hsm.SuiteGCM, hsm.SuiteGCMToken, hsm.SuiteCBCHMAC} {
		old := []byte{suite, 12, 0, 0}
		if v, rest := hsm.ParseSeal(old); v != hsm.FirstMaster || !bytes.Equal(rest, old) {
			t.Errorf("suite %d: version %d, %x", suite, v, rest)
		}
	}
	for _, b := range [][]byte{nil, {1}, {1, 1, 0}, {2, 1, 0, 1}} {
		if _, _, _, ok := hsm.ParseBlob(b); ok {
			t.Errorf("%x was taken for a blob", b)
		}
	}
}
