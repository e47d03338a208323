package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func TestCreateWrapUnwrapUnderBothPrefixesAndHeaders(t *testing.T) {
	w := newWorld(t)
	root := w.root(t, "shop")
	for _, prefix := range []string{"/api/v2", "/kms/api/v2"} {
		for _, header := range []string{"Bluemix-Instance", "Icp-Instance"} {
			c := client{w: w, token: root.token}.with(header, root.instance)
			r := c.do(t, "POST", prefix+"/keys", createBody(`"name":"root","extractable":false`))
			k := r.key(t)
			if r.status != 201 || k.State != 1 || k.KeyVersion == nil || k.Payload != "" || k.KeyRingID != "default" {
				t.Fatalf("%d %s", r.status, r.body)
			}
			path := prefix + "/keys/" + k.ID
			var wrapped, open kmsapi.ActionAnswer
			c.do(t, "POST", path+"/actions/wrap", `{"plaintext":"aGVsbG8=","aad":["a"]}`).into(t, &wrapped)
			if wrapped.Ciphertext == "" || wrapped.Plaintext != "" {
				t.Errorf("%+v", wrapped)
			}
			in, _ := json.Marshal(kmsapi.UnwrapRequest{Ciphertext: wrapped.Ciphertext, AAD: []string{"a"}})
			c.do(t, "POST", path+"/actions/unwrap", string(in)).into(t, &open)
			if open.Plaintext != "aGVsbG8=" {
				t.Errorf("%+v", open)
			}
			for _, sub := range []string{"", "/metadata"} {
				if got := c.do(t, "GET", path+sub, ""); got.status != 200 || got.key(t).ID != k.ID {
					t.Errorf("%s: %+v", sub, got)
				}
			}
		}
	}
	var list kmsapi.Keys
	root.do(t, "GET", "/api/v2/keys", "").into(t, &list)
	if len(list.Resources) != 4 || list.Metadata.CollectionTotal != 4 || list.Metadata.CollectionType != kmsapi.TypeKey {
		t.Errorf("%+v", list.Metadata)
	}
	if r := root.do(t, "HEAD", "/api/v2/keys", ""); r.status != 200 || r.header.Get("Key-Total") != "4" {
		t.Errorf("%d %v", r.status, r.header)
	}
}

// TestEmptyBodies: IBM's clients send nothing, {} or null where there is
// nothing to say.
func TestEmptyBodies(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	for _, body := range []string{"", "{}", "null", " \n", `{"plaintext":""}`} {
		var out kmsapi.ActionAnswer
		c.do(t, "POST", "/api/v2/keys/"+k.ID+"/actions/wrap", body).into(t, &out)
		if out.Plaintext == "" || out.Ciphertext == "" {
			t.Errorf("body %q: %+v", body, out)
		}
	}
	if r := c.do(t, "POST", "/api/v2/keys/"+k.ID+"/actions/unwrap", ""); r.code() != kmsapi.NoBody || r.status != 400 {
		t.Errorf("%+v", r)
	}
}

