package server_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	kp "github.com/IBM/keyprotect-go-client"
	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func (c client) act(t *testing.T, id, action, body string) reply {
	t.Helper()
	return c.do(t, "POST", "/api/v2/keys/"+id+"/actions/"+action, body)
}

// wrapped wraps a fresh DEK and gives the body that unwraps it.
func (c client) wrapped(t *testing.T, id string) string {
	t.Helper()
	var out kmsapi.ActionAnswer
	r := c.act(t, id, "wrap", "")
	if r.status != 200 {
		t.Fatalf("wrap: %d %s", r.status, r.body)
	}
	r.into(t, &out)
	b, _ := json.Marshal(kmsapi.UnwrapRequest{Ciphertext: out.Ciphertext})
	return string(b)
}

// TestStatesAndActions is IBM's table of what a key in each state can do.
func TestStatesAndActions(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	const ok = ""
	state, gone := kmsapi.InvalidState, kmsapi.KeyDeleted
	// The states in the order active, suspended, deactivated by expiry, destroyed.
	want := map[string][4]string{
		"get": {ok, ok, ok, ok}, "metadata": {ok, ok, ok, ok}, "wrap": {ok, state, kmsapi.KeyExpired, gone}, "unwrap": {ok, state, ok, gone},
		"rewrap": {ok, state, ok, gone}, "rotate": {ok, state, ok, gone}, "disable": {ok, state, state, gone}, "enable": {state, ok, state, gone},
		"delete": {ok, ok, ok, gone}, "restore": {state, state, state, ok}, "purge": {state, state, state, ok}, "sync": {ok, ok, ok, gone},
		"versions": {ok, ok, ok, gone}, "policies": {ok, ok, ok, gone}, "patch": {ok, ok, ok, gone}, "alias": {ok, ok, ok, gone},
	}
	for action, codes := range want {
		for i, code := range codes {
			in := `"name":"root"`
			if i == 2 {
				in += `,"expirationDate":"` + w.now().Add(time.Minute).Format(time.RFC3339) + `"`
			}
			k := c.create(t, in)
			cipher := c.wrapped(t, k.ID)
			switch i {
			case 1:
				c.act(t, k.ID, "disable", "null")
			case 3:
				c.do(t, "DELETE", "/api/v2/keys/"+k.ID, "")
			}
			if i != 0 {
				w.advance(time.Minute)
			}
			path, r := "/api/v2/keys/"+k.ID, reply{}
			switch action {
			case "get":
				r = c.do(t, "GET", path, "")
			case "metadata", "versions", "policies":
				r = c.do(t, "GET", path+"/"+action, "")
			case "patch":
				r = c.do(t, "PATCH", path, `{"KeyRingID":"default"}`)
			case "delete":
				r = c.do(t, "DELETE", path, "")
			case "purge":
				w.advance(5 * time.Hour)
				c.token = w.login(t, w.admin)
				r = c.do(t, "DELETE", path+"/purge", "")
			case "restore":
				r = c.do(t, "POST", path+"/restore", "")
			case "alias":
				r = c.do(t, "POST", path+"/aliases/"+fmt.Sprintf("a%d", i), "")
			case "unwrap", "rewrap":
				r = c.act(t, k.ID, action, cipher)
			default:
				r = c.act(t, k.ID, action, "null")
			}
			if (code == ok) != (r.status < 300) || r.code() != code || r.status != map[bool]int{true: r.status, false: kmsapi.StatusOf(code)}[code == ok] {
				t.Errorf("%s in state %d: %d %s, want %q", action, i, r.status, r.body, code)
			}
		}
	}
}

func TestTimeWindows(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	refuse := func(r reply, code, says string) {
		t.Helper()
		if r.code() != code || !strings.Contains(r.body, says) {
			t.Errorf("%d %s, want %s", r.status, r.body, code)
		}
	}
	pass := func(r reply, status int) {
		t.Helper()
		if r.status != status {
			t.Errorf("%d %s, want %d", r.status, r.body, status)
		}
	}
	pass(c.act(t, k.ID, "rotate", ""), 204)
	refuse(c.act(t, k.ID, "rotate", ""), kmsapi.RotationTooSoon, "Only one 'rotate' action per hour")
	w.advance(59 * time.Minute)
	refuse(c.act(t, k.ID, "rotate", ""), kmsapi.RotationTooSoon, "Conflict: Key could not be rotated: Please see `reasons` for more details (KEY_ROTATION_NOT_PERMITTED)")
	w.advance(time.Minute)
	c.token = w.login(t, w.admin)
	pass(c.act(t, k.ID, "rotate", ""), 204)

	pass(c.act(t, k.ID, "disable", "null"), 204)
	w.advance(29 * time.Second)
	refuse(c.act(t, k.ID, "enable", "null"), kmsapi.TooEarly, "The key was updated recently")
	w.advance(time.Second)
	pass(c.act(t, k.ID, "enable", "null"), 204)

	del := c.with("Prefer", "return=representation").do(t, "DELETE", "/api/v2/keys/"+k.ID, "")
	pass(del, 200)
	d := del.key(t)
	if d.State != 5 || !*d.Deleted || d.DeletedBy == "" || d.DeletionDate == nil || !*d.RestoreAllowed || *d.PurgeAllowed || *d.NonactiveStateReason != 2 ||
		!d.RestoreExpiration.Equal(d.DeletionDate.Add(30*24*time.Hour)) || !d.PurgeAllowedFrom.Equal(d.DeletionDate.Add(4*time.Hour)) || !d.PurgeScheduledOn.Equal(d.DeletionDate.Add(90*24*time.Hour)) {
		t.Errorf("%s", del.body)
	}
	refuse(c.do(t, "POST", "/api/v2/keys/"+k.ID+"/restore", ""), kmsapi.TooEarly, "updated recently")
	refuse(c.do(t, "DELETE", "/api/v2/keys/"+k.ID+"/purge", ""), kmsapi.TooEarly, "Purge operation is allowed 4h0m0s after key is deleted")
	w.advance(30 * time.Second)
	r := c.do(t, "POST", "/api/v2/keys/"+k.ID+"/restore", "")
	pass(r, 201)
	if r.key(t).State != 1 {
		t.Errorf("%s", r.body)
	}
	pass(c.do(t, "DELETE", "/api/v2/keys/"+k.ID, ""), 204)
	w.advance(30*24*time.Hour + time.Second)
	c.token = w.login(t, w.admin)
	refuse(c.do(t, "POST", "/api/v2/keys/"+k.ID+"/restore", ""), kmsapi.RestoreExpired, "expired")
	pass(c.do(t, "DELETE", "/api/v2/keys/"+k.ID+"/purge", ""), 204)
	refuse(c.do(t, "GET", "/api/v2/keys/"+k.ID, ""), kmsapi.KeyNotFound, "key does not exist")

	// A key whose expiry has passed cannot be restored.
	e := c.create(t, `"name":"root","expirationDate":"`+w.now().Add(time.Minute).Format(time.RFC3339)+`"`)
	pass(c.do(t, "DELETE", "/api/v2/keys/"+e.ID, ""), 204)
	w.advance(time.Hour)
	c.token = w.login(t, w.admin)
	refuse(c.do(t, "POST", "/api/v2/keys/"+e.ID+"/restore", ""), kmsapi.KeyExpired, "The key expired on")
}

