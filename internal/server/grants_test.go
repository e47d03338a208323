package server_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// managing are the calls of IAM, in kmsctl's form and in ICP's. SERVICE, KEY
// and POLICY stand for ids, INSTANCE for an instance's.
var managing = []struct{ method, path, body string }{
	{"POST", "/kmsctl/v1/iam/service-ids", `{"name":"NEW"}`},
	{"POST", "/kmsctl/v1/iam/service-ids", `{"name":"NEW","instance":"INSTANCE"}`},
	{"POST", "/iam-token/serviceids/", `{"name":"NEW"}`},
	{"GET", "/kmsctl/v1/iam/service-ids", ""},
	{"GET", "/iam-token/serviceids/", ""},
	{"POST", "/kmsctl/v1/iam/api-keys", `{"name":"NEW","serviceId":"SERVICE"}`},
	{"POST", "/iam-token/apikeys/", `{"name":"NEW","boundTo":"crn:v1:icp:private:iam-identity:c:n/kube-system::serviceid:SERVICE"}`},
	{"GET", "/kmsctl/v1/iam/api-keys?serviceId=SERVICE", ""},
	{"POST", "/kmsctl/v1/iam/policies", `{"serviceId":"SERVICE","role":"Viewer","instance":"INSTANCE"}`},
	{"POST", "/iam-pap/acms/v1/scopes/n%252Fkube-system/service_ids/iam-SERVICE/policies",
		`{"resources":[{"serviceName":"kms","serviceInstance":"INSTANCE"}],"roles":[{"id":"crn:v1:icp:private:iam::::role:Viewer"}]}`},
	{"GET", "/kmsctl/v1/iam/policies/SERVICE", ""},
	{"GET", "/iam-pap/acms/v1/scopes/n%252Fkube-system/service_ids/iam-SERVICE/policies", ""},
	{"POST", "/kmsctl/v1/onboard", `{"name":"NEW"}`},
	{"DELETE", "/kmsctl/v1/iam/policies/SERVICE/POLICY", ""},
	{"DELETE", "/kmsctl/v1/iam/api-keys/KEY", ""},
	{"DELETE", "/kmsctl/v1/iam/service-ids/SERVICE", ""},
}

// crew is a service ID of an instance, with an API key and a policy.
type crew struct{ service, key, policy string }

func newCrew(t *testing.T, c client, name string) crew {
	t.Helper()
	who := iam.LocalAdmin().In(c.instance)
	sid, err := c.w.iam.CreateServiceID(t.Context(), who, name, "")
	if err != nil {
		t.Fatal(err)
	}
	k, _, err := c.w.iam.CreateAPIKey(t.Context(), who, "k", sid.ID)
	if err != nil {
		t.Fatal(err)
	}
	p, err := iam.NewPolicy(c.instance, "", "", "Viewer")
	if err != nil {
		t.Fatal(err)
	}
	id, err := c.w.iam.CreatePolicy(t.Context(), who, sid.ID, p)
	if err != nil {
		t.Fatal(err)
	}
	return crew{sid.ID, k.ID, id}
}

func (c crew) in(s, instance, name string) string {
	return strings.NewReplacer("SERVICE", c.service, "KEY", c.key, "POLICY", c.policy, "INSTANCE", instance, "NEW", name).Replace(s)
}

