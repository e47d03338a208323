package hsm

import "encoding/binary"

// Whatever a master key made names its version, so that it opens after the
// master keys were changed. The first installations' Seal named none: theirs
// begins with a suite, and is of version 1.

// FirstMaster is the version of the master keys that an installation is made
// with.
const FirstMaster uint16 = 1

const (
	blobFormat = 1
	blobHead   = 4
	sealFormat = 0x81 // no suite
	sealHead   = 3
)

// BlobHead begins a wrapped root key: format, form, version of the master key.
func BlobHead(form uint8, version uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte{blobFormat, form}, version)
}

// ParseBlob takes BlobHead off; ok is false when b is no wrapped root key.
func ParseBlob(b []byte) (form uint8, version uint16, rest []byte, ok bool) {
	if len(b) < blobHead || b[0] != blobFormat {
		return 0, 0, nil, false
	}
	return b[1], binary.BigEndian.Uint16(b[2:]), b[blobHead:], true
}

// SealHead begins what Seal makes: format, version of the master key.
func SealHead(version uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte{sealFormat}, version)
}

// ParseSeal takes SealHead off.
func ParseSeal(b []byte) (version uint16, rest []byte) {
	if len(b) < sealHead || b[0] != sealFormat {
		return FirstMaster, b
	}
	return binary.BigEndian.Uint16(b[1:]), b[sealHead:]
}

// VersionOf is the version of the master keys that made a blob or what Seal
// gave; 0 for a blob that needs none to be opened, as that of a placed key.
func VersionOf(blob, sealed []byte) uint16 {
	if _, v, _, ok := ParseBlob(blob); ok {
		return v
	}
	if len(sealed) == 0 {
		return 0
	}
	v, _ := ParseSeal(sealed)
	return v
}
