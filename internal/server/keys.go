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

func badBody(code, why string) error {
	return fault.New(fault.Usage, "", "", errors.New(why)).WithReason(code)
}

func badParam(name, rule string) error {
	return fault.Newf(fault.Usage, "", "", "The query_param `%s` must be: %s", name, rule).WithReason(kmsapi.InvalidQuery)
}

// minimal says whether the caller wants as little as possible back.
func (c *call) minimal(otherwise bool) bool {
	switch v := strings.ReplaceAll(c.r.Header.Get(kmsapi.HeaderPrefer), " ", ""); {
	case strings.Contains(v, "return=minimal"):
		return true
	case strings.Contains(v, "return=representation"):
		return false
	}
	return otherwise
}

func createKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.CreateKeys
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	switch {
	case in.Metadata == nil:
		return nil, badBody(kmsapi.BadBody, "Only bodies with metadata are supported: CollectionMetadata is empty")
	case in.Metadata.CollectionTotal != len(in.Resources):
		return nil, badBody(kmsapi.CollectionTotal, "totals differ")
	case len(in.Resources) != 1:
		return nil, badBody(kmsapi.BadBody, "Only creation of one key per request is supported")
	}
	k := in.Resources[0]
	if overrides := strings.HasSuffix(c.r.URL.Path, "/keys_with_policy_overrides"); !overrides && (k.Rotation != nil || k.DualAuthDelete != nil) {
		return nil, badBody(kmsapi.BadBody, "Only keys_with_policy_overrides takes policies")
	} else if overrides && k.Rotation != nil {
		// What rewrites the policy needs the right to set policies as well.
		if err := c.IAM.Authorize(ctx, c.who, iam.KeysPolicies, iam.Resource{Instance: c.instance, KeyRing: c.ring}); err != nil {
			return nil, err
		}
	}
	out, err := c.KMS.CreateKey(ctx, c.instance, c.ring, c.who.String(), k)
	if err != nil {
		return nil, err
	}
	c.id = out.ID
	if c.minimal(false) {
		out.Payload = ""
	}
	return keysOf("", out), nil
}

// keysOf is a collection of keys.
func keysOf(dialect string, keys ...kmsapi.Key) kmsapi.Keys {
	t := kmsapi.TypeKey
	if dialect == kms.DialectICP {
		t = kmsapi.TypeCollection
	}
	return kmsapi.Keys{Metadata: kmsapi.Metadata{CollectionType: t, CollectionTotal: len(keys)}, Resources: keys}
}