// TestRolesAndGrants meets every call of IAM with every role on the instance
// of its policy, on another one, without one, and by a policy on one key or
// ring. Only those who manage the whole instance may, only within it, and
// what is elsewhere looks like nothing.
func TestRolesAndGrants(t *testing.T) {
	w := newWorld(t)
	home, away := w.root(t, "home"), w.root(t, "away")
	key := home.create(t, `"name":"root"`)
	abroad := newCrew(t, away, "abroad")
	none := crew{"ServiceId-00000000-0000-4000-8000-000000000000", strings.Repeat("0", 32), "00000000-0000-4000-8000-000000000000"}
	count := map[string]int{}
	for role := range roleLetters {
		all := home.service(t, "all-"+role, role, "", "")
		elsewhere, nowhere := all, all
		elsewhere.instance, nowhere.instance = away.instance, ""
		manages := slices.Contains([]string{"Manager", "Administrator", "AccountAdministrator", "ClusterAdministrator"}, role)
		for i, e := range managing {
			for _, x := range []struct {
				name string
				by   client
				may  bool
			}{
				{"instance", all, manages}, {"another instance", elsewhere, false}, {"no instance", nowhere, false},
				{"one key", home.service(t, fmt.Sprint("one-", role, i), role, key.ID, ""), false},
				{"one ring", home.service(t, fmt.Sprint("ring-", role, i), role, "", "blue").with(kmsapi.HeaderKeyRing, "blue"), false},
			} {
				name := strings.ReplaceAll(fmt.Sprint(role, i, x.name), " ", "")
				mine := newCrew(t, home, "crew"+name)
				r := x.by.do(t, e.method, mine.in(e.path, home.instance, name), mine.in(e.body, home.instance, name))
				if x.may != (r.status/100 == 2) || !x.may && r.status != 403 {
					t.Errorf("%s %s by %s (%s): %d %s", e.method, e.path, role, x.name, r.status, r.body)
				}
				count[fmt.Sprint(x.name, ": allowed ", x.may)]++
			}
			if !manages || !strings.Contains(e.path+e.body, "SERVICE") && !strings.Contains(e.path, "KEY") {
				continue
			}
			// What another instance has, and what nobody has, are refused alike.
			var bodies [2]string
			for j, c := range []crew{abroad, none} {
				r := all.do(t, e.method, c.in(e.path, home.instance, "x"), c.in(e.body, home.instance, "x"))
				if r.status != 404 {
					t.Errorf("%s %s of another instance by %s: %d %s", e.method, e.path, role, r.status, r.body)
				}
				bodies[j] = strings.NewReplacer(c.service, "SERVICE", c.key, "KEY", c.policy, "POLICY").Replace(r.body)
				count["foreign and absent: alike"]++
			}
			if bodies[0] != bodies[1] {
				t.Errorf("%s %s by %s tells whether it exists:\n%s\n%s", e.method, e.path, role, bodies[0], bodies[1])
			}
		}
		// Rights on another instance, and more than one's own.
		for _, body := range []string{`{"serviceId":"SERVICE","role":"Viewer","instance":"` + away.instance + `"}`, `{"serviceId":"SERVICE","role":"Viewer","instance":"` + none.policy + `"}`,
			`{"serviceId":"SERVICE","role":"KeyPurge","instance":"INSTANCE"}`} {
			mine := newCrew(t, home, "crew"+role+fmt.Sprint(len(body), strings.Contains(body, none.policy)))
			if r := all.do(t, "POST", "/kmsctl/v1/iam/policies", mine.in(body, home.instance, "")); r.status != 403 {
				t.Errorf("%s by %s: %d %s", body, role, r.status, r.body)
			}
			count["more than one's own: refused"]++
		}
	}
	t.Logf("roles × IAM calls: %v", count)
}

