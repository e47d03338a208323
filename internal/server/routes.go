package server

import (
	"context"
	"fmt"
	"net/http"
	"slices"

	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// api gives a path under both prefixes.
func api(path string) []string { return []string{"/api/v2" + path, "/kms/api/v2" + path} }

func own(path string) []string { return []string{"/kmsctl/v1" + path} }

// routes is the whole API but what is open to all.
func routes() []route {
	return slices.Concat(keyRoutes(), instanceRoutes(), ownRoutes(), icpRoutes())
}

// openRoute is an endpoint that asks nobody who they are.
type openRoute struct {
	method string
	paths  []string
	what   string
	handle func(s *Server, w http.ResponseWriter, r *http.Request)
}

// isToken says whether the endpoint takes a grant for an access token.
func (o openRoute) isToken() bool { return o.method == http.MethodPost }

func openRoutes() []openRoute {
	document := serveOpenAPI()
	return []openRoute{
		{"GET", []string{"/livez"}, "the process lives", func(_ *Server, w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }},
		{"GET", []string{"/readyz"}, "the service can be used; 503 with reasons when not", (*Server).readyz},
		{"GET", []string{"/metrics"}, "Prometheus metrics", func(s *Server, w http.ResponseWriter, r *http.Request) { s.metrics.handler().ServeHTTP(w, r) }},
		{"GET", []string{"/openapi.json"}, "this document", func(_ *Server, w http.ResponseWriter, r *http.Request) { document(w, r) }},
		{"POST", []string{"/identity/token", "/oidc/token", "/iam-token/oidc/token"}, "Exchange an API key for an access token", (*Server).token},
		{"POST", []string{"/idprovider/v1/auth/identitytoken"}, "ICP's exchange of a password, which is refused: there are no passwords here", (*Server).passwordToken},
	}
}

func keyRoutes() []route {
	const key, keys = "/keys/{id}", "/keys"
	action := func(name string) []string { return api(key + "/actions/" + name) }
	return []route{
		{"POST", api(keys), "kms.secrets.create", "Key could not be created", iam.KeysCreate, inRing, http.StatusCreated, createKey},
		{"POST", api("/keys_with_policy_overrides"), "kms.secrets-with-policy-overrides.create", "Key could not be created", iam.KeysCreate, inRing, http.StatusCreated, createKey},
		{"GET", api(keys), "kms.secrets.list", "Keys could not be retrieved", iam.KeysList, inInstance, http.StatusOK, listKeys},
		{"HEAD", api(keys), "kms.secrets.head", "Keys could not be retrieved", iam.KeysList, inInstance, http.StatusOK, headKeys},
		{"GET", api(key), "kms.secrets.read", "Key could not be retrieved", iam.KeysRead, onKey, http.StatusOK, getKey},
		{"GET", api(key + "/metadata"), "kms.secrets-metadata.read", "Key could not be retrieved", iam.KeysMetadata, onKey, http.StatusOK, getMetadata},
		{"PATCH", api(key), "kms.secrets.patch", "Key could not be updated", iam.KeysPatch, onKey, http.StatusOK, patchKey},
		{"DELETE", api(key), "kms.secrets.delete", "Key could not be deleted", iam.KeysDelete, onKey, http.StatusNoContent, deleteKey},
		{"DELETE", api(key + "/purge"), "kms.secrets.purge", "Key could not be purged", iam.KeysPurge, onKey, http.StatusNoContent, purgeKey},
		{"POST", append(api(key+"/restore"), action("restore")...), "kms.secrets.restore", "Key could not be restored", iam.KeysRestore, onKey, http.StatusCreated, restoreKey},
		{"GET", api(key + "/versions"), "kms.secrets-key-versions.list", "KeyVersion(s) could not be retrieved", iam.KeysVersions, onKey, http.StatusOK, listVersions},
		{"POST", action("wrap"), "kms.secrets.wrap", "Wrap with key could not be performed", iam.KeysWrap, onKey, http.StatusOK, wrapKey},
		{"POST", action("unwrap"), "kms.secrets.unwrap", "Unwrap with key could not be performed", iam.KeysUnwrap, onKey, http.StatusOK, unwrapKey},
		{"POST", action("rewrap"), "kms.secrets.rewrap", "Rewrap with key could not be performed", iam.KeysRewrap, onKey, http.StatusOK, rewrapKey},
		{"POST", action("rotate"), "kms.secrets.rotate", "Key could not be rotated", iam.KeysRotate, onKey, http.StatusNoContent, rotateKey},
		{"POST", action("disable"), "kms.secrets.disable", "Key could not be disabled", iam.KeysEnable, onKey, http.StatusNoContent, disableKey},
		{"POST", action("enable"), "kms.secrets.enable", "Key could not be enabled", iam.KeysEnable, onKey, http.StatusNoContent, enableKey},
		{"POST", action("setKeyForDeletion"), "kms.secrets.setkeyfordeletion", "Action could not be performed on key", iam.KeysSetDeletion, onKey, http.StatusNoContent, setForDeletion},
		{"POST", action("unsetKeyForDeletion"), "kms.secrets.unsetkeyfordeletion", "Action could not be performed on key", iam.KeysSetDeletion, onKey, http.StatusNoContent, unsetForDeletion},
		{"POST", action("sync"), "kms.secrets.sync", "Action could not be performed on key", iam.KeysSync, onKey, http.StatusNoContent, syncKey},
		{"GET", api(key + "/policies"), "kms.policies.read", "Policies could not be retrieved", iam.KeysPolicies, onKey, http.StatusOK, getPolicies},
		{"PUT", api(key + "/policies"), "kms.policies.write", "Policies could not be created", iam.KeysPolicies, onKey, http.StatusOK, setPolicies},
		{"POST", api(key + "/aliases/{alias}"), "kms.secrets-alias.create", "Key alias could not be created", iam.AliasesManage, onKey, http.StatusCreated, createAlias},
		{"DELETE", api(key + "/aliases/{alias}"), "kms.secrets-alias.delete", "Key alias could not be deleted", iam.AliasesManage, onKey, http.StatusNoContent, deleteAlias},
		{"GET", api("/keys/registrations"), "kms.registrations.list", "Registrations could not be retrieved", iam.RegistrationsList, inInstance, http.StatusOK, listRegistrations},
		{"GET", api(key + "/registrations"), "kms.registrations.list", "Registrations could not be retrieved", iam.RegistrationsList, onKey, http.StatusOK, listRegistrations},
		{"POST", api(key + "/registrations/{crn}"), "kms.registrations.create", "Registration could not be created", iam.RegistrationsWrite, onKey, http.StatusCreated, createRegistration},
		{"DELETE", api(key + "/registrations/{crn}"), "kms.registrations.delete", "Registration could not be deleted", iam.RegistrationsWrite, onKey, http.StatusNoContent, deleteRegistration},
	}
}

func instanceRoutes() []route {
	return []route{
		{"GET", api("/key_rings"), "kms.key-rings.list", "Key rings could not be retrieved", iam.RingsList, inInstance, http.StatusOK, listRings},
		{"POST", api("/key_rings/{id}"), "kms.key-rings.create", "Key ring could not be created", iam.RingsCreate, inInstance, http.StatusCreated, createRing},
		{"DELETE", api("/key_rings/{id}"), "kms.key-rings.delete", "Key ring could not be deleted", iam.RingsDelete, inInstance, http.StatusNoContent, deleteRing},
		{"POST", api("/import_token"), "kms.import-token.create", "Import Token could not be created", iam.ImportTokens, inInstance, http.StatusOK, createImportToken},
		{"GET", api("/import_token"), "kms.import-token.read", "Import Token could not be retrieved", iam.ImportTokens, inInstance, http.StatusOK, getImportToken},
		{"GET", api("/instance/policies"), "kms.instance-policies.read", "Instance policy could not be retrieved", iam.InstancePolicies, inInstance, http.StatusOK, getInstancePolicies},
		{"PUT", api("/instance/policies"), "kms.instance-policies.write", "Instance policy could not be created", iam.InstancePolicies, inInstance, http.StatusNoContent, setInstancePolicies},
		{"GET", api("/instance/allowed_ip_port"), "kms.instance-allowed-ip-port.read", "Allowed IP port could not be retrieved", iam.InstanceRead, inInstance, http.StatusOK, allowedPort},
	}
}

func ownRoutes() []route {
	return []route{
		{"POST", own("/instances"), "kmsctl.instances.create", "Instance could not be created", iam.InstancesManage, everywhere, http.StatusCreated, createInstance},
		{"GET", own("/instances"), "kmsctl.instances.list", "Instances could not be retrieved", iam.InstancesManage, everywhere, http.StatusOK, listInstances},
		{"DELETE", own("/instance"), "kmsctl.instances.delete", "Instance could not be deleted", iam.InstancesManage, inInstance, http.StatusNoContent, deleteInstance},
		{"GET", own("/audit/heads"), "kmsctl.audit.read", "Heads of the audit logs could not be retrieved", iam.IAMManage, everywhere, http.StatusOK, auditHeads},
		{"GET", own("/backup"), "kmsctl.backup.read", "Backup could not be made", iam.IAMManage, everywhere, http.StatusOK, readBackup},
		{"GET", own("/clear"), "kmsctl.clear.read", "What clearing would take away could not be found out", iam.IAMManage, everywhere, http.StatusOK, readClear},
		{"POST", own("/clear/plan"), "kmsctl.clear.plan", "Clearing could not be planned", iam.IAMManage, everywhere, http.StatusCreated, planClear},
		{"POST", own("/clear/settle"), "kmsctl.clear.settle", "Clearing could not be settled", iam.IAMManage, everywhere, http.StatusOK, settleClear},
		{"POST", own("/clear"), "kmsctl.clear", "Data could not be cleared", iam.IAMManage, everywhere, http.StatusAccepted, beginClear},
		{"GET", own("/master"), "kmsctl.master.read", "Master keys could not be looked at", iam.IAMManage, everywhere, http.StatusOK, readMaster},
		{"POST", own("/master/rotate"), "kmsctl.master.rotate", "Master keys could not be rotated", iam.IAMManage, everywhere, http.StatusAccepted, rotateMaster},
		{"POST", own("/master/migrate"), "kmsctl.master.migrate", "Keys could not be moved to the other token", iam.IAMManage, everywhere, http.StatusAccepted, migrateMaster},
		{"POST", own("/master/stop"), "kmsctl.master.stop", "The change of the master keys could not be stopped", iam.IAMManage, everywhere, http.StatusOK, stopMaster},
		{"GET", own("/clock"), "kmsctl.clock.read", "Clock could not be looked at", iam.IAMManage, everywhere, http.StatusOK, readClock},
		{"POST", own("/clock/confirm"), "kmsctl.clock.confirm", "Clock could not be confirmed", iam.IAMManage, everywhere, http.StatusOK, confirmClock},
		{"POST", own("/onboard"), "kmsctl.onboard", "Service could not be onboarded", iam.IAMGrant, managing, http.StatusCreated, onboard},
		{"GET", own("/iam/signing-keys"), "iam.signing-keys.list", "Signing keys could not be retrieved", iam.IAMManage, everywhere, http.StatusOK, listSigningKeys},
		{"POST", own("/iam/signing-keys/rotate"), "iam.signing-keys.rotate", "Signing key could not be rotated", iam.IAMManage, everywhere, http.StatusCreated, rotateSigningKey},
		{"POST", own("/iam/service-ids"), "iam.service-ids.create", "Service ID could not be created", iam.IAMGrant, managing, http.StatusCreated, createServiceID},
		{"GET", own("/iam/service-ids"), "iam.service-ids.list", "Service IDs could not be retrieved", iam.IAMGrant, managing, http.StatusOK, listServiceIDs},
		{"DELETE", own("/iam/service-ids/{id}"), "iam.service-ids.delete", "Service ID could not be deleted", iam.IAMGrant, managing, http.StatusNoContent, deleteServiceID},
		{"POST", own("/iam/api-keys"), "iam.api-keys.create", "API key could not be created", iam.IAMGrant, managing, http.StatusCreated, createAPIKey},
		{"GET", own("/iam/api-keys"), "iam.api-keys.list", "API keys could not be retrieved", iam.IAMGrant, managing, http.StatusOK, listAPIKeys},
		{"DELETE", own("/iam/api-keys/{id}"), "iam.api-keys.delete", "API key could not be deleted", iam.IAMGrant, managing, http.StatusNoContent, deleteAPIKey},
		{"POST", own("/iam/policies"), "iam.policies.create", "Policy could not be created", iam.IAMGrant, managing, http.StatusCreated, createPolicy},
		{"GET", own("/iam/policies/{service}"), "iam.policies.list", "Policies could not be retrieved", iam.IAMGrant, managing, http.StatusOK, listPolicies},
		{"DELETE", own("/iam/policies/{service}/{id}"), "iam.policies.delete", "Policy could not be deleted", iam.IAMGrant, managing, http.StatusNoContent, deletePolicy},
	}
}

func createInstance(ctx context.Context, c *call) (any, error) {
	var in kmsapi.CreateInstance
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	out, err := c.KMS.CreateInstance(ctx, in, c.who.String())
	c.instance = out.ID
	return out, err
}

func listInstances(ctx context.Context, c *call) (any, error) {
	all, err := c.KMS.Instances(ctx)
	return kmsapi.Instances{Instances: all}, err
}

func deleteInstance(ctx context.Context, c *call) (any, error) {
	return nil, c.KMS.DeleteInstance(ctx, c.instance, func(ctx context.Context) error { return c.IAM.ForgetInstance(ctx, c.instance) })
}

func auditHeads(ctx context.Context, c *call) (any, error) { return c.AuditHeads(ctx) }