func TestSweepExpiresRotatesAndPurges(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	soon := w.now().Add(time.Hour).Format(time.RFC3339)
	expires, rotates, purges := c.create(t, `"name":"aa","expirationDate":"`+soon+`"`), c.create(t, `"name":"bb"`), c.create(t, `"name":"cc","aliases":["free-again"]`)
	if r := c.do(t, "PUT", "/api/v2/keys/"+rotates.ID+"/policies?policy=rotation", policyBody(`"rotation":{"interval_month":1}`)); r.status != 200 {
		t.Fatal(r)
	}
	c.do(t, "DELETE", "/api/v2/keys/"+purges.ID, "")
	if acts, err := w.kms.Sweep(t.Context()); err != nil || len(acts) != 0 {
		t.Errorf("nothing is due: %+v %v", acts, err)
	}
	w.advance(91 * 24 * time.Hour)
	acts, err := w.kms.Sweep(t.Context())
	var did []string
	for _, a := range acts {
		if a.Err != nil {
			t.Errorf("%+v", a)
		}
		did = append(did, a.Action+" "+a.Key)
	}
	slices.Sort(did)
	want := []string{"kms.secrets.expire " + expires.ID, "kms.secrets.purge " + purges.ID, "kms.secrets.rotate " + rotates.ID}
	if err != nil || !slices.Equal(did, want) {
		t.Errorf("%v %v", did, err)
	}
	if acts, err := w.kms.Sweep(t.Context()); err != nil || len(acts) != 0 {
		t.Errorf("a second sweep: %+v %v", acts, err)
	}
	c.token = w.login(t, w.admin)
	c.create(t, `"name":"dd","aliases":["free-again"]`)
	if k := c.do(t, "GET", "/api/v2/keys/"+rotates.ID, "").key(t); k.LastRotateDate == nil || k.KeyVersion.ID == rotates.KeyVersion.ID {
		t.Errorf("%+v", k)
	}
}

// TestRotation: old ciphertexts go on opening, and unwrap gives them back
// wrapped by the newest version.
func TestRotation(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	old := c.wrapped(t, k.ID)
	w.advance(time.Hour)
	c.token = w.login(t, w.admin)
	if r := c.act(t, k.ID, "rotate", "null"); r.status != 204 || r.body != "" {
		t.Fatal(r)
	}
	now := c.do(t, "GET", "/api/v2/keys/"+k.ID+"/metadata", "").key(t)
	var u, again, re kmsapi.ActionAnswer
	c.act(t, k.ID, "unwrap", old).into(t, &u)
	if u.Plaintext == "" || u.KeyVersion.ID != k.KeyVersion.ID || u.RewrappedKeyVersion.ID != now.KeyVersion.ID || u.Ciphertext == "" {
		t.Fatalf("%+v", u)
	}
	c.act(t, k.ID, "unwrap", `{"ciphertext":"`+u.Ciphertext+`"}`).into(t, &again)
	if again.Plaintext != u.Plaintext || again.KeyVersion.ID != now.KeyVersion.ID || again.Ciphertext != "" || again.RewrappedKeyVersion != nil {
		t.Errorf("%+v", again)
	}
	for _, cipher := range []string{old, `{"ciphertext":"` + u.Ciphertext + `"}`} {
		re = kmsapi.ActionAnswer{}
		c.act(t, k.ID, "rewrap", cipher).into(t, &re)
		if re.Plaintext != "" || re.Ciphertext == "" || re.RewrappedKeyVersion.ID != now.KeyVersion.ID {
			t.Errorf("%+v", re)
		}
	}
	var vs kmsapi.Collection[kmsapi.KeyVersion]
	c.do(t, "GET", "/api/v2/keys/"+k.ID+"/versions?totalCount=true&limit=1", "").into(t, &vs)
	if len(vs.Resources) != 1 || vs.Resources[0].ID != now.KeyVersion.ID || *vs.Metadata.TotalCount != 2 || vs.Metadata.CollectionType != kmsapi.TypeKeyVersion {
		t.Errorf("%+v", vs)
	}
	c.do(t, "GET", "/api/v2/keys/"+k.ID+"/versions?offset=1", "").into(t, &vs)
	if len(vs.Resources) != 1 || vs.Resources[0].ID != k.KeyVersion.ID {
		t.Errorf("%+v", vs)
	}

	material := base64.StdEncoding.EncodeToString(make([]byte, 32))
	imported := c.create(t, `"name":"brought","payload":"`+material+`"`)
	if r := c.act(t, imported.ID, "rotate", ""); r.code() != kmsapi.PayloadRequired || r.status != 400 {
		t.Errorf("%+v", r)
	}
	if r := c.act(t, imported.ID, "rotate", `{"payload":"`+material+`"}`); r.status != 204 {
		t.Errorf("%+v", r)
	}
	if r := c.act(t, k.ID, "rotate", `{"payload":"`+material+`"}`); r.status < 400 {
		t.Errorf("a generated key takes no material: %+v", r)
	}
	std := c.create(t, `"name":"std","extractable":true`)
	if r := c.act(t, std.ID, "rotate", ""); r.code() != kmsapi.RootRequired {
		t.Errorf("%+v", r)
	}
}

// TestConcurrentRotations: of many at the same time one wins, the others are
// told why, and no answer is a failure of the server.
func TestConcurrentRotations(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	var mu sync.Mutex
	count := map[string]int{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			r := c.act(t, k.ID, "rotate", "")
			mu.Lock()
			defer mu.Unlock()
			count[fmt.Sprint(r.status, r.code())]++
		})
	}
	wg.Wait()
	if count["204"] != 1 || count["409"+kmsapi.RotationTooSoon] != 7 {
		t.Errorf("%v", count)
	}
	for i := range 4 {
		wg.Go(func() {
			if r := c.do(t, "POST", fmt.Sprintf("/api/v2/keys/%s/aliases/alias-%d", k.ID, i), ""); r.status != 201 {
				t.Errorf("%+v", r)
			}
		})
	}
	wg.Wait()
	if got := c.do(t, "GET", "/api/v2/keys/"+k.ID, "").key(t); len(got.Aliases) != 4 {
		t.Errorf("an update was lost: %q", got.Aliases)
	}
}

