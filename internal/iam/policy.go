package iam

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
)

// Action is one thing that somebody may do.
type Action string

// The actions of the API.
const (
	KeysCreate         Action = "keys.create" // and import
	KeysList           Action = "keys.list"   // and their total
	KeysRead           Action = "keys.read"   // with a standard key's material
	KeysMetadata       Action = "keys.metadata"
	KeysVersions       Action = "keys.versions"
	KeysWrap           Action = "keys.wrap"
	KeysUnwrap         Action = "keys.unwrap"
	KeysRewrap         Action = "keys.rewrap"
	KeysRotate         Action = "keys.rotate"
	KeysEnable         Action = "keys.enable" // and disable
	KeysSetDeletion    Action = "keys.set-for-deletion"
	KeysSync           Action = "keys.sync"
	KeysDelete         Action = "keys.delete"
	KeysRestore        Action = "keys.restore"
	KeysPatch          Action = "keys.patch"
	KeysPurge          Action = "keys.purge"
	KeysPolicies       Action = "keys.policies"
	AliasesManage      Action = "aliases.manage"
	RingsList          Action = "key-rings.list"
	RingsCreate        Action = "key-rings.create"
	RingsDelete        Action = "key-rings.delete"
	ImportTokens       Action = "import-tokens"
	RegistrationsList  Action = "registrations.list"
	RegistrationsWrite Action = "registrations.write"
	InstancePolicies   Action = "instance.policies"
	InstanceRead       Action = "instance.read"
	IAMGrant           Action = "iam.grant"        // service IDs, API keys and policies of one's instance
	InstancesManage    Action = "instances.manage" // administrators only
	IAMManage          Action = "iam.manage"       // administrators only
)

// Actions lists all actions, for tables that must be complete.
func Actions() []Action {
	return append(slices.Clone(manager), KeysPurge, InstancesManage, IAMManage)
}

// roleCRN begins the id of every role in a policy.
const roleCRN = "crn:v1:icp:private:iam::::role:"

var (
	viewer   = []Action{KeysWrap, KeysUnwrap}
	editor   = append(slices.Clone(viewer), KeysCreate, KeysList, KeysRead, KeysMetadata)
	icpAdmin = append(slices.Clone(editor), KeysRotate, KeysDelete, IAMGrant)
	reader   = []Action{KeysMetadata, KeysVersions, KeysWrap, KeysUnwrap, KeysRewrap, KeysList, RegistrationsList, RingsList, InstanceRead}
	plus     = append(slices.Clone(reader), KeysRead)
	writer   = append(slices.Clone(plus), KeysCreate, KeysRotate, KeysSetDeletion, KeysSync, RingsCreate, ImportTokens, AliasesManage, RegistrationsWrite)
	manager  = append(slices.Clone(writer), KeysEnable, KeysDelete, KeysRestore, KeysPatch, KeysPolicies, RingsDelete, InstancePolicies, IAMGrant)
)

// roles maps both families onto the actions: ICP's as registered by its IAM
// operator, Key Protect's as in its access documentation.
var roles = map[string][]Action{
	"Viewer": viewer, "Editor": editor, "Administrator": icpAdmin, "AccountAdministrator": icpAdmin, "ClusterAdministrator": icpAdmin,
	"Reader": reader, "ReaderPlus": plus, "Writer": writer, "Manager": manager, "KeyPurge": {KeysPurge},
}

// Policy is the manual's JSON: what, and in which role.
type Policy struct {
	ID        string     `json:"id,omitempty"`
	Resources []Resource `json:"resources"`
	Roles     []Role     `json:"roles"`
}

// Role is a role by its CRN.
type Role struct {
	ID string `json:"id"`
}

// Resource is what a policy, or a request, is about. In a policy an empty
// Key means every key of the instance.
type Resource struct {
	NamespaceID  string `json:"namespaceId,omitempty"`
	ServiceName  string `json:"serviceName,omitempty"`
	Instance     string `json:"serviceInstance,omitempty"`
	Key          string `json:"resource,omitempty"`
	ResourceType string `json:"resourceType,omitempty"`
	KeyRing      string `json:"keyRing,omitempty"`
	// Resolve, in a request, gives the id and the ring of the key that Key
	// names. It is called only when a policy of the same instance needs to know,
	// so that what is foreign costs no look-up.
	Resolve func() (key, ring string) `json:"-"`
}

