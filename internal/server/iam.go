package server

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// grantType is IBM Cloud's and ICP's way to exchange an API key.
const grantType = "urn:ibm:params:oauth:grant-type:apikey"

// codeBadGrant is what IBM Cloud answers to a grant that it does not know.
const codeBadGrant = "BXNIM0137E"

// token answers the token endpoints. Refusals are 400, as IBM's IAM gives.
func (s *Server) token(w http.ResponseWriter, r *http.Request) {
	corr := correlate(w, r)
	ctx, span := s.Trace.Request(r, tokenIssue)
	status, code, who := s.answerToken(ctx, w, r, corr)
	span.Set([2]string{"kmsctl.correlation_id", corr}, [2]string{"kmsctl.principal", who})
	span.Answered(status, code)
}

// tokenIssue is the audit action.
const tokenIssue = "iam.token.issue"

// answerToken gives what the trace says of the answer.
func (s *Server) answerToken(ctx context.Context, w http.ResponseWriter, r *http.Request, corr string) (status int, code, who string) {
	r.Body = http.MaxBytesReader(w, r.Body, 16<<10)
	if err := r.ParseForm(); err != nil || !slices.Equal(r.PostForm["grant_type"], []string{grantType}) || len(r.PostForm["apikey"]) > 1 {
		writeJSON(w, http.StatusBadRequest, kmsapi.TokenError{ErrorCode: codeBadGrant, ErrorMessage: "grant_type must be " + grantType + ", and nothing given twice (RFC 6749, 3.2)"})
		return http.StatusBadRequest, codeBadGrant, ""
	}
	key := secret.New([]byte(r.PostForm.Get("apikey")))
	defer key.Zero()
	if err := s.limits.take("token for " + remote(r)); err != nil {
		s.tokenLimited(w, err)
		return http.StatusTooManyRequests, kmsapi.TooManyRequests, ""
	}
	e := audit.Event{Action: tokenIssue, Outcome: "success", Status: http.StatusOK, CorrelationID: corr, Remote: remote(r)}
	t, err := s.IAM.Issue(ctx, key)
	if err != nil {
		e.Outcome, e.Status, e.Detail = "failure", http.StatusBadRequest, iam.CodeUnknownKey
		if fault.KindOf(err) != fault.Denied {
			e.Status, e.Detail = http.StatusServiceUnavailable, kmsapi.Unavailable
		}
	}
	e.Principal = t.Principal.String()
	if aerr := s.append(ctx, e); aerr != nil {
		s.Log.Error("audit", "error", aerr)
		e.Status, e.Detail = http.StatusServiceUnavailable, kmsapi.Unavailable
	}
	switch e.Status {
	case http.StatusOK:
		writeJSON(w, e.Status, kmsapi.Token{AccessToken: t.AccessToken, RefreshToken: "not_supported", TokenType: "Bearer", ExpiresIn: t.ExpiresIn, Expiration: t.Expiration})
	case http.StatusBadRequest:
		writeJSON(w, e.Status, kmsapi.TokenError{ErrorCode: iam.CodeUnknownKey, ErrorMessage: "Provided API key could not be found"})
	default:
		w.Header().Set("Retry-After", soon)
		writeError(w, kmsapi.Unavailable, "Token could not be issued", "")
	}
	return e.Status, e.Detail, e.Principal
}

func (s *Server) tokenLimited(w http.ResponseWriter, err error) {
	var lim *limited
	errors.As(err, &lim)
	s.metrics.limited.WithLabelValues(lim.name).Inc()
	retryAfter(w.Header(), kmsapi.TooManyRequests, lim)
	writeError(w, kmsapi.TooManyRequests, "Token could not be issued", "")
}

// manager is the caller as IAM sees them: an administrator anywhere, anybody
// else within the instance of the header.
func (c *call) manager() iam.Principal {
	if c.who.Admin() {
		return c.who
	}
	return c.who.In(c.instance)
}

