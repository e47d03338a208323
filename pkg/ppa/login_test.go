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

// FuzzLogins gives all that may stand around a password in a spec: no crash,
// and the password is in no error and in nothing that prints.
func FuzzLogins(f *testing.F) {
	for _, around := range [][2]string{
		{"", ""}, {`"`, `"`}, {"'", ""}, {"*", ""}, {"!!int ", ""}, {"!!float ", ""}, {"{[a]: ", "}"}, {"{[", "]: 1}"}, {"[", "]"}, {"{env: ", "}"}, {"${", "}"},
		{"{{ ", " }}"}, {"&a ", ""}, {"|", ""}, {"%", ""}, {"a: ", ""}, {`"\q`, `"`}, {"? ", ""}, {"1\n- image: ", "\n"}, {"!!binary ", "="}, {"<<: ", ""},
	} {
		f.Add(around[0], around[1])
	}
	const secret = "s3cret-word"
	f.Fuzz(func(t *testing.T, before, after string) {
		spec := []byte("images:\n- image: a\n  references:\n  - repository: a\n    pull-authorization:\n      username: u\n      password: " + before + secret + after + "\n")
		logins, err := ParseLogins(spec)
		_, yerr := ParseYAML(spec)
		if strings.ContainsAny(before+after, "\n\r\u0085\u2028\u2029") || strings.ContainsAny(before, "{$") {
			return // then it is another key's text, or the name of a variable
		}
		if text := fmt.Sprintf("%v %v %v %+v %#v", err, yerr, logins, logins, logins); strings.Contains(text, secret) {
			t.Errorf("a secret in %s", text)
		}
	})
}