func TestBodiesAreReadStrictly(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	for name, b := range map[string]struct {
		body, code, says string
	}{
		"unknown field":    {createBody(`"name":"xx","colour":"red"`), kmsapi.BadBody, `unknown field \"colour\"`},
		"field twice":      {createBody(`"name":"xx","Name":"yy"`), kmsapi.BadBody, `duplicate field \"Name\"`},
		"trailing comma":   {createBody(`"name":"xx",`), kmsapi.BadBody, "valid formatting"},
		"two values":       {createBody(`"name":"xx"`) + "{}", kmsapi.BadBody, "valid formatting"},
		"rubbish after":    {createBody(`"name":"xx"`) + "]", kmsapi.BadBody, "valid formatting"},
		"no JSON":          {"name=xx", kmsapi.BadBody, "valid formatting"},
		"no UTF-8":         {createBody("\"name\":\"x\xffx\""), kmsapi.BadBody, "valid formatting"},
		"half of a pair":   {createBody(`"name":"x\ud83dx"`), kmsapi.BadBody, "valid formatting"},
		"halves swapped":   {createBody(`"name":"x\ude00\ud83dx"`), kmsapi.BadBody, "valid formatting"},
		"no JSON blank":    {"\u00a0" + createBody(`"name":"xx"`), kmsapi.BadBody, "valid formatting"},
		"wrong type":       {createBody(`"name":7`), kmsapi.BadBody, "valid formatting"},
		"no metadata":      {`{"resources":[{"name":"xx"}]}`, kmsapi.BadBody, "CollectionMetadata is empty"},
		"nothing":          {"", kmsapi.BadBody, "CollectionMetadata is empty"},
		"total differs":    {`{"metadata":{"collectionType":"x","collectionTotal":2},"resources":[{"name":"xx"}]}`, kmsapi.CollectionTotal, "Collection total"},
		"two keys":         {`{"metadata":{"collectionType":"x","collectionTotal":2},"resources":[{"name":"xx"},{"name":"yy"}]}`, kmsapi.BadBody, "Only creation of one key"},
		"name too short":   {createBody(`"name":"x"`), kmsapi.InvalidField, "`name`"},
		"payload no base":  {createBody(`"name":"xx","payload":"%"`), kmsapi.InvalidField, "`payload`"},
		"root of 31 bytes": {createBody(`"name":"xx","payload":"AAAA"`), kmsapi.InvalidField, "128, 192 or 256"},
	} {
		r := c.do(t, "POST", "/api/v2/keys", b.body)
		if r.status != 400 || r.code() != b.code || !strings.Contains(r.body, b.says) || !strings.Contains(r.body, "Bad Request: Key could not be created") {
			t.Errorf("%s: %d %s", name, r.status, r.body)
		}
	}
	if r := c.do(t, "POST", "/api/v2/keys", createBody(`"name":"`+strings.Repeat("x", kmsapi.MaxBody)+`"`)); r.status != 413 || r.code() != kmsapi.TooLarge {
		t.Errorf("large body: %d %.200s", r.status, r.body)
	}
	if p, err := w.kms.Keys(t.Context(), c.instance, allKeys); err != nil || p.Total != 0 {
		t.Errorf("%d keys were made all the same: %v", p.Total, err)
	}
}

// TestAuthentication: whoever is not known gets 401 without a reason, whatever
// was wrong, and whatever they asked for.
func TestAuthentication(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	good := c.token
	head, sig, _ := strings.Cut(good, ".")
	for name, value := range map[string]string{
		"nothing": "", "no scheme": good, "basic": "Basic " + good, "rubbish": "Bearer x.y.z", "other signature": "Bearer " + good[:len(good)-4] + "AAAA",
		"no algorithm": "Bearer eyJhbGciOiJub25lIn0." + sig[:strings.IndexByte(sig, '.')] + ".", "cut": "Bearer " + head, "an API key": "Bearer " + w.admin,
	} {
		bad := client{w: w, instance: c.instance}.with("Authorization", value)
		for _, path := range []string{"/api/v2/keys/" + k.ID, "/api/v2/keys/nope", "/kmsctl/v1/instances"} {
			r := bad.do(t, "GET", path, "")
			if r.status != 401 || strings.Contains(r.body, "reasons") || !strings.Contains(r.body, kmsapi.UnauthorizedText) {
				t.Errorf("%s, %s: %d %s", name, path, r.status, r.body)
			}
			if e := w.audit.last(); e.Outcome != "failure" || e.Status != 401 || e.Principal != "nobody" {
				t.Errorf("%s: audit %+v", name, e)
			}
		}
	}
	w.advance(2 * time.Hour)
	if r := c.do(t, "GET", "/api/v2/keys", ""); r.status != 401 {
		t.Errorf("an expired token: %d", r.status)
	}
}

