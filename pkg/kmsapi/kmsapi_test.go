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