// onboard makes an instance and a key where none are named, then a service ID,
// an API key and a policy on that one key. When the last step fails, what was
// made before stays and is named in the answer of a second try.
func onboard(ctx context.Context, c *call) (any, error) {
	var in kmsapi.OnboardRequest
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	if in.Role == "" {
		in.Role = "Viewer"
	}
	who := c.manager()
	if !who.Admin() {
		if in.Instance != "" && in.Instance != c.instance {
			return nil, fault.Newf(fault.Denied, "", "", "another instance than the header's").WithReason(kmsapi.Forbidden)
		}
		in.Instance = c.instance
	}
	// The service ID's name is looked at first: a name that is taken must not
	// leave an instance and a key behind.
	if sid, ps, err := c.IAM.Policies(ctx, who, in.Name); err == nil {
		return c.onboardAgain(ctx, in, sid, ps)
	} else if fault.KindOf(err) != fault.NotFound {
		return nil, err
	}
	if in.Key != "" && in.Instance == "" {
		return nil, fault.Newf(fault.Usage, "", "", "The field `instance` must be: present with a key").WithReason(kmsapi.InvalidField)
	}
	if err := c.IAM.MayOnboard(ctx, who, in.Name, in.Instance, in.Role); err != nil {
		return nil, err
	}
	if in.Instance == "" {
		inst, err := c.instanceNamed(ctx, in.Name)
		if err != nil {
			return nil, err
		}
		in.Instance = inst
	}
	c.instance = in.Instance
	if err := c.onboardKey(ctx, &in); err != nil {
		return nil, err
	}
	c.id = in.Key
	o, err := c.IAM.Onboard(ctx, who, in.Name, in.Instance, in.Key, in.Role)
	if err != nil {
		return nil, err
	}
	return kmsapi.Onboarded{InstanceID: in.Instance, ServiceID: o.ServiceID.ID, APIKey: string(o.APIKey.Reveal()), PolicyID: o.PolicyID, KeyID: in.Key}, nil
}

// onboardKey finds the key that was named, or makes one.
func (c *call) onboardKey(ctx context.Context, in *kmsapi.OnboardRequest) error {
	if in.Key != "" {
		id, _, err := c.KMS.Resolve(ctx, in.Instance, in.Key)
		in.Key = id
		return err
	}
	if err := c.IAM.Authorize(ctx, c.who, iam.KeysCreate, iam.Resource{Instance: in.Instance, KeyRing: kmsapi.DefaultKeyRing}); err != nil {
		return err
	}
	k, err := c.KMS.CreateKey(ctx, in.Instance, kmsapi.DefaultKeyRing, c.who.String(), kmsapi.CreateKey{Name: in.Name + " root key"})
	in.Key = k.ID
	return err
}

// onboardAgain gives what the first onboarding made; what was asked for must
// be that.
func (c *call) onboardAgain(ctx context.Context, in kmsapi.OnboardRequest, sid iam.ServiceID, ps []iam.Policy) (any, error) {
	differs := fault.Newf(fault.Conflict, "", in.Name, "a service ID of this name exists and is for something else").WithReason(kmsapi.Conflict)
	if len(ps) != 1 || len(ps[0].Resources) != 1 || !slices.Equal(ps[0].RoleNames(), []string{in.Role}) {
		return nil, differs
	}
	r := ps[0].Resources[0]
	if in.Key != "" {
		if err := c.onboardKey(ctx, &in); err != nil {
			return nil, err
		}
	}
	if r.Key == "" || in.Instance != "" && in.Instance != r.Instance || in.Key != "" && in.Key != r.Key {
		return nil, differs
	}
	who := c.manager()
	c.instance, c.id = r.Instance, r.Key
	out := kmsapi.Onboarded{InstanceID: r.Instance, ServiceID: sid.ID, PolicyID: ps[0].ID, KeyID: r.Key, Existing: true}
	if !in.NewAPIKey {
		return out, nil
	}
	_, value, err := c.IAM.CreateAPIKey(ctx, who, in.Name, sid.ID)
	out.APIKey = string(value.Reveal())
	return out, err
}

func listAPIKeys(ctx context.Context, c *call) (any, error) {
	all, err := c.IAM.APIKeys(ctx, c.manager(), c.r.URL.Query().Get("serviceId"))
	out := kmsapi.APIKeys{APIKeys: []kmsapi.APIKey{}}
	for _, k := range all {
		out.APIKeys = append(out.APIKeys, kmsapi.APIKey{ID: k.ID, Name: k.Name, ServiceID: k.ServiceID, CreatedAt: k.CreatedAt})
	}
	return out, err
}

func listPolicies(ctx context.Context, c *call) (any, error) {
	sid, all, err := c.IAM.Policies(ctx, c.manager(), c.r.PathValue("service"))
	out := kmsapi.Policies{Policies: []kmsapi.Policy{}}
	for _, p := range all {
		for _, r := range p.Resources {
			out.Policies = append(out.Policies, kmsapi.Policy{ID: p.ID, ServiceID: sid.ID, Instance: r.Instance, Key: r.Key, KeyRing: r.KeyRing, Roles: p.RoleNames()})
		}
	}
	return out, err
}

// instanceNamed makes the instance of this name, or takes the one that a run
// which was cut short has left.
func (c *call) instanceNamed(ctx context.Context, name string) (string, error) {
	in, err := c.KMS.CreateInstance(ctx, kmsapi.CreateInstance{Name: name}, c.who.String())
	if fault.KindOf(err) != fault.Conflict {
		return in.ID, err
	}
	all, lerr := c.KMS.Instances(ctx)
	if lerr != nil {
		return "", lerr
	}
	for _, have := range all {
		if have.Name != name {
			continue
		}
		keys, lerr := c.KMS.Keys(ctx, have.ID, kms.Query{Limit: 1})
		if lerr == nil && keys.Total == 0 {
			return have.ID, nil
		}
	}
	return "", err
}