func TestInstanceHeader(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	for _, id := range []string{"", "shop", "../x"} {
		c.instance = id
		if r := c.do(t, "GET", "/api/v2/keys", ""); r.status != 400 || r.code() != kmsapi.InvalidInstance {
			t.Errorf("%q: %+v", id, r)
		}
	}
	c.instance = "00000000-0000-4000-8000-000000000000"
	if r := c.do(t, "GET", "/api/v2/keys", ""); r.status != 404 || r.code() != kmsapi.InstanceNotFound {
		t.Errorf("%+v", r)
	}
}

// TestAuthorizationComesBeforeLookUp: to somebody without a right, a key that
// is there and a key that is not look the same, and the HSM is not asked.
func TestAuthorizationComesBeforeLookUp(t *testing.T) {
	w := newWorld(t)
	mine, theirs := w.root(t, "mine"), w.root(t, "theirs")
	a, b, foreign := mine.create(t, `"name":"aa"`), mine.create(t, `"name":"bb"`), theirs.create(t, `"name":"cc"`)
	s := mine.service(t, "orders", "Viewer", a.ID, "")
	calls := w.token.Calls.Load()
	var bodies []string
	for _, c := range []struct{ instance, key string }{
		{mine.instance, b.ID}, {mine.instance, foreign.ID}, {mine.instance, "00000000-0000-4000-8000-000000000000"}, {mine.instance, "no-such-alias"},
		{theirs.instance, foreign.ID}, {theirs.instance, a.ID}, {"00000000-0000-4000-8000-000000000000", a.ID},
	} {
		s.instance = c.instance
		r := s.do(t, "POST", "/api/v2/keys/"+c.key+"/actions/wrap", "{not even JSON")
		if r.status != 403 || r.code() != kmsapi.Forbidden {
			t.Errorf("%+v: %d %s", c, r.status, r.body)
		}
		bodies = append(bodies, r.body)
		if e := w.audit.last(); e.Action != "kms.secrets.wrap" || e.Outcome != "failure" || e.Status != 403 || e.Key != c.key || e.Instance != c.instance ||
			!strings.HasPrefix(e.Principal, "ServiceId-") || e.Detail != kmsapi.Forbidden {
			t.Errorf("audit %+v", e)
		}
	}
	for _, body := range bodies {
		if body != bodies[0] {
			t.Errorf("bodies differ:\n%s\n%s", bodies[0], body)
		}
	}
	if n := w.token.Calls.Load(); n != calls {
		t.Errorf("the HSM was asked %d times", n-calls)
	}
	s.instance = mine.instance
	if r := s.do(t, "POST", "/api/v2/keys/"+a.ID+"/actions/wrap", ""); r.status != 200 {
		t.Errorf("its own key: %d %s", r.status, r.body)
	}
	if r := s.do(t, "GET", "/api/v2/keys", ""); r.status != 403 {
		t.Errorf("list by a policy on one key: %d", r.status)
	}
}

func TestRevocationHoldsAtOnce(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	var o kmsapi.Onboarded
	c.do(t, "POST", "/kmsctl/v1/onboard", `{"name":"orders","instance":"`+c.instance+`","key":"`+k.ID+`"}`).into(t, &o)
	s := client{w: w, token: w.login(t, o.APIKey), instance: c.instance}
	wrap := "/api/v2/keys/" + k.ID + "/actions/wrap"
	if r := s.do(t, "POST", wrap, ""); r.status != 200 {
		t.Fatal(r)
	}
	if r := c.do(t, "DELETE", "/kmsctl/v1/iam/policies/"+o.ServiceID+"/"+o.PolicyID, ""); r.status != 204 {
		t.Fatal(r)
	}
	if r := s.do(t, "POST", wrap, ""); r.status != 403 {
		t.Errorf("policy deleted: %d", r.status)
	}
	if r := c.do(t, "DELETE", "/kmsctl/v1/iam/service-ids/orders", ""); r.status != 204 {
		t.Fatal(r)
	}
	if r := s.do(t, "POST", wrap, ""); r.status != 401 {
		t.Errorf("service ID deleted: %d", r.status)
	}
}