// TestManagerOnboards: what a manager made works, in their instance and
// nowhere else.
func TestManagerOnboards(t *testing.T) {
	w := newWorld(t)
	home, away := w.root(t, "home"), w.root(t, "away")
	manager := home.service(t, "manager", "Manager", "", "")
	var made kmsapi.Onboarded
	r := manager.do(t, "POST", "/kmsctl/v1/onboard", `{"name":"orders"}`)
	if r.into(t, &made); r.status != 201 || made.InstanceID != home.instance {
		t.Fatal(r)
	}
	if e := w.audit.last(); e.Action != "kmsctl.onboard" || e.Instance != home.instance || !strings.HasPrefix(e.Principal, "ServiceId-") {
		t.Errorf("%+v", e)
	}
	orders := client{w: w, token: w.login(t, made.APIKey), instance: home.instance}
	if r := orders.do(t, "POST", "/api/v2/keys/"+made.KeyID+"/actions/wrap", ""); r.status != 200 {
		t.Error(r)
	}
	var again kmsapi.Onboarded
	r = manager.do(t, "POST", "/kmsctl/v1/onboard", `{"name":"orders"}`)
	if r.into(t, &again); r.status != 201 || !again.Existing || again.KeyID != made.KeyID {
		t.Error(r)
	}
	if r := manager.do(t, "POST", "/kmsctl/v1/onboard", `{"name":"x","instance":"`+away.instance+`"}`); r.status != 403 {
		t.Error(r)
	}
	// The administrator sees what managers made, and managers only their own.
	var ids kmsapi.ServiceIDs
	home.do(t, "GET", "/kmsctl/v1/iam/service-ids", "").into(t, &ids)
	if len(ids.ServiceIDs) != 2 {
		t.Errorf("%+v", ids)
	}
	manager.do(t, "GET", "/kmsctl/v1/iam/service-ids", "").into(t, &ids)
	if len(ids.ServiceIDs) != 1 || ids.ServiceIDs[0].Instance != home.instance {
		t.Errorf("%+v", ids)
	}
	if r := manager.do(t, "DELETE", "/kmsctl/v1/iam/service-ids/orders", ""); r.status != 204 {
		t.Error(r)
	}
	if e := w.audit.last(); e.Key != made.ServiceID {
		t.Errorf("the audit log names %q", e.Key)
	}
	if r := orders.do(t, "POST", "/api/v2/keys/"+made.KeyID+"/actions/wrap", ""); r.status != 401 {
		t.Error(r)
	}
}

// TestDeletedInstanceIsForgotten: its service IDs are gone, and nobody has
// rights in it any more.
func TestDeletedInstanceIsForgotten(t *testing.T) {
	w := newWorld(t)
	home, away := w.root(t, "home"), w.root(t, "away")
	manager := home.service(t, "manager", "Manager", "", "")
	if r := away.do(t, "POST", "/kmsctl/v1/iam/policies", `{"serviceId":"manager","role":"Reader","instance":"`+away.instance+`"}`); r.status != 201 {
		t.Fatal(r)
	}
	mine := newCrew(t, home, "crew")
	key := home.create(t, `"name":"root"`)
	if r := home.do(t, "DELETE", "/kmsctl/v1/instance", ""); r.status != 409 {
		t.Errorf("with a key: %d %s", r.status, r.body)
	}
	home.do(t, "DELETE", "/api/v2/keys/"+key.ID, "")
	w.advance(kms.DefaultWindows().PurgeMin)
	home.token, away.token = w.login(t, w.admin), w.login(t, w.admin)
	purger := home.service(t, "purger", "KeyPurge", "", "")
	if r := purger.do(t, "DELETE", "/api/v2/keys/"+key.ID+"/purge", ""); r.status != 204 {
		t.Fatal(r)
	}
	for range 2 { // a second time there is none
		if r := home.do(t, "DELETE", "/kmsctl/v1/instance", ""); r.status != 204 && r.code() != kmsapi.InstanceNotFound {
			t.Fatal(r)
		}
	}
	var ids kmsapi.ServiceIDs
	away.do(t, "GET", "/kmsctl/v1/iam/service-ids", "").into(t, &ids)
	if slices.ContainsFunc(ids.ServiceIDs, func(s kmsapi.ServiceID) bool { return s.ID == mine.service }) || len(ids.ServiceIDs) != 2 {
		t.Errorf("%+v", ids)
	}
	var ps kmsapi.Policies
	away.do(t, "GET", "/kmsctl/v1/iam/policies/manager", "").into(t, &ps)
	if len(ps.Policies) != 1 || ps.Policies[0].Instance != away.instance {
		t.Errorf("%+v", ps)
	}
	manager.token = w.login(t, string(w.anotherKey(t, "manager")))
	if r := manager.do(t, "GET", "/api/v2/keys", ""); r.status != 403 {
		t.Error(r)
	}
}

// anotherKey is one more API key of a service ID.
func (w *world) anotherKey(t *testing.T, service string) []byte {
	t.Helper()
	_, v, err := w.iam.CreateAPIKey(t.Context(), iam.LocalAdmin(), "k", service)
	if err != nil {
		t.Fatal(err)
	}
	return v.Reveal()
}

