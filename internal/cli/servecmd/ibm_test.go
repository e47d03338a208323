package servecmd_test

import (
	"encoding/base64"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	kp "github.com/IBM/keyprotect-go-client"
)

// TestIBMsGoClient drives every call of IBM's own client but KMIP against a
// real `kmsctl serve` over SoftHSM, by API key and token URL.
func TestIBMsGoClient(t *testing.T) {
	r := serve(t, t.TempDir(), "--window", "rotate=0s", "--window", "enable=0s", "--window", "restore-min=0s", "--window", "purge-min=0s")
	// The client fetches tokens by Go's default transport, whatever it was given.
	usual := http.DefaultTransport
	http.DefaultTransport = r.client(t).Transport
	t.Cleanup(func() { http.DefaultTransport = usual })
	var in struct{ ID string }
	r.run(t, &in, "instances", "create", "shop")
	member := func(name string, roles ...string) *kp.Client {
		t.Helper()
		r.run(t, nil, "iam", "service-ids", "create", name)
		for _, role := range roles {
			r.run(t, nil, "iam", "policies", "create", "--service-id", name, "--instance", in.ID, "--role", role)
		}
		var key struct{ APIKey string }
		r.run(t, &key, "iam", "api-keys", "create", "k", "--service-id", name)
		c, err := kp.New(kp.ClientConfig{BaseURL: r.url, APIKey: key.APIKey, TokenURL: r.url + "/oidc/token", InstanceID: in.ID, Timeout: 30}, r.client(t).Transport)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	one, two := member("one", "Manager", "KeyPurge"), member("two", "Manager")
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func(err error, status int, reason string) {
		t.Helper()
		var e *kp.Error
		if !errors.As(err, &e) || e.StatusCode != status || (reason != "" && (len(e.Reasons) == 0 || e.Reasons[0].Code != reason)) {
			t.Errorf("got %v, want %d %s", err, status, reason)
		}
	}

	// Keys of every kind.
	root, err := one.CreateRootKey(ctx, "root", nil)
	must(err)
	std, err := one.CreateStandardKey(ctx, "standard", nil)
	must(err)
	later := time.Now().Add(time.Hour)
	material := base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef"))
	imported, err := one.CreateImportedRootKey(ctx, "imported", &later, material, "", "")
	must(err)
	importedStd, err := one.CreateImportedStandardKey(ctx, "imported standard", nil, base64.StdEncoding.EncodeToString([]byte("any bytes")))
	must(err)
	aliased, err := one.CreateKeyWithAliases(ctx, "aliased", nil, false, []string{"first-alias"})
	must(err)
	_, err = one.CreateImportedKeyWithAliases(ctx, "imported aliased", nil, material, "", "", false, []string{"second-alias"})
	must(err)
	_, err = one.CreateKeyWithOptions(ctx, "options", false, kp.WithDescription("all options"), kp.WithTags([]string{"a", "b"}), kp.WithAliases([]string{"third-alias"}), kp.WithExpiration(&later))
	must(err)
	yes := true
	over := kp.Policy{Rotation: &kp.Rotation{Enabled: &yes, Interval: 3}, DualAuth: &kp.DualAuth{Enabled: &yes}}
	ov, err := one.CreateRootKeyWithPolicyOverrides(ctx, "overrides", nil, nil, over)
	must(err)
	_, err = one.CreateStandardKeyWithPolicyOverrides(ctx, "overrides std", nil, nil, kp.Policy{DualAuth: &kp.DualAuth{Enabled: &yes}})
	must(err)
	_, err = one.CreateImportedRootKeyWithPolicyOverrides(ctx, "overrides imp", nil, material, "", "", nil, kp.Policy{DualAuth: &kp.DualAuth{Enabled: &yes}})
	must(err)
	_, err = one.CreateImportedStandardKeyWithPolicyOverrides(ctx, "overrides imp std", nil, "AAAA", nil, kp.Policy{DualAuth: &kp.DualAuth{Enabled: &yes}})
	must(err)
	if root.Extractable || !std.Extractable || std.Payload == "" || !imported.Imported || imported.Payload != "" || importedStd.Payload == "" || ov.Rotation.Interval != 3 || !*ov.DualAuthDelete.Enabled {
		t.Errorf("%+v %+v %+v %+v", root, std, imported, ov)
	}

	// Import by token, both variants.
	meta, err := one.CreateImportToken(ctx, 600, 5)
	must(err)
	tok, err := one.GetImportTokenTransportKey(ctx)
	must(err)
	if meta.MaxAllowedRetrievals != 5 || tok.Nonce == "" {
		t.Errorf("%+v %+v", meta, tok)
	}
	nonce, iv, err := kp.EncryptNonce(material, tok.Nonce, "")
	must(err)
	sealed, err := kp.EncryptKey(material, tok.Payload)
	must(err)
	_, err = one.CreateImportedKey(ctx, "secure", nil, sealed, nonce, iv, false)
	must(err)
	cbc, cbcIV, err := kp.EncryptNonceWithCBCPAD(material, tok.Nonce, "")
	must(err)
	sha1, err := kp.EncryptKeyWithSHA1(material, tok.Payload) //nolint:staticcheck // the variant is part of the API
	must(err)
	_, err = one.CreateImportedKeyWithSHA1(ctx, "secure sha1", nil, sha1, cbc, cbcIV, false, nil)
	must(err)

	// Lists, reads.
	all, err := one.GetKeys(ctx, 0, 0)
	must(err)
	if len(all.Keys) != 13 || all.Metadata.NumberOfKeys != 13 {
		t.Errorf("%d keys", len(all.Keys))
	}
	search, _ := kp.GetKeySearchQuery(new("aliased"), kp.WithExactMatch(), kp.AddKeyNameScope())
	filter := kp.GetFilterQueryBuilder().CreationDate().LessThan(later).State([]kp.KeyState{kp.Active}).Extractable(false).Build()
	found, err := one.ListKeys(ctx, &kp.ListKeysOptions{Limit: new(uint32(10)), Offset: new(uint32(0)), State: []kp.KeyState{kp.Active, kp.Suspended}, Extractable: new(bool),
		Search: search, Sort: kp.GetKeySortStr(kp.WithCreationDateDesc(), kp.WithID()), Filter: &filter})
	must(err)
	if len(found.Keys) != 1 || found.Keys[0].ID != aliased.ID {
		t.Errorf("%+v", found.Keys)
	}
	got, err := one.GetKey(ctx, std.ID)
	must(err)
	md, err := one.GetKeyMetadata(ctx, "first-alias")
	must(err)
	if got.Payload != std.Payload || md.ID != aliased.ID {
		t.Errorf("%+v %+v", got, md)
	}
	_, err = one.GetKey(ctx, "00000000-0000-4000-8000-000000000000")
	refused(err, 404, "KEY_NOT_FOUND_ERR")

	// Wrapping.
	aad := []string{"table=orders"}
	dek := []byte(base64.StdEncoding.EncodeToString([]byte("a data encryption key")))
	ct, err := one.Wrap(ctx, root.ID, dek, &aad)
	must(err)
	made, ct2, err := one.WrapCreateDEK(ctx, root.ID, nil)
	must(err)
	if plain, err := one.Unwrap(ctx, root.ID, ct2, nil); err != nil || !slices.Equal(plain, made) {
		t.Errorf("%q %v", plain, err)
	}
	v2, err := one.WrapV2(ctx, root.ID, dek, &aad)
	must(err)
	_, err = one.WrapCreateDEKV2(ctx, root.ID, nil)
	must(err)
	if v2.KeyVersion == nil || v2.KeyVersion.ID == "" {
		t.Errorf("%+v", v2)
	}
	_, err = one.Unwrap(ctx, root.ID, ct, &[]string{"table=customers"})
	refused(err, 422, "UNPROCESSABLE_CIPHERTEXT_ERR")
	_, err = one.Wrap(ctx, root.ID, []byte(base64.StdEncoding.EncodeToString(make([]byte, 4097))), nil)
	refused(err, 400, "INVALID_FIELD_ERR")

	// Rotation.
	must(one.Rotate(ctx, root.ID, ""))
	must(one.RotateV2(ctx, root.ID, nil))
	payload := kp.NewKeyPayload(material, "", "")
	must(one.RotateV2(ctx, imported.ID, &payload))
	plain, rewrapped, err := one.UnwrapV2(ctx, root.ID, ct, &aad)
	must(err)
	if !slices.Equal(plain, dek) || len(rewrapped) == 0 {
		t.Errorf("%q, rewrapped %q", plain, rewrapped)
	}
	vs, err := one.ListKeyVersions(ctx, root.ID, &kp.ListKeyVersionsOptions{Limit: new(uint32(2)), TotalCount: &yes})
	must(err)
	if len(vs.KeyVersion) != 2 || *vs.Metadata.TotalCount != 3 {
		t.Errorf("%+v", vs)
	}

	// States.
	must(one.DisableKey(ctx, root.ID))
	_, err = one.Wrap(ctx, root.ID, dek, nil)
	refused(err, 409, "KEY_ACTION_INVALID_STATE_ERR")
	must(one.EnableKey(ctx, root.ID))
	must(one.SyncAssociatedResources(ctx, root.ID))

	// Aliases, rings.
	al, err := one.CreateKeyAlias(ctx, "fourth-alias", root.ID)
	must(err)
	if al.KeyID != root.ID {
		t.Errorf("%+v", al)
	}
	must(one.DeleteKeyAlias(ctx, "fourth-alias", root.ID))
	must(one.CreateKeyRing(ctx, "blue"))
	moved, err := one.SetKeyRing(ctx, root.ID, "blue")
	must(err)
	rings, err := one.GetKeyRings(ctx)
	must(err)
	if moved.KeyRingID != "blue" || len(rings.KeyRings) != 2 {
		t.Errorf("%+v %+v", moved, rings)
	}
	refused(one.DeleteKeyRing(ctx, "blue"), 409, "")
	_, err = one.SetKeyRing(ctx, root.ID, "default")
	must(err)
	must(one.DeleteKeyRing(ctx, "blue", kp.WithForce(true)))

	// Policies of a key.
	_, err = one.SetPolicy(ctx, root.ID, kp.ReturnRepresentation, 4)
	must(err)
	p, err := one.GetPolicy(ctx, root.ID)
	must(err)
	if p.Rotation.Interval != 4 {
		t.Errorf("%+v", p)
	}
	_, err = one.SetRotationPolicy(ctx, root.ID, 5, true)
	must(err)
	_, err = one.SetRotationPolicy(ctx, root.ID, 0)
	refused(err, 400, "INVALID_FIELD_ERR")
	_, err = one.DisableRotationPolicy(ctx, root.ID)
	must(err)
	_, err = one.EnableRotationPolicy(ctx, root.ID)
	must(err)
	rp, err := one.GetRotationPolicy(ctx, root.ID)
	must(err)
	if rp.Rotation.Interval != 5 || !*rp.Rotation.Enabled {
		t.Errorf("%+v", rp.Rotation)
	}
	if none, err := one.GetDualAuthDeletePolicy(ctx, root.ID); err != nil || none != nil {
		t.Errorf("%+v %v", none, err)
	}
	_, err = one.SetDualAuthDeletePolicy(ctx, root.ID, true)
	must(err)
	_, err = one.SetPolicies(ctx, root.ID, true, 6, true, true)
	must(err)
	ps, err := one.GetPolicies(ctx, root.ID)
	must(err)
	if len(ps) != 2 {
		t.Errorf("%+v", ps)
	}

	// Deletion by two, restore, purge.
	_, err = one.DeleteKey(ctx, root.ID, kp.ReturnMinimal)
	refused(err, 409, "AUTHORIZATIONS_NOT_MET")
	must(one.InitiateDualAuthDelete(ctx, root.ID))
	must(one.CancelDualAuthDelete(ctx, root.ID))
	must(one.InitiateDualAuthDelete(ctx, root.ID))
	gone, err := two.DeleteKey(ctx, root.ID, kp.ReturnRepresentation, kp.ForceOpt{Force: true})
	must(err)
	if gone.State != int(kp.Destroyed) || gone.PurgeAllowed == nil || gone.DeletionDate == nil {
		t.Errorf("%+v", gone)
	}
	_, err = one.Wrap(ctx, root.ID, dek, nil)
	refused(err, 410, "KEY_DELETED_ERR")
	back, err := one.RestoreKey(ctx, root.ID)
	must(err)
	if back.State != int(kp.Active) {
		t.Errorf("%+v", back)
	}
	_, err = one.DeleteKey(ctx, std.ID, kp.ReturnMinimal)
	must(err)
	_, err = two.PurgeKey(ctx, std.ID, kp.ReturnMinimal)
	refused(err, 403, "")
	_, err = one.PurgeKey(ctx, std.ID, kp.ReturnRepresentation)
	must(err)
	_, err = one.GetKey(ctx, std.ID)
	refused(err, 404, "KEY_NOT_FOUND_ERR")

	// Registrations.
	regs, err := one.ListRegistrations(ctx, root.ID, "")
	must(err)
	regsAll, err := one.ListRegistrations(ctx, "", "crn:v1:x:*")
	must(err)
	if len(regs.Registrations)+len(regsAll.Registrations) != 0 {
		t.Errorf("%+v", regs)
	}

	// Policies of the instance.
	must(one.SetMetricsInstancePolicy(ctx, true))
	must(one.SetAllowedNetworkInstancePolicy(ctx, true, "public-and-private"))
	must(one.SetAllowedIPInstancePolicy(ctx, true, []string{"127.0.0.0/8"}))
	must(one.SetKeyCreateImportAccessInstancePolicy(ctx, true, map[string]bool{kp.CreateRootKey: true, kp.CreateStandardKey: false}))
	_, err = one.CreateStandardKey(ctx, "refused", nil)
	refused(err, 409, "KEY_CREATE_IMPORT_ACCESS_ERR")
	months := 2
	must(one.SetRotationInstancePolicy(ctx, true, &months))
	must(one.SetDualAuthInstancePolicy(ctx, false))
	must(one.SetInstancePolicies(ctx, kp.MultiplePolicies{Metrics: &kp.BasicPolicyData{Enabled: false}, DualAuthDelete: &kp.BasicPolicyData{Enabled: false},
		AllowedNetwork: &kp.AllowedNetworkPolicyData{Enabled: true, Network: "private-only"}, Rotation: &kp.RotationPolicyData{Enabled: false}}))
	ips, err := one.GetInstancePolicies(ctx)
	must(err)
	if len(ips) != 6 {
		t.Errorf("%d instance policies", len(ips))
	}
	for name, get := range map[string]func() (*kp.InstancePolicy, error){
		"dualAuthDelete": func() (*kp.InstancePolicy, error) { return one.GetDualAuthInstancePolicy(ctx) }, "allowedNetwork": func() (*kp.InstancePolicy, error) { return one.GetAllowedNetworkInstancePolicy(ctx) },
		"allowedIP": func() (*kp.InstancePolicy, error) { return one.GetAllowedIPInstancePolicy(ctx) }, "metrics": func() (*kp.InstancePolicy, error) { return one.GetMetricsInstancePolicy(ctx) },
		"keyCreateImportAccess": func() (*kp.InstancePolicy, error) { return one.GetKeyCreateImportAccessInstancePolicy(ctx) }, "rotation": func() (*kp.InstancePolicy, error) { return one.GetRotationInstancePolicy(ctx) },
	} {
		if p, err := get(); err != nil || p.PolicyType != name || p.PolicyData.Enabled == nil || p.UpdatedAt == nil {
			t.Errorf("%s: %+v %v", name, p, err)
		}
	}
	if port, err := one.GetAllowedIPPrivateNetworkPort(ctx); err != nil || port == 0 || !strings.HasSuffix(r.url, ":"+strconv.Itoa(port)) {
		t.Errorf("port %d of %s: %v", port, r.url, err)
	}

	// Without a right, and with a key that is none.
	poor := member("poor", "Reader")
	_, err = poor.CreateRootKey(ctx, "refused", nil)
	refused(err, 403, "")
	none, err := kp.New(kp.ClientConfig{BaseURL: r.url, APIKey: "kms_none", TokenURL: r.url + "/oidc/token", InstanceID: in.ID}, r.client(t).Transport)
	must(err)
	if _, err := none.GetKeys(ctx, 1, 0); err == nil || !strings.Contains(err.Error(), "Provided API key could not be found") {
		t.Errorf("%v", err)
	}
	// ICP's prefix and header.
	icp, err := kp.New(kp.ClientConfig{BaseURL: r.url + "/kms", Authorization: "Bearer " + login(t, r.client(t), r.url, mustAPIKey(t, r, "two")), InstanceID: in.ID,
		Headers: http.Header{"icp-instance": {in.ID}}}, r.client(t).Transport)
	must(err)
	if _, err := icp.GetKeys(ctx, 1, 0); err != nil {
		t.Error(err)
	}
}

func mustAPIKey(t *testing.T, r *running, service string) string {
	t.Helper()
	var key struct{ APIKey string }
	r.run(t, &key, "iam", "api-keys", "create", "another", "--service-id", service)
	return key.APIKey
}
