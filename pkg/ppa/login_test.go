package ppa

import (
	"fmt"
	"strings"
	"testing"
)

const loginSample = `images:
- image: search-api:latest
  references:
  - repository: search-api-amd64:latest
    pull-authorization:
      username: {env: ARTIFACTORY_USER}
      password: {env: ARTIFACTORY_PASSWORD}
  - repository: search-api-ppc64le
    pull-authorization: {username: me, password: "s3cret"}
  - repository: search-api-s390x:latest
    pull-authorization:
      username: {{ ARTIFACTORY_USERNAME }}
      password: ${PASS}
  - repository: search-api-arm64:latest
`

// TestLogins reads every form of pull-authorization, says what is missing of
// it, and prints none.
func TestLogins(t *testing.T) {
	got, err := ParseLogins([]byte(loginSample))
	if err != nil || len(got) != 3 {
		t.Fatalf("%v, %v", got, err)
	}
	if text := fmt.Sprintf("%v %+v %#v", got, got, got); strings.Contains(text, "s3cret") {
		t.Errorf("a secret in %s", text)
	}
	env := func(k string) string { return map[string]string{"ARTIFACTORY_USER": "u", "PASS": "p"}[k] }
	for ref, want := range map[string][2]string{
		"search-api-amd64:latest":   {"u", "the environment has no ARTIFACTORY_PASSWORD"},
		"search-api-ppc64le:latest": {"me", "s3cret"},
		"search-api-s390x:latest":   {"{{ ARTIFACTORY_USERNAME }} is a placeholder that nobody replaced", "p"},
	} {
		for n, c := range []Credential{got[ref].Username, got[ref].Password} {
			v, err := c.Value(env)
			if err != nil {
				v = err.Error()
			}
			if v != want[n] {
				t.Errorf("%s: %q, want %q", ref, v, want[n])
			}
		}
	}
	if _, err := (Credential{}).Value(env); err == nil {
		t.Error("nothing at all was taken for a credential")
	}
	for _, bad := range []string{"12345", "[a]", "{file: x}", "{env: ''}"} {
		if _, err := ParseLogins([]byte("images: [{references: [{repository: a, pull-authorization: {password: " + bad + "}}]}]")); err == nil || strings.Contains(err.Error(), "12345") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	// It is no part of what is written into an archive.
	m, err := ParseYAML([]byte(loginSample))
	if out := string(m.YAML()); err != nil || strings.Contains(out, "s3cret") || strings.Contains(out, "authorization") {
		t.Errorf("%v, %s", err, out)
	}
}
