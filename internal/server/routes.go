package server

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// api gives a path under both prefixes.
func api(path string) []string { return []string{"/api/v2" + path, "/kms/api/v2" + path} }

func own(path string) []string { return []string{"/kmsctl/v1" + path} }

// routes is the whole API but health and tokens.
func routes() []route {
	return []route{
		{"POST", api("/keys"), "kms.secrets.create", "Key could not be created", iam.KeysCreate, inInstance, http.StatusCreated, createKey},
		{"GET", api("/keys"), "kms.secrets.list", "Keys could not be retrieved", iam.KeysList, inInstance, http.StatusOK, listKeys},
		{"HEAD", api("/keys"), "kms.secrets.head", "Keys could not be retrieved", iam.KeysList, inInstance, http.StatusOK, headKeys},
		{"GET", api("/keys/{id}"), "kms.secrets.read", "Key could not be retrieved", iam.KeysRead, onKey, http.StatusOK, getKey},
		{"GET", api("/keys/{id}/metadata"), "kms.secrets-metadata.read", "Key could not be retrieved", iam.KeysMetadata, onKey, http.StatusOK, getMetadata},
		{"POST", api("/keys/{id}/actions/wrap"), "kms.secrets.wrap", "Wrap with key could not be performed", iam.KeysWrap, onKey, http.StatusOK, wrapKey},
		{"POST", api("/keys/{id}/actions/unwrap"), "kms.secrets.unwrap", "Unwrap with key could not be performed", iam.KeysUnwrap, onKey, http.StatusOK, unwrapKey},

		{"POST", own("/instances"), "kmsctl.instances.create", "Instance could not be created", iam.InstancesManage, everywhere, http.StatusCreated, createInstance},
		{"GET", own("/instances"), "kmsctl.instances.list", "Instances could not be retrieved", iam.InstancesManage, everywhere, http.StatusOK, listInstances},
		{"DELETE", own("/instance"), "kmsctl.instances.delete", "Instance could not be deleted", iam.InstancesManage, inInstance, http.StatusNoContent, deleteInstance},
		{"GET", own("/audit/heads"), "kmsctl.audit.read", "Heads of the audit logs could not be retrieved", iam.IAMManage, everywhere, http.StatusOK, auditHeads},
		{"GET", own("/backup"), "kmsctl.backup.read", "Backup could not be made", iam.IAMManage, everywhere, http.StatusOK, readBackup},
		{"POST", own("/onboard"), "kmsctl.onboard", "Service could not be onboarded", iam.InstancesManage, everywhere, http.StatusCreated, onboard},
		{"POST", own("/iam/service-ids"), "iam.service-ids.create", "Service ID could not be created", iam.IAMManage, everywhere, http.StatusCreated, createServiceID},
		{"GET", own("/iam/service-ids"), "iam.service-ids.list", "Service IDs could not be retrieved", iam.IAMManage, everywhere, http.StatusOK, listServiceIDs},
		{"DELETE", own("/iam/service-ids/{id}"), "iam.service-ids.delete", "Service ID could not be deleted", iam.IAMManage, everywhere, http.StatusNoContent, deleteServiceID},
		{"POST", own("/iam/api-keys"), "iam.api-keys.create", "API key could not be created", iam.IAMManage, everywhere, http.StatusCreated, createAPIKey},
		{"DELETE", own("/iam/api-keys/{id}"), "iam.api-keys.delete", "API key could not be deleted", iam.IAMManage, everywhere, http.StatusNoContent, deleteAPIKey},
		{"POST", own("/iam/policies"), "iam.policies.create", "Policy could not be created", iam.IAMManage, everywhere, http.StatusCreated, createPolicy},
		{"DELETE", own("/iam/policies/{service}/{id}"), "iam.policies.delete", "Policy could not be deleted", iam.IAMManage, everywhere, http.StatusNoContent, deletePolicy},
	}
}

func keysOf(dialect string, total int, keys ...kmsapi.Key) kmsapi.Keys {
	t := kmsapi.TypeKey
	if dialect == kms.DialectICP {
		t = kmsapi.TypeCollection
	}
	return kmsapi.Keys{Metadata: kmsapi.Metadata{CollectionType: t, CollectionTotal: total}, Resources: keys}
}

func createKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.CreateKeys
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	bad := func(code, why string) error { return fault.New(fault.Usage, "", "", errors.New(why)).WithReason(code) }
	switch {
	case in.Metadata == nil:
		return nil, bad(kmsapi.BadBody, "Only bodies with metadata are supported: CollectionMetadata is empty")
	case in.Metadata.CollectionTotal != len(in.Resources):
		return nil, bad(kmsapi.CollectionTotal, "totals differ")
	case len(in.Resources) != 1:
		return nil, bad(kmsapi.BadBody, "Only creation of one key per request is supported")
	}
	ring := c.ring
	if ring == "" {
		ring = kmsapi.DefaultKeyRing
	}
	if ring != kmsapi.DefaultKeyRing {
		return nil, bad(kmsapi.NotBuilt, "key rings other than `default` are not served yet")
	}
	k, err := c.KMS.CreateKey(ctx, c.instance, ring, c.who.String(), in.Resources[0])
	if err != nil {
		return nil, err
	}
	c.id = k.ID
	return keysOf("", 1, k), nil
}

func query(c *call, limit int) (kms.Query, error) {
	q := kms.Query{Limit: limit, Ring: c.ring}
	bad := func(name, rule string) error {
		return fault.Newf(fault.Usage, "", "", "The query_param `%s` must be: %s", name, rule).WithReason(kmsapi.InvalidQuery)
	}
	for name, vs := range c.r.URL.Query() {
		v := vs[0]
		var err error
		switch name {
		case "limit":
			if q.Limit, err = strconv.Atoi(v); err != nil || q.Limit < 1 || q.Limit > kmsapi.MaxLimit {
				return q, bad(name, "an integer between 1 and 5000 (inclusive)")
			}
		case "offset":
			if q.Offset, err = strconv.Atoi(v); err != nil || q.Offset < 0 {
				return q, bad(name, "an integer that is not negative")
			}
		case "state":
			for _, part := range strings.Split(v, ",") {
				n, err := strconv.Atoi(part)
				if err != nil || n < 0 || n > 5 {
					return q, bad(name, "a comma separated list of states between 0 and 5")
				}
				q.States = append(q.States, n)
			}
		case "extractable":
			b, err := strconv.ParseBool(v)
			if err != nil {
				return q, bad(name, "true or false")
			}
			q.Extractable = &b
		default:
			return q, fault.Newf(fault.Usage, "", "", "the query parameter `%s` is not served yet", name).WithReason(kmsapi.NotBuilt)
		}
	}
	return q, nil
}

// icpLimit is the default limit of the ICP generation.
const icpLimit = 2000

func listKeys(ctx context.Context, c *call) (any, error) {
	in, err := c.KMS.Instance(ctx, c.instance)
	if err != nil {
		return nil, err
	}
	limit := kmsapi.DefaultLimit
	if in.Dialect == kms.DialectICP {
		limit = icpLimit
	}
	q, err := query(c, limit)
	if err != nil {
		return nil, err
	}
	keys, _, err := c.KMS.Keys(ctx, c.instance, q)
	return keysOf(in.Dialect, len(keys), keys...), err
}

func headKeys(ctx context.Context, c *call) (any, error) {
	q, err := query(c, 1)
	if err != nil {
		return nil, err
	}
	_, total, err := c.KMS.Keys(ctx, c.instance, q)
	c.resHeader.Set(kmsapi.HeaderKeyTotal, strconv.Itoa(total))
	return nil, err
}

func getKey(ctx context.Context, c *call) (any, error) {
	k, err := c.KMS.Key(ctx, c.instance, c.id, true)
	return keysOf("", 1, k), err
}

func getMetadata(ctx context.Context, c *call) (any, error) {
	k, err := c.KMS.Key(ctx, c.instance, c.id, false)
	return keysOf("", 1, k), err
}

func wrapKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.WrapRequest
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	return c.KMS.Wrap(ctx, c.instance, c.id, in)
}

func unwrapKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.UnwrapRequest
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	if in.Ciphertext == "" {
		return nil, fault.Newf(fault.Usage, "", "", "no ciphertext").WithReason(kmsapi.NoBody)
	}
	return c.KMS.Unwrap(ctx, c.instance, c.id, in)
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
	return nil, c.KMS.DeleteInstance(ctx, c.instance)
}

func auditHeads(ctx context.Context, c *call) (any, error) { return c.AuditHeads(ctx) }