// TestNothingIsAnsweredThatIsNotWrittenDown: when the audit log fails, so does
// the call, and the answer holds nothing.
func TestNothingIsAnsweredThatIsNotWrittenDown(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"xx","extractable":true`)
	w.audit.err = errors.New("no space left on device")
	r := c.do(t, "GET", "/api/v2/keys/"+k.ID, "")
	if r.status != 503 || r.code() != kmsapi.Unavailable || r.header.Get("Retry-After") == "" || strings.Contains(r.body, k.Payload) || strings.Contains(r.body, "space") {
		t.Errorf("%d %v %s", r.status, r.header, r.body)
	}
	res, err := http.PostForm(w.url+"/oidc/token", url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {w.admin}})
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 503 {
		t.Errorf("token: %d", res.StatusCode)
	}
}

func TestAStaleViewRefuses(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	w.lag.Store(int64(1001 * time.Millisecond))
	r := c.do(t, "GET", "/api/v2/keys", "")
	if r.status != 503 || r.code() != kmsapi.Unavailable || r.header.Get("Retry-After") == "" {
		t.Errorf("%+v", r)
	}
	ready := c.do(t, "GET", "/readyz", "")
	if ready.status != 503 || !strings.Contains(ready.body, "storage: silent for 1s") {
		t.Errorf("%+v", ready)
	}
	if r := c.do(t, "GET", "/livez", ""); r.status != 200 {
		t.Errorf("livez: %d", r.status)
	}
	w.lag.Store(0)
	if r := c.do(t, "GET", "/api/v2/keys", ""); r.status != 200 {
		t.Errorf("fresh again: %+v", r)
	}
}

// TestAStaleViewThatServes: who chose so is answered by a view that is too old,
// and told.
func TestAStaleViewThatServes(t *testing.T) {
	w := newWorldWith(t, server.Limits{}, func(c *server.Config) { c.ServeStale = true })
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	w.lag.Store(int64(time.Hour))
	if r := c.act(t, k.ID, "wrap", ""); r.status != 200 {
		t.Errorf("%+v", r)
	}
	var h kmsapi.Health
	r := c.do(t, "GET", "/readyz", "")
	if r.into(t, &h); r.status != 200 || len(h.Warnings) != 1 || !strings.Contains(h.Warnings[0], "storage: silent for 1h") {
		t.Errorf("%+v", r)
	}
	w.lag.Store(0)
	if r := c.do(t, "GET", "/readyz", ""); strings.Contains(r.body, "silent") {
		t.Errorf("%+v", r)
	}
}

func TestReadinessNamesTheReasons(t *testing.T) {
	w := newWorld(t)
	c := client{w: w}
	var h kmsapi.Health
	if r := c.do(t, "GET", "/readyz", ""); r.status != 200 {
		t.Errorf("%+v", r)
	}
	w.full.Store(true)
	r := c.do(t, "GET", "/readyz", "")
	r.into(t, &h)
	if r.status != 200 || !h.Ready || len(h.Warnings) != 1 || !strings.Contains(h.Warnings[0], "storage: full") {
		t.Errorf("a full store: %d %+v", r.status, h)
	}
	sick := []string{"hsm: not logged in"}
	w.sick.Store(&sick)
	r = c.do(t, "GET", "/readyz", "")
	r.into(t, &h)
	if r.status != 503 || h.Ready || len(h.Reasons) != 1 || h.Reasons[0] != sick[0] {
		t.Errorf("%d %+v", r.status, h)
	}
}

// TestGate: before there is a server, the process lives, says why it is not
// ready, and everything else is to be tried again.
func TestGate(t *testing.T) {
	w := newWorld(t)
	g := server.NewGate("storage: no answer")
	ask := func(path string) *httptest.ResponseRecorder {
		r := httptest.NewRecorder()
		g.ServeHTTP(r, httptest.NewRequestWithContext(t.Context(), "GET", path, nil))
		return r
	}
	if r := ask("/livez"); r.Code != 200 {
		t.Errorf("livez %d", r.Code)
	}
	g.Shut("hsm: this password was refused before")
	if r := ask("/readyz"); r.Code != 503 || !strings.Contains(r.Body.String(), "refused before") {
		t.Errorf("readyz %d %s", r.Code, r.Body)
	}
	if r := ask("/api/v2/keys"); r.Code != 503 || r.Header().Get("Retry-After") == "" || !strings.Contains(r.Body.String(), kmsapi.Unavailable) {
		t.Errorf("keys %d %s", r.Code, r.Body)
	}
	g.Open(w.server)
	if r := ask("/readyz"); r.Code != 200 {
		t.Errorf("open: readyz %d %s", r.Code, r.Body)
	}
}

// TestGateClosesBehindTheLastCall: who is in gets an answer, and nobody else
// gets in meanwhile.
func TestGateClosesBehindTheLastCall(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	g := server.NewGate("starting")
	g.Open(w.server)
	inside, goOn := make(chan struct{}), make(chan struct{})
	w.token.Hold = func() { close(inside); <-goOn }
	ask := func(path string) *httptest.ResponseRecorder {
		q := httptest.NewRequestWithContext(t.Context(), "POST", path, nil)
		q.Header.Set("Authorization", "Bearer "+c.token)
		q.Header.Set(kmsapi.HeaderInstance, c.instance)
		r := httptest.NewRecorder()
		g.ServeHTTP(r, q)
		return r
	}
	answer, closed := make(chan int, 1), make(chan struct{})
	go func() { answer <- ask("/api/v2/keys/" + k.ID + "/actions/wrap").Code }()
	<-inside
	go func() { g.Close("cleared", time.Minute); close(closed) }()
	for ask("/readyz").Code != 503 { // until the gate is shut
		runtime.Gosched()
	}
	select {
	case <-closed:
		t.Error("it did not wait for the call")
	default:
	}
	close(goOn)
	<-closed
	if code := <-answer; code != 200 {
		t.Errorf("the call under way: %d", code)
	}
}

// TestHSMFailure: the caller learns that the service is away, and nothing of
// why; the log has the cause.
func TestHSMFailure(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	k := c.create(t, `"name":"root"`)
	var out kmsapi.ActionAnswer
	c.do(t, "POST", "/api/v2/keys/"+k.ID+"/actions/wrap", "").into(t, &out)
	w.token.DeviceErr = fault.Newf(fault.Unreachable, "unwrap", "fake", "CKR_DEVICE_REMOVED")
	in, _ := json.Marshal(kmsapi.UnwrapRequest{Ciphertext: out.Ciphertext})
	r := c.do(t, "POST", "/api/v2/keys/"+k.ID+"/actions/unwrap", string(in))
	if r.status != 503 || r.code() != kmsapi.Unavailable || strings.Contains(r.body, "CKR") {
		t.Errorf("%d %s", r.status, r.body)
	}
	w.token.DeviceErr = errors.New("a bug with a secret")
	r = c.do(t, "POST", "/api/v2/keys/"+k.ID+"/actions/unwrap", string(in))
	if r.status != 500 || r.code() != kmsapi.Internal || strings.Contains(r.body, "secret") {
		t.Errorf("%d %s", r.status, r.body)
	}
}

func TestEveryCallLeavesOneAuditLine(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop").with("Correlation-Id", "corr-1")
	before := w.audit.count()
	k := c.create(t, `"name":"root"`)
	if e := w.audit.last(); w.audit.count() != before+1 || e.Action != "kms.secrets.create" || e.Key != k.ID || e.CorrelationID != "corr-1" || e.Remote != "127.0.0.1" ||
		e.Outcome != "success" || e.Status != 201 || e.Instance != c.instance || !strings.HasPrefix(e.Principal, "admin:") {
		t.Errorf("%+v", e)
	}
	r := c.do(t, "GET", "/api/v2/keys/"+k.ID+"x", "")
	if r.status != 404 || r.code() != kmsapi.KeyNotFound || r.header.Get("Correlation-Id") != "corr-1" {
		t.Errorf("%+v", r)
	}
	if e := w.audit.last(); e.Outcome != "failure" || e.Detail != kmsapi.KeyNotFound {
		t.Errorf("%+v", e)
	}
	if r := c.do(t, "GET", "/api/v3/keys", ""); r.status != 404 || r.code() != kmsapi.NoSuchPath {
		t.Errorf("%+v", r)
	}
}

func TestTokenEndpoints(t *testing.T) {
	w := newWorld(t)
	for _, path := range []string{"/identity/token", "/oidc/token", "/iam-token/oidc/token"} {
		for name, c := range map[string]struct {
			form   url.Values
			status int
			says   string
		}{
			"good":        {url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {w.admin}, "response_type": {"cloud_iam"}}, 200, `"access_token":"ey`},
			"wrong key":   {url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {w.admin + "x"}}, 400, "BXNIM0415E"},
			"no key":      {url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}}, 400, "Provided API key could not be found"},
			"two keys":    {url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {w.admin, w.admin}}, 400, "nothing given twice"},
			"two grants":  {url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey", "password"}, "apikey": {w.admin}}, 400, "BXNIM0137E"},
			"other grant": {url.Values{"grant_type": {"client_credentials"}}, 400, "grant_type"},
		} {
			res, err := http.PostForm(w.url+path, c.form)
			if err != nil {
				t.Fatal(err)
			}
			var body json.RawMessage
			err = json.NewDecoder(res.Body).Decode(&body)
			res.Body.Close()
			if err != nil || res.StatusCode != c.status || !strings.Contains(string(body), c.says) {
				t.Errorf("%s %s: %d %s %v", path, name, res.StatusCode, body, err)
			}
		}
	}
	w.login(t, w.admin)
	if e := w.audit.last(); e.Action != "iam.token.issue" || !strings.HasPrefix(e.Principal, "admin:") {
		t.Errorf("%+v", e)
	}
}