func TestOldActionForm(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	for _, prefix := range []string{"/api/v2", "/kms/api/v2"} {
		r := c.do(t, "POST", prefix+"/keys/"+k.ID+"?action=wrap", `{"plaintext":"aGVsbG8="}`)
		var out kmsapi.ActionAnswer
		r.into(t, &out)
		if r.status != 200 || out.Ciphertext == "" {
			t.Fatal(r)
		}
		r = c.do(t, "POST", prefix+"/keys/"+k.ID+"?action=unwrap", `{"ciphertext":"`+out.Ciphertext+`"}`)
		if r.into(t, &out); out.Plaintext != "aGVsbG8=" {
			t.Error(r)
		}
	}
	for _, action := range []string{"disable", "rotate"} {
		r := c.do(t, "POST", "/api/v2/keys/"+k.ID+"?action="+action, "")
		if e := w.audit.last(); e.Action != "kms.secrets."+action || e.Key != k.ID {
			t.Errorf("%s: %d, audit %+v", action, r.status, e)
		}
	}
	for _, q := range []string{"?action=fly", ""} {
		if r := c.do(t, "POST", "/api/v2/keys/"+k.ID+q, ""); r.code() != kmsapi.InvalidQuery || r.status != 400 {
			t.Errorf("%q: %+v", q, r)
		}
	}
}

func policyBody(fields string) string {
	return `{"metadata":{"collectionType":"application/vnd.ibm.kms.policy+json","collectionTotal":1},"resources":[{"type":"application/vnd.ibm.kms.policy+json",` + fields + `}]}`
}

func TestDualAuthorization(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	one, two := c.service(t, "one", "Manager", "", ""), c.service(t, "two", "Manager", "", "")
	k := c.create(t, `"name":"root"`)
	path := "/api/v2/keys/" + k.ID
	if r := one.act(t, k.ID, "setKeyForDeletion", "null"); r.code() != kmsapi.NotDualAuth || r.status != 409 {
		t.Errorf("%+v", r)
	}
	if r := one.do(t, "PUT", path+"/policies?policy=dualAuthDelete", policyBody(`"dualAuthDelete":{"enabled":true}`)); r.status != 200 {
		t.Fatal(r)
	}
	if r := one.do(t, "PUT", path+"/policies?policy=dualAuthDelete", policyBody(`"dualAuthDelete":{"enabled":false}`)); r.code() != kmsapi.InvalidField {
		t.Errorf("switched off: %+v", r)
	}
	lacks := func(by client) {
		t.Helper()
		r := by.do(t, "DELETE", path, "")
		if r.code() != kmsapi.AuthorizationsLack || r.status != 409 || !strings.Contains(r.body, "1 prior authorization(s) are required for deletion: Please see") {
			t.Errorf("%+v", r)
		}
	}
	lacks(two)
	if r := one.act(t, k.ID, "setKeyForDeletion", "null"); r.status != 204 {
		t.Fatal(r)
	}
	lacks(one) // the same person twice
	if d := c.do(t, "GET", path, "").key(t).DualAuthDelete; !d.Enabled || !*d.KeySetForDeletion || d.AuthExpiration == nil || !d.AuthExpiration.Equal(w.now().Truncate(time.Second).Add(7*24*time.Hour)) {
		t.Errorf("%+v", d)
	}
	if r := one.act(t, k.ID, "wrap", ""); r.status != 200 {
		t.Errorf("the key stays usable: %+v", r)
	}
	one.act(t, k.ID, "unsetKeyForDeletion", "null")
	lacks(two)
	one.act(t, k.ID, "setKeyForDeletion", "null")
	if r := two.do(t, "DELETE", path, ""); r.status != 204 {
		t.Errorf("two people: %+v", r)
	}

	// The instance's policy is for keys that are made later; an authorization lapses.
	if r := c.do(t, "PUT", "/api/v2/instance/policies?policy=dualAuthDelete", instancePolicy("dualAuthDelete", `"enabled":true`)); r.status != 204 {
		t.Fatal(r)
	}
	k = c.create(t, `"name":"later"`)
	path = "/api/v2/keys/" + k.ID
	if !k.DualAuthDelete.Enabled {
		t.Errorf("%+v", k)
	}
	one.act(t, k.ID, "setKeyForDeletion", "null")
	w.advance(7*24*time.Hour + time.Second)
	c.token = w.login(t, w.admin)
	lacks(c)
}

func instancePolicy(kind, data string) string {
	return `{"metadata":{"collectionType":"application/vnd.ibm.kms.policy+json","collectionTotal":1},"resources":[{"policy_type":"` + kind + `","policy_data":{` + data + `}}]}`
}

func TestRegistrationsProtectAKey(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	path := "/api/v2/keys/" + k.ID
	crn := func(n int) string {
		return url.PathEscape(fmt.Sprintf("crn:v1:x:public:storage:eu:a/1:bucket-%d::", n))
	}
	bucket := c.service(t, "bucket", "Writer", "", "")
	for _, method := range []string{"POST", "DELETE"} { // an administrator is no service
		if r := c.do(t, method, path+"/registrations/"+crn(1), ""); r.code() != kmsapi.ServiceOnly || r.status != 403 || malformed(r) != "" {
			t.Errorf("%+v", r)
		}
	}
	if r := bucket.do(t, "POST", path+"/registrations/"+crn(1), `{"description":"a bucket"}`); r.status != 201 {
		t.Fatal(r)
	}
	for _, p := range []string{path + "/registrations", "/api/v2/keys/registrations"} {
		var l kmsapi.Collection[kmsapi.Registration]
		c.do(t, "GET", p+"?totalCount=true", "").into(t, &l)
		if len(l.Resources) != 1 || l.Resources[0].KeyID != k.ID || *l.Metadata.TotalCount != 1 || l.Resources[0].Description != "a bucket" {
			t.Errorf("%+v", l)
		}
		c.do(t, "GET", p+"?preventKeyDeletion=true", "").into(t, &l)
		if l.Metadata.CollectionTotal != 0 {
			t.Errorf("%+v", l.Metadata)
		}
	}
	if r := c.do(t, "DELETE", path, ""); r.code() != kmsapi.ProtectedResource || r.status != 409 {
		t.Errorf("%+v", r)
	}
	bucket.do(t, "POST", path+"/registrations/"+crn(2), `{"preventKeyDeletion":true}`)
	if r := c.do(t, "DELETE", path+"?force=true", ""); r.code() != kmsapi.PreventDeletion || r.status != 409 {
		t.Errorf("%+v", r)
	}
	if r := bucket.do(t, "DELETE", path+"/registrations/"+crn(2), ""); r.status != 204 {
		t.Errorf("%+v", r)
	}
	if r := bucket.do(t, "DELETE", path+"/registrations/"+crn(2), ""); r.code() != kmsapi.RegistrationAbsent || r.status != 404 {
		t.Errorf("%+v", r)
	}
	if r := c.do(t, "DELETE", path+"?force=true", ""); r.status != 204 {
		t.Errorf("%+v", r)
	}
	idle := c.create(t, `"name":"idle"`)
	c.act(t, idle.ID, "disable", "")
	if r := bucket.do(t, "POST", "/api/v2/keys/"+idle.ID+"/registrations/"+crn(1), ""); r.code() != kmsapi.InvalidKeyState || r.status != 422 || malformed(r) != "" {
		t.Errorf("of a key that is suspended: %+v", r)
	}
	std := c.create(t, `"name":"std","extractable":true`)
	for _, method := range []string{"POST", "GET"} {
		at := "/api/v2/keys/" + std.ID + "/registrations"
		if method == "POST" {
			at += "/" + crn(3)
		}
		if r := bucket.do(t, method, at, ""); r.code() != kmsapi.RootRequiredReg || r.status != 422 {
			t.Errorf("%s on a standard key: %+v", method, r)
		}
	}
}