// number reads a query parameter that is a number.
func (c *call) number(name string, otherwise, least, most int) (int, error) {
	v := c.r.URL.Query().Get(name)
	if v == "" {
		return otherwise, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < least || n > most {
		return 0, badParam(name, "an integer between "+strconv.Itoa(least)+" and "+strconv.Itoa(most)+" (inclusive)")
	}
	return n, nil
}

// flag reads a query parameter that is true or false; nil when it is absent.
func (c *call) flag(name string) (*bool, error) {
	v := c.r.URL.Query().Get(name)
	if v == "" {
		return nil, nil
	}
	b := v == "true"
	if !b && v != "false" {
		return nil, badParam(name, "true or false")
	}
	return &b, nil
}

func (c *call) isSet(name string) (bool, error) {
	b, err := c.flag(name)
	return b != nil && *b, err
}

const maxOffset = 1 << 30

func (c *call) page(limit int) (l, o int, err error) {
	l, err = c.number("limit", limit, 1, kmsapi.MaxLimit)
	if err == nil {
		o, err = c.number("offset", 0, 0, maxOffset)
	}
	return l, o, err
}

func query(c *call, limit int) (q kms.Query, err error) {
	v := c.r.URL.Query()
	q = kms.Query{Ring: c.ring, Search: v.Get("search"), Sort: v.Get("sort"), Filter: v.Get("filter")}
	if q.Limit, q.Offset, err = c.page(limit); err != nil {
		return q, err
	}
	if v.Get("state") != "" {
		if q.States, err = kms.ParseStates("state", v.Get("state")); err != nil {
			return q, err
		}
	}
	q.Extractable, err = c.flag("extractable")
	return q, err
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
	p, err := c.KMS.Keys(ctx, c.instance, q)
	if err != nil {
		return nil, err
	}
	out := keysOf(in.Dialect, p.Keys...)
	out.Resources = p.Keys // an empty list is a list
	out.Metadata.SearchQuery, out.Metadata.IncompleteSearch = p.Search, p.Incomplete
	if total, err := c.isSet("totalCount"); err != nil || total {
		out.Metadata.TotalCount = &p.Total
	}
	return out, nil
}

func headKeys(ctx context.Context, c *call) (any, error) {
	q, err := query(c, 1)
	if err != nil {
		return nil, err
	}
	p, err := c.KMS.Keys(ctx, c.instance, q)
	c.resHeader.Set(kmsapi.HeaderKeyTotal, strconv.Itoa(p.Total))
	return nil, err
}

func getKey(ctx context.Context, c *call) (any, error) {
	k, err := c.KMS.Key(ctx, c.instance, c.id, true)
	return keysOf("", k), err
}

func getMetadata(ctx context.Context, c *call) (any, error) {
	k, err := c.KMS.Key(ctx, c.instance, c.id, false)
	return keysOf("", k), err
}

func patchKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.PatchKey
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	// The right must cover the ring that the key goes to as well.
	if err := c.IAM.Authorize(ctx, c.who, iam.KeysPatch, iam.Resource{Instance: c.instance, KeyRing: in.KeyRingID}); err != nil {
		return nil, err
	}
	k, err := c.KMS.Patch(ctx, c.instance, c.id, in)
	return keysOf("", k), err
}

// represent gives a key when the caller prefers that, else nothing.
func (c *call) represent(k kmsapi.Key, err error) (any, error) {
	if err != nil || c.minimal(true) {
		return nil, err
	}
	c.status = http.StatusOK
	return keysOf("", k), nil
}

func deleteKey(ctx context.Context, c *call) (any, error) {
	force, err := c.isSet("force")
	if err != nil {
		return nil, err
	}
	return c.represent(c.KMS.Delete(ctx, c.instance, c.id, c.who.String(), force))
}

func purgeKey(ctx context.Context, c *call) (any, error) {
	return c.represent(c.KMS.Purge(ctx, c.instance, c.id))
}

func restoreKey(ctx context.Context, c *call) (any, error) {
	k, err := c.KMS.Restore(ctx, c.instance, c.id)
	return keysOf("", k), err
}

func listVersions(ctx context.Context, c *call) (any, error) {
	limit, offset, err := c.page(kmsapi.DefaultLimit)
	if err != nil {
		return nil, err
	}
	all, err := c.isSet("allKeyStates")
	if err != nil {
		return nil, err
	}
	vs, total, err := c.KMS.Versions(ctx, c.instance, c.id, limit, offset, all)
	if err != nil {
		return nil, err
	}
	return collection(c, kmsapi.TypeKeyVersion, total, vs)
}

// collection is any other collection; totalCount=true adds the total.
func collection[T any](c *call, kind string, total int, vs []T) (any, error) {
	out := kmsapi.Collection[T]{Metadata: kmsapi.Metadata{CollectionType: kind, CollectionTotal: len(vs)}, Resources: vs}
	want, err := c.isSet("totalCount")
	if want {
		out.Metadata.TotalCount = &total
	}
	return out, err
}

// answer leaves out what the ICP generation does not know.
func (c *call) answer(ctx context.Context, out kmsapi.ActionAnswer, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	in, err := c.KMS.Instance(ctx, c.instance)
	if err == nil && in.Dialect == kms.DialectICP {
		out.KeyVersion, out.RewrappedKeyVersion = nil, nil
		if out.Plaintext != "" && c.rt.action == iam.KeysUnwrap {
			out.Ciphertext = ""
		}
	}
	return out, err
}

func wrapKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.WrapRequest
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	out, err := c.KMS.Wrap(ctx, c.instance, c.id, in)
	return c.answer(ctx, out, err)
}

func unwrapKey(ctx context.Context, c *call) (any, error) {
	return c.reopen(ctx, c.KMS.Unwrap)
}

func rewrapKey(ctx context.Context, c *call) (any, error) {
	return c.reopen(ctx, c.KMS.Rewrap)
}

func (c *call) reopen(ctx context.Context, do func(context.Context, string, string, kmsapi.UnwrapRequest) (kmsapi.ActionAnswer, error)) (any, error) {
	var in kmsapi.UnwrapRequest
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	out, err := do(ctx, c.instance, c.id, in)
	return c.answer(ctx, out, err)
}

func rotateKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.RotateRequest
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	return nil, c.KMS.Rotate(ctx, c.instance, c.id, in)
}

func disableKey(ctx context.Context, c *call) (any, error) {
	return nil, c.KMS.Disable(ctx, c.instance, c.id)
}

func enableKey(ctx context.Context, c *call) (any, error) {
	return nil, c.KMS.Enable(ctx, c.instance, c.id)
}

func setForDeletion(ctx context.Context, c *call) (any, error) {
	return nil, c.KMS.SetForDeletion(ctx, c.instance, c.id, c.who.String())
}

func unsetForDeletion(ctx context.Context, c *call) (any, error) {
	return nil, c.KMS.UnsetForDeletion(ctx, c.instance, c.id)
}

func syncKey(ctx context.Context, c *call) (any, error) {
	return nil, c.KMS.Sync(ctx, c.instance, c.id)
}

// keyPolicy is the query's policy, of those that keys have.
func (c *call) keyPolicy() (string, error) {
	kind := c.r.URL.Query().Get("policy")
	if kind != "" && kind != kmsapi.PolicyRotation && kind != kmsapi.PolicyDualAuthDelete {
		return "", badParam("policy", "rotation or dualAuthDelete")
	}
	return kind, nil
}

func getPolicies(ctx context.Context, c *call) (any, error) {
	kind, err := c.keyPolicy()
	if err != nil {
		return nil, err
	}
	ps, err := c.KMS.KeyPolicies(ctx, c.instance, c.id, kind)
	if err != nil {
		return nil, err
	}
	return collection(c, kmsapi.TypePolicy, len(ps), ps)
}

func setPolicies(ctx context.Context, c *call) (any, error) {
	kind, err := c.keyPolicy()
	if err != nil {
		return nil, err
	}
	in, err := resources[kmsapi.KeyPolicy](c)
	if err != nil {
		return nil, err
	}
	ps, err := c.KMS.SetKeyPolicies(ctx, c.instance, c.id, kind, c.who.String(), in)
	if err != nil {
		return nil, err
	}
	return collection(c, kmsapi.TypePolicy, len(ps), ps)
}

// resources reads a collection from the body.
func resources[T any](c *call) ([]T, error) {
	var in struct {
		Metadata  *kmsapi.Metadata `json:"metadata"`
		Resources []T              `json:"resources"`
	}
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	if in.Metadata == nil {
		return nil, badBody(kmsapi.BadBody, "Only bodies with metadata are supported: CollectionMetadata is empty")
	}
	if in.Metadata.CollectionTotal != len(in.Resources) {
		return nil, badBody(kmsapi.CollectionTotal, "totals differ")
	}
	return in.Resources, nil
}

func createAlias(ctx context.Context, c *call) (any, error) {
	a, err := c.KMS.CreateAlias(ctx, c.instance, c.id, c.r.PathValue("alias"), c.who.String())
	if err != nil {
		return nil, err
	}
	return collection(c, kmsapi.TypeAlias, 1, []kmsapi.Alias{a})
}

func deleteAlias(ctx context.Context, c *call) (any, error) {
	return nil, c.KMS.DeleteAlias(ctx, c.instance, c.id, c.r.PathValue("alias"))
}