// TestLocalSocket: the same user on this machine is administrator without a
// token.
func TestLocalSocket(t *testing.T) {
	w := newWorld(t)
	h := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", w.socket)
	}}}
	defer h.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://local/kmsctl/v1/instances", nil)
	if err != nil {
		t.Fatal(err)
	}
	if r := roundTrip(t, h, req); r.status != 200 {
		t.Errorf("%+v", r)
	}
	if e := w.audit.last(); e.Principal != iam.LocalAdmin().String() || e.Remote != "local" {
		t.Errorf("%+v", e)
	}
}

func TestOnboardAndManageByHTTP(t *testing.T) {
	w := newWorld(t)
	c := client{w: w, token: w.login(t, w.admin)}
	var o kmsapi.Onboarded
	r := c.do(t, "POST", "/kmsctl/v1/onboard", `{"name":"orders"}`)
	if r.into(t, &o); r.status != 201 || o.APIKey == "" || o.KeyID == "" || o.InstanceID == "" || o.PolicyID == "" || !strings.HasPrefix(o.ServiceID, "ServiceId-") {
		t.Fatalf("%+v", r)
	}
	s := client{w: w, token: w.login(t, o.APIKey), instance: o.InstanceID}
	if r := s.do(t, "POST", "/api/v2/keys/"+o.KeyID+"/actions/wrap", ""); r.status != 200 {
		t.Errorf("%+v", r)
	}
	for _, path := range []string{"/kmsctl/v1/instances", "/kmsctl/v1/iam/service-ids"} {
		if r := s.do(t, "GET", path, ""); r.status != 403 {
			t.Errorf("%s by a service: %d", path, r.status)
		}
	}
	var sid kmsapi.ServiceID
	c.do(t, "POST", "/kmsctl/v1/iam/service-ids", `{"name":"billing"}`).into(t, &sid)
	var key kmsapi.APIKey
	c.do(t, "POST", "/kmsctl/v1/iam/api-keys", `{"name":"laptop","serviceId":"billing"}`).into(t, &key)
	if key.Key == "" || key.ServiceID != sid.ID {
		t.Fatalf("%+v", key)
	}
	var p kmsapi.PolicyID
	c.do(t, "POST", "/kmsctl/v1/iam/policies", `{"serviceId":"billing","role":"Editor","instance":"`+o.InstanceID+`"}`).into(t, &p)
	b := client{w: w, token: w.login(t, key.Key), instance: o.InstanceID}
	if r := b.do(t, "GET", "/api/v2/keys", ""); r.status != 200 {
		t.Errorf("%+v", r)
	}
	for _, role := range []string{"Operator", "Auditor", "King"} {
		if r := c.do(t, "POST", "/kmsctl/v1/iam/policies", `{"serviceId":"billing","role":"`+role+`","instance":"`+o.InstanceID+`"}`); r.status != 400 {
			t.Errorf("%s: %+v", role, r)
		}
	}
	if r := c.do(t, "DELETE", "/kmsctl/v1/iam/api-keys/"+key.ID, ""); r.status != 204 {
		t.Errorf("%+v", r)
	}
	if r := b.do(t, "GET", "/api/v2/keys", ""); r.status != 401 {
		t.Errorf("API key deleted: %d", r.status)
	}
	c.instance = o.InstanceID
	if r := c.do(t, "DELETE", "/kmsctl/v1/instance", ""); r.status != 409 {
		t.Errorf("delete an instance with keys: %+v", r)
	}
}

