package hsm

// Where a root key lives: wrapped out of the token under the master key, or in
// the token as an object that never leaves it.
const (
	PlacementWrapped = "wrapped"
	PlacementToken   = "token"
)

// IDLen is the length of the CKA_ID of what stays in the token.
const IDLen = 16

// A key that stays in the token has no wrapped form: its blob only says how to
// find it. Format 2, whether a MAC key stands beside it, its CKA_ID.
const (
	placedFormat = 2
	placedHead   = 2
	placedID     = IDLen
)

// PlacedBlob names a key that stays in the token.
func PlacedBlob(id []byte, mac bool) []byte {
	out := []byte{placedFormat, 0}
	if mac {
		out[1] = 1
	}
	return append(out, id...)
}

// InToken says whether the blob is that of a key that stays in the token.
func InToken(blob []byte) bool {
	return len(blob) == placedHead+placedID && blob[0] == placedFormat && blob[1] <= 1
}

// ParsePlaced takes apart what PlacedBlob made.
func ParsePlaced(blob []byte) (id []byte, mac bool) { return blob[placedHead:], blob[1] == 1 }
