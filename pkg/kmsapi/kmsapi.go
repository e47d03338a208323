// Package kmsapi has the words of the HTTP API: IBM Key Protect v2 with the
// dialect of IBM Cloud Private (ICP), and kmsctl's own calls for instances and
// onboarding. Field names and limits are those of IBM's API description.
package kmsapi

import "time"

// Headers of the API.
const (
	HeaderInstance    = "Bluemix-Instance" // Key Protect: id of the instance, a UUID
	HeaderInstanceICP = "Icp-Instance"     // the same in ICP's dialect
	HeaderCorrelation = "Correlation-Id"
	HeaderKeyRing     = "X-Kms-Key-Ring"
	HeaderKeyTotal    = "Key-Total" // answer to HEAD /keys
	HeaderPrefer      = "Prefer"    // return=minimal or return=representation
)

// Collection and content types.
const (
	TypeKey   = "application/vnd.ibm.kms.key+json"
	TypeError = "application/vnd.ibm.kms.error+json"

	TypeKeyVersion   = "application/vnd.ibm.kms.key.version+json"
	TypeAlias        = "application/vnd.ibm.kms.alias+json"
	TypeKeyRing      = "application/vnd.ibm.kms.key_ring+json"
	TypePolicy       = "application/vnd.ibm.kms.policy+json"
	TypeRegistration = "application/vnd.ibm.kms.registration+json"
	TypeAllowedIP    = "application/vnd.ibm.kms.allowed_ip_metadata+json"
	// TypeCollection is what lists of the ICP generation say.
	TypeCollection = "application/vnd.ibm.collection+json"
)

// Limits of the API.
const (
	MaxBody        = 1 << 20 // bytes of a request body
	MaxPlaintext   = 4096    // bytes that wrap takes
	MaxAADStrings  = 126
	MaxAADLength   = 255  // characters of each
	MaxStandard    = 7500 // bytes of a standard key's payload
	GeneratedDEK   = 32   // bytes that wrap makes when it is given none
	DefaultLimit   = 200
	MaxLimit       = 5000
	DefaultKeyRing = "default"
	MaxAliases     = 5  // of a key
	MaxKeyRings    = 50 // of an instance, the default one included
	MaxTags        = 30
	MaxCandidates  = 5000 // keys that a search looks at
)

// Metadata heads every collection.
type Metadata struct {
	CollectionType   string       `json:"collectionType"`
	CollectionTotal  int          `json:"collectionTotal"`
	TotalCount       *int         `json:"totalCount,omitempty"`
	SearchQuery      *SearchQuery `json:"searchQuery,omitempty"`
	IncompleteSearch bool         `json:"incompleteSearch,omitempty"`
}

// SearchQuery says how a list's search was understood.
type SearchQuery struct {
	Query  string   `json:"query"`
	Scopes []string `json:"scopes"`
	Not    bool     `json:"not"`
	Exact  bool     `json:"exact"`
}

// Keys is a collection of keys.
type Keys struct {
	Metadata  Metadata `json:"metadata"`
	Resources []Key    `json:"resources"`
}

