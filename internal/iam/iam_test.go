package iam_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/store"
)

const (
	shop  = "11111111-1111-4111-8111-111111111111"
	other = "22222222-2222-4222-8222-222222222222"
	keyA  = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
	keyB  = "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"
)

type world struct {
	*iam.Service
	key    *ecdsa.PrivateKey
	now    time.Time
	store  *store.Store
	config iam.Config
	away   error // of the HSM
}

// derive makes a key of a salt, the same each time.
func (w *world) derive(_ context.Context, salt []byte) (*ecdsa.PrivateKey, error) {
	if w.away != nil {
		return nil, w.away
	}
	sum := sha256.Sum256(salt)
	return ecdsa.ParseRawPrivateKey(elliptic.P256(), sum[:])
}

func newWorld(t *testing.T) *world {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := m.Client()
	codec, err := record.NewCodec(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(t.Context(), c, codec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close(); c.Close(); m.Close() })
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{key: k, store: st, now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	w.config = iam.Config{SigningKey: k, Derive: w.derive, Now: func() time.Time { return w.now }}
	w.Service = iam.New(st, w.config)
	return w
}

func (w *world) onboard(t *testing.T, name, role string) (iam.Onboarded, iam.Principal, string) {
	t.Helper()
	o, err := w.Onboard(t.Context(), iam.LocalAdmin(), name, shop, keyA, role)
	if err != nil {
		t.Fatal(err)
	}
	tok, err := w.Issue(t.Context(), o.APIKey)
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.Authenticate(t.Context(), tok.AccessToken)
	if err != nil {
		t.Fatal(err)
	}
	return o, p, tok.AccessToken
}

func TestOnboardedServiceMayUseItsKeyAndNoOther(t *testing.T) {
	w := newWorld(t)
	_, p, _ := w.onboard(t, "orders", "Viewer")
	for _, c := range []struct {
		act  iam.Action
		what iam.Resource
		ok   bool
	}{
		{iam.KeysWrap, iam.Resource{Instance: shop, Key: keyA}, true},
		{iam.KeysUnwrap, iam.Resource{Instance: shop, Key: keyA}, true},
		{iam.KeysWrap, iam.Resource{Instance: shop, Key: keyB}, false},
		{iam.KeysWrap, iam.Resource{Instance: other, Key: keyA}, false},
		{iam.KeysRead, iam.Resource{Instance: shop, Key: keyA}, false},
		{iam.KeysList, iam.Resource{Instance: shop}, false},
		{iam.KeysCreate, iam.Resource{Instance: shop}, false},
		{iam.IAMManage, iam.Resource{}, false},
		{iam.InstancesManage, iam.Resource{}, false},
	} {
		err := w.Authorize(t.Context(), p, c.act, c.what)
		if (err == nil) != c.ok || (err != nil && fault.KindOf(err) != fault.Denied) {
			t.Errorf("%s on %+v: %v", c.act, c.what, err)
		}
	}
	if err := w.Authorize(t.Context(), iam.Principal{}, iam.KeysWrap, iam.Resource{Instance: shop, Key: keyA}); fault.KindOf(err) != fault.Denied {
		t.Errorf("nobody: %v", err)
	}
}

// TestRoles is the table of who may do what on an instance.
func TestRoles(t *testing.T) {
	want := actionsOf()
	w := newWorld(t)
	for role, list := range want {
		p, err := iam.NewPolicy(shop, "", "", role)
		if err != nil {
			t.Fatal(err)
		}
		sid, err := w.CreateServiceID(t.Context(), iam.LocalAdmin(), role, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.CreatePolicy(t.Context(), iam.LocalAdmin(), role, p); err != nil {
			t.Fatal(err)
		}
		var may []string
		for _, act := range iam.Actions() {
			who := iam.Principal{Kind: iam.KindService, ServiceID: sid.ID}
			if w.Authorize(t.Context(), who, act, iam.Resource{Instance: shop, Key: keyA}) == nil {
				may = append(may, string(act))
			}
		}
		wanted := strings.Fields(list)
		slices.Sort(may)
		slices.Sort(wanted)
		if !slices.Equal(may, wanted) {
			t.Errorf("%s may\n%s, want\n%s", role, may, wanted)
		}
	}
	for _, role := range []string{"Operator", "Auditor", "God", ""} {
		if _, err := iam.NewPolicy(shop, "", "", role); fault.KindOf(err) != fault.Usage || fault.HintOf(err) == "" {
			t.Errorf("role %q: %v", role, err)
		}
	}
}

func TestForgedTokensAreRefused(t *testing.T) {
	w := newWorld(t)
	_, p, good := w.onboard(t, "orders", "Viewer")
	claims := func(exp time.Time) jwt.MapClaims {
		return jwt.MapClaims{"iss": "kmsctl", "sub": p.ServiceID, "key_id": p.APIKeyID, "iat": w.now.Unix(), "exp": exp.Unix()}
	}
	parsed, _, err := jwt.NewParser().ParseUnverified(good, jwt.MapClaims{})
	if err != nil {
		t.Fatal(err)
	}
	kid := parsed.Header["kid"]
	sign := func(m jwt.SigningMethod, key any, kid any, c jwt.MapClaims) string {
		tok := jwt.NewWithClaims(m, c)
		tok.Header["kid"] = kid
		spell := tok.SignedString
		if k, ok := key.(*ecdsa.PrivateKey); ok {
			spell = func(any) (string, error) { return iam.SignForTest(tok, k) }
		}
		s, err := spell(key)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	later := w.now.Add(time.Hour)
	if _, err := w.Authenticate(t.Context(), sign(jwt.SigningMethodES256, w.key, kid, claims(later))); err != nil {
		t.Fatalf("the control token: %v", err)
	}
	pub, err := x509.MarshalPKIXPublicKey(w.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	noExp := claims(later)
	delete(noExp, "exp")
	foreign := claims(later)
	foreign["iss"] = "x"
	future := claims(later.Add(time.Hour))
	future["iat"] = w.now.Add(time.Hour).Unix()
	for name, tok := range map[string]string{
		"none": sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, kid, claims(later)), "HS256 with the public key": sign(jwt.SigningMethodHS256, pub, kid, claims(later)),
		"another key": sign(jwt.SigningMethodES256, stranger, kid, claims(later)), "another kid": sign(jwt.SigningMethodES256, w.key, "x", claims(later)),
		"expired": sign(jwt.SigningMethodES256, w.key, kid, claims(w.now.Add(-time.Minute))), "no expiry": sign(jwt.SigningMethodES256, w.key, kid, noExp),
		"another issuer": sign(jwt.SigningMethodES256, w.key, kid, foreign), "issued in the future": sign(jwt.SigningMethodES256, w.key, kid, future),
		"empty": "", "rubbish": "a.b.c", "cut": good[:len(good)-4],
	} {
		if _, err := w.Authenticate(t.Context(), tok); fault.KindOf(err) != fault.Denied {
			t.Errorf("%s: %v", name, err)
		}
	}
	w.now = w.now.Add(2 * time.Hour)
	if _, err := w.Authenticate(t.Context(), good); fault.KindOf(err) != fault.Denied {
		t.Errorf("after its hour: %v", err)
	}
}

// TestATokenHasOneSpelling: whatever character of a token is changed, left out
// or put in, it proves nobody.
func TestATokenHasOneSpelling(t *testing.T) {
	w := newWorld(t)
	_, _, good := w.onboard(t, "orders", "Viewer")
	refused := func(tok string) {
		t.Helper()
		if _, err := w.Authenticate(t.Context(), tok); fault.KindOf(err) != fault.Denied {
			t.Errorf("%q: %v", tok, err)
		}
	}
	for i := range good {
		refused(good[:i] + good[i+1:])
		for _, c := range "\n\r =." {
			refused(good[:i] + string(c) + good[i:])
		}
	}
	refused(good + "\n")
	refused(good + "=")
	last := len(good) - 1
	for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_" {
		if byte(c) != good[last] {
			refused(good[:last] + string(c))
		}
	}
	if _, err := w.Authenticate(t.Context(), good); err != nil {
		t.Error(err)
	}
}

func TestRevocationBeatsTheToken(t *testing.T) {
	w := newWorld(t)
	for name, revoke := range map[string]func(iam.Onboarded, iam.Principal) error{
		"api key": func(_ iam.Onboarded, p iam.Principal) error {
			return w.DeleteAPIKey(t.Context(), iam.LocalAdmin(), p.APIKeyID)
		},
		"service id": func(o iam.Onboarded, _ iam.Principal) error {
			_, err := w.DeleteServiceID(t.Context(), iam.LocalAdmin(), o.ServiceID.Name)
			return err
		},
	} {
		o, p, tok := w.onboard(t, "svc "+name, "Viewer")
		if err := revoke(o, p); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Authenticate(t.Context(), tok); fault.KindOf(err) != fault.Denied {
			t.Errorf("%s deleted, token: %v", name, err)
		}
		if _, err := w.Issue(t.Context(), o.APIKey); fault.KindOf(err) != fault.Denied {
			t.Errorf("%s deleted, new token: %v", name, err)
		}
	}
	o, p, _ := w.onboard(t, "svc policy", "Viewer")
	if err := w.DeletePolicy(t.Context(), iam.LocalAdmin(), o.ServiceID.ID, o.PolicyID); err != nil {
		t.Fatal(err)
	}
	if err := w.Authorize(t.Context(), p, iam.KeysWrap, iam.Resource{Instance: shop, Key: keyA}); fault.KindOf(err) != fault.Denied {
		t.Errorf("policy deleted: %v", err)
	}
}

func TestWrongAPIKeys(t *testing.T) {
	w := newWorld(t)
	o, _, _ := w.onboard(t, "orders", "Viewer")
	good := o.APIKey.Reveal()
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		_, err := w.Issue(t.Context(), secret.New(bad))
		var f *fault.Error
		if !errors.As(err, &f) || f.Kind != fault.Denied || f.Reason != iam.CodeUnknownKey {
			t.Fatalf("byte %d flipped: %v", i, err)
		}
	}
	for _, bad := range []string{"", "kms_", "x", "../../x"} {
		if _, err := w.Issue(t.Context(), secret.New([]byte(bad))); fault.KindOf(err) != fault.Denied {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// actionsOf is who may do what, as words.
func actionsOf() map[string]string {
	admin := "keys.create keys.list keys.read keys.metadata keys.wrap keys.unwrap keys.rotate keys.delete iam.grant"
	reader := "keys.list keys.metadata keys.versions keys.wrap keys.unwrap keys.rewrap registrations.list key-rings.list instance.read"
	writer := reader + " keys.read keys.create keys.rotate keys.set-for-deletion keys.sync key-rings.create import-tokens aliases.manage registrations.write"
	return map[string]string{
		"Viewer": "keys.wrap keys.unwrap",
		"Editor": "keys.create keys.list keys.read keys.metadata keys.wrap keys.unwrap", "Administrator": admin, "AccountAdministrator": admin, "ClusterAdministrator": admin,
		"Reader": reader, "ReaderPlus": reader + " keys.read", "Writer": writer,
		"Manager":  writer + " keys.enable keys.delete keys.restore keys.patch keys.policies key-rings.delete instance.policies iam.grant",
		"KeyPurge": "keys.purge",
	}
}

// TestNobodyGrantsMoreThanTheyHave meets every role on every scope with every
// role on every scope that it could grant, and with the API key of a service
// ID that has it: both only within the granter's own actions and scope.
func TestNobodyGrantsMoreThanTheyHave(t *testing.T) {
	w := newWorld(t)
	ctx, admin := t.Context(), iam.LocalAdmin()
	service := func(name, in string, role string, scope [3]string) iam.Principal {
		t.Helper()
		sid, err := w.CreateServiceID(ctx, admin.In(in), name, "")
		if err != nil {
			t.Fatal(err)
		}
		p, err := iam.NewPolicy(scope[0], scope[1], scope[2], role)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.CreatePolicy(ctx, admin.In(in), sid.ID, p); err != nil {
			t.Fatal(err)
		}
		return iam.Principal{Kind: iam.KindService, ServiceID: sid.ID}
	}
	scopes := map[string][3]string{"instance": {shop}, "key": {shop, keyA}, "ring": {shop, "", "blue"}, "another instance": {other}}
	roles := actionsOf()
	count := map[bool]int{}
	granted := map[string]iam.Principal{}
	for role := range roles {
		for scope, s := range scopes {
			if s[0] == shop {
				granted[role+scope] = service("has "+role+" on "+scope, shop, role, s)
			}
		}
	}
	if _, err := w.CreateServiceID(ctx, admin.In(shop), "target", ""); err != nil {
		t.Fatal(err)
	}
	for own, acts := range roles {
		for ownScope, s := range scopes {
			if s[0] != shop {
				continue
			}
			who := service(own+" on "+ownScope, "", own, s).In(shop)
			for role, wanted := range roles {
				within := strings.Contains(acts, "iam.grant") && ownScope == "instance"
				for _, act := range strings.Fields(wanted) {
					within = within && slices.Contains(strings.Fields(acts), act)
				}
				for scope, to := range scopes {
					may := within && to[0] == shop
					p, err := iam.NewPolicy(to[0], to[1], to[2], role)
					if err != nil {
						t.Fatal(err)
					}
					_, err = w.CreatePolicy(ctx, who, "target", p)
					if (err == nil) != may || (err != nil && fault.KindOf(err) != fault.Denied) {
						t.Errorf("%s on %s grants %s on %s: %v", own, ownScope, role, scope, err)
					}
					count[may]++
					if to[0] != shop {
						continue
					}
					_, _, err = w.CreateAPIKey(ctx, who, "k", granted[role+scope].ServiceID)
					if (err == nil) != may || (err != nil && fault.KindOf(err) != fault.Denied) {
						t.Errorf("%s on %s makes an API key for %s on %s: %v", own, ownScope, role, scope, err)
					}
					count[may]++
				}
			}
		}
	}
	t.Logf("roles × scopes × grants: %d allowed, %d refused", count[true], count[false])
}

// TestBoundServiceIDs: a service ID of an instance has no rights elsewhere,
// whoever wants to give them, and what is another's looks like none.
func TestBoundServiceIDs(t *testing.T) {
	w := newWorld(t)
	ctx, admin := t.Context(), iam.LocalAdmin()
	manager := iam.Principal{Kind: iam.KindService}
	sid, err := w.CreateServiceID(ctx, admin, "manager", "")
	if err != nil {
		t.Fatal(err)
	}
	manager.ServiceID = sid.ID
	for _, in := range []string{shop, other} {
		p, err := iam.NewPolicy(in, "", "", "Manager")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.CreatePolicy(ctx, admin, "manager", p); err != nil {
			t.Fatal(err)
		}
	}
	mine, err := w.CreateServiceID(ctx, manager.In(shop), "orders", "")
	if err != nil || mine.Instance != shop {
		t.Fatalf("%+v %v", mine, err)
	}
	if _, err := w.CreateServiceID(ctx, manager.In(other), "orders", ""); err != nil {
		t.Errorf("the same name in another instance: %v", err)
	}
	if _, err := w.CreateServiceID(ctx, manager.In(shop), "orders", ""); fault.KindOf(err) != fault.Conflict {
		t.Errorf("the same name again: %v", err)
	}
	if _, err := w.CreateServiceID(ctx, manager.In(shop), "mine", "", iam.SubjectOfCert("somebody")); fault.KindOf(err) != fault.Denied {
		t.Errorf("a manager binds a certificate: %v", err)
	}
	p, err := iam.NewPolicy(other, "", "", "Viewer")
	if err != nil {
		t.Fatal(err)
	}
	for name, who := range map[string]iam.Principal{"manager of both": manager.In(shop), "administrator": admin.In(shop)} {
		if _, err := w.CreatePolicy(ctx, who, "orders", p); fault.KindOf(err) != fault.Usage {
			t.Errorf("rights elsewhere by %s: %v", name, err)
		}
	}
	key, _, err := w.CreateAPIKey(ctx, manager.In(shop), "k", "orders")
	if err != nil {
		t.Fatal(err)
	}
	foreign := manager.In(other)
	for what, f := range map[string]func() error{
		"find":                           func() error { _, _, err := w.Find(ctx, foreign, mine.ID); return err },
		"delete":                         func() error { _, err := w.DeleteServiceID(ctx, foreign, mine.ID); return err },
		"make a key":                     func() error { _, _, err := w.CreateAPIKey(ctx, foreign, "k", mine.ID); return err },
		"delete a key":                   func() error { return w.DeleteAPIKey(ctx, foreign, key.ID) },
		"list policies":                  func() error { _, _, err := w.Policies(ctx, foreign, mine.ID); return err },
		"delete an unbound service ID's": func() error { _, err := w.DeleteServiceID(ctx, foreign, "manager"); return err },
	} {
		if err := f(); fault.KindOf(err) != fault.NotFound {
			t.Errorf("%s of another instance: %v", what, err)
		}
	}
	all, err := w.ServiceIDs(ctx, manager.In(shop))
	if err != nil || len(all) != 1 || all[0].ID != mine.ID {
		t.Errorf("listed: %+v %v", all, err)
	}
	keys, err := w.APIKeys(ctx, manager.In(shop), "")
	if err != nil || len(keys) != 1 || keys[0].ID != key.ID {
		t.Errorf("listed: %+v %v", keys, err)
	}
	if _, err := w.DeleteServiceID(ctx, manager.In(shop), "orders"); err != nil {
		t.Error(err)
	}
	if _, _, err := w.Find(ctx, admin, mine.ID); fault.KindOf(err) != fault.NotFound {
		t.Errorf("after its deletion: %v", err)
	}
}

// TestManyKeysAndPolicies: a service ID of more API keys and policies than one
// transaction takes is deleted whole, and so is an instance's.
func TestManyKeysAndPolicies(t *testing.T) {
	w := newWorld(t)
	ctx, admin := t.Context(), iam.LocalAdmin()
	for _, name := range []string{"deleted", "forgotten"} {
		sid, err := w.CreateServiceID(ctx, admin.In(shop), name, "")
		if err != nil {
			t.Fatal(err)
		}
		p, err := iam.NewPolicy(shop, "", "", "Viewer")
		if err != nil {
			t.Fatal(err)
		}
		for range 120 {
			if _, err := w.CreatePolicy(ctx, admin, sid.ID, p); err != nil {
				t.Fatal(err)
			}
			if _, _, err := w.CreateAPIKey(ctx, admin, "k", sid.ID); err != nil {
				t.Fatal(err)
			}
		}
		if name == "deleted" {
			_, err = w.DeleteServiceID(ctx, admin, sid.ID)
		} else {
			err = w.ForgetInstance(ctx, shop)
		}
		if err != nil {
			t.Fatal(err)
		}
		ids, err := w.ServiceIDs(ctx, admin)
		keys, err2 := w.APIKeys(ctx, admin, "")
		if err != nil || err2 != nil || len(ids) != 0 || len(keys) != 0 || w.store.Version("iam/policies/"+sid.ID+"/") == 0 {
			t.Errorf("%s: %d service IDs, %d API keys, %v %v", name, len(ids), len(keys), err, err2)
		}
	}
}

func TestFirstAdmin(t *testing.T) {
	w := newWorld(t)
	key, id, hash, err := iam.NewAPIKey()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.EnsureAdmin(t.Context(), id, hash); err != nil {
			t.Fatal(err)
		}
	}
	tok, err := w.Issue(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.Authenticate(t.Context(), tok.AccessToken)
	if err != nil || p.Kind != iam.KindAdmin {
		t.Fatalf("%+v %v", p, err)
	}
	if err := w.Authorize(t.Context(), p, iam.InstancesManage, iam.Resource{}); err != nil {
		t.Error(err)
	}
	if err := w.EnsureAdmin(t.Context(), id, strings.Repeat("0", 64)); fault.KindOf(err) != fault.Conflict {
		t.Errorf("another hash for the same id: %v", err)
	}
	if w.EnsureAdmin(t.Context(), "../x", hash) == nil || w.EnsureAdmin(t.Context(), id, "x") == nil {
		t.Error("a malformed id or hash was taken")
	}
}

func TestNamesAreUniqueAndFreedByDeletion(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	if _, err := w.CreateServiceID(ctx, iam.LocalAdmin(), "orders", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Onboard(ctx, iam.LocalAdmin(), "orders", shop, keyA, "Viewer"); fault.KindOf(err) != fault.Conflict {
		t.Errorf("%v", err)
	}
	if _, err := w.DeleteServiceID(ctx, iam.LocalAdmin(), "orders"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Onboard(ctx, iam.LocalAdmin(), "orders", shop, keyA, "Viewer"); err != nil {
		t.Error(err)
	}
	all, err := w.ServiceIDs(ctx, iam.LocalAdmin())
	if err != nil || len(all) != 1 || !slices.ContainsFunc(all, func(s iam.ServiceID) bool { return s.Name == "orders" }) {
		t.Errorf("%+v %v", all, err)
	}
	for _, bad := range []string{"", "a/b", "ServiceId-1", strings.Repeat("x", 91)} {
		if _, err := w.CreateServiceID(ctx, iam.LocalAdmin(), bad, ""); fault.KindOf(err) != fault.Usage {
			t.Errorf("name %q: %v", bad, err)
		}
	}
}

func TestPolicyCheck(t *testing.T) {
	manual := `{"resources":[{"namespaceId":"kube-system","serviceName":"kms","serviceInstance":"` + shop + `","resource":"` + keyA + `","resourceType":"key"}],
		"roles":[{"id":"crn:v1:icp:private:iam::::role:Viewer"}]}`
	check := func(text string) (p iam.Policy, err error) {
		if err := json.Unmarshal([]byte(text), &p); err != nil {
			t.Fatal(err)
		}
		return p, p.Check()
	}
	if p, err := check(manual); err != nil || p.Resources[0].Key != keyA {
		t.Errorf("the manual's policy: %+v %v", p, err)
	}
	for _, bad := range []string{`{}`, strings.Replace(manual, "kms", "cos", 1), strings.Replace(manual, `"key"`, `"ring"`, 1),
		strings.Replace(manual, shop, "x", 1), strings.Replace(manual, keyA, "*", 1), strings.Replace(manual, "role:Viewer", "role:Auditor", 1)} {
		if _, err := check(bad); fault.KindOf(err) != fault.Usage {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