// NewPolicy makes the policy of a role on an instance, or on one key or key
// ring of it.
func NewPolicy(instance, key, ring, role string) (Policy, error) {
	r := Resource{NamespaceID: "kube-system", ServiceName: "kms", Instance: instance, Key: key, KeyRing: ring}
	if key != "" {
		r.ResourceType = "key"
	}
	p := Policy{Resources: []Resource{r}, Roles: []Role{{ID: roleCRN + role}}}
	return p, p.Check()
}

// Check refuses a policy that this service cannot keep.
func (p Policy) Check() error {
	if len(p.Resources) == 0 || len(p.Roles) == 0 {
		return fault.Usagef("a policy needs at least one resource and one role")
	}
	for _, r := range p.Resources {
		switch {
		case r.ServiceName != "kms":
			return fault.Usagef("policy: serviceName %q is not kms", r.ServiceName)
		case uuid.Validate(r.Instance) != nil:
			return fault.Usagef("policy: serviceInstance %q is no instance id", r.Instance)
		case r.ResourceType != "" && r.ResourceType != "key":
			return fault.Usagef("policy: resourceType %q is not key", r.ResourceType)
		case r.Key != "" && uuid.Validate(r.Key) != nil:
			return fault.Usagef("policy: resource %q is no key id", r.Key)
		}
	}
	for _, r := range p.Roles {
		if _, err := r.actions(); err != nil {
			return err
		}
	}
	return nil
}

func (r Role) actions() ([]Action, error) {
	name, ok := strings.CutPrefix(r.ID, roleCRN)
	if name == "Operator" || name == "Auditor" {
		return nil, fault.Usagef("role %q is not supported by kms", name).WithHint("use Viewer (wrap and unwrap), Editor, or Administrator")
	}
	acts := roles[name]
	if !ok || acts == nil {
		return nil, fault.Usagef("unknown role %q", r.ID).WithHint("use one of: Viewer, Editor, Administrator, ClusterAdministrator, Reader, ReaderPlus, Writer, Manager, KeyPurge")
	}
	return acts, nil
}

// covers says whether r, of a policy, covers what a request is about. A
// policy on one key, or on one ring, does not cover the instance: listing
// shows nothing of what was granted one by one.
func (r Resource) covers(want Resource) bool {
	if r.Instance == "" || r.Instance != want.Instance {
		return false
	}
	if r.Key == "" && r.KeyRing == "" || r.KeyRing == "" && r.Key == want.Key {
		return true
	}
	key, ring := want.Key, want.KeyRing
	if want.Resolve != nil {
		key, ring = want.Resolve()
	}
	return (r.Key == "" || r.Key == key) && (r.KeyRing == "" || r.KeyRing == ring)
}

func (p Policy) allows(act Action, want Resource) bool {
	if !slices.ContainsFunc(p.Resources, func(r Resource) bool { return r.covers(want) }) {
		return false
	}
	return slices.ContainsFunc(p.Roles, func(r Role) bool {
		acts, err := r.actions()
		return err == nil && slices.Contains(acts, act)
	})
}

// Authorize gives nil when somebody may do act on what, and fault.Denied
// otherwise. It looks nothing else up, so that what is foreign looks like
// what is not there.
func (s *Service) Authorize(ctx context.Context, who Principal, act Action, what Resource) error {
	if who.Admin() {
		return nil
	}
	if who.Kind != KindService || who.ServiceID == "" {
		return fault.New(fault.Denied, "", "", errNotAllowed)
	}
	all, err := s.rights.of(ctx, s.store, who.ServiceID)
	if err != nil {
		return err
	}
	for _, p := range all {
		if p.allows(act, what) {
			return nil
		}
	}
	return fault.New(fault.Denied, "", "", errNotAllowed)
}

// mayManage lets administrators, and whoever holds IAMGrant on the whole
// instance that they act in.
func (s *Service) mayManage(ctx context.Context, who Principal) error {
	if who.Admin() {
		return nil
	}
	if who.instance == "" {
		return fault.New(fault.Denied, "", "", errNotAllowed)
	}
	return s.Authorize(ctx, who, IAMGrant, Resource{Instance: who.instance})
}

// MayGrant lets nobody give more than they have: every action of the policy,
// on each of its resources.
func (s *Service) MayGrant(ctx context.Context, who Principal, p Policy) error {
	if who.Admin() {
		return nil
	}
	for _, role := range p.Roles {
		acts, err := role.actions()
		if err != nil {
			return err
		}
		for _, act := range acts {
			for _, r := range p.Resources {
				if err := s.Authorize(ctx, who, act, r); err != nil {
					return fmt.Errorf("grant %s: %w", act, err)
				}
			}
		}
	}
	return nil
}

