package server_test

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// TestOpenAPI: every route is described, everything that is described is
// served, and every reference leads somewhere.
func TestOpenAPI(t *testing.T) {
	if left := server.UndocumentedForTest(); len(left) != 0 {
		t.Errorf("not described, or not served: %q", left)
	}
	w := newWorld(t)
	c := client{w: w, instance: "00000000-0000-4000-8000-000000000000"}
	r := c.do(t, "GET", "/openapi.json", "")
	var d struct {
		OpenAPI    string
		Paths      map[string]map[string]json.RawMessage
		Components struct{ Schemas map[string]json.RawMessage }
	}
	r.into(t, &d)
	if r.status != 200 || d.OpenAPI != "3.1.0" || len(d.Paths) < 60 {
		t.Errorf("%d: version %q, %d paths", r.status, d.OpenAPI, len(d.Paths))
	}
	for _, m := range regexp.MustCompile(`"#/components/schemas/([^"]*)"`).FindAllStringSubmatch(r.body, -1) {
		if d.Components.Schemas[m[1]] == nil {
			t.Errorf("no schema %q", m[1])
		}
	}
	for pattern := range server.RoutesForTest() {
		method, path, _ := strings.Cut(pattern, " ")
		if d.Paths[strings.TrimSuffix(path, "{$}")][strings.ToLower(method)] == nil {
			t.Errorf("%s is served and not described", pattern)
		}
	}
	open := server.OpenForTest()
	n := 0
	for path, methods := range d.Paths {
		url := regexp.MustCompile(`\{[a-z]+\}`).ReplaceAllString(path, "x")
		for method := range methods {
			n++
			r := c.do(t, strings.ToUpper(method), url, "")
			if r.code() == kmsapi.NoSuchPath || r.status == 404 || r.status == 405 {
				t.Errorf("%s %s is described and not served: %d %s", method, path, r.status, r.body)
			}
			if !slices.Contains(open, path) && r.status != 401 {
				t.Errorf("%s %s without a token: %d", method, path, r.status)
			}
		}
	}
	t.Logf("%d operations", n)
}
