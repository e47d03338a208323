package kmsapi

import (
	"fmt"
	"net/http"
)

// Errors is the body of every refusal.
type Errors struct {
	Metadata  Metadata `json:"metadata"`
	Resources []Error  `json:"resources"`
}

// Error is its one resource. A 401 has no reasons.
type Error struct {
	ErrorMsg string   `json:"errorMsg"`
	Reasons  []Reason `json:"reasons,omitempty"`
}

// Reason says what was wrong, in one of IBM's codes.
type Reason struct {
	Code     string  `json:"code"`
	Message  string  `json:"message"`
	Status   int     `json:"status"`
	MoreInfo string  `json:"moreInfo"`
	Target   *Target `json:"target,omitempty"`
}

// Target names the field or query parameter that was wrong.
type Target struct {
	Type string `json:"type"`
	Name string `json:"name"`
}

// Codes that this service answers with.
const (
	BadBody            = "BAD_BODY_ERR"
	CollectionTotal    = "COLLECTION_TOTAL_MISMATCH_ERR"
	InvalidField       = "INVALID_FIELD_ERR"
	InvalidQuery       = "INVALID_QUERY_PARAM_ERR"
	NoBody             = "NO_BODY_ERR"
	RootRequired       = "KEY_ROOT_REQ_ERR"
	KeyExpired         = "KEY_EXPIRED_ERR"
	InvalidInstance    = "INVALID_INSTANCE_ERR" // ours: IBM gives the text without a code
	Unauthorized       = "UNAUTHORIZED_ERR"
	Forbidden          = "FORBIDDEN_ERR" // ours: 403 with the text of UNAUTHORIZED_ERR
	KeyNotFound        = "KEY_NOT_FOUND_ERR"
	InstanceNotFound   = "INSTANCE_NOT_FOUND_ERR" // ours
	NoSuchPath         = "PATH_NOT_FOUND_ERR"     // ours
	InvalidState       = "KEY_ACTION_INVALID_STATE_ERR"
	BodyQueryMismatch  = "BODY_QUERY_PARAM_MISMATCH_ERR"
	BearerSubject      = "BEARER_SUB_EXTRACTION_ERR"
	NumResources       = "NUM_COLLECTION_RESOURCE_ERR"
	ImportRequired     = "KEY_IMPT_REQ_ERR" // kept for clients: any key may be restored today
	RestoreExpired     = "KEY_RESTORE_EXPIRED"
	PayloadRequired    = "KEY_PAYLOAD_REQ_ERR"
	WrongNonce         = "INCORRECT_NONCE_ERR"
	WrongNonceIV       = "INCORRECT_NONCE_IV_ERR"
	SearchTooBroad     = "KEY_SEARCH_TOO_BROAD"
	ConfigRule         = "CONFIG_RULE_CONFLICT_ERR"
	ResourceOwner      = "RESOURCE_OWNER_ERR"
	ServiceOnly        = "SERVICE_ONLY_ERR"
	FeatureRestricted  = "FEATURE_RESTRICTED_ERR"
	AuthorizationsLack = "AUTHORIZATIONS_NOT_MET"
	ProtectedResource  = "PROTECTED_RESOURCE_ERR"
	PreventDeletion    = "PREV_KEY_DEL_ERR"
	CreateImportAccess = "KEY_CREATE_IMPORT_ACCESS_ERR"
	NotDualAuth        = "NOT_DUAL_AUTH_ERR"
	TooEarly           = "REQ_TOO_EARLY_ERR"
	TokenExpired       = "IMPORT_TOKEN_EXPIRED_ERR"
	RotationTooSoon    = "KEY_ROTATION_NOT_PERMITTED"
	KeyDeleted         = "KEY_DELETED_ERR"
	InvalidKeyState    = "KEY_INVALID_STATE_ERR"
	RootRequiredReg    = "KEY_ROOT_REQ_REG_ERR"
	VersionInvalid     = "KEY_VERSION_INVALID"
	SignatureInvalid   = "INVALID_SIG_EXP_ERR"
	IncompleteMetadata = "INCOMPLETE_METADATA_ERR"
	RingNotFound       = "KEY_RING_NOT_FOUND_ERR"     // ours
	RingNotEmpty       = "KEY_RING_NOT_EMPTY_ERR"     // ours
	RingLimit          = "KEY_RING_LIMIT_ERR"         // ours
	AliasNotFound      = "KEY_ALIAS_NOT_FOUND_ERR"    // ours
	RegistrationAbsent = "REGISTRATION_NOT_FOUND_ERR" // ours
	TooManyRequests    = "TOO_MANY_REQUESTS_ERR"      // ours
	UsedUp             = "KEY_USED_UP_ERR"            // ours: AES-GCM must not encrypt more under one key
	ClockAhead         = "CLOCK_NOT_CONFIRMED_ERR"    // ours
	Conflict           = "CONFLICT_ERR"               // ours: another changed it first, or the name is taken
	BadCiphertext      = "UNPROCESSABLE_CIPHERTEXT_ERR"
	Unavailable        = "UNAVAILABLE_ERR"    // ours: text as ICP's when its HSM is down
	Internal           = "INTERNAL_ERR"       // ours
	TooLarge           = "BODY_TOO_LARGE_ERR" // ours
	UnauthorizedText   = "Unauthorized: The user does not have access to the specified resource"
	moreInfo           = "https://cloud.ibm.com/apidocs/key-protect"
	unavailableMessage = "Experiencing delays. Please try again in few minutes."
)