// TestICPsIAMPaths: scripts that were written for ICP's own IAM onboard a
// service here, step by step.
func TestICPsIAMPaths(t *testing.T) {
	w := newWorld(t)
	root := w.root(t, "shop")
	k := root.create(t, `"name":"root"`)
	for i, at := range []struct{ identity, pap string }{
		{"/iam-token", "/iam-pap/acms/v1/scopes/n%252Fkube-system"}, {"", "/acms/v1/scopes/n%252Fkube-system"}, {"/iam-token", "/v1/scopes/n%2Fkube-system"},
	} {
		name := fmt.Sprint("svc-", i)
		var sid struct {
			Metadata struct {
				IAMID string `json:"iam_id"`
				CRN   string `json:"crn"`
			}
		}
		r := root.do(t, "POST", at.identity+"/serviceids/", `{"name":"`+name+`","description":"d","boundTo":"crn:v1:icp:private:k8:mycluster:n/kube-system:::"}`)
		if r.into(t, &sid); r.status != 201 || !strings.HasPrefix(sid.Metadata.IAMID, "iam-ServiceId-") {
			t.Fatal(r)
		}
		if r := root.do(t, "GET", at.identity+"/serviceids/?boundTo=crn", ""); r.status != 200 || !strings.Contains(r.body, `"iam_id":"`+sid.Metadata.IAMID+`"`) {
			t.Errorf("%+v", r)
		}
		var key struct{ APIKey, BoundTo string }
		root.do(t, "POST", at.identity+"/apikeys/", `{"name":"k","description":"d","boundTo":"`+sid.Metadata.CRN+`"}`).into(t, &key)
		policies := at.pap + "/service_ids/" + sid.Metadata.IAMID + "/policies"
		body := `{"resources":[{"namespaceId":"kube-system","serviceName":"kms","serviceInstance":"` + root.instance + `","resource":"` + k.ID +
			`","resourceType":"key"}],"roles":[{"id":"crn:v1:icp:private:iam::::role:Viewer"}]}`
		var p struct{ ID string }
		if r := root.do(t, "POST", policies, body); r.status != 201 {
			t.Fatalf("%s: %+v", policies, r)
		} else {
			r.into(t, &p)
		}
		if r := root.do(t, "POST", policies, strings.Replace(body, "Viewer", "Operator", 1)); r.status != 400 {
			t.Errorf("%+v", r)
		}
		s := client{w: w, token: w.login(t, key.APIKey), instance: root.instance}
		if r := s.act(t, k.ID, "wrap", ""); r.status != 200 {
			t.Errorf("%+v", r)
		}
		if r := s.do(t, "POST", policies, body); r.status != 403 {
			t.Errorf("a service grants: %+v", r)
		}
		if r := root.do(t, "GET", policies, ""); !strings.Contains(r.body, p.ID) {
			t.Errorf("%+v", r)
		}
		if r := root.do(t, "DELETE", policies+"/"+p.ID, ""); r.status != 204 {
			t.Errorf("%+v", r)
		}
		if r := s.act(t, k.ID, "wrap", ""); r.status != 403 {
			t.Errorf("%+v", r)
		}
		if r := root.do(t, "DELETE", at.identity+"/serviceids/"+sid.Metadata.IAMID, ""); r.status != 204 {
			t.Errorf("%+v", r)
		}
		if r := s.act(t, k.ID, "wrap", ""); r.status != 401 {
			t.Errorf("%+v", r)
		}
	}
	if r := (client{w: w}).do(t, "POST", "/idprovider/v1/auth/identitytoken", "grant_type=password"); r.status != 400 || !strings.Contains(r.body, "API key") {
		t.Errorf("%+v", r)
	}
}