// covers says whether all that a service ID may do lies within what who may:
// a key of it is a grant of all of that, and to take its rights away is for
// those who could give them.
func (s *Service) covers(ctx context.Context, who Principal, sid ServiceID) error {
	if who.Admin() {
		return nil
	}
	all, err := listPolicies(ctx, s.store, sid.ID)
	if err != nil {
		return err
	}
	for _, p := range all {
		if err := s.MayGrant(ctx, who, p); err != nil {
			return err
		}
	}
	return nil
}

// CreatePolicy gives a service ID a policy, within what the granter may do.
func (s *Service) CreatePolicy(ctx context.Context, who Principal, service string, p Policy) (string, error) {
	if err := p.Check(); err != nil {
		return "", err
	}
	sid, _, err := s.Find(ctx, who, service)
	if err != nil {
		return "", err
	}
	if err := s.MayGrant(ctx, who, p); err != nil {
		return "", err
	}
	if sid.Instance != "" && slices.ContainsFunc(p.Resources, func(r Resource) bool { return r.Instance != sid.Instance }) {
		return "", fault.Usagef("policy: service ID %q is bound to instance %s and gets no rights elsewhere", sid.Name, sid.Instance)
	}
	p.ID = uuid.NewString()
	return p.ID, s.store.Commit(ctx, record.Change{Path: policies + sid.ID + "/" + p.ID, Value: p})
}

// Policies lists the policies of a service ID.
func (s *Service) Policies(ctx context.Context, who Principal, service string) (ServiceID, []Policy, error) {
	sid, _, err := s.Find(ctx, who, service)
	if err != nil {
		return sid, nil, err
	}
	out, err := listPolicies(ctx, s.store, sid.ID)
	return sid, out, err
}

func listPolicies(ctx context.Context, s Store, service string) ([]Policy, error) {
	out := []Policy{}
	err := s.List(ctx, policies+service+"/", func(_ record.Meta, decode func(any) error) error {
		var p Policy
		if err := decode(&p); err != nil {
			return err
		}
		out = append(out, p)
		return nil
	})
	return out, err
}

// RoleNames are the names of a policy's roles.
func (p Policy) RoleNames() []string {
	var out []string
	for _, r := range p.Roles {
		out = append(out, strings.TrimPrefix(r.ID, roleCRN))
	}
	return out
}

// DeletePolicy takes a policy from a service ID.
func (s *Service) DeletePolicy(ctx context.Context, who Principal, service, id string) error {
	sid, _, err := s.Find(ctx, who, service)
	if err != nil {
		return err
	}
	if strings.Contains(id, "/") {
		return notThere("policy", id)
	}
	var p Policy
	path := policies + sid.ID + "/" + id
	rev, err := s.store.Get(ctx, path, &p)
	if err != nil {
		return absent("policy", id, err)
	}
	if err := s.MayGrant(ctx, who, p); err != nil {
		return err
	}
	return s.store.Commit(ctx, record.Change{Path: path, Rev: rev})
}

// withdraw takes from a service ID what it may do in an instance.
func (s *Service) withdraw(ctx context.Context, sid ServiceID, instance string) error {
	var changes []record.Change
	err := s.store.List(ctx, policies+sid.ID+"/", func(m record.Meta, decode func(any) error) error {
		var p Policy
		if err := decode(&p); err != nil {
			return err
		}
		there := len(p.Resources)
		p.Resources = slices.DeleteFunc(p.Resources, func(r Resource) bool { return r.Instance == instance })
		switch len(p.Resources) {
		case there:
		case 0:
			changes = append(changes, record.Change{Path: m.Path, Rev: m.Rev})
		default:
			changes = append(changes, record.Change{Path: m.Path, Value: p, Rev: m.Rev})
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.commitAll(ctx, changes)
}

// batch is how many changes one transaction makes: etcd takes 128.
const batch = 100

// commitAll makes changes that need not come together.
func (s *Service) commitAll(ctx context.Context, changes []record.Change) error {
	for part := range slices.Chunk(changes, batch) {
		if err := s.store.Commit(ctx, part...); err != nil {
			return err
		}
	}
	return nil
}
