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
	Conflict           = "CONFLICT_ERR" // ours: another changed it first, or the name is taken
	BadCiphertext      = "UNPROCESSABLE_CIPHERTEXT_ERR"
	NotBuilt           = "NOT_IMPLEMENTED_ERR" // ours
	Unavailable        = "UNAVAILABLE_ERR"     // ours: text as ICP's when its HSM is down
	Internal           = "INTERNAL_ERR"        // ours
	TooLarge           = "BODY_TOO_LARGE_ERR"  // ours
	UnauthorizedText   = "Unauthorized: The user does not have access to the specified resource"
	moreInfo           = "https://cloud.ibm.com/apidocs/key-protect"
	unavailableMessage = "Experiencing delays. Please try again in few minutes."
)

var statuses = map[string]int{
	BadBody: 400, CollectionTotal: 400, InvalidField: 400, InvalidQuery: 400, NoBody: 400, RootRequired: 400, KeyExpired: 400, InvalidInstance: 400,
	Unauthorized: 401, Forbidden: 403, KeyNotFound: 404, InstanceNotFound: 404, NoSuchPath: 404, InvalidState: 409, Conflict: 409,
	TooLarge: 413, BadCiphertext: 422, NotBuilt: 501, Unavailable: 503, Internal: 500,
}

var messages = map[string]string{
	BadBody:         "Invalid body data was passed: Please ensure the data passed had valid formatting with no invalid characters",
	CollectionTotal: "Collection total does not match number of resources",
	NoBody:          "Missing body in request", RootRequired: "Requested action can only be completed with a root key",
	KeyExpired:      "The action could not be performed on the key because the key is expired",
	InvalidInstance: "Request requires valid Instance Header containing a valid UUID",
	Unauthorized:    UnauthorizedText, Forbidden: UnauthorizedText, KeyNotFound: "key does not exist", InstanceNotFound: "instance does not exist",
	NoSuchPath: "no such path", InvalidState: "Key is not in a valid state", Conflict: "The resource exists already, or was changed meanwhile",
	BadCiphertext: "The provided ciphertext is invalid or corrupted", NotBuilt: "This part of the API is not served",
	Unavailable: unavailableMessage, Internal: "Internal error", TooLarge: "The body is too large",
	InvalidField: "A field is invalid", InvalidQuery: "A query parameter is invalid",
}

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