// TestServiceAccountTokens: the token of a ServiceAccount proves the service ID
// that names it, Kubernetes is asked once in a while, and nobody else is let in.
func TestServiceAccountTokens(t *testing.T) {
	w := newWorld(t)
	root := w.root(t, "shop")
	k := root.create(t, `"name":"root"`)
	var sid kmsapi.ServiceID
	root.do(t, "POST", "/kmsctl/v1/iam/service-ids", `{"name":"orders","subjects":["serviceaccount:shop:orders"]}`).into(t, &sid)
	root.do(t, "POST", "/kmsctl/v1/iam/policies", `{"serviceId":"orders","role":"Viewer","instance":"`+root.instance+`","key":"`+k.ID+`"}`)
	w.accounts.Store("a.b.c", "shop:orders")
	w.accounts.Store("d.e.f", "shop:billing")
	s := client{w: w, token: "a.b.c", instance: root.instance}
	for range 3 {
		if r := s.act(t, k.ID, "wrap", ""); r.status != 200 {
			t.Fatalf("%+v", r)
		}
	}
	if e := w.audit.last(); e.Principal != sid.ID {
		t.Errorf("%+v", e)
	}
	if n := w.reviews.Load(); n != 1 {
		t.Errorf("Kubernetes was asked %d times", n)
	}
	for _, token := range []string{"d.e.f", "g.h.i", "no JWT", w.admin} {
		s.token = token
		if r := s.act(t, k.ID, "wrap", ""); r.status != 401 {
			t.Errorf("%s: %+v", token, r)
		}
	}
	for _, bad := range []string{"serviceaccount:shop", "cert:", "user:x", "serviceaccount:shop:orders"} { // the last is taken
		if r := root.do(t, "POST", "/kmsctl/v1/iam/service-ids", `{"name":"another","subjects":["`+bad+`"]}`); r.status != 400 && r.status != 409 {
			t.Errorf("%s: %+v", bad, r)
		}
	}
	s.token = "a.b.c"
	if r := root.do(t, "DELETE", "/kmsctl/v1/iam/service-ids/orders", ""); r.status != 204 {
		t.Fatal(r)
	}
	if r := s.act(t, k.ID, "wrap", ""); r.status != 401 {
		t.Errorf("the service ID is gone: %+v", r)
	}
	if r := root.do(t, "POST", "/kmsctl/v1/iam/service-ids", `{"name":"again","subjects":["serviceaccount:shop:orders"]}`); r.status != 201 {
		t.Errorf("the subject is free again: %+v", r)
	}
}