func TestAliases(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k, other := c.create(t, `"name":"root","aliases":["first"]`), c.create(t, `"name":"other"`)
	var out kmsapi.Collection[kmsapi.Alias]
	r := c.do(t, "POST", "/api/v2/keys/first/aliases/second", "")
	if r.into(t, &out); r.status != 201 || out.Resources[0].KeyID != k.ID || out.Resources[0].Alias != "second" || out.Metadata.CollectionType != kmsapi.TypeAlias {
		t.Errorf("%+v", r)
	}
	for _, alias := range []string{"first", "second"} {
		if r := c.act(t, alias, "wrap", ""); r.status != 200 {
			t.Errorf("wrap by alias: %+v", r)
		}
		if e := w.audit.last(); e.Key != k.ID {
			t.Errorf("the audit log names the alias: %+v", e)
		}
		if r := c.do(t, "POST", "/api/v2/keys/"+other.ID+"/aliases/"+alias, ""); r.code() != kmsapi.Conflict || r.status != 409 {
			t.Errorf("taken: %+v", r)
		}
	}
	if r := c.do(t, "POST", "/api/v2/keys", createBody(`"name":"xx","aliases":["second"]`)); r.status != 409 {
		t.Errorf("%+v", r)
	}
	if r := c.do(t, "DELETE", "/api/v2/keys/second/aliases/second", ""); r.status != 204 {
		t.Errorf("%+v", r)
	}
	if r := c.act(t, "second", "wrap", ""); r.code() != kmsapi.KeyNotFound || r.status != 404 {
		t.Errorf("%+v", r)
	}
	if r := c.do(t, "DELETE", "/api/v2/keys/first/aliases/second", ""); r.status != 404 || r.code() != kmsapi.AliasNotFound {
		t.Errorf("%+v", r)
	}
	for i := range 4 {
		c.do(t, "POST", fmt.Sprintf("/api/v2/keys/%s/aliases/more-%d", k.ID, i), "")
	}
	if r := c.do(t, "POST", "/api/v2/keys/"+k.ID+"/aliases/one-too-many", ""); r.code() != kmsapi.InvalidField {
		t.Errorf("%+v", r)
	}
	// By an alias, a policy on the key's id holds too, and one on another key does not.
	mine, theirs := c.service(t, "mine", "Viewer", k.ID, ""), c.service(t, "theirs", "Viewer", other.ID, "")
	if r := mine.act(t, "first", "wrap", ""); r.status != 200 {
		t.Errorf("%+v", r)
	}
	a, b := theirs.act(t, "first", "wrap", ""), theirs.act(t, "no-such-alias", "wrap", "")
	if a.status != 403 || a.body != b.body {
		t.Errorf("%+v\n%+v", a, b)
	}
}

func TestKeyRings(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	if r := c.do(t, "POST", "/api/v2/key_rings/blue", ""); r.status != 201 || r.body != "" {
		t.Fatal(r)
	}
	if r := c.do(t, "POST", "/api/v2/key_rings/blue", ""); r.status != 409 {
		t.Errorf("%+v", r)
	}
	var rings kmsapi.Collection[kmsapi.KeyRing]
	c.do(t, "GET", "/api/v2/key_rings?totalCount=true", "").into(t, &rings)
	if len(rings.Resources) != 2 || rings.Resources[0].ID != "default" || *rings.Metadata.TotalCount != 2 {
		t.Errorf("%+v", rings)
	}
	blue := c.with("X-Kms-Key-Ring", "blue")
	k := blue.create(t, `"name":"in blue"`)
	if k.KeyRingID != "blue" {
		t.Errorf("%+v", k)
	}
	if r := c.with("X-Kms-Key-Ring", "green").do(t, "POST", "/api/v2/keys", createBody(`"name":"xx"`)); r.code() != kmsapi.RingNotFound {
		t.Errorf("%+v", r)
	}
	if r := c.with("X-Kms-Key-Ring", "default").do(t, "GET", "/api/v2/keys/"+k.ID, ""); r.status != 404 {
		t.Errorf("a key of another ring: %+v", r)
	}
	var list kmsapi.Keys
	blue.do(t, "GET", "/api/v2/keys", "").into(t, &list)
	if len(list.Resources) != 1 {
		t.Errorf("%+v", list.Metadata)
	}
	// A policy on the ring covers its keys, its list, and nothing else.
	other := c.create(t, `"name":"in default"`)
	s := c.service(t, "painter", "Manager", "", "blue")
	for _, x := range []struct {
		by     client
		method string
		path   string
		body   string
		status int
	}{
		{s, "POST", "/api/v2/keys/" + k.ID + "/actions/wrap", "", 200},
		{s, "POST", "/api/v2/keys/" + other.ID + "/actions/wrap", "", 403},
		{s, "GET", "/api/v2/keys", "", 403},
		{s.with("X-Kms-Key-Ring", "blue"), "GET", "/api/v2/keys", "", 200},
		{s, "POST", "/api/v2/keys", createBody(`"name":"xx"`), 403},
		{s.with("X-Kms-Key-Ring", "blue"), "POST", "/api/v2/keys", createBody(`"name":"xx"`), 201},
		{s, "PATCH", "/api/v2/keys/" + k.ID, `{"keyRingID":"default"}`, 403},
		{s.with("X-Kms-Key-Ring", "blue"), "PATCH", "/api/v2/keys/" + other.ID, `{"keyRingID":"blue"}`, 403},
		{c, "PATCH", "/api/v2/keys/" + other.ID, `{"keyRingID":"blue"}`, 200},
		{s, "POST", "/api/v2/keys/" + other.ID + "/actions/wrap", "", 200},
	} {
		if r := x.by.do(t, x.method, x.path, x.body); r.status != x.status {
			t.Errorf("%s %s: %d %s, want %d", x.method, x.path, r.status, r.body, x.status)
		}
	}
	if r := c.do(t, "DELETE", "/api/v2/key_rings/blue", ""); r.code() != kmsapi.RingNotEmpty || r.status != 409 {
		t.Errorf("%+v", r)
	}
	blue.do(t, "GET", "/api/v2/keys", "").into(t, &list)
	for _, k := range list.Resources {
		c.do(t, "DELETE", "/api/v2/keys/"+k.ID, "")
	}
	if r := c.do(t, "DELETE", "/api/v2/key_rings/blue", ""); r.status != 409 {
		t.Errorf("destroyed keys, no force: %+v", r)
	}
	if r := c.do(t, "DELETE", "/api/v2/key_rings/blue?force=true", ""); r.status != 204 {
		t.Errorf("%+v", r)
	}
	if k := c.do(t, "GET", "/api/v2/keys/"+k.ID, "").key(t); k.KeyRingID != "default" {
		t.Errorf("%+v", k)
	}
	if r := c.do(t, "DELETE", "/api/v2/key_rings/default", ""); r.status != 400 {
		t.Errorf("%+v", r)
	}
	for i := 1; i < kmsapi.MaxKeyRings; i++ { // the default one counts
		if r := c.do(t, "POST", fmt.Sprint("/api/v2/key_rings/ring-", i), ""); r.status != 201 {
			t.Fatalf("ring %d: %+v", i, r)
		}
	}
	if r := c.do(t, "POST", "/api/v2/key_rings/one-too-many", ""); r.code() != kmsapi.RingLimit || r.status != 409 {
		t.Errorf("%+v", r)
	}
}