// Key as the API shows it. Payload is the base64 material of a standard key,
// on creation and on GET only.
type Key struct {
	Type                 string             `json:"type,omitempty"`
	ID                   string             `json:"id,omitempty"`
	Name                 string             `json:"name,omitempty"`
	Aliases              []string           `json:"aliases,omitempty"`
	Description          string             `json:"description,omitempty"`
	Tags                 []string           `json:"tags,omitempty"`
	State                int                `json:"state"`
	Expiration           *time.Time         `json:"expirationDate,omitempty"`
	Extractable          bool               `json:"extractable"`
	CRN                  string             `json:"crn,omitempty"`
	Imported             bool               `json:"imported"`
	KeyRingID            string             `json:"keyRingID,omitempty"`
	CreationDate         *time.Time         `json:"creationDate,omitempty"`
	CreatedBy            string             `json:"createdBy,omitempty"`
	AlgorithmType        string             `json:"algorithmType,omitempty"`
	AlgorithmMetadata    *AlgorithmMetadata `json:"algorithmMetadata,omitempty"`
	AlgorithmBitSize     int                `json:"algorithmBitSize,omitempty"`
	AlgorithmMode        string             `json:"algorithmMode,omitempty"`
	LastUpdateDate       *time.Time         `json:"lastUpdateDate,omitempty"`
	LastRotateDate       *time.Time         `json:"lastRotateDate,omitempty"`
	NonactiveStateReason *int               `json:"nonactiveStateReason,omitempty"`
	KeyVersion           *KeyVersion        `json:"keyVersion,omitempty"`
	DualAuthDelete       *DualAuthDelete    `json:"dualAuthDelete,omitempty"`
	Rotation             *Rotation          `json:"rotation,omitempty"`
	Deleted              *bool              `json:"deleted,omitempty"`
	DeletedBy            string             `json:"deletedBy,omitempty"`
	DeletionDate         *time.Time         `json:"deletionDate,omitempty"`
	RestoreAllowed       *bool              `json:"restoreAllowed,omitempty"`
	RestoreExpiration    *time.Time         `json:"restoreExpirationDate,omitempty"`
	PurgeAllowed         *bool              `json:"purgeAllowed,omitempty"`
	PurgeAllowedFrom     *time.Time         `json:"purgeAllowedFrom,omitempty"`
	PurgeScheduledOn     *time.Time         `json:"purgeScheduledOn,omitempty"`
	Payload              string             `json:"payload,omitempty"`
}

// AlgorithmMetadata is kept for old clients.
type AlgorithmMetadata struct {
	BitLength string `json:"bitLength"`
	Mode      string `json:"mode"`
}

// KeyVersion names one version of a key's material.
type KeyVersion struct {
	ID           string     `json:"id"`
	CreationDate *time.Time `json:"creationDate,omitempty"`
	// Encryptions is ours: under this version no more texts were encrypted by
	// AES-GCM; absent where it is not used, or nothing was yet.
	Encryptions *uint64 `json:"encryptions,omitempty"`
}

// DualAuthDelete says whether two people must agree to a deletion.
type DualAuthDelete struct {
	Enabled           bool       `json:"enabled"`
	KeySetForDeletion *bool      `json:"keySetForDeletion,omitempty"`
	AuthExpiration    *time.Time `json:"authExpiration,omitempty"`
}

// Rotation is a rotation policy; a month is 30 days.
type Rotation struct {
	Enabled       *bool `json:"enabled,omitempty"`
	IntervalMonth int   `json:"interval_month,omitempty"`
}

// CreateKeys is the body of POST /keys.
type CreateKeys struct {
	Metadata  *Metadata   `json:"metadata"`
	Resources []CreateKey `json:"resources"`
}

// CreateKey is one key to make. Extractable true makes a standard key, false
// (or absent) a root key. Payload imports base64 material.
type CreateKey struct {
	Type                string     `json:"type"`
	Name                string     `json:"name"`
	Description         string     `json:"description,omitempty"`
	ExpirationDate      *time.Time `json:"expirationDate,omitempty"`
	Extractable         bool       `json:"extractable"`
	Payload             string     `json:"payload,omitempty"`
	Aliases             []string   `json:"aliases,omitempty"`
	Tags                []string   `json:"tags,omitempty"`
	EncryptedNonce      string     `json:"encryptedNonce,omitempty"`
	IV                  string     `json:"iv,omitempty"`
	EncryptionAlgorithm string     `json:"encryptionAlgorithm,omitempty"`
	// With policy overrides only:
	Rotation       *Rotation       `json:"rotation,omitempty"`
	DualAuthDelete *DualAuthDelete `json:"dualAuthDelete,omitempty"`
}

// Ways to encrypt material for import, under an import token's public key.
const (
	OAEPSHA256 = "RSAES_OAEP_SHA_256" // the nonce by AES-GCM
	OAEPSHA1   = "RSAES_OAEP_SHA_1"   // the nonce by AES-CBC with PKCS#7 padding
)

