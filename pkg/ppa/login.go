package ppa

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// Login is the pull-authorization of a reference: as whom the maker of an
// archive pulls it. It is no part of a Manifest, so that it is never written
// into an archive.
type Login struct {
	Username Credential `json:"username"`
	Password Credential `json:"password"`
}

// Credential is a text of the spec, or the name of the variable of the
// environment that has it. It does not print.
type Credential struct{ env, text string }

// UnmarshalJSON reads a text, or {"env": NAME}.
func (c *Credential) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &c.text) == nil {
		return nil
	}
	var o struct{ Env string }
	if json.Unmarshal(b, &o) != nil || o.Env == "" {
		return errors.New("it is neither a text nor {env: NAME}")
	}
	c.env = o.Env
	return nil
}

// String hides the text.
func (c Credential) String() string {
	if c.env != "" {
		return "$" + c.env
	}
	return "(hidden)"
}

// GoString is String.
func (c Credential) GoString() string { return c.String() }

// Value gives the text, and what is wrong when there is none.
func (c Credential) Value(getenv func(string) string) (string, error) {
	name := c.env
	if bare, ok := strings.CutPrefix(c.text, "${"); ok && strings.HasSuffix(bare, "}") {
		name = strings.TrimSuffix(bare, "}")
	}
	switch {
	case strings.HasPrefix(c.text, "{{") && strings.HasSuffix(c.text, "}}"):
		return "", fmt.Errorf("%s is a placeholder that nobody replaced", c.text)
	case name == "" && c.text == "":
		return "", errors.New("it is empty")
	case name == "":
		return c.text, nil
	}
	v := getenv(name)
	if v == "" {
		return "", fmt.Errorf("the environment has no %s", name)
	}
	return v, nil
}

// ParseLogins reads the pull-authorizations of a manifest.yaml, by the names of
// their references.
func ParseLogins(b []byte) (map[string]Login, error) {
	var in struct {
		Images []struct {
			References []struct {
				Repository string `json:"repository"`
				Login      *Login `json:"pull-authorization"`
			} `json:"references"`
		} `json:"images"`
	}
	if err := readYAML(b, &in); err != nil {
		return nil, fmt.Errorf("read %s: pull-authorization: %w", YAMLName, err)
	}
	out := map[string]Login{}
	for _, i := range in.Images {
		for _, r := range i.References {
			if r.Login != nil {
				name, tag := SplitRef(r.Repository)
				out[name+":"+orLatest(tag)] = *r.Login
			}
		}
	}
	return out, nil
}
