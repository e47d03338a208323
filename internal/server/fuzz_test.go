package server_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// target is a world that fuzzers ask, without a network. What was refused has
// changed nothing, so it is made anew only after a call that did something:
// no input depends on the ones before.
type target struct {
	*world
	by      client
	crew    string            // token of a service, which is a manager of the instance
	fill    *strings.Replacer // of placeholders, since ids are not the same in two runs
	n       int
	commits int64 // when the fixture was new
}

func newTarget(tb testing.TB) *target {
	tb.Helper()
	return newTargetOn(tb, nil)
}

func newTargetOn(tb testing.TB, own *connector.Client) *target {
	tb.Helper()
	quiet := func(c *server.Config) { c.Log = slog.New(slog.DiscardHandler) }
	x := &target{world: newWorldOn(tb, own, server.Limits{}, quiet)}
	x.token.Installed = []hsm.Installation{{ID: "22222222", Objects: []string{"mkek:v1"}}}
	x.renew(tb)
	return x
}

// renew makes an instance with what bodies may speak of.
func (x *target) renew(tb testing.TB) {
	tb.Helper()
	ctx, me := tb.Context(), iam.LocalAdmin()
	x.advance(26 * time.Hour) // signing keys that retired are let go
	x.n++
	tok, err := x.iam.Issue(ctx, secret.New([]byte(x.admin)))
	must(tb, err)
	in, err := x.kms.CreateInstance(ctx, kmsapi.CreateInstance{Name: fmt.Sprint("fixture-", x.n)}, me.String())
	must(tb, err)
	key, err := x.kms.CreateKey(ctx, in.ID, kmsapi.DefaultKeyRing, me.String(), kmsapi.CreateKey{Name: "root"})
	must(tb, err)
	wrapped, err := x.kms.Wrap(ctx, in.ID, key.ID, kmsapi.WrapRequest{Plaintext: "aGVsbG8=", AAD: []string{"a"}})
	must(tb, err)
	crew, err := x.iam.CreateServiceID(ctx, me, fmt.Sprint("crew-", x.n), "")
	must(tb, err)
	must(tb, x.kms.CreateRing(ctx, in.ID, "blue", me.String()))
	manager, err := iam.NewPolicy(in.ID, "", "", "Manager")
	must(tb, err)
	_, err = x.iam.CreatePolicy(ctx, me, crew.ID, manager)
	must(tb, err)
	_, own, err := x.iam.CreateAPIKey(ctx, me, "own", crew.ID)
	must(tb, err)
	service, err := x.iam.Issue(ctx, own)
	must(tb, err)
	x.crew = service.AccessToken
	x.by = client{w: x.world, token: tok.AccessToken, instance: in.ID}
	x.fill = strings.NewReplacer("{id}", key.ID, "KEY", key.ID, "INSTANCE", in.ID, "CIPHERTEXT", wrapped.Ciphertext, "{service}", crew.ID, "CREW", crew.ID,
		"NEW", fmt.Sprint("new-", x.n), "APIKEY", x.admin, "MOMENT", x.now().Format(time.RFC3339), "{crn}", "crn:v1:x", "{scope}", "n%252Fkube-system")
	x.commits = x.store.commits.Load()
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// ask makes a call, and holds that it leaves one line in the audit log (none
// when what came was no call), and no change when it was refused.
func (x *target) ask(tb testing.TB, method, path, token, body string) reply {
	tb.Helper()
	r, err := http.NewRequestWithContext(tb.Context(), method, "http://kms"+path, strings.NewReader(body))
	must(tb, err)
	r.RemoteAddr = "192.0.2.1:1234"
	r.Header.Set(kmsapi.HeaderInstance, x.by.instance)
	r.Header["Authorization"] = []string{token}
	if strings.HasSuffix(path, "/token") {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	x.audit.forget()
	rec := httptest.NewRecorder()
	seen.watch(x.server).ServeHTTP(rec, r)
	out := reply{rec.Code, rec.Header(), rec.Body.String()}
	if n := x.store.commits.Load() - x.commits; out.status >= 400 && n != 0 {
		tb.Errorf("%s %s was refused (%s) and changed something: %d commits", method, path, out.body, n)
	}
	if e := x.audit.last(); x.audit.count() != 1 && !strings.Contains(out.body, "BXNIM0137E") || x.audit.count() == 1 && e.Status != out.status {
		tb.Errorf("%s %s: %d audit lines, of status %d, for %d", method, path, x.audit.count(), e.Status, out.status)
	}
	if n := x.audit.coming.Load(); n != 0 {
		tb.Errorf("the audit log still expects %d lines", n)
	}
	return out
}

// send makes a call of an endpoint by whom it is for.
func (x *target) send(tb testing.TB, endpoint, body string) reply {
	tb.Helper()
	method, path, _ := strings.Cut(endpoint, " ")
	token := x.by.token
	if strings.Contains(path, "/registrations/") {
		token = x.crew
	}
	return x.ask(tb, method, x.fill.Replace(path), "Bearer "+token, body)
}

// settle makes the fixture anew when the call changed something.
func (x *target) settle(tb testing.TB) {
	tb.Helper()
	if x.store.commits.Load() != x.commits {
		x.renew(tb)
	}
}

// malformed says what is wrong with an answer to a caller's mistake.
func malformed(r reply) string {
	var e kmsapi.Errors
	switch {
	case r.status < 400 || r.status >= 500:
		return "the status is no refusal"
	case r.header.Get("Content-Type") != "application/json" || !json.Valid([]byte(r.body)):
		return "no JSON"
	case json.Unmarshal([]byte(r.body), &e) != nil || e.Metadata.CollectionType != kmsapi.TypeError || e.Metadata.CollectionTotal != 1 || len(e.Resources) != 1:
		return "not the collection of one error"
	case r.status == http.StatusUnauthorized && (e.Resources[0].ErrorMsg != kmsapi.UnauthorizedText || e.Resources[0].Reasons != nil):
		return "a 401 says nothing but its one text"
	case r.status == http.StatusUnauthorized:
		return ""
	case len(e.Resources[0].Reasons) != 1:
		return "not one reason"
	}
	why := e.Resources[0].Reasons[0]
	switch {
	case !kmsapi.Known(why.Code) || why.Status != r.status || kmsapi.StatusOf(why.Code) != r.status || why.Message == "" || why.MoreInfo == "":
		return "the reason is not one of the table's"
	case !strings.HasPrefix(e.Resources[0].ErrorMsg, http.StatusText(r.status)+": ") || !strings.HasSuffix(e.Resources[0].ErrorMsg, "("+why.Code+")"):
		return "the text has not IBM's form"
	}
	return ""
}

// bodies has for each endpoint that takes a body some that are right, the
// first of which must be taken, and some that are nearly right.
var bodies = map[string][]string{
	"POST /api/v2/keys": {createBody(`"name":"root","aliases":["NEW"],"description":"text","expirationDate":"2100-01-02T15:04:05Z","tags":["a"]`),
		createBody(`"name":"std","extractable":true,"payload":"AAAA"`), createBody(`"name":"brought","payload":"MDEyMzQ1Njc4OWFiY2RlZg=="`),
		createBody(`"name":"sent","payload":"AAAA","encryptedNonce":"AAAA","iv":"AAAA","encryptionAlgorithm":"RSAES_OAEP_SHA_256"`), createBody(`"name":"root",`)},
	"POST /api/v2/keys_with_policy_overrides": {createBody(`"name":"root","rotation":{"enabled":true,"interval_month":2},"dualAuthDelete":{"enabled":true}`)},
	"PATCH /api/v2/keys/{id}":                 {`{"KeyRingID":"blue"}`, `{"keyRingID":"../x"}`},
	"POST /api/v2/keys/{id}/actions/wrap": {`{"plaintext":"aGVsbG8=","aad":["a","b"]}`, "", "null", "{}", `{"plaintext":"%"}`,
		"{\"aad\":[\"\xff\"]}", `{"aad":["\ud800"]}`, `{"aad":["\ud83d\ude00"]}`, `{"aad":["\ude00\ud83d"]}`, `{"aad":["\\ud800"]}`, "\u00a0{}"},
	"POST /api/v2/keys/{id}/actions/unwrap":      {`{"ciphertext":"CIPHERTEXT","aad":["a"]}`, `{"ciphertext":"e30="}`},
	"POST /api/v2/keys/{id}/actions/rewrap":      {`{"ciphertext":"CIPHERTEXT","aad":["a"]}`, "null"},
	"POST /api/v2/keys/{id}/actions/rotate":      {"", `{"payload":"MDEyMzQ1Njc4OWFiY2RlZg=="}`, `{"payload":"AAAA","encryptedNonce":"AAAA","iv":"AAAA"}`},
	"PUT /api/v2/keys/{id}/policies":             {policyBody(`"rotation":{"enabled":true,"interval_month":3}`), policyBody(`"dualAuthDelete":{"enabled":true}`)},
	"POST /api/v2/keys/{id}/registrations/{crn}": {`{"description":"a bucket","preventKeyDeletion":true}`},
	"POST /api/v2/import_token":                  {`{"expiration":300,"maxAllowedRetrievals":2}`, `{"expiration":-1}`},
	"PUT /api/v2/instance/policies": {instancePolicy("rotation", `"enabled":true,"attributes":{"interval_month":3}`), instancePolicy("allowedIP", `"enabled":true,"attributes":{"allowed_ip":["10.0.0.0/8"]}`),
		instancePolicy("keyCreateImportAccess", `"enabled":true,"attributes":{"create_root_key":false}`), instancePolicy("metrics", `"enabled":true`)},
	"POST /kmsctl/v1/instances":               {`{"name":"NEW","dialect":"icp","placement":"token"}`},
	"POST /kmsctl/v1/onboard":                 {`{"name":"NEW"}`, `{"name":"NEW","instance":"INSTANCE","key":"KEY","role":"Viewer","newApiKey":true}`, `{"name":"x","key":"KEY"}`},
	"POST /kmsctl/v1/iam/signing-keys/rotate": {`{"now":true}`, "null"},
	"POST /kmsctl/v1/iam/service-ids":         {`{"name":"NEW","description":"text","subjects":["cert:NEW"],"instance":"INSTANCE"}`, `{"name":"NEW","subjects":["serviceaccount:a:b"]}`},
	"POST /kmsctl/v1/iam/api-keys":            {`{"name":"NEW","serviceId":"CREW"}`, `{"name":"NEW","serviceId":"a/b"}`},
	"POST /kmsctl/v1/iam/policies":            {`{"serviceId":"CREW","role":"Viewer","instance":"INSTANCE","key":"KEY"}`, `{"serviceId":"CREW","role":"Operator","instance":"INSTANCE","keyRing":"blue"}`},
	"POST /kmsctl/v1/clear/plan":              {`{"name":"r","installation":"22222222"}`},
	"POST /kmsctl/v1/clear":                   {`{"name":"r","installation":"22222222","confirmation":"no"}`},
	"POST /kmsctl/v1/clock/confirm":           {`{"machine":"MOMENT"}`, `{"machine":"2036-01-02T15:04:05Z"}`, "null"},
	"POST /kmsctl/v1/master/migrate":          {`{"leavePlaced":true}`},
	"POST /kmsctl/v1/master/rotate":           {`{"destroyOld":true}`},
	"POST /serviceids":                        {`{"name":"NEW","description":"text","boundTo":"crn:v1:icp"}`},
	"POST /apikeys":                           {`{"name":"NEW","description":"text","boundTo":"crn:v1:icp:private:iam-identity:c:n/kube-system::serviceid:CREW"}`},
	"POST /v1/scopes/{scope}/service_ids/{service}/policies": {`{"resources":[{"namespaceId":"kube-system","serviceName":"kms","serviceInstance":"INSTANCE","resource":"KEY","resourceType":"key"}],"roles":[{"id":"crn:v1:icp:private:iam::::role:Viewer"}]}`,
		`{"resources":[{"serviceName":"kms","serviceInstance":"INSTANCE"}],"roles":[{"id":"crn:v1:icp:private:iam::::role:Viewer"}]}]`},
	"POST /identity/token": {`grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey=APIKEY`, `grant_type=urn:ibm:params:oauth:grant-type:apikey&apikey=%zz`, `grant_type=password`},
}

// FuzzBodies throws bodies at every endpoint that takes one. A caller's
// mistake is a caller's error in IBM's form, never a panic, a 5xx or a half
// change; what is taken is strict JSON.
func FuzzBodies(f *testing.F) {
	if want := server.BodiesForTest(); !slices.Equal(want, slices.Sorted(maps.Keys(bodies))) {
		f.Fatalf("endpoints that take bodies: %q", want)
	}
	x := newTarget(f)
	at := slices.Sorted(maps.Keys(bodies))
	call := func(tb testing.TB, endpoint, body string) reply {
		tb.Helper()
		defer x.settle(tb)
		return x.send(tb, endpoint, x.fill.Replace(body))
	}
	for i, e := range at {
		if r := call(f, e, bodies[e][0]); r.status/100 != 2 && e != "POST /kmsctl/v1/clear" && e != "POST /kmsctl/v1/master/migrate" { // the end of the world, and where there is no other
			f.Fatalf("%s: %d %s", e, r.status, r.body)
		}
		for _, b := range bodies[e] {
			f.Add(uint8(i), b)
		}
	}
	f.Fuzz(func(t *testing.T, i uint8, body string) {
		endpoint := at[int(i)%len(at)]
		r := call(t, endpoint, body)
		body = strings.Trim(x.fill.Replace(body), " \t\r\n")
		switch form := endpoint == "POST /identity/token"; {
		case r.status/100 == 2 && r.body != "" && !json.Valid([]byte(r.body)):
			t.Errorf("%s answers %q", endpoint, r.body)
		case r.status/100 == 2 && !form && body != "" && !strictJSON(body):
			t.Errorf("%s takes %q", endpoint, body)
		case r.status/100 == 2:
		case form:
			var e kmsapi.TokenError
			if json.Unmarshal([]byte(r.body), &e) != nil || r.status != 400 || e.ErrorCode == "" || e.ErrorMessage == "" {
				t.Errorf("%s: %d %s", endpoint, r.status, r.body)
			}
		default:
			if why := malformed(r); why != "" {
				t.Errorf("%s: %s: %d %s", endpoint, why, r.status, r.body)
			}
		}
	})
}

// strictJSON says whether a text is JSON all of whose strings are texts, so
// that none reads like another, and no object of which has a field twice.
func strictJSON(text string) bool {
	if !json.Valid([]byte(text)) || !utf8.ValidString(text) || hasTwice(json.NewDecoder(strings.NewReader(text))) {
		return false
	}
	// For a lone surrogate Go puts in a character that was not in the text.
	var v any
	if json.Unmarshal([]byte(text), &v) != nil {
		return false
	}
	again, err := json.Marshal(v)
	return err == nil && (!strings.Contains(string(again), "\ufffd") || strings.Contains(text, "\ufffd") || strings.Contains(strings.ToLower(text), `\ufffd`))
}

// hasTwice reads one value, and says whether an object in it has a field twice,
// in any case.
func hasTwice(d *json.Decoder) bool {
	open, _ := d.Token()
	found, names := false, []string(nil)
	for (open == json.Delim('{') || open == json.Delim('[')) && d.More() {
		if open == json.Delim('{') {
			t, _ := d.Token()
			name, _ := t.(string)
			found = found || slices.ContainsFunc(names, func(other string) bool { return strings.EqualFold(name, other) })
			names = append(names, name)
		}
		found = hasTwice(d) || found
	}
	if open == json.Delim('{') || open == json.Delim('[') {
		_, _ = d.Token() // its end
	}
	return found
}

// TestNoFieldTwice: a body in which a field stands twice, in whatever case or
// spelling and however deep, is refused by every endpoint that takes a body,
// and changes nothing.
func TestNoFieldTwice(t *testing.T) {
	x := newTarget(t)
	field := regexp.MustCompile(`"([A-Za-z_]+)":`)
	alike := strings.NewReplacer("k", "\u212a", "K", "\u212a", "s", "\u017f") // for Unicode, and the decoder, the same letters
	n := 0
	for _, endpoint := range slices.Sorted(maps.Keys(bodies)) {
		if endpoint == "POST /identity/token" {
			continue // a form
		}
		i := slices.IndexFunc(bodies[endpoint], func(b string) bool { return strings.HasPrefix(b, "{") })
		body := x.fill.Replace(bodies[endpoint][i])
		for _, at := range field.FindAllStringSubmatchIndex(body, -1) {
			name := body[at[2]:at[3]]
			for _, spelt := range []string{name, strings.ToUpper(name), fmt.Sprintf(`\u%04x%s`, name[0], name[1:]), alike.Replace(name)} {
				r := x.send(t, endpoint, body[:at[0]]+`"`+spelt+`":null,`+body[at[0]:])
				if r.status != 400 || r.code() != kmsapi.BadBody || malformed(r) != "" || !strings.Contains(r.body, `duplicate field \"`) {
					t.Errorf("%s with %s twice: %d %s", endpoint, spelt, r.status, r.body)
				}
				n++
			}
		}
	}
	t.Logf("%d bodies with a field twice, all refused", n)
	// What is no second one: the same name in another object, in a text, or as a value.
	for _, body := range []string{`{"aad":["aad","aad","\"aad\":"],"plaintext":"aGVsbG8="}`, `{"aad":["plaintext","{","}","[","\\"],"plaintext":"aGVsbG8="}`} {
		if r := x.ask(t, "POST", x.fill.Replace("/api/v2/keys/{id}/actions/wrap"), "Bearer "+x.by.token, body); r.status != 200 {
			t.Errorf("%s: %d %s", body, r.status, r.body)
		}
	}
}

// FuzzLists asks for lists. What is asked wrongly is refused as such; what is
// shown was asked for, in its order, whole over all pages, and counted right.
func FuzzLists(f *testing.F) {
	x := newTarget(f)
	in, ctx, me := x.by.instance, f.Context(), "me"
	for i, name := range []string{"apple", "Banana", "cherry pie", "not:really", "ÄPFEL", "alias:x", "a,b"} {
		k, err := x.kms.CreateKey(ctx, in, []string{"default", "blue"}[i%2], me, kmsapi.CreateKey{Name: name, Aliases: []string{fmt.Sprint("alias-", i)}, Extractable: i%3 == 0})
		must(f, err)
		if i%3 == 1 {
			must(f, x.kms.Disable(ctx, in, k.ID))
		}
		x.advance(time.Minute)
	}
	x.commits = x.store.commits.Load()
	for _, s := range []struct{ search, sort, filter, state, extractable string }{
		{"", "", "", "", ""}, {"apple,", "-creationDate,id", `creationDate=gt:"2026-01-03T00:00:00Z"`, "1,2", "true"}, {"not:exact:name:apple", "state", "state=1,2 extractable=true", "", ""},
		{"escape:not:", "lastRotateDate", "expirationDate=none", "5", "false"}, {"alias:alias-1", "-extractable", "lastUpdateDate=lte:2026-01-03T00:00:00Z", "", "yes"},
		{",", "id,", "state=", "1,", ""}, {"a,,", "--id", "x=1", "6", ""}, {"alias:not:name:x", "imported,-deletionDate", "deletionDate=none", "0,1,2,3,4,5", ""},
	} {
		f.Add(s.search, s.sort, s.filter, s.state, s.extractable, uint8(3))
	}
	f.Fuzz(func(t *testing.T, search, sort, filter, state, extractable string, size uint8) {
		v := url.Values{"search": {search}, "sort": {sort}, "filter": {filter}, "state": {state}, "extractable": {extractable}, "totalCount": {"true"}}
		list := func(v url.Values) (reply, kmsapi.Keys) {
			r := x.ask(t, "GET", "/api/v2/keys?"+v.Encode(), "Bearer "+x.by.token, "")
			var ks kmsapi.Keys
			if r.status == http.StatusOK {
				r.into(t, &ks)
			} else if why := malformed(r); why != "" || r.status != 400 || r.code() != kmsapi.InvalidQuery {
				t.Fatalf("%v: %s: %d %s", v, why, r.status, r.body)
			}
			return r, ks
		}
		r, all := list(v)
		head := x.ask(t, "HEAD", "/api/v2/keys?"+v.Encode(), "Bearer "+x.by.token, "")
		if head.status != r.status && (sort == "" || head.status != http.StatusOK) {
			t.Errorf("%v: GET %d, HEAD %d", v, r.status, head.status)
		}
		if r.status != http.StatusOK {
			return
		}
		ids := names(all.Resources)
		if total := *all.Metadata.TotalCount; total != len(ids) || head.header.Get(kmsapi.HeaderKeyTotal) != fmt.Sprint(total) {
			t.Errorf("%v: %d keys, the total says %d, HEAD %s", v, len(ids), total, head.header.Get(kmsapi.HeaderKeyTotal))
		}
		for _, k := range all.Resources {
			if why := unasked(k, all.Metadata.SearchQuery, state, extractable); why != "" {
				t.Errorf("%v: %+v: %s", v, k, why)
			}
		}
		// Page by page, the same keys come in the same order.
		limit, paged := 1+int(size)%5, []string(nil)
		for len(paged) < len(ids) {
			v.Set("limit", fmt.Sprint(limit))
			v.Set("offset", fmt.Sprint(len(paged)))
			_, part := list(v)
			if n := min(limit, len(ids)-len(paged)); len(part.Resources) != n {
				t.Fatalf("%v: a page of %d, want %d", v, len(part.Resources), n)
			}
			paged = append(paged, names(part.Resources)...)
		}
		if !slices.Equal(paged, ids) {
			t.Errorf("%v: by pages %q, at once %q", v, paged, ids)
		}
		// The comma that IBM's Go client adds says nothing.
		if search != "" && !strings.HasSuffix(search, ",") {
			v.Del("limit")
			v.Del("offset")
			v.Set("search", search+",")
			if _, again := list(v); !slices.Equal(names(again.Resources), ids) {
				t.Errorf("%v: %q, without the comma %q", v, names(again.Resources), ids)
			}
		}
	})
}

func names(ks []kmsapi.Key) (ids []string) {
	for _, k := range ks {
		ids = append(ids, k.ID)
	}
	return ids
}

// unasked says why a key does not belong into a list.
func unasked(k kmsapi.Key, q *kmsapi.SearchQuery, state, extractable string) string {
	if state != "" && !strings.Contains(state, fmt.Sprint(k.State)) {
		return "another state"
	}
	if extractable != "" && extractable != fmt.Sprint(k.Extractable) {
		return "another kind"
	}
	if k.Payload != "" {
		return "its payload is shown"
	}
	if q == nil || k.ID == strings.ToLower(q.Query) {
		return ""
	}
	fits := func(s string) bool {
		return !q.Exact && strings.Contains(strings.ToLower(s), strings.ToLower(q.Query)) || q.Exact && strings.EqualFold(s, q.Query)
	}
	hit := slices.Contains(q.Scopes, "name") && fits(k.Name) || slices.Contains(q.Scopes, "alias") && slices.ContainsFunc(k.Aliases, fits)
	if hit == q.Not {
		return "not what was searched for"
	}
	return ""
}