// RotateRequest is the body of the rotate action; of a generated key it is
// empty.
type RotateRequest struct {
	Payload             string `json:"payload,omitempty"`
	EncryptedNonce      string `json:"encryptedNonce,omitempty"`
	IV                  string `json:"iv,omitempty"`
	EncryptionAlgorithm string `json:"encryptionAlgorithm,omitempty"`
}

// PatchKey is the body of PATCH /keys/{id}.
type PatchKey struct {
	KeyRingID string `json:"keyRingID"`
}

// Collection is any other collection.
type Collection[T any] struct {
	Metadata  Metadata `json:"metadata"`
	Resources []T      `json:"resources,omitempty"`
}

// Alias is another name of a key.
type Alias struct {
	KeyID        string     `json:"keyId"`
	Alias        string     `json:"alias"`
	CreatedBy    string     `json:"createdBy"`
	CreationDate *time.Time `json:"creationDate"`
}

// KeyRing groups keys of an instance.
type KeyRing struct {
	ID           string     `json:"id"`
	CreationDate *time.Time `json:"creationDate"`
	CreatedBy    string     `json:"createdBy"`
}

// KeyPolicy is one policy of a key.
type KeyPolicy struct {
	ID             string          `json:"id,omitempty"`
	CRN            string          `json:"crn,omitempty"`
	Type           string          `json:"type,omitempty"`
	CreatedBy      string          `json:"createdBy,omitempty"`
	CreationDate   *time.Time      `json:"creationDate,omitempty"`
	UpdatedBy      string          `json:"updatedBy,omitempty"`
	LastUpdateDate *time.Time      `json:"lastUpdateDate,omitempty"`
	Rotation       *Rotation       `json:"rotation,omitempty"`
	DualAuthDelete *DualAuthDelete `json:"dualAuthDelete,omitempty"`
}

// Names of policies; the first two are of keys too.
const (
	PolicyRotation       = "rotation"
	PolicyDualAuthDelete = "dualAuthDelete"
	PolicyAllowedNetwork = "allowedNetwork"
	PolicyAllowedIP      = "allowedIP"
	PolicyMetrics        = "metrics"
	PolicyCreateImport   = "keyCreateImportAccess"
)

// InstancePolicy is one policy of an instance.
type InstancePolicy struct {
	Type         string     `json:"policy_type"`
	Data         PolicyData `json:"policy_data"`
	CreatedBy    string     `json:"createdBy,omitempty"`
	CreationDate *time.Time `json:"creationDate,omitempty"`
	UpdatedBy    string     `json:"updatedBy,omitempty"`
	LastUpdated  *time.Time `json:"lastUpdated,omitempty"`
}

// PolicyData is what an instance policy says.
type PolicyData struct {
	Enabled    *bool             `json:"enabled,omitempty"`
	Attributes *PolicyAttributes `json:"attributes,omitempty"`
}

// PolicyAttributes are the attributes of all kinds of instance policies.
type PolicyAttributes struct {
	AllowedNetwork    *string   `json:"allowed_network,omitempty"`
	AllowedIP         *[]string `json:"allowed_ip,omitempty"`
	CreateRootKey     *bool     `json:"create_root_key,omitempty"`
	CreateStandardKey *bool     `json:"create_standard_key,omitempty"`
	ImportRootKey     *bool     `json:"import_root_key,omitempty"`
	ImportStandardKey *bool     `json:"import_standard_key,omitempty"`
	EnforceToken      *bool     `json:"enforce_token,omitempty"`
	IntervalMonth     *int      `json:"interval_month,omitempty"`
}

// ImportTokenRequest is the body of POST /import_token.
type ImportTokenRequest struct {
	Expiration           *int `json:"expiration"` // seconds
	MaxAllowedRetrievals *int `json:"maxAllowedRetrievals"`
}

// ImportToken is its answer; GET adds Payload, the base64 of a PEM public key,
// and Nonce.
type ImportToken struct {
	ID                   string     `json:"id"`
	CreationDate         *time.Time `json:"creationDate"`
	ExpirationDate       *time.Time `json:"expirationDate"`
	MaxAllowedRetrievals int        `json:"maxAllowedRetrievals"`
	RemainingRetrievals  int        `json:"remainingRetrievals"`
	Payload              string     `json:"payload,omitempty"`
	Nonce                string     `json:"nonce,omitempty"`
}

