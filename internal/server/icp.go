package server

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// icpRoutes are the paths at which ICP's scripts look for service IDs, API
// keys and policies, as its ingress and its inner services have them.
func icpRoutes() []route {
	identity := func(path string) []string {
		return []string{path, path + "/{$}", "/iam-token" + path, "/iam-token" + path + "/{$}"}
	}
	pap := func(path string) []string {
		p := "/v1/scopes/{scope}/service_ids/{service}/policies" + path
		return []string{p, "/acms" + p, "/iam-pap/acms" + p}
	}
	const made = http.StatusCreated
	return []route{
		{"POST", identity("/serviceids"), "iam.service-ids.create", "Service ID could not be created", iam.IAMGrant, managing, made, icpCreateServiceID},
		{"GET", identity("/serviceids"), "iam.service-ids.list", "Service IDs could not be retrieved", iam.IAMGrant, managing, http.StatusOK, icpListServiceIDs},
		{"DELETE", []string{"/serviceids/{id}", "/iam-token/serviceids/{id}"}, "iam.service-ids.delete", "Service ID could not be deleted", iam.IAMGrant, managing, http.StatusNoContent, icpDeleteServiceID},
		{"POST", identity("/apikeys"), "iam.api-keys.create", "API key could not be created", iam.IAMGrant, managing, made, icpCreateAPIKey},
		{"POST", pap(""), "iam.policies.create", "Policy could not be created", iam.IAMGrant, managing, made, icpCreatePolicy},
		{"GET", pap(""), "iam.policies.list", "Policies could not be retrieved", iam.IAMGrant, managing, http.StatusOK, icpListPolicies},
		{"DELETE", pap("/{id}"), "iam.policies.delete", "Policy could not be deleted", iam.IAMGrant, managing, http.StatusNoContent, icpDeletePolicy},
	}
}

// icpDocs describes them by their audit action; where they are kmsctl's own
// calls in ICP's words, the bodies differ.
var icpDocs = map[string]doc{
	"iam.service-ids.create": {icpNamed{}, icpServiceID{}, ""}, "iam.service-ids.list": {nil, icpServiceIDs{}, "boundTo"}, "iam.service-ids.delete": {},
	"iam.api-keys.create": {icpNamed{}, icpAPIKey{}, ""},
	"iam.policies.create": {iam.Policy{}, iam.Policy{}, ""}, "iam.policies.list": {nil, icpPolicies{}, ""}, "iam.policies.delete": {},
}

// icpNamed asks for a service ID, or for an API key that is bound to one.
type icpNamed struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	BoundTo     string `json:"boundTo"`
}

type icpServiceIDs struct {
	Items []icpServiceID `json:"items"`
}

type icpAPIKey struct {
	kmsapi.APIKey
	BoundTo string `json:"boundTo"`
}

type icpPolicies struct {
	Policies []iam.Policy `json:"policies"`
}

// serviceCRN begins the CRN of every service ID of ours; the cluster's name is
// not known to the KMS, and nothing depends on it.
const serviceCRN = "crn:v1:icp:private:iam-identity:kmsctl:n/kube-system::serviceid:"

// icpServiceID is a service ID in ICP's shape.
type icpServiceID struct {
	Metadata struct {
		UUID      string    `json:"uuid"`
		IAMID     string    `json:"iam_id"`
		CRN       string    `json:"crn"`
		CreatedAt time.Time `json:"createdAt"`
	} `json:"metadata"`
	Entity struct {
		Name        string `json:"name"`
		Description string `json:"description,omitempty"`
	} `json:"entity"`
}

func icpShow(s iam.ServiceID) icpServiceID {
	var out icpServiceID
	out.Metadata.UUID, out.Metadata.IAMID, out.Metadata.CRN, out.Metadata.CreatedAt = s.ID, "iam-"+s.ID, serviceCRN+s.ID, s.CreatedAt
	out.Entity.Name, out.Entity.Description = s.Name, s.Description
	return out
}

// icpName takes a service ID as ICP writes it: id, iam_id, CRN or name.
func icpName(s string) string {
	if i := strings.LastIndexByte(s, ':'); strings.HasPrefix(s, "crn:") && i >= 0 {
		s = s[i+1:]
	}
	return strings.TrimPrefix(s, "iam-")
}

func icpCreateServiceID(ctx context.Context, c *call) (any, error) {
	var in icpNamed
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	s, err := c.IAM.CreateServiceID(ctx, c.manager(), in.Name, in.Description)
	if err != nil {
		return nil, err
	}
	return icpShow(s), nil
}

func icpListServiceIDs(ctx context.Context, c *call) (any, error) {
	all, err := c.IAM.ServiceIDs(ctx, c.manager())
	out := icpServiceIDs{[]icpServiceID{}}
	for _, s := range all {
		out.Items = append(out.Items, icpShow(s))
	}
	return out, err
}

func icpDeleteServiceID(ctx context.Context, c *call) (any, error) {
	return nil, c.dropServiceID(ctx, icpName(c.id))
}

func icpCreateAPIKey(ctx context.Context, c *call) (any, error) {
	var in icpNamed
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	k, value, err := c.IAM.CreateAPIKey(ctx, c.manager(), in.Name, icpName(in.BoundTo))
	if err != nil {
		return nil, err
	}
	return icpAPIKey{kmsapi.APIKey{ID: k.ID, Name: k.Name, ServiceID: k.ServiceID, CreatedAt: k.CreatedAt, Key: string(value.Reveal())}, serviceCRN + k.ServiceID}, nil
}

func icpCreatePolicy(ctx context.Context, c *call) (any, error) {
	var p iam.Policy
	err := c.decode(&p)
	if err == nil {
		err = p.Check()
	}
	if err != nil {
		return nil, err
	}
	p.ID, err = c.grant(ctx, icpName(c.r.PathValue("service")), p)
	return p, err
}

func icpListPolicies(ctx context.Context, c *call) (any, error) {
	_, all, err := c.IAM.Policies(ctx, c.manager(), icpName(c.r.PathValue("service")))
	return icpPolicies{all}, err
}

func icpDeletePolicy(ctx context.Context, c *call) (any, error) {
	return nil, c.IAM.DeletePolicy(ctx, c.manager(), icpName(c.r.PathValue("service")), c.id)
}

// passwordToken refuses ICP's way to log in by name and password.
func (s *Server) passwordToken(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusBadRequest, kmsapi.TokenError{ErrorCode: codeBadGrant,
		ErrorMessage: "users with passwords are not kept here: exchange an API key at /identity/token"})
}
