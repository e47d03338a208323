package hsm_test

import (
	"testing"

	"github.com/kmsctl/kmsctl/internal/hsm"
)

func TestSameKey(t *testing.T) {
	kw, kwp, other := []byte{1, 5, 5, 5}, []byte{2, 6, 6, 6}, []byte{1, 5, 5, 6}
	both := append(append([]byte{}, kw...), kwp...)
	for name, c := range map[string]struct {
		a, b []byte
		want bool
	}{
		"the same": {kw, kw, true}, "none and none": {nil, nil, true}, "one method more": {kw, both, true}, "one less": {both, kwp, true},
		"another key": {kw, other, false}, "another key beside": {both, other, false}, "no method in common": {kw, kwp, false},
		"none and one": {nil, kw, false}, "cut": {kw, kw[:3], false},
	} {
		if got := hsm.SameKey(c.a, c.b); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
