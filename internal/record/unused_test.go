package record_test

import (
	"testing"

	"github.com/kmsctl/kmsctl/internal/record"
)

func TestWrittenUnused(t *testing.T) {
	body := func(json string) []byte { return append(append([]byte{record.Version}, make([]byte, 32)...), json...) }
	for _, c := range []struct {
		path, json string
		want       bool
	}{
		{"audit/embedded", "{}", true}, {"clock/seen", "{}", true}, {"uses/master/seal", "{}", true}, {"iam/signing-keys/a", "{}", true},
		{"iam/apikeys/a", `{"admin":true}`, true}, {"iam/apikeys/a", `{"serviceId":"s"}`, false}, {"iam/apikeys/a", "no JSON", false},
		{"uses/instance/key", "{}", false}, {"instances/a", "{}", false}, {"keys/a/b", "{}", false}, {"clocks", "{}", false},
	} {
		if got := record.WrittenUnused(c.path, body(c.json)); got != c.want {
			t.Errorf("%s %s: %v", c.path, c.json, got)
		}
	}
}