// Registration says that a resource is protected by a key.
type Registration struct {
	KeyID              string      `json:"keyId"`
	ResourceCRN        string      `json:"resourceCrn"`
	CreatedBy          string      `json:"createdBy"`
	CreationDate       *time.Time  `json:"creationDate"`
	Description        string      `json:"description,omitempty"`
	PreventKeyDeletion bool        `json:"preventKeyDeletion"`
	KeyVersion         *KeyVersion `json:"keyVersion,omitempty"`
}

// CreateRegistration is the body of POST /keys/{id}/registrations/{crn}.
type CreateRegistration struct {
	Description        string `json:"description"`
	PreventKeyDeletion bool   `json:"preventKeyDeletion"`
}

// AllowedPort is the answer of GET /instance/allowed_ip_port.
type AllowedPort struct {
	PrivateEndpointPort int `json:"private_endpoint_port"`
}

// WrapRequest is the body of the wrap action; without plaintext the HSM makes
// a data encryption key (DEK) of 32 bytes and the answer has it.
type WrapRequest struct {
	Plaintext string   `json:"plaintext,omitempty"` // base64
	AAD       []string `json:"aad,omitempty"`
}

// UnwrapRequest is the body of the unwrap action.
type UnwrapRequest struct {
	Ciphertext string   `json:"ciphertext"`
	AAD        []string `json:"aad,omitempty"`
}

// ActionAnswer is what wrap, unwrap and rewrap give. Unwrap adds a fresh
// ciphertext when an older version of the key had wrapped the old one.
type ActionAnswer struct {
	Plaintext           string      `json:"plaintext,omitempty"`  // base64
	Ciphertext          string      `json:"ciphertext,omitempty"` // base64 of the JSON that Ciphertext describes
	KeyVersion          *KeyVersion `json:"keyVersion,omitempty"`
	RewrappedKeyVersion *KeyVersion `json:"rewrappedKeyVersion,omitempty"`
}

// CiphertextVersion is the version that this service writes.
const CiphertextVersion = "4.0.0"

// Ciphertext is what the base64 string of a wrap answer holds: IBM's fields
// and the cipher suite. Everything but the two byte fields is authenticated
// together with the caller's AAD.
type Ciphertext struct {
	Ciphertext []byte `json:"ciphertext"`
	IV         []byte `json:"iv"`
	Version    string `json:"version"`
	Handle     string `json:"handle"` // id of the key version
	Suite      uint8  `json:"suite"`
}

// Instance is a tenant: keys and policies live in one.
type Instance struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Dialect   string    `json:"dialect"`             // key-protect or icp
	Placement string    `json:"placement,omitempty"` // of root keys: wrapped (also when it is empty) or token
	CreatedAt time.Time `json:"createdAt"`
	CreatedBy string    `json:"createdBy"`
	Deleting  bool      `json:"deleting,omitempty"` // its deletion was cut short: delete it again
}

// CreateInstance is the body of POST /kmsctl/v1/instances.
type CreateInstance struct {
	Name      string `json:"name"`
	Dialect   string `json:"dialect,omitempty"`
	Placement string `json:"placement,omitempty"`
}

// Instances is the answer of GET /kmsctl/v1/instances.
type Instances struct {
	Instances []Instance `json:"instances"`
}

// OnboardRequest is the body of POST /kmsctl/v1/onboard. Instance and Key are
// ids; without them new ones are made. For a service that is there already
// nothing is made, but a further API key when NewAPIKey is set.
type OnboardRequest struct {
	Name      string `json:"name"`
	Instance  string `json:"instance,omitempty"`
	Key       string `json:"key,omitempty"`
	Role      string `json:"role,omitempty"` // Viewer unless given: wrap and unwrap
	NewAPIKey bool   `json:"newApiKey,omitempty"`
}

