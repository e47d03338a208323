package hsm_test

import (
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/pki"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func pair(t *testing.T, name string, hosts []string, at time.Time) (ca, leaf pki.Pair) {
	t.Helper()
	ca, err := pki.NewCA("luna", at)
	if err != nil {
		t.Fatal(err)
	}
	if leaf, err = pki.Issue(ca, name, pki.Client, hosts, at); err != nil {
		t.Fatal(err)
	}
	return ca, leaf
}

func TestCheckClient(t *testing.T) {
	ca, byCN := pair(t, "10.0.0.11", nil, now)
	_, bySAN := pair(t, "node", []string{"10.0.0.11"}, now)
	_, other := pair(t, "10.0.0.12", nil, now)
	_, old := pair(t, "10.0.0.11", nil, now.Add(-398*24*time.Hour))
	_, ends := pair(t, "10.0.0.11", nil, now.Add(-390*24*time.Hour))
	_, early := pair(t, "10.0.0.11", nil, now.Add(48*time.Hour))
	for name, c := range map[string]struct {
		cert, key  []byte
		err, warns string
	}{
		"by CN":        {byCN.Cert, byCN.Key, "", ""},
		"by SAN":       {bySAN.Cert, bySAN.Key, "", ""},
		"other node":   {other.Cert, other.Key, "", `is for "10.0.0.12"`},
		"ends soon":    {ends.Cert, ends.Key, "", "expires on"},
		"expired":      {old.Cert, old.Key, "expired on", ""},
		"not yet":      {early.Cert, early.Key, "valid only from", ""},
		"keys swapped": {byCN.Cert, bySAN.Key, "private key does not match", ""},
		"no PEM":       {[]byte("canary"), byCN.Key, "certificate pair of node 10.0.0.11", ""},
		"torn PEM":     {[]byte("-----BEGIN CERTIFICATE-----\nY2FuYXJ5\n-----END CERTIFICATE-----\n"), byCN.Key, "certificate pair of node 10.0.0.11", ""},
		"no key":       {byCN.Cert, []byte("canary"), "certificate pair of node 10.0.0.11", ""},
	} {
		warns, err := hsm.CheckClient("10.0.0.11", c.cert, c.key, now)
		if (err == nil) != (c.err == "") || (err != nil && !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %v, want %q", name, err, c.err)
		}
		if err != nil && strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: content in the error: %v", name, err)
		}
		if (len(warns) == 0) != (c.warns == "") || (len(warns) > 0 && !strings.Contains(string(warns[0]), c.warns)) {
			t.Errorf("%s: warnings %q, want %q", name, warns, c.warns)
		}
	}
	for name, c := range map[string]struct {
		pem  []byte
		want string
	}{
		"two":     {append(append([]byte{}, ca.Cert...), byCN.Cert...), ""},
		"none":    {[]byte("x"), "no certificate"},
		"torn":    {[]byte("-----BEGIN CERTIFICATE-----\nY2FuYXJ5\n-----END CERTIFICATE-----\n"), "server certificate 1: "},
		"a key":   {byCN.Key, "has a EC PRIVATE KEY"},
		"expired": {old.Cert, "expired on"},
	} {
		err := hsm.CheckServerCA(c.pem, now)
		if (err == nil) != (c.want == "") || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