func listRegistrations(ctx context.Context, c *call) (any, error) {
	limit, offset, err := c.page(kmsapi.DefaultLimit)
	if err != nil {
		return nil, err
	}
	prevent, err := c.flag("preventKeyDeletion")
	if err != nil {
		return nil, err
	}
	q := kms.RegistrationQuery{Key: c.id, CRN: c.r.URL.Query().Get("urlEncodedResourceCRNQuery"), Prevent: prevent, Limit: limit, Offset: offset}
	regs, total, err := c.KMS.Registrations(ctx, c.instance, q)
	if err != nil {
		return nil, err
	}
	return collection(c, kmsapi.TypeRegistration, total, regs)
}

// byService refuses people: a registration says what a service needs of a key,
// and only a service can know when that is no longer so.
func (c *call) byService() error {
	if c.who.Kind != iam.KindService {
		return fault.Newf(fault.Denied, "", "", "registrations are the services' own").WithReason(kmsapi.ServiceOnly)
	}
	return nil
}

func createRegistration(ctx context.Context, c *call) (any, error) {
	if err := c.byService(); err != nil {
		return nil, err
	}
	var in kmsapi.CreateRegistration
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	r, err := c.KMS.Register(ctx, c.instance, c.id, c.r.PathValue("crn"), c.who.String(), in)
	if err != nil {
		return nil, err
	}
	return collection(c, kmsapi.TypeRegistration, 1, []kmsapi.Registration{r})
}

func deleteRegistration(ctx context.Context, c *call) (any, error) {
	if err := c.byService(); err != nil {
		return nil, err
	}
	return nil, c.KMS.Unregister(ctx, c.instance, c.id, c.r.PathValue("crn"))
}

func listRings(ctx context.Context, c *call) (any, error) {
	limit, offset, err := c.page(kmsapi.MaxLimit)
	if err != nil {
		return nil, err
	}
	all, err := c.KMS.Rings(ctx, c.instance)
	if err != nil {
		return nil, err
	}
	offset = min(offset, len(all))
	return collection(c, kmsapi.TypeKeyRing, len(all), all[offset:min(offset+limit, len(all))])
}

func createRing(ctx context.Context, c *call) (any, error) {
	return nil, c.KMS.CreateRing(ctx, c.instance, c.id, c.who.String())
}

func deleteRing(ctx context.Context, c *call) (any, error) {
	force, err := c.isSet("force")
	if err != nil {
		return nil, err
	}
	return nil, c.KMS.DeleteRing(ctx, c.instance, c.id, force)
}

func createImportToken(ctx context.Context, c *call) (any, error) {
	var in kmsapi.ImportTokenRequest
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	return c.KMS.CreateImportToken(ctx, c.instance, in)
}

func getImportToken(ctx context.Context, c *call) (any, error) {
	return c.KMS.ImportToken(ctx, c.instance)
}

func getInstancePolicies(ctx context.Context, c *call) (any, error) {
	ps, err := c.KMS.InstancePolicies(ctx, c.instance, c.r.URL.Query().Get("policy"))
	if err != nil {
		return nil, err
	}
	return collection(c, kmsapi.TypePolicy, len(ps), ps)
}

func setInstancePolicies(ctx context.Context, c *call) (any, error) {
	in, err := resources[kmsapi.InstancePolicy](c)
	if err != nil {
		return nil, err
	}
	return nil, c.KMS.SetInstancePolicies(ctx, c.instance, c.r.URL.Query().Get("policy"), c.who.String(), in)
}

// allowedPort says where the private endpoint is that an allowed-IP policy is
// about: there is one endpoint here, the one that was asked.
func allowedPort(ctx context.Context, c *call) (any, error) {
	if _, err := c.KMS.Instance(ctx, c.instance); err != nil {
		return nil, err
	}
	port := 0
	if _, p, ok := strings.Cut(c.r.Host, ":"); ok {
		port, _ = strconv.Atoi(p) // 0 when the Host header has no number
	}
	return collection(c, kmsapi.TypeAllowedIP, 1, []kmsapi.AllowedPort{{PrivateEndpointPort: port}})
}
