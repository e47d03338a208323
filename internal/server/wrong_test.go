package server_test

import (
	"testing"

	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// TestWrongInput gives endpoints that no other test does what they must not
// take: each answers with its documented code, and is no 5xx.
func TestWrongInput(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	if _, err := w.iam.CreateServiceID(t.Context(), iam.LocalAdmin(), "crew", ""); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"POST", "/api/v2/keys_with_policy_overrides", createBody(`"name":"xx","rotation":{"enabled":true,"interval_month":13}`), 400, kmsapi.InvalidField},
		{"POST", "/api/v2/keys_with_policy_overrides", createBody(`"name":"xx","extractable":true,"rotation":{"enabled":true,"interval_month":2}`), 400, kmsapi.RootRequired},
		{"GET", "/api/v2/keys/none/metadata", "", 404, kmsapi.KeyNotFound},
		{"GET", "/api/v2/keys/registrations?limit=x", "", 400, kmsapi.InvalidQuery},
		{"GET", "/api/v2/key_rings?offset=-1", "", 400, kmsapi.InvalidQuery},
		{"GET", "/api/v2/instance/policies?policy=colour", "", 400, kmsapi.InvalidQuery},
		{"POST", "/kmsctl/v1/instances", `{"name":""}`, 400, kmsapi.InvalidField},
		{"POST", "/kmsctl/v1/instances", `{"name":"xx","dialect":"latin"}`, 400, kmsapi.InvalidField},
		{"POST", "/serviceids", `{"name":"a/b"}`, 400, kmsapi.InvalidField},
		{"POST", "/serviceids", `{"name":"ab","colour":"red"}`, 400, kmsapi.BadBody},
		{"DELETE", "/serviceids/none", "", 404, kmsapi.KeyNotFound},
		{"DELETE", "/v1/scopes/n%252Fkube-system/service_ids/crew/policies/none", "", 404, kmsapi.KeyNotFound},
	} {
		if r := c.do(t, x.method, x.path, x.body); r.status != x.status || r.code() != x.code || malformed(r) != "" {
			t.Errorf("%s %s %s: %d %s", x.method, x.path, x.body, r.status, r.body)
		}
	}
	c.instance = "00000000-0000-4000-8000-000000000000"
	if r := c.do(t, "GET", "/api/v2/instance/allowed_ip_port", ""); r.status != 404 || r.code() != kmsapi.InstanceNotFound {
		t.Errorf("%+v", r)
	}
}
