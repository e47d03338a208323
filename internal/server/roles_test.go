package server_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// roleLetters are the roles of both families as the table below names them:
// Key Protect's Reader, readerPlus (P), Writer, Manager, KeyPurge, then ICP's
// Viewer, Editor, and the three administrators, which are alike.
var roleLetters = map[string]string{"Reader": "R", "ReaderPlus": "P", "Writer": "W", "Manager": "M", "KeyPurge": "K",
	"Viewer": "v", "Editor": "e", "Administrator": "a", "AccountAdministrator": "a", "ClusterAdministrator": "a"}

// endpoints is who may do what, written down from IBM's documentation and not
// from the code. KEY stands for a key's id.
var endpoints = []struct{ method, path, body, roles string }{
	{"POST", "/keys", createBody(`"name":"xx"`), "WMea"},
	{"POST", "/keys_with_policy_overrides", createBody(`"name":"xx"`), "WMea"},
	{"GET", "/keys", "", "RPWMea"},
	{"HEAD", "/keys", "", "RPWMea"},
	{"GET", "/keys/KEY", "", "PWMea"},
	{"GET", "/keys/KEY/metadata", "", "RPWMea"},
	{"PATCH", "/keys/KEY", `{"keyRingID":"default"}`, "M"},
	{"GET", "/keys/KEY/versions", "", "RPWM"},
	{"POST", "/keys/KEY/actions/wrap", "", "RPWMvea"},
	{"POST", "/keys/KEY/actions/unwrap", "{}", "RPWMvea"},
	{"POST", "/keys/KEY/actions/rewrap", "{}", "RPWM"},
	{"POST", "/keys/KEY/actions/rotate", "", "WMa"},
	{"POST", "/keys/KEY/actions/disable", "", "M"},
	{"POST", "/keys/KEY/actions/enable", "", "M"},
	{"POST", "/keys/KEY/actions/setKeyForDeletion", "", "WM"},
	{"POST", "/keys/KEY/actions/unsetKeyForDeletion", "", "WM"},
	{"POST", "/keys/KEY/actions/sync", "", "WM"},
	{"POST", "/keys/KEY?action=wrap", "", "RPWMvea"},
	{"POST", "/keys/KEY?action=rotate", "", "WMa"},
	{"POST", "/keys/KEY?action=disable", "", "M"},
	{"GET", "/keys/KEY/policies", "", "M"},
	{"PUT", "/keys/KEY/policies", "{}", "M"},
	{"POST", "/keys/KEY/aliases/metadata", "", "WM"},
	{"DELETE", "/keys/KEY/aliases/none", "", "WM"},
	{"GET", "/keys/KEY/registrations", "", "RPWM"},
	{"GET", "/keys/registrations", "", "RPWM"},
	{"POST", "/keys/KEY/registrations/none", "", "WM"},
	{"DELETE", "/keys/KEY/registrations/none", "", "WM"},
	{"DELETE", "/keys/KEY/purge", "", "K"},
	{"POST", "/keys/KEY/restore", "", "M"},
	{"DELETE", "/keys/KEY", "", "Ma"},
	{"GET", "/key_rings", "", "RPWM"},
	{"POST", "/key_rings/default", "", "WM"},
	{"DELETE", "/key_rings/none", "", "M"},
	{"POST", "/import_token", `{"expiration":1}`, "WM"},
	{"GET", "/import_token", "", "WM"},
	{"GET", "/instance/policies", "", "M"},
	{"PUT", "/instance/policies", "{}", "M"},
	{"GET", "/instance/allowed_ip_port", "", "RPWM"},
}

// TestRolesAndEndpoints meets every endpoint with every role: on the instance
// of its policy, on another instance, by a policy on one key for that key and
// for another, and by a policy on a ring for a key that lies elsewhere. To
// move a key, one needs the right on the ring that it goes to as well.
func TestRolesAndEndpoints(t *testing.T) {
	w := newWorld(t)
	home, away := w.root(t, "home"), w.root(t, "away")
	foreign := away.create(t, `"name":"foreign"`)
	home.do(t, "POST", "/api/v2/key_rings/blue", "")
	count := map[string]int{}
	for role, letter := range roleLetters {
		fresh := func() kmsapi.Key { return home.create(t, `"name":"root"`) }
		mine := fresh()
		all := home.service(t, "all-"+role, role, "", "")
		one := home.service(t, "one-"+role, role, mine.ID, "")
		ring := home.service(t, "ring-"+role, role, "", "blue")
		abroad := all
		abroad.instance = away.instance
		for _, e := range endpoints {
			key := fresh()
			onKey := strings.Contains(e.path, "KEY")
			allowed := strings.Contains(e.roles, letter)
			for _, x := range []struct {
				name string
				by   client
				key  string
				may  bool
			}{
				{"instance", all, key.ID, allowed}, {"another instance", abroad, foreign.ID, false}, {"another instance, no such key", abroad, key.ID, false},
				{"one key", one, mine.ID, allowed && onKey && e.method != "PATCH"}, {"another key", one, key.ID, false}, {"key of another ring", ring, key.ID, false},
			} {
				if x.name == "one key" && onKey && e.method == "DELETE" && !strings.Contains(e.path, "none") {
					continue // the key is needed for the rest of the row; the other columns cover the action
				}
				calls, path := w.token.Calls.Load(), "/api/v2"+strings.ReplaceAll(e.path, "KEY", x.key)
				r := x.by.do(t, e.method, path, e.body)
				refused := r.status == 403
				if refused == x.may || r.status == 401 || r.status >= 500 {
					t.Errorf("%s by %s (%s): %d %s", e.method+" "+e.path, role, x.name, r.status, r.body)
				}
				if refused && w.token.Calls.Load() != calls {
					t.Errorf("%s by %s (%s): refused, but the HSM was asked", e.method+" "+e.path, role, x.name)
				}
				if refused && e.method != "HEAD" && r.code() != kmsapi.Forbidden {
					t.Errorf("%s by %s: %s", e.path, role, r.body)
				}
				count[fmt.Sprint(x.name, ": allowed ", x.may)]++
			}
		}
		// What only administrators may do is closed to every role.
		for _, p := range []string{"GET /kmsctl/v1/instances", "POST /kmsctl/v1/instances", "DELETE /kmsctl/v1/instance", "GET /kmsctl/v1/audit/heads", "GET /kmsctl/v1/backup",
			"GET /kmsctl/v1/iam/signing-keys", "POST /kmsctl/v1/iam/signing-keys/rotate",
			"GET /kmsctl/v1/clear", "POST /kmsctl/v1/clear", "POST /kmsctl/v1/clear/plan", "POST /kmsctl/v1/clear/settle",
			"GET /kmsctl/v1/master", "POST /kmsctl/v1/master/rotate", "POST /kmsctl/v1/master/migrate", "POST /kmsctl/v1/master/stop",
			"GET /kmsctl/v1/clock", "POST /kmsctl/v1/clock/confirm"} {
			method, path, _ := strings.Cut(p, " ")
			if r := all.do(t, method, path, "{}"); r.status != 403 {
				t.Errorf("%s by %s: %d %s", p, role, r.status, r.body)
			}
			count["administration: allowed false"]++
		}
	}
	t.Logf("roles × endpoints: %v", count)
}