// Onboarded is its answer. APIKey is shown once, when it is made.
type Onboarded struct {
	InstanceID string `json:"instanceId"`
	ServiceID  string `json:"serviceId"`
	APIKey     string `json:"apiKey"`
	PolicyID   string `json:"policyId"`
	KeyID      string `json:"keyId"`
	Existing   bool   `json:"existing,omitempty"` // the service was there already
}

// Token is the answer of the token endpoints.
type Token struct {
	AccessToken  string `json:"access_token"`
	RefreshToken string `json:"refresh_token"`
	TokenType    string `json:"token_type"`
	ExpiresIn    int64  `json:"expires_in"` // seconds
	Expiration   int64  `json:"expiration"` // Unix seconds
}

// TokenError is a token endpoint's refusal.
type TokenError struct {
	ErrorCode    string `json:"errorCode"`
	ErrorMessage string `json:"errorMessage"`
}

// SigningKey is a key that signs access tokens; ID is the kid of their header.
type SigningKey struct {
	ID        string     `json:"id"`
	Signs     bool       `json:"signs"`
	CreatedAt *time.Time `json:"createdAt,omitempty"`
	CreatedBy string     `json:"createdBy,omitempty"`
	RetiredAt *time.Time `json:"retiredAt,omitempty"`
	GoodUntil *time.Time `json:"goodUntil,omitempty"` // of what a retired one signed
	// AgeSeconds is for how long it signs, or signed; absent of a first key
	// whose age nobody counted.
	AgeSeconds int64      `json:"ageSeconds,omitempty"`
	RotatesOn  *time.Time `json:"rotatesOn,omitempty"` // by itself; absent: when somebody does
}

// SigningKeys is the answer of GET /kmsctl/v1/iam/signing-keys.
type SigningKeys struct {
	SigningKeys []SigningKey `json:"signingKeys"`
}

// RotateSigningKey is the body of POST /kmsctl/v1/iam/signing-keys/rotate. With
// Now, every token that was issued before is worth nothing.
type RotateSigningKey struct {
	Now bool `json:"now,omitempty"`
}

// Health is the answer of /readyz. Warnings need somebody's attention, and keep
// nobody from using the KMS.
type Health struct {
	Ready    bool         `json:"ready"`
	Reasons  []string     `json:"reasons,omitempty"`
	Warnings []string     `json:"warnings,omitempty"`
	Clock    *ClockHealth `json:"clock,omitempty"`  // of a machine's clock that is not right
	KeyUse   *KeyUse      `json:"keyUse,omitempty"` // of keys that are near their limit
}

// ClockHealth is how a machine's clock is off.
type ClockHealth struct {
	State        string `json:"state"`
	AheadSeconds int64  `json:"aheadSeconds"` // negative: behind
}

// KeyUse tells of versions of keys that have encrypted half as many texts by
// AES-GCM as one may, or more.
type KeyUse struct {
	Near     int     `json:"near"`
	Furthest float64 `json:"furthest"` // share of the limit; at 1 it encrypts no more
}

// States of the machine's clock, against the time that the KMS saw pass.
const (
	ClockRight    = "right"
	ClockIsAhead  = "ahead"    // it is not followed: nothing is purged by it
	ClockBehind   = "behind"   // time goes on as if it had not been set back
	ClockStarting = "starting" // the KMS looks whether it was stopped all the while
)

// ClockStatus is the answer of GET /kmsctl/v1/clock and of the POST to
// /kmsctl/v1/clock/confirm: the clock of the machine that answers, the time that
// the life of keys goes by, and what would be due at once by the former.
type ClockStatus struct {
	State        string     `json:"state"`
	Machine      time.Time  `json:"machine"`
	Time         time.Time  `json:"time"`
	AheadSeconds int64      `json:"aheadSeconds"` // of the machine; negative when it is behind
	Purges       int        `json:"purges"`       // keys that would be purged
	Expires      int        `json:"expires"`      // keys that would be deactivated for good
	ConfirmedAt  *time.Time `json:"confirmedAt,omitempty"`
	ConfirmedBy  string     `json:"confirmedBy,omitempty"`
	Changed      bool       `json:"changed,omitempty"` // by this call
}