func TestKeyPolicies(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	path := "/api/v2/keys/" + k.ID + "/policies"
	if r := c.do(t, "GET", path, ""); r.status != 200 || !strings.Contains(r.body, `"collectionTotal":0`) || strings.Contains(r.body, "resources") {
		t.Errorf("none set: %+v", r)
	}
	for _, x := range []struct {
		query, fields string
		status        int
		code          string
	}{
		{"?policy=rotation", `"rotation":{"enabled":true}`, 400, kmsapi.InvalidField}, // no interval yet
		{"?policy=rotation", `"rotation":{"interval_month":13}`, 400, kmsapi.InvalidField},
		{"?policy=rotation", `"rotation":{"interval_month":-1}`, 400, kmsapi.InvalidField},
		{"?policy=rotation", `"dualAuthDelete":{"enabled":true}`, 400, kmsapi.BodyQueryMismatch},
		{"?policy=colour", `"rotation":{"interval_month":3}`, 400, kmsapi.InvalidQuery},
		{"?policy=rotation", `"rotation":{"interval_month":3}`, 200, ""},
		{"?policy=rotation", `"rotation":{"enabled":false}`, 200, ""},
		{"", `"rotation":{"interval_month":4}`, 200, ""},
	} {
		if r := c.do(t, "PUT", path+x.query, policyBody(x.fields)); r.status != x.status || r.code() != x.code {
			t.Errorf("%s %s: %+v", x.query, x.fields, r)
		}
	}
	if r := c.do(t, "PUT", path+"?policy=rotation", `{"metadata":{"collectionType":"x","collectionTotal":2},"resources":[{"rotation":{"interval_month":3}},{"rotation":{"interval_month":3}}]}`); r.code() != kmsapi.NumResources {
		t.Errorf("%+v", r)
	}
	if r := c.do(t, "PUT", path, `{"metadata":{"collectionType":"x","collectionTotal":2},"resources":[{"rotation":{"interval_month":5}},{"dualAuthDelete":{"enabled":true}}]}`); r.status != 200 || !strings.Contains(r.body, `"collectionTotal":2`) {
		t.Errorf("both: %+v", r)
	}
	var got kmsapi.Collection[kmsapi.KeyPolicy]
	c.do(t, "GET", path+"?policy=rotation", "").into(t, &got)
	if p := got.Resources[0]; len(got.Resources) != 1 || p.Rotation.IntervalMonth != 5 || !*p.Rotation.Enabled || p.CreatedBy == "" || p.UpdatedBy == "" {
		t.Errorf("%+v", got)
	}
	std := c.create(t, `"name":"std","extractable":true`)
	if r := c.do(t, "PUT", "/api/v2/keys/"+std.ID+"/policies", policyBody(`"rotation":{"interval_month":3}`)); r.code() != kmsapi.RootRequired {
		t.Errorf("%+v", r)
	}
	over := `"name":"over","rotation":{"enabled":true,"interval_month":2},"dualAuthDelete":{"enabled":true}`
	r := c.do(t, "POST", "/api/v2/keys_with_policy_overrides", createBody(over))
	if k := r.key(t); r.status != 201 || k.Rotation.IntervalMonth != 2 || !k.DualAuthDelete.Enabled {
		t.Errorf("%+v", r)
	}
	if r := c.do(t, "POST", "/api/v2/keys", createBody(over)); r.code() != kmsapi.BadBody {
		t.Errorf("%+v", r)
	}
}

