package record

import (
	"encoding/json"
	"strings"
)

// WrittenUnused says whether a KMS writes such a record by itself, before
// anybody uses it: heads of its audit log, its clock, what its master keys are
// about and what they sealed, the end of a clearing or a restore, keys that sign its tokens,
// and the administrators' keys that its start registers. value is as the store
// has it.
func WrittenUnused(path string, value []byte) bool {
	for _, own := range []string{"audit/", "clear/", "clock/", "master/", RestoredDir, "uses/master/", "iam/signing-keys/"} {
		if strings.HasPrefix(path, own) {
			return true
		}
	}
	var k struct {
		Admin bool `json:"admin"`
	}
	return strings.HasPrefix(path, "iam/apikeys/") && json.Unmarshal(Body(value), &k) == nil && k.Admin
}