// ConfirmClock is the body of POST /kmsctl/v1/clock/confirm: the time that the
// machine's clock showed when it was looked at.
type ConfirmClock struct {
	Machine time.Time `json:"machine"`
}

// ServiceID is somebody who is not a person.
type ServiceID struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	Description string    `json:"description,omitempty"`
	CreatedAt   time.Time `json:"createdAt"`
	CreatedBy   string    `json:"createdBy"`
	Subjects    []string  `json:"subjects,omitempty"`
	Instance    string    `json:"instance,omitempty"` // it is bound to: it has no rights elsewhere
}

// CreateServiceID is the body of POST /kmsctl/v1/iam/service-ids. Subjects are
// further ways to prove it, besides API keys: cert:COMMON-NAME for a client
// certificate, serviceaccount:NAMESPACE:NAME for a token of Kubernetes. Instance
// binds it to an instance; what the instance's managers make is always bound.
type CreateServiceID struct {
	Name        string   `json:"name"`
	Description string   `json:"description,omitempty"`
	Subjects    []string `json:"subjects,omitempty"`
	Instance    string   `json:"instance,omitempty"`
}

// ServiceIDs is the answer of GET /kmsctl/v1/iam/service-ids.
type ServiceIDs struct {
	ServiceIDs []ServiceID `json:"serviceIds"`
}

// CreateAPIKey is the body of POST /kmsctl/v1/iam/api-keys; ServiceID is an id
// or a name.
type CreateAPIKey struct {
	Name      string `json:"name"`
	ServiceID string `json:"serviceId"`
}

// APIKey names an API key. Key has the key itself, in the answer to its
// creation alone.
type APIKey struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	ServiceID string    `json:"serviceId"`
	CreatedAt time.Time `json:"createdAt"`
	Key       string    `json:"apiKey,omitempty"`
}

// CreatePolicy is the body of POST /kmsctl/v1/iam/policies. Without Key and
// KeyRing the role holds for the whole instance.
type CreatePolicy struct {
	ServiceID string `json:"serviceId"`
	Role      string `json:"role"`
	Instance  string `json:"instance"`
	Key       string `json:"key,omitempty"`
	KeyRing   string `json:"keyRing,omitempty"`
}

// APIKeys is the answer of GET /kmsctl/v1/iam/api-keys.
type APIKeys struct {
	APIKeys []APIKey `json:"apiKeys"`
}

// Policy is what a service ID may do where.
type Policy struct {
	ID        string   `json:"id"`
	ServiceID string   `json:"serviceId"`
	Instance  string   `json:"instance"`
	Key       string   `json:"key,omitempty"`
	KeyRing   string   `json:"keyRing,omitempty"`
	Roles     []string `json:"roles"`
}

// Policies is the answer of GET /kmsctl/v1/iam/policies/{service}.
type Policies struct {
	Policies []Policy `json:"policies"`
}

// PolicyID is the answer to its creation.
type PolicyID struct {
	ID string `json:"id"`
}

// AuditHeads is the answer of GET /kmsctl/v1/audit/heads: the last signed
// state of each process's audit log, and the key that signed (PKIX DER). Own
// is the log of the process that answers.
type AuditHeads struct {
	PublicKey []byte      `json:"publicKey"`
	Own       *AuditHead  `json:"own,omitempty"`
	Heads     []AuditHead `json:"heads"`
}

// AuditHead is the signed state of one log.
type AuditHead struct {
	Log       string `json:"log"` // name of the process that writes it
	Chain     string `json:"chain"`
	Seq       uint64 `json:"seq"`
	Prev      string `json:"prev"`
	Signature []byte `json:"signature"`
}