func TestInstancePolicies(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	path := "/api/v2/instance/policies"
	for _, x := range []struct {
		kind, data string
		status     int
		code       string
	}{
		{"rotation", `"enabled":true`, 400, kmsapi.InvalidField},
		{"rotation", `"enabled":true,"attributes":{"interval_month":13}`, 400, kmsapi.InvalidField},
		{"rotation", `"enabled":true,"attributes":{"interval_month":3}`, 204, ""},
		{"allowedNetwork", `"enabled":true,"attributes":{"allowed_network":"moon"}`, 400, kmsapi.InvalidField},
		{"allowedNetwork", `"enabled":true,"attributes":{"allowed_network":"private-only"}`, 204, ""},
		{"allowedIP", `"enabled":true,"attributes":{"allowed_ip":["x"]}`, 400, kmsapi.InvalidField},
		{"allowedIP", `"enabled":true`, 400, kmsapi.InvalidField},
		{"metrics", `"enabled":true`, 204, ""},
		{"metrics", ``, 400, kmsapi.InvalidField},
		{"colour", `"enabled":true`, 400, kmsapi.InvalidQuery},
		{"keyCreateImportAccess", `"enabled":true,"attributes":{"create_standard_key":false,"import_root_key":true,"enforce_token":true}`, 204, ""},
	} {
		if r := c.do(t, "PUT", path+"?policy="+x.kind, instancePolicy(x.kind, x.data)); r.status != x.status || r.code() != x.code {
			t.Errorf("%+v: %+v", x, r)
		}
	}
	if r := c.do(t, "PUT", path+"?policy=metrics", instancePolicy("rotation", `"enabled":true`)); r.code() != kmsapi.BodyQueryMismatch {
		t.Errorf("%+v", r)
	}
	var got kmsapi.Collection[kmsapi.InstancePolicy]
	c.do(t, "GET", path, "").into(t, &got)
	if len(got.Resources) != 4 {
		t.Errorf("%+v", got)
	}
	if k := c.create(t, `"name":"root"`); k.Rotation == nil || k.Rotation.IntervalMonth != 3 {
		t.Errorf("%+v", k)
	}
	material := base64.StdEncoding.EncodeToString(make([]byte, 32))
	for fields, code := range map[string]string{`"name":"xx","extractable":true`: kmsapi.CreateImportAccess, `"name":"xx","payload":"` + material + `"`: kmsapi.CreateImportAccess,
		`"name":"xx","extractable":true,"payload":"AAAA"`: ""} {
		if r := c.do(t, "POST", "/api/v2/keys", createBody(fields)); r.code() != code {
			t.Errorf("%s: %+v", fields, r)
		}
	}
	// An address that is not allowed is refused, whatever rights there are.
	k := c.create(t, `"name":"root"`)
	if r := c.do(t, "PUT", path+"?policy=allowedIP", instancePolicy("allowedIP", `"enabled":true,"attributes":{"allowed_ip":["10.0.0.0/8"]}`)); r.status != 204 {
		t.Fatal(r)
	}
	if r := c.act(t, k.ID, "wrap", ""); r.status != 403 || r.code() != kmsapi.ConfigRule || malformed(r) != "" {
		t.Errorf("%+v", r)
	}
	if r := c.service(t, "nobody", "", "", "").act(t, k.ID, "wrap", ""); r.code() != kmsapi.Forbidden {
		t.Errorf("without a right: %+v", r)
	}
	if err := w.kms.SetInstancePolicies(t.Context(), c.instance, "", "local", []kmsapi.InstancePolicy{{Type: "allowedIP", Data: kmsapi.PolicyData{Enabled: new(bool)}}}); err != nil {
		t.Fatal(err)
	}
	if r := c.act(t, k.ID, "wrap", ""); r.status != 200 {
		t.Errorf("%+v", r)
	}
	if r := c.do(t, "GET", "/api/v2/instance/allowed_ip_port", ""); r.status != 200 || !strings.Contains(r.body, "private_endpoint_port") {
		t.Errorf("%+v", r)
	}
}

// TestImportToken imports by both variants, as IBM's own client encrypts,
// whether the HSM holds the private half or sealed it.
func TestImportToken(t *testing.T) {
	for name, held := range map[string]map[string][]byte{"sealed": nil, "held": {}} {
		t.Run(name, func(t *testing.T) { importToken(t, held) })
	}
}

func importToken(t *testing.T, held map[string][]byte) {
	t.Helper()
	w := newWorld(t)
	w.token.Held = held
	c := w.root(t, "shop")
	if r := c.do(t, "GET", "/api/v2/import_token", ""); r.code() != kmsapi.TokenExpired || r.status != 409 {
		t.Errorf("%+v", r)
	}
	for body, code := range map[string]string{`{"expiration":299}`: kmsapi.InvalidField, `{"expiration":86401}`: kmsapi.InvalidField, `{"maxAllowedRetrievals":0}`: kmsapi.InvalidField, `{"maxAllowedRetrievals":501}`: kmsapi.InvalidField} {
		if r := c.do(t, "POST", "/api/v2/import_token", body); r.code() != code {
			t.Errorf("%s: %+v", body, r)
		}
	}
	c.do(t, "POST", "/api/v2/import_token", "") // the next one takes its place
	if r := c.do(t, "POST", "/api/v2/import_token", `{"expiration":300,"maxAllowedRetrievals":2}`); r.status != 200 || !strings.Contains(r.body, `"remainingRetrievals":2`) {
		t.Fatal(r)
	}
	var tok kmsapi.ImportToken
	c.do(t, "GET", "/api/v2/import_token", "").into(t, &tok)
	if tok.Payload == "" || tok.Nonce == "" || tok.RemainingRetrievals != 1 {
		t.Fatalf("%+v", tok)
	}
	material := base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef"))
	other := base64.StdEncoding.EncodeToString([]byte("X123456789abcdef0123456789abcdef"))
	sealed, err := kp.EncryptKey(material, tok.Payload)
	if err != nil {
		t.Fatal(err)
	}
	sha1, err := kp.EncryptKeyWithSHA1(material, tok.Payload) //nolint:staticcheck // the variant is part of the API
	if err != nil {
		t.Fatal(err)
	}
	nonce, iv, _ := kp.EncryptNonce(material, tok.Nonce, "")
	cbc, cbcIV, _ := kp.EncryptNonceWithCBCPAD(material, tok.Nonce, "")
	wrongNonce, wrongIV, _ := kp.EncryptNonce(material, base64.StdEncoding.EncodeToString([]byte("another nonce")), "")
	notMine, notMineIV, _ := kp.EncryptNonce(other, tok.Nonce, "")
	fields := func(payload, nonce, iv, alg string) string {
		return fmt.Sprintf(`"name":"brought","payload":%q,"encryptedNonce":%q,"iv":%q,"encryptionAlgorithm":%q`, payload, nonce, iv, alg)
	}
	for name, x := range map[string]struct{ fields, code string }{
		"good":               {fields(sealed, nonce, iv, kmsapi.OAEPSHA256), ""},
		"good with SHA-1":    {fields(sha1, cbc, cbcIV, kmsapi.OAEPSHA1), ""},
		"wrong hash":         {fields(sealed, nonce, iv, kmsapi.OAEPSHA1), kmsapi.InvalidField},
		"another nonce":      {fields(sealed, wrongNonce, wrongIV, kmsapi.OAEPSHA256), kmsapi.WrongNonce},
		"not the material's": {fields(sealed, notMine, notMineIV, kmsapi.OAEPSHA256), kmsapi.WrongNonceIV},
		"wrong iv":           {fields(sealed, nonce, wrongIV, kmsapi.OAEPSHA256), kmsapi.WrongNonceIV},
		"short iv":           {fields(sealed, nonce, "AAAA", kmsapi.OAEPSHA256), kmsapi.WrongNonceIV},
		"unknown algorithm":  {fields(sealed, nonce, iv, "ROT13"), kmsapi.InvalidField},
		"in the clear":       {fields(material, nonce, iv, kmsapi.OAEPSHA256), kmsapi.InvalidField},
		"standard key":       {fields(sealed, nonce, iv, kmsapi.OAEPSHA256) + `,"extractable":true`, kmsapi.InvalidField},
	} {
		r := c.do(t, "POST", "/api/v2/keys", createBody(x.fields))
		if r.code() != x.code || (x.code == "") != (r.status == 201) {
			t.Errorf("%s: %+v", name, r)
			continue
		}
		if x.code != "" {
			continue
		}
		// It is the same material: what it wraps, a key imported in the clear opens.
		k := r.key(t)
		plain := c.create(t, `"name":"clear","payload":"`+material+`"`)
		if u := c.act(t, plain.ID, "unwrap", c.wrapped(t, k.ID)); u.status != 200 || !k.Imported {
			t.Errorf("%s: %+v", name, u)
		}
	}
	c.do(t, "GET", "/api/v2/import_token", "")
	if r := c.do(t, "GET", "/api/v2/import_token", ""); r.code() != kmsapi.TokenExpired {
		t.Errorf("retrieved too often: %+v", r)
	}
	w.advance(301 * time.Second)
	if r := c.do(t, "POST", "/api/v2/keys", createBody(fields(sealed, nonce, iv, kmsapi.OAEPSHA256))); r.code() != kmsapi.TokenExpired || r.status != 409 {
		t.Errorf("%+v", r)
	}
	if held != nil && len(held) != 1 {
		t.Errorf("the HSM holds %d private halves, of one token", len(held))
	}
	if acts, err := w.kms.Sweep(t.Context()); err != nil || len(acts) != 0 || len(held) != 0 {
		t.Errorf("it is over, and the HSM holds %d private halves: %v %v", len(held), acts, err)
	}
}