// TestSigningKeysByHTTP: tokens of before live on after a rotation, and not
// after a withdrawal.
func TestSigningKeysByHTTP(t *testing.T) {
	w := newWorld(t)
	root := w.root(t, "shop")
	rotate := func(body string) kmsapi.SigningKey {
		t.Helper()
		var k kmsapi.SigningKey
		r := root.do(t, "POST", "/kmsctl/v1/iam/signing-keys/rotate", body)
		if r.into(t, &k); r.status != 201 || !k.Signs || k.ID == "" {
			t.Fatal(r)
		}
		if e := w.audit.last(); e.Action != "iam.signing-keys.rotate" || e.Key != k.ID {
			t.Errorf("%+v", e)
		}
		return k
	}
	first := rotate("")
	if r := root.do(t, "GET", "/api/v2/keys", ""); r.status != 200 {
		t.Errorf("after a rotation: %+v", r)
	}
	w.advance(time.Second)
	second := rotate(`{"now":true}`)
	if r := root.do(t, "GET", "/api/v2/keys", ""); r.status != 401 {
		t.Errorf("after a withdrawal: %+v", r)
	}
	root.token = w.login(t, w.admin)
	var all kmsapi.SigningKeys
	root.do(t, "GET", "/kmsctl/v1/iam/signing-keys", "").into(t, &all)
	if len(all.SigningKeys) != 3 || all.SigningKeys[0].ID != second.ID || all.SigningKeys[1].ID != first.ID || all.SigningKeys[1].GoodUntil == nil || all.SigningKeys[2].CreatedAt != nil {
		t.Errorf("%+v", all)
	}
	if r := root.do(t, "POST", "/kmsctl/v1/iam/signing-keys/rotate", `{"when":"now"}`); r.status != 400 {
		t.Error(r)
	}
}

// TestAdministratorsReadHeadsAndBackup: what administrators alone may read.
func TestAdministratorsReadHeadsAndBackup(t *testing.T) {
	w := newWorld(t)
	root := w.root(t, "shop")
	var heads kmsapi.AuditHeads
	r := root.do(t, "GET", "/kmsctl/v1/audit/heads", "")
	if r.into(t, &heads); r.status != 200 || len(heads.PublicKey) == 0 {
		t.Error(r)
	}
	if r := root.do(t, "GET", "/kmsctl/v1/backup", ""); r.status != 200 || r.body != "a copy of the store" || r.header.Get("Cache-Control") != "no-store" {
		t.Error(r)
	}
}

// TestARefusedOnboardingLeavesNothing: what is wrong with it is found before
// an instance or a key is made.
func TestARefusedOnboardingLeavesNothing(t *testing.T) {
	w := newWorld(t)
	root := w.root(t, "shop")
	manager := root.service(t, "boss", "Manager", "", "")
	left := func() string {
		return root.do(t, "GET", "/kmsctl/v1/instances", "").body + root.do(t, "GET", "/api/v2/keys", "").body
	}
	before := left()
	for _, c := range []struct {
		by     client
		body   string
		status int
	}{
		{root, `{"name":"orders","role":"Nonsense"}`, 400},
		{root, `{"name":"orders","role":"Operator"}`, 400},
		{root, `{"name":"ServiceId-orders"}`, 400},
		{root, `{"name":"or/ders"}`, 400},
		{root, `{"name":""}`, 400},
		{root, `{"name":"orders","key":"an-alias"}`, 400},
		{root, `{"name":"orders","role":"Nonsense","instance":"` + root.instance + `"}`, 400},
		{manager, `{"name":"orders","role":"KeyPurge"}`, 403},
	} {
		r := c.by.do(t, "POST", "/kmsctl/v1/onboard", c.body)
		if r.status != c.status {
			t.Errorf("%s: %d %s", c.body, r.status, r.body)
		}
		if after := left(); after != before {
			t.Errorf("%s left something:\n%s\n%s", c.body, before, after)
		}
	}
	if r := root.do(t, "POST", "/kmsctl/v1/onboard", `{"name":"orders"}`); r.status != 201 {
		t.Error(r)
	}
}