// ClearPlan is the answer of GET /kmsctl/v1/clear: what clearing the
// installation would take away. POST /kmsctl/v1/clear/plan gives the same with
// a confirmation, which POST /kmsctl/v1/clear takes once, until it expires.
type ClearPlan struct {
	Installation string        `json:"installation"`
	TokenLabel   string        `json:"tokenLabel"`
	TokenSerial  string        `json:"tokenSerial"`
	Objects      []string      `json:"objects"` // on the token, by label
	Instances    int           `json:"instances"`
	RootKeys     int           `json:"rootKeys"`
	StandardKeys int           `json:"standardKeys"`
	ServiceIDs   int           `json:"serviceIds"`
	APIKeys      int           `json:"apiKeys"` // of service IDs
	Policies     int           `json:"policies"`
	Others       []ClearTarget `json:"others"`            // further installations on the token
	Cleared      *Cleared      `json:"cleared,omitempty"` // the last time
	Confirmation string        `json:"confirmation,omitempty"`
	Expires      *time.Time    `json:"expires,omitempty"`
}

// Empty says that nobody keeps anything there: master keys alone.
func (p ClearPlan) Empty() bool {
	return p.Instances+p.RootKeys+p.StandardKeys+p.ServiceIDs+p.APIKeys+p.Policies == 0
}

// ClearTarget is an installation that left objects on the token.
type ClearTarget struct {
	Installation string   `json:"installation"`
	Objects      []string `json:"objects"`
}

// ClearRequest is the body of both POSTs. Name is what the person confirmed:
// the release's name, or the installation's id. Installation is whose data
// go; empty is the KMS's own.
type ClearRequest struct {
	Name         string `json:"name"`
	Installation string `json:"installation,omitempty"`
	Confirmation string `json:"confirmation,omitempty"`
}

// Cleared says what was cleared, when, and who asked for it. Nothing is set
// when clearing was asked for and there was nothing yet.
type Cleared struct {
	At           time.Time `json:"at"`
	By           string    `json:"by"`
	Installation string    `json:"installation"`
	TokenLabel   string    `json:"tokenLabel"`
	TokenSerial  string    `json:"tokenSerial"`
	Objects      int       `json:"objects"` // that went from the token
	Nothing      bool      `json:"nothing,omitempty"`
}

// States of a change of the master keys.
const (
	RotationRunning = "running"
	RotationStopped = "stopped"
	RotationDone    = "done"
)

// MasterStatus is the answer of GET /kmsctl/v1/master, and of the POSTs to
// /kmsctl/v1/master/rotate, /migrate and /stop: the versions of the
// master keys, and the last change of them.
type MasterStatus struct {
	Installation string          `json:"installation"`
	Token        string          `json:"token"`   // serial number of the token that makes what is new
	Version      uint16          `json:"version"` // that makes what is new
	Older        []uint16        `json:"older"`   // that still open what they made
	Rotation     *MasterRotation `json:"rotation,omitempty"`
	Changed      bool            `json:"changed,omitempty"` // by this call
}

// MasterRotation is a change of the master keys. It runs in the background,
// can be stopped and goes on after a crash; no client's ciphertext changes.
type MasterRotation struct {
	Version    uint16     `json:"version"` // that it brings
	State      string     `json:"state"`
	DestroyOld bool       `json:"destroyOld"`
	Done       int        `json:"done"` // records that were taken over
	Left       int        `json:"left"` // at the last look
	By         string     `json:"by"`
	Began      time.Time  `json:"began"`
	Ended      *time.Time `json:"ended,omitempty"`
	Worker     string     `json:"worker,omitempty"` // process that works on it
	Fault      string     `json:"fault,omitempty"`  // why it does not go on; it is tried again
	// To is the token to which all keys move; absent: they stay in theirs.
	To          *MasterToken `json:"to,omitempty"`
	LeavePlaced bool         `json:"leavePlaced,omitempty"` // keys that cannot leave the old token stay behind
}

// MasterToken names a token.
type MasterToken struct {
	Label  string `json:"label"`
	Serial string `json:"serial"`
}

// MigrationRequest is the body of POST /kmsctl/v1/master/migrate. LeavePlaced
// leaves keys behind that stay in the old token by their instance's placement.
type MigrationRequest struct {
	LeavePlaced bool `json:"leavePlaced,omitempty"`
}

// MasterRotationRequest is the body of POST /kmsctl/v1/master/rotate.
// DestroyOld destroys every older version at the end: a backup from before
// can then not be restored any more.
type MasterRotationRequest struct {
	DestroyOld bool `json:"destroyOld,omitempty"`
}