func TestListing(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	names := []string{"apple", "Banana", "cherry pie", "not:really"}
	var ids []string
	for i, n := range names {
		k := c.create(t, fmt.Sprintf(`"name":%q,"aliases":["alias-%d"],"extractable":%v`, n, i, i%2 == 1))
		ids = append(ids, k.ID)
		w.advance(time.Minute)
	}
	c.do(t, "DELETE", "/api/v2/keys/"+ids[3], "")
	at := func(i int) string { return start.Add(time.Duration(i) * time.Minute).Format(time.RFC3339Nano) }
	for _, x := range []struct {
		query url.Values
		want  []int // in order; nil: any order by id
	}{
		{url.Values{"sort": {"creationDate"}}, []int{0, 1, 2}},
		{url.Values{"sort": {"-creationDate"}}, []int{2, 1, 0}},
		{url.Values{"sort": {"extractable,-creationDate"}}, []int{2, 0, 1}},
		{url.Values{"sort": {"creationDate"}, "limit": {"1"}, "offset": {"1"}}, []int{1}},
		{url.Values{"sort": {"creationDate"}, "state": {"1,5"}}, []int{0, 1, 2, 3}},
		{url.Values{"state": {"5"}}, []int{3}},
		{url.Values{"state": {"0,2"}}, []int{}},
		{url.Values{"extractable": {"true"}}, []int{1}},
		{url.Values{"search": {"an,"}}, []int{1}},
		{url.Values{"search": {"exact:banana"}}, []int{1}},
		{url.Values{"search": {"exact:anana"}}, []int{}},
		{url.Values{"search": {"alias:alias-2"}}, []int{2}},
		{url.Values{"search": {"name:alias"}}, []int{}},
		{url.Values{"search": {"not:apple"}, "sort": {"creationDate"}}, []int{1, 2}},
		{url.Values{"search": {"escape:not:really"}, "state": {"5"}}, []int{3}},
		{url.Values{"search": {ids[0]}}, []int{0}},
		{url.Values{"filter": {` creationDate=gt:"` + at(0) + `"`}, "sort": {"creationDate"}}, []int{1, 2}},
		{url.Values{"filter": {`creationDate=lte:"` + at(1) + `" extractable=false`}}, []int{0}},
		{url.Values{"filter": {`creationDate="` + at(1) + `"`}}, []int{1}},
		{url.Values{"filter": {`state=5 deletionDate=gte:"` + at(0) + `"`}}, []int{3}},
		{url.Values{"filter": {`lastRotateDate=none`}, "sort": {"creationDate"}}, []int{0, 1, 2}},
	} {
		r := c.do(t, "GET", "/api/v2/keys?"+x.query.Encode(), "")
		var l kmsapi.Keys
		r.into(t, &l)
		got := []int{}
		for _, k := range l.Resources {
			got = append(got, slices.Index(ids, k.ID))
		}
		if r.status != 200 || !slices.Equal(got, x.want) || l.Metadata.CollectionTotal != len(x.want) {
			t.Errorf("%v: %v, want %v", x.query, got, x.want)
		}
		if (x.query.Get("search") != "") != (l.Metadata.SearchQuery != nil) {
			t.Errorf("%v: %+v", x.query, l.Metadata)
		}
	}
	for _, bad := range []string{"limit=0", "limit=5001", "limit=x", "offset=-1", "state=6", "state=1,", "state=1, 2", "extractable=maybe", "sort=colour", "filter=x", "filter=colour=1",
		"filter=creationDate=gt:now", "search=exact:", "filter=state=9"} {
		if r := c.do(t, "GET", "/api/v2/keys?"+strings.ReplaceAll(bad, " ", "%20"), ""); r.code() != kmsapi.InvalidQuery || r.status != 400 || !strings.Contains(r.body, "The query_param `") {
			t.Errorf("%s: %+v", bad, r)
		}
	}
	if r := c.do(t, "HEAD", "/api/v2/keys?extractable=true", ""); r.header.Get("Key-Total") != "1" {
		t.Errorf("%v", r.header)
	}
}

