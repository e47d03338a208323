package kmsapi

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestEveryCodeHasStatusAndMessage(t *testing.T) {
	for code := range statuses {
		if messages[code] == "" {
			t.Errorf("%s has no message", code)
		}
		if s := StatusOf(code); s < 400 || s > 599 {
			t.Errorf("%s has status %d", code, s)
		}
	}
	if len(statuses) != len(messages) {
		t.Errorf("%d statuses, %d messages", len(statuses), len(messages))
	}
	if StatusOf("?") != 500 {
		t.Error("an unknown code must be 500")
	}
}

func TestErrorBody(t *testing.T) {
	b, err := json.Marshal(NewErrors(KeyNotFound, "Key could not be retrieved", ""))
	if err != nil {
		t.Fatal(err)
	}
	want := "{\"metadata\":{\"collectionType\":\"application/vnd.ibm.kms.error+json\",\"collectionTotal\":1},\"resources\":[{" +
		"\"errorMsg\":\"Not Found: Key could not be retrieved: Please see `reasons` for more details (KEY_NOT_FOUND_ERR)\"," +
		"\"reasons\":[{\"code\":\"KEY_NOT_FOUND_ERR\",\"message\":\"key does not exist\",\"status\":404,\"moreInfo\":\"https://cloud.ibm.com/apidocs/key-protect\"}]}]}"
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	b, _ = json.Marshal(NewErrors(Unauthorized, "x", ""))
	if strings.Contains(string(b), "reasons") || !strings.Contains(string(b), UnauthorizedText) {
		t.Errorf("401 must have the text alone: %s", b)
	}
}

// TestIBMsCodes holds every code of IBM's documentation to its status and the
// beginning of its message.
func TestIBMsCodes(t *testing.T) {
	for code, want := range map[string]struct {
		status int
		says   string
	}{
		"COLLECTION_TOTAL_MISMATCH_ERR": {400, "Collection total does not match number of resources"},
		"BODY_QUERY_PARAM_MISMATCH_ERR": {400, "Data in body does not match data required by query parameter"},
		"BEARER_SUB_EXTRACTION_ERR":     {400, "Extracting the subject from the bearer token failed"},
		"BAD_BODY_ERR":                  {400, "Invalid body data was passed: Please ensure the data passed had valid formatting with no invalid characters"},
		"INVALID_FIELD_ERR":             {400, ""}, "INVALID_QUERY_PARAM_ERR": {400, ""}, "KEY_SEARCH_TOO_BROAD": {400, ""},
		"NO_BODY_ERR":                 {400, "Missing body in request"},
		"NUM_COLLECTION_RESOURCE_ERR": {400, "Only a single instance policy may be created per query parameter: Please pass single resource object"},
		"KEY_IMPT_REQ_ERR":            {400, "Only imported keys may be restored"},
		"KEY_ROOT_REQ_ERR":            {400, "Requested action can only be completed with a root key"},
		"KEY_EXPIRED_ERR":             {400, "The action could not be performed on the key because the key is expired"},
		"KEY_RESTORE_EXPIRED":         {400, "Key restoration has expired"},
		"KEY_PAYLOAD_REQ_ERR":         {400, "This root key was created with user-supplied key material: Key material is required to perform a 'rotate' action"},
		"INCORRECT_NONCE_ERR":         {400, "The encrypted nonce given does not match existing record"},
		"INCORRECT_NONCE_IV_ERR":      {400, "The provided encrypted nonce was not encrypted with the key material given OR the provided IV does not match"},
		"UNAUTHORIZED_ERR":            {401, UnauthorizedText},
		"CONFIG_RULE_CONFLICT_ERR":    {403, ""}, "RESOURCE_OWNER_ERR": {403, ""}, "SERVICE_ONLY_ERR": {403, ""}, "FEATURE_RESTRICTED_ERR": {403, ""},
		"KEY_NOT_FOUND_ERR":            {404, "key does not exist"},
		"KEY_ACTION_INVALID_STATE_ERR": {409, "Key is not in a valid state"},
		"AUTHORIZATIONS_NOT_MET":       {409, "Number of authorizations required to delete is not met"},
		"PROTECTED_RESOURCE_ERR":       {409, "Key is protecting one or more cloud resources"},
		"PREV_KEY_DEL_ERR":             {409, "The key cannot be deleted because it's protecting a cloud resource that has a retention policy"},
		"KEY_CREATE_IMPORT_ACCESS_ERR": {409, "KeyCreateImportAccess instance policy does not allow this action"},
		"NOT_DUAL_AUTH_ERR":            {409, "The key is not dual auth enabled and cannot be set for deletion"},
		"REQ_TOO_EARLY_ERR":            {409, "The key was updated recently: Please wait and try again"},
		"IMPORT_TOKEN_EXPIRED_ERR":     {409, "The import token has expired"},
		"KEY_ROTATION_NOT_PERMITTED":   {409, "This root key has been rotated within the last hour: Only one 'rotate' action per hour is permitted"},
		"KEY_DELETED_ERR":              {410, "Key has already been deleted: Please delete references to this key"},
		"KEY_INVALID_STATE_ERR":        {422, "Key is not in a valid state"},
		"KEY_ROOT_REQ_REG_ERR":         {422, "Requested action can only be completed with a root key"},
		"UNPROCESSABLE_CIPHERTEXT_ERR": {422, "The provided ciphertext is invalid or corrupted"},
		"KEY_VERSION_INVALID":          {422, ""}, "INVALID_SIG_EXP_ERR": {422, "Signature is invalid"},
		"INCOMPLETE_METADATA_ERR": {500, "Key metadata became corrupted: Please delete this key"},
	} {
		if !Known(code) || StatusOf(code) != want.status || !strings.HasPrefix(MessageOf(code), want.says) {
			t.Errorf("%s: %d %q, want %d %q", code, StatusOf(code), MessageOf(code), want.status, want.says)
		}
	}
}