var statuses = map[string]int{
	BadBody: 400, CollectionTotal: 400, InvalidField: 400, InvalidQuery: 400, NoBody: 400, RootRequired: 400, KeyExpired: 400, InvalidInstance: 400,
	Unauthorized: 401, Forbidden: 403, KeyNotFound: 404, InstanceNotFound: 404, NoSuchPath: 404, InvalidState: 409, Conflict: 409,
	TooLarge: 413, BadCiphertext: 422, Unavailable: 503, Internal: 500,
	BodyQueryMismatch: 400, BearerSubject: 400, NumResources: 400, ImportRequired: 400, RestoreExpired: 400, PayloadRequired: 400, WrongNonce: 400,
	WrongNonceIV: 400, SearchTooBroad: 400, ConfigRule: 403, ResourceOwner: 403, ServiceOnly: 403, FeatureRestricted: 403, AuthorizationsLack: 409,
	ProtectedResource: 409, PreventDeletion: 409, CreateImportAccess: 409, NotDualAuth: 409, TooEarly: 409, TokenExpired: 409, RotationTooSoon: 409,
	KeyDeleted: 410, InvalidKeyState: 422, RootRequiredReg: 422, VersionInvalid: 422, SignatureInvalid: 422, IncompleteMetadata: 500,
	RingNotFound: 404, RingNotEmpty: 409, RingLimit: 409, AliasNotFound: 404, RegistrationAbsent: 404, TooManyRequests: 429, UsedUp: 409, ClockAhead: 409,
}

