package hsm

// The words that the KMS and the connector share. No PIN, no PKCS#11 handle
// and no key material that was born in the token is among them.

// TokenInfo describes the token that a connector serves.
type TokenInfo struct {
	Module       string `json:"module"`       // path of the PKCS#11 library
	Library      string `json:"library"`      // its own description and version
	Slot         uint64 `json:"slot"`         // slot id, which may move; never used to find the token again
	Label        string `json:"label"`        //
	Serial       string `json:"serial"`       //
	Manufacturer string `json:"manufacturer"` //
	Model        string `json:"model"`        //
	Firmware     string `json:"firmware"`     //
	PINCountLow  bool   `json:"pinCountLow"`  // CKF_USER_PIN_COUNT_LOW: a wrong PIN was entered since the last good one
	PINFinalTry  bool   `json:"pinFinalTry"`  // CKF_USER_PIN_FINAL_TRY
	PINLocked    bool   `json:"pinLocked"`    // CKF_USER_PIN_LOCKED
	LoggedIn     bool   `json:"loggedIn"`     //
}

// MasterIDs are the CKA_ID values of one version of an installation's master
// keys, chosen by the KMS and kept in its store before the keys are made, so
// that a run that is killed in between finds them again.
type MasterIDs struct {
	Install string `json:"install"` // goes into the labels: kms:<install>:mkek:v1 …
	Wrap    []byte `json:"wrap"`    // AES-256, wraps root keys out of the token
	Seal    []byte `json:"seal"`    // AES-256, encrypts the service's own secrets and standard keys
	Sign    []byte `json:"sign"`    // EC P-256 or RSA, signs the audit log's heads; one for all versions
	Version uint16 `json:"-"`       // goes into the labels, the blobs and what Seal makes
	Spare   bool   `json:"-"`       // opens what this version made; another one makes what is new
}

// Master is what an installation's master keys are recognised by.
type Master struct {
	WrapKCV   []byte   `json:"wrapKCV"`   // check value, see SameKey
	SealKCV   []byte   `json:"sealKCV"`   // check value, see SameKey
	PublicKey []byte   `json:"publicKey"` // of Sign, PKIX DER
	Suite     uint8    `json:"suite"`     // the cipher suite that the self-test chose
	WrapWay   string   `json:"wrapWay"`   // mechanism by which root keys leave the token
	Notes     []string `json:"notes"`     // what an operator should know: weaker attributes, missing mechanisms
}

// Installation is what one installation of this product left in a token.
type Installation struct {
	ID      string   `json:"id"`
	Objects []string `json:"objects"` // their labels, without the installation
}

// Proof shows that a clearing was asked for by the installation itself: a text
// that its sealing key sealed. The additional data say what is asked for.
type Proof struct{ Sealed, AAD []byte }

// Cipher suites. Each ciphertext names its own.
const (
	SuiteGCM       uint8 = 1 // AES-256-GCM, 12-byte IV from C_GenerateRandom, 16-byte tag appended
	SuiteGCMToken  uint8 = 2 // AES-256-GCM, IV made by the token
	SuiteCBCHMAC   uint8 = 3 // AES-256-CBC with PKCS#7 padding, then HMAC-SHA-256 by the version's own MAC key
	maxSuite             = SuiteCBCHMAC
	minCiphertext        = 16
	maxCiphertext        = 1 << 16
	maxInitVectors       = 16
)

// Sealed is the output of a cipher suite. The suite number and the caller's
// additional data are authenticated with it.
type Sealed struct {
	Suite      uint8
	IV         []byte
	Ciphertext []byte
}

// Plausible refuses what no suite can have made, before the token sees it.
func (s Sealed) Plausible() bool {
	return s.Suite >= SuiteGCM && s.Suite <= maxSuite && len(s.IV) > 0 && len(s.IV) <= maxInitVectors &&
		len(s.Ciphertext) >= minCiphertext && len(s.Ciphertext) <= maxCiphertext
}

// NewKey is a root key that was made in, or brought into, the token and
// wrapped out under the master key.
type NewKey struct {
	Blob []byte // opaque: header and wrapped key, only the same master key opens it
	KCV  []byte // check value, see SameKey
}

// Carried is a root key on its way from one token to another, wrapped by
// RSA-OAEP under a public key of the other: itself and, where there is one, its
// MAC key.
type Carried struct {
	Parts [][]byte
	SHA1  bool   // OAEP over SHA-1; else SHA-256
	KCV   []byte // check value, see SameKey
}
