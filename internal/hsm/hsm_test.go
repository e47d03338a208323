package hsm_test

import (
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/hsm"
)

func TestLookup(t *testing.T) {
	for _, n := range []string{"gemalto", "thales", "softhsm"} {
		if m, err := hsm.Lookup(n); err != nil || m.Name != n || !strings.HasPrefix(m.Image, "kms-") {
			t.Errorf("%s: %+v, %v", n, m, err)
		}
	}
	_, err := hsm.Lookup("luna")
	if err == nil || !strings.Contains(err.Error(), "gemalto, thales, softhsm") {
		t.Errorf("%v", err)
	}
}

func TestCheckPIN(t *testing.T) {
	for pin, ok := range map[string]bool{
		"password": true, "pass word": true, "pässwörd": true,
		"": false, "password\n": false, "password\r\n": false, " password": false, "password ": false, "pass\x00word": false, "\tpassword": false,
	} {
		err := hsm.CheckPIN([]byte(pin))
		if (err == nil) != ok {
			t.Errorf("%q: %v", pin, err)
		}
		if err != nil && strings.Contains(err.Error(), "password\n") {
			t.Errorf("the PIN is in the error: %v", err)
		}
	}
}