func createServiceID(ctx context.Context, c *call) (any, error) {
	var in kmsapi.CreateServiceID
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	who := c.manager()
	if in.Instance != "" {
		if !who.Admin() && in.Instance != c.instance {
			return nil, fault.Newf(fault.Denied, "", "", "another instance than the header's").WithReason(kmsapi.Forbidden)
		}
		if _, err := c.KMS.Instance(ctx, in.Instance); err != nil {
			return nil, err
		}
		who, c.instance = who.In(in.Instance), in.Instance
	}
	s, err := c.IAM.CreateServiceID(ctx, who, in.Name, in.Description, in.Subjects...)
	return kmsapi.ServiceID(s), err
}

func listServiceIDs(ctx context.Context, c *call) (any, error) {
	all, err := c.IAM.ServiceIDs(ctx, c.manager())
	out := kmsapi.ServiceIDs{ServiceIDs: []kmsapi.ServiceID{}}
	for _, s := range all {
		out.ServiceIDs = append(out.ServiceIDs, kmsapi.ServiceID(s))
	}
	return out, err
}

func deleteServiceID(ctx context.Context, c *call) (any, error) {
	return nil, c.dropServiceID(ctx, c.id)
}

// dropServiceID deletes, and has the audit log name a bound service ID by its
// id: its name alone does not say which.
func (c *call) dropServiceID(ctx context.Context, nameOrID string) error {
	sid, err := c.IAM.DeleteServiceID(ctx, c.manager(), nameOrID)
	if sid.Instance != "" {
		c.instance, c.id = sid.Instance, sid.ID
	}
	return err
}

func createAPIKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.CreateAPIKey
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	k, value, err := c.IAM.CreateAPIKey(ctx, c.manager(), in.Name, in.ServiceID)
	if err != nil {
		return nil, err
	}
	return kmsapi.APIKey{ID: k.ID, Name: k.Name, ServiceID: k.ServiceID, CreatedAt: k.CreatedAt, Key: string(value.Reveal())}, nil
}

func deleteAPIKey(ctx context.Context, c *call) (any, error) {
	return nil, c.IAM.DeleteAPIKey(ctx, c.manager(), c.id)
}

func createPolicy(ctx context.Context, c *call) (any, error) {
	var in kmsapi.CreatePolicy
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	if in.Key != "" && in.KeyRing != "" {
		return nil, fault.New(fault.Usage, "", "", errors.New("key and keyRing exclude each other")).WithReason(kmsapi.InvalidField)
	}
	p, err := iam.NewPolicy(in.Instance, in.Key, in.KeyRing, in.Role)
	if err != nil {
		return nil, err
	}
	id, err := c.grant(ctx, in.ServiceID, p)
	return kmsapi.PolicyID{ID: id}, err
}

// grant gives a service ID a policy: whether the caller may comes before the
// look whether its instances exist.
func (c *call) grant(ctx context.Context, service string, p iam.Policy) (id string, err error) {
	who := c.manager()
	if err := c.IAM.MayGrant(ctx, who, p); err != nil {
		return "", err
	}
	for _, r := range p.Resources {
		c.instance = r.Instance
		if _, err := c.KMS.Instance(ctx, r.Instance); err != nil {
			return "", err
		}
	}
	return c.IAM.CreatePolicy(ctx, who, service, p)
}

func deletePolicy(ctx context.Context, c *call) (any, error) {
	return nil, c.IAM.DeletePolicy(ctx, c.manager(), c.r.PathValue("service"), c.id)
}

func (c *call) showSigningKey(k iam.SigningKey) kmsapi.SigningKey {
	out := kmsapi.SigningKey{ID: k.ID, CreatedBy: k.CreatedBy, RetiredAt: k.RetiredAt, GoodUntil: k.GoodUntil(), Signs: k.RetiredAt == nil,
		AgeSeconds: int64(c.IAM.SigningKeyAge(k) / time.Second)}
	if !k.CreatedAt.IsZero() {
		out.CreatedAt = &k.CreatedAt
	}
	if due := c.IAM.SigningKeyDue(k); !due.IsZero() {
		out.RotatesOn = &due
	}
	return out
}

func listSigningKeys(ctx context.Context, c *call) (any, error) {
	all, err := c.IAM.SigningKeys(ctx)
	out := kmsapi.SigningKeys{SigningKeys: []kmsapi.SigningKey{}}
	for _, k := range all {
		out.SigningKeys = append(out.SigningKeys, c.showSigningKey(k))
	}
	return out, err
}

func rotateSigningKey(ctx context.Context, c *call) (any, error) {
	var in kmsapi.RotateSigningKey
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	k, err := c.IAM.RotateSigningKey(ctx, c.who, in.Now)
	c.id = k.ID
	return c.showSigningKey(k), err
}