// TestICPDialect: the wire differences of the ICP generation, by the
// instance's setting.
// TestAKeyThatIsUsedUp: after as many texts as are safe, a key wraps no more
// until it is rotated; it unwraps all the same.
func TestAKeyThatIsUsedUp(t *testing.T) {
	uses := kms.NewUses(2)
	uses.Saw(hsm.SuiteGCM)
	w := newWorldWith(t, server.Limits{}, func(c *server.Config) { c.KMS.Count(uses) })
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	text := c.wrapped(t, k.ID)
	c.wrapped(t, k.ID)
	if r := c.act(t, k.ID, "wrap", ""); r.code() != kmsapi.UsedUp || r.status != 409 {
		t.Errorf("%+v", r)
	}
	var h kmsapi.Health
	if c.do(t, "GET", "/readyz", "").into(t, &h); !h.Ready || h.KeyUse == nil || *h.KeyUse != (kmsapi.KeyUse{Near: 1, Furthest: 1}) || len(h.Warnings) != 1 {
		t.Errorf("%+v", h)
	}
	if names := uses.Nearest(); len(names) != 1 || names[0] != c.instance+"/"+k.ID {
		t.Errorf("%q", names)
	}
	if r := c.act(t, k.ID, "unwrap", text); r.status != 200 {
		t.Errorf("%+v", r)
	}
	if r := c.act(t, k.ID, "rotate", ""); r.status != 204 {
		t.Errorf("%+v", r)
	}
	if r := c.act(t, k.ID, "wrap", ""); r.status != 200 {
		t.Errorf("%+v", r)
	}
}

// TestSearchTooBroad: of more keys than are looked through, only one that the
// text names is found, and the answer says that it did not look further.
func TestSearchTooBroad(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"apple","aliases":["fruit"]`)
	c.create(t, `"name":"apple juice","extractable":true`)
	dir := "keys/" + c.instance + "/"
	var one map[string]any
	if _, err := w.store.Get(t.Context(), dir+k.ID, &one); err != nil {
		t.Fatal(err)
	}
	for left := kmsapi.MaxCandidates; left > 0; {
		var many []record.Change
		for ; left > 0 && len(many) < 100; left-- {
			r := maps.Clone(one)
			r["id"], r["aliases"] = uuid.NewString(), nil
			many = append(many, record.Change{Path: dir + r["id"].(string), Value: r})
		}
		if err := w.store.Commit(t.Context(), many...); err != nil {
			t.Fatal(err)
		}
	}
	if r := c.do(t, "GET", "/api/v2/keys?search=apple", ""); r.status != 400 || r.code() != kmsapi.SearchTooBroad {
		t.Errorf("%d %.300s", r.status, r.body)
	}
	for _, text := range []string{"alias:fruit", k.ID} {
		var l kmsapi.Keys
		r := c.do(t, "GET", "/api/v2/keys?search="+text, "")
		if r.into(t, &l); len(l.Resources) != 1 || l.Resources[0].ID != k.ID || !l.Metadata.IncompleteSearch {
			t.Errorf("%s: %d %.300s", text, r.status, r.body)
		}
	}
	var l kmsapi.Keys
	r := c.do(t, "GET", "/api/v2/keys?search=apple&extractable=true", "") // few enough again
	if r.into(t, &l); len(l.Resources) != 1 || l.Resources[0].Name != "apple juice" || l.Metadata.IncompleteSearch {
		t.Errorf("%d %.300s", r.status, r.body)
	}
}

func TestICPDialect(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	var in kmsapi.Instance
	c.do(t, "POST", "/kmsctl/v1/instances", `{"name":"icp","dialect":"icp"}`).into(t, &in)
	icp := client{w: w, token: c.token}.with("icp-instance", in.ID)
	k := icp.do(t, "POST", "/kms/api/v2/keys", createBody(`"name":"root"`)).key(t)
	if r := icp.do(t, "GET", "/kms/api/v2/keys", ""); !strings.Contains(r.body, `"collectionType":"application/vnd.ibm.collection+json"`) {
		t.Errorf("%+v", r)
	}
	r := icp.do(t, "POST", "/kms/api/v2/keys/"+k.ID+"?action=wrap", `{"plaintext":"aGVsbG8="}`)
	if r.status != 200 || strings.Contains(r.body, "keyVersion") || strings.Contains(r.body, "plaintext") {
		t.Errorf("%+v", r)
	}
	if r := icp.with("Prefer", "return=representation").do(t, "DELETE", "/kms/api/v2/keys/"+k.ID, ""); r.status != 200 || *r.key(t).RestoreAllowed {
		t.Errorf("%+v", r)
	}
	w.advance(time.Minute)
	if r := icp.do(t, "POST", "/kms/api/v2/keys/"+k.ID+"/restore", ""); r.code() != kmsapi.RestoreExpired {
		t.Errorf("deletion is final: %+v", r)
	}
}

func TestPreferOnCreate(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	r := c.with("Prefer", "return=minimal").do(t, "POST", "/api/v2/keys", createBody(`"name":"std","extractable":true`))
	if k := r.key(t); r.status != http.StatusCreated || k.ID == "" || k.Payload != "" {
		t.Errorf("%+v", r)
	}
	if _, err := w.kms.Keys(t.Context(), c.instance, kms.Query{Limit: 1, Sort: "x"}); err == nil {
		t.Error("a sort that is none was taken")
	}
}

// TestAllowedNetwork: an instance that is private takes no call from a public
// address.
func TestAllowedNetwork(t *testing.T) {
	x := newTarget(t)
	wrap := func() reply {
		return x.ask(t, "POST", x.fill.Replace("/api/v2/keys/{id}/actions/wrap"), "Bearer "+x.crew, "") // from 192.0.2.1
	}
	set := func(network string) {
		t.Helper()
		on := true
		must(t, x.kms.SetInstancePolicies(t.Context(), x.by.instance, "", "local", []kmsapi.InstancePolicy{
			{Type: "allowedNetwork", Data: kmsapi.PolicyData{Enabled: &on, Attributes: &kmsapi.PolicyAttributes{AllowedNetwork: &network}}}}))
		x.commits = x.store.commits.Load()
	}
	if r := wrap(); r.status != 200 {
		t.Fatal(r)
	}
	set("private-only")
	if r := wrap(); r.status != 403 || r.code() != kmsapi.ConfigRule || malformed(r) != "" {
		t.Errorf("from a public address: %+v", r)
	}
	for remote, may := range map[string]bool{"10.1.2.3": true, "172.16.0.1": true, "192.168.9.9": true, "::ffff:10.1.2.3": true, "fd00::1": true, "127.0.0.1": true, "::1": true, "fe80::1": true,
		"8.8.8.8": false, "172.32.0.1": false, "::ffff:8.8.8.8": false, "2001:db8::1": false, "": false} {
		if got, err := x.kms.AllowsAddress(t.Context(), x.by.instance, remote); err != nil || got != may {
			t.Errorf("%q: %v %v", remote, got, err)
		}
	}
	set("public-and-private")
	if r := wrap(); r.status != 200 {
		t.Errorf("%+v", r)
	}
}