var messages = map[string]string{
	BadBody:         "Invalid body data was passed: Please ensure the data passed had valid formatting with no invalid characters",
	CollectionTotal: "Collection total does not match number of resources",
	NoBody:          "Missing body in request", RootRequired: "Requested action can only be completed with a root key",
	KeyExpired:      "The action could not be performed on the key because the key is expired",
	InvalidInstance: "Request requires valid Instance Header containing a valid UUID",
	Unauthorized:    UnauthorizedText, Forbidden: UnauthorizedText, KeyNotFound: "key does not exist", InstanceNotFound: "instance does not exist",
	NoSuchPath: "no such path", InvalidState: "Key is not in a valid state", Conflict: "The resource exists already, or was changed meanwhile",
	BadCiphertext: "The provided ciphertext is invalid or corrupted",
	Unavailable:   unavailableMessage, Internal: "Internal error", TooLarge: "The body is too large",
	InvalidField: "A field is invalid", InvalidQuery: "A query parameter is invalid",
	BodyQueryMismatch:  "Data in body does not match data required by query parameter",
	BearerSubject:      "Extracting the subject from the bearer token failed: Make sure the bearer token passed is the correct one (and correct format) and is allowed to perform requested actions",
	NumResources:       "Only a single instance policy may be created per query parameter: Please pass single resource object",
	ImportRequired:     "Only imported keys may be restored",
	RestoreExpired:     "Key restoration has expired",
	PayloadRequired:    "This root key was created with user-supplied key material: Key material is required to perform a 'rotate' action",
	WrongNonce:         "The encrypted nonce given does not match existing record: Please ensure the correct nonce was given in the request",
	WrongNonceIV:       "The provided encrypted nonce was not encrypted with the key material given OR the provided IV does not match the encrypted nonce",
	SearchTooBroad:     "The search is too broad: Please narrow it by state, extractable or key ring",
	ConfigRule:         "Requested change is not compliant with configuration rules",
	ResourceOwner:      "The resource(s) queried does not belong to the service",
	ServiceOnly:        "This action can only be done by a service (service to service)",
	FeatureRestricted:  "This action is not permitted on this resource",
	AuthorizationsLack: "Number of authorizations required to delete is not met",
	ProtectedResource:  "Key is protecting one or more cloud resources",
	PreventDeletion:    "The key cannot be deleted because it's protecting a cloud resource that has a retention policy: Before you delete this key, contact an account owner to remove the retention policy on each resource that is associated with the key",
	CreateImportAccess: "KeyCreateImportAccess instance policy does not allow this action",
	NotDualAuth:        "The key is not dual auth enabled and cannot be set for deletion",
	TooEarly:           "The key was updated recently: Please wait and try again",
	TokenExpired:       "The import token has expired",
	RotationTooSoon:    "This root key has been rotated within the last hour: Only one 'rotate' action per hour is permitted",
	KeyDeleted:         "Key has already been deleted: Please delete references to this key",
	InvalidKeyState:    "Key is not in a valid state",
	RootRequiredReg:    "Requested action can only be completed with a root key",
	VersionInvalid:     "This request requires that the key version is later than current registration key version",
	SignatureInvalid:   "Signature is invalid",
	IncompleteMetadata: "Key metadata became corrupted: Please delete this key",
	RingNotFound:       "key ring does not exist",
	RingNotEmpty:       "The key ring still holds keys",
	RingLimit:          "The limit of key rings is reached",
	AliasNotFound:      "key alias does not exist",
	RegistrationAbsent: "registration does not exist",
	UsedUp:             "This version of the key has encrypted as many texts as are safe: Please rotate the key",
	ClockAhead:         "The machine's clock is further ahead than time has passed: nothing is destroyed by it until it is set right or confirmed",
	TooManyRequests:    "Too many requests: Please slow down",
}

// MessageOf gives the message of a reason code.
func MessageOf(code string) string { return messages[code] }

// StatusOf gives the HTTP status of a reason code; unknown codes are 500.
func StatusOf(code string) int {
	if s, ok := statuses[code]; ok {
		return s
	}
	return http.StatusInternalServerError
}

// Known says whether a reason code is one of this API's.
func Known(code string) bool {
	_, ok := statuses[code]
	return ok
}

// NewErrors makes the body of a refusal. what says what could not be done
// ("Key could not be created"); message completes or, when empty, is the
// code's own message.
func NewErrors(code, what, message string) Errors {
	status := StatusOf(code)
	if message == "" {
		message = messages[code]
	}
	e := Error{ErrorMsg: fmt.Sprintf("%s: %s: Please see `reasons` for more details (%s)", http.StatusText(status), what, code),
		Reasons: []Reason{{Code: code, Message: message, Status: status, MoreInfo: moreInfo}}}
	if code == Unauthorized {
		e = Error{ErrorMsg: UnauthorizedText}
	}
	return Errors{Metadata: Metadata{CollectionType: TypeError, CollectionTotal: 1}, Resources: []Error{e}}
}
