package kms

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func checkMonths(n int) error {
	if n < 1 || n > 12 {
		return invalid("interval_month", "an integer between 1 and 12 (inclusive)")
	}
	return nil
}

// KeyPolicies gives a key's policies, or the one of a kind.
func (s *Service) KeyPolicies(ctx context.Context, instance, id, kind string) ([]kmsapi.KeyPolicy, error) {
	k, _, err := s.load(ctx, instance, id)
	if err != nil {
		return nil, err
	}
	if k.State == stateDestroyed {
		return nil, refusal(fault.NotFound, id, kmsapi.KeyDeleted)
	}
	return showPolicies(k, kind), nil
}

func showPolicies(k *keyRecord, kind string) []kmsapi.KeyPolicy {
	var out []kmsapi.KeyPolicy
	add := func(name string, p *policyRecord, fill func(*kmsapi.KeyPolicy)) {
		if p == nil || (kind != "" && kind != name) {
			return
		}
		v := kmsapi.KeyPolicy{ID: p.ID, CRN: crn(k.Instance, "policy", k.ID+":"+p.ID), Type: kmsapi.TypePolicy, CreatedBy: p.CreatedBy,
			CreationDate: &p.CreatedAt, UpdatedBy: p.UpdatedBy, LastUpdateDate: &p.UpdatedAt}
		fill(&v)
		out = append(out, v)
	}
	add(kmsapi.PolicyDualAuthDelete, k.DualAuth, func(v *kmsapi.KeyPolicy) {
		v.DualAuthDelete = &kmsapi.DualAuthDelete{Enabled: k.DualAuth.Enabled}
	})
	add(kmsapi.PolicyRotation, k.Rotation, func(v *kmsapi.KeyPolicy) {
		v.Rotation = &kmsapi.Rotation{Enabled: &k.Rotation.Enabled, IntervalMonth: k.Rotation.Months}
	})
	return out
}

// SetKeyPolicies sets one or both policies of a key. With a kind, the body
// must hold that one alone.
func (s *Service) SetKeyPolicies(ctx context.Context, instance, id, kind, who string, in []kmsapi.KeyPolicy) ([]kmsapi.KeyPolicy, error) {
	if err := checkKinds(kind, in); err != nil {
		return nil, err
	}
	k, err := s.change(ctx, instance, id, func(k *keyRecord, now time.Time) ([]record.Change, error) {
		if k.State == stateDestroyed {
			return nil, refusal(fault.NotFound, id, kmsapi.KeyDeleted)
		}
		for _, p := range in {
			if err := s.setKeyPolicy(k, p, who, now); err != nil {
				return nil, err
			}
		}
		return nil, nil
	})
	if err != nil {
		return nil, err
	}
	return showPolicies(k, kind), nil
}

func checkKinds(kind string, in []kmsapi.KeyPolicy) error {
	if len(in) == 0 {
		return invalid("resources", "at least one policy")
	}
	if kind != "" && len(in) > 1 {
		return refusal(fault.Usage, "", kmsapi.NumResources)
	}
	for _, p := range in {
		if (p.Rotation == nil) == (p.DualAuthDelete == nil) {
			return invalid("resources", "policies of one kind each, rotation or dualAuthDelete")
		}
		if kind == kmsapi.PolicyRotation && p.Rotation == nil || kind == kmsapi.PolicyDualAuthDelete && p.DualAuthDelete == nil {
			return refusal(fault.Usage, "", kmsapi.BodyQueryMismatch)
		}
	}
	return nil
}

func (s *Service) setKeyPolicy(k *keyRecord, p kmsapi.KeyPolicy, who string, now time.Time) error {
	if d := p.DualAuthDelete; d != nil {
		if k.dual() && !d.Enabled {
			return invalid("dualAuthDelete.enabled", "true: the policy of a key cannot be switched off")
		}
		k.DualAuth = renew(k.DualAuth, d.Enabled, 0, who, now)
		return nil
	}
	return setRotation(k, *p.Rotation, who, now)
}

// setRotation holds the rules of rotation policies: of root keys that were
// made in the HSM only; the interval may be left out when there is one.
func setRotation(k *keyRecord, r kmsapi.Rotation, who string, now time.Time) error {
	if k.Kind != kindRoot {
		return refusal(fault.Usage, k.ID, kmsapi.RootRequired)
	}
	if k.Imported {
		return refusal(fault.Usage, k.ID, kmsapi.PayloadRequired)
	}
	months := r.IntervalMonth
	if months == 0 && r.Enabled != nil && k.Rotation != nil {
		months = k.Rotation.Months
	}
	if err := checkMonths(months); err != nil {
		return err
	}
	k.Rotation = renew(k.Rotation, r.Enabled == nil || *r.Enabled, months, who, now)
	return nil
}

func renew(old *policyRecord, enabled bool, months int, who string, now time.Time) *policyRecord {
	p := policyRecord{ID: uuid.NewString(), CreatedAt: now, CreatedBy: who}
	if old != nil {
		p = *old
	}
	p.Enabled, p.Months, p.UpdatedAt, p.UpdatedBy = enabled, months, now, who
	return &p
}

// instancePolicyKinds are all kinds, in the order in which they are listed.
var instancePolicyKinds = []string{kmsapi.PolicyAllowedIP, kmsapi.PolicyAllowedNetwork, kmsapi.PolicyDualAuthDelete, kmsapi.PolicyCreateImport,
	kmsapi.PolicyMetrics, kmsapi.PolicyRotation}

func instancePolicyPath(instance, kind string) string {
	return "instancepolicies/" + instance + "/" + kind
}

// InstancePolicies gives an instance's policies, or the one of a kind.
func (s *Service) InstancePolicies(ctx context.Context, instance, kind string) ([]kmsapi.InstancePolicy, error) {
	if _, err := s.Instance(ctx, instance); err != nil {
		return nil, err
	}
	if kind != "" && !slices.Contains(instancePolicyKinds, kind) {
		return nil, badPolicyQuery()
	}
	var out []kmsapi.InstancePolicy
	err := s.store.List(ctx, instancePolicyPath(instance, ""), func(m record.Meta, decode func(any) error) error {
		if kind != "" && m.Path != instancePolicyPath(instance, kind) {
			return nil
		}
		var p kmsapi.InstancePolicy
		if err := decode(&p); err != nil {
			return err
		}
		out = append(out, p)
		return nil
	})
	return out, err
}

func badPolicyQuery() error {
	return fault.Newf(fault.Usage, "", "", "The query_param `policy` must be: one of %v", instancePolicyKinds).WithReason(kmsapi.InvalidQuery)
}

// SetInstancePolicies sets policies of an instance, all or none. With a kind,
// the body must hold that one alone.
func (s *Service) SetInstancePolicies(ctx context.Context, instance, kind, who string, in []kmsapi.InstancePolicy) error {
	alive, err := s.alive(ctx, instance)
	if err != nil {
		return err
	}
	switch {
	case kind != "" && !slices.Contains(instancePolicyKinds, kind):
		return badPolicyQuery()
	case len(in) == 0:
		return invalid("resources", "at least one policy")
	case kind != "" && len(in) > 1:
		return refusal(fault.Usage, "", kmsapi.NumResources)
	case kind != "" && in[0].Type != kind:
		return refusal(fault.Usage, "", kmsapi.BodyQueryMismatch)
	}
	var changes []record.Change
	for _, p := range in {
		if err := checkInstancePolicy(p); err != nil {
			return err
		}
		var old kmsapi.InstancePolicy
		path := instancePolicyPath(instance, p.Type)
		rev, err := s.store.Get(ctx, path, &old)
		if err != nil && !errors.Is(err, record.ErrNotFound) {
			return err
		}
		now := s.stamp()
		p.CreatedBy, p.CreationDate, p.UpdatedBy, p.LastUpdated = who, &now, who, &now
		if old.CreationDate != nil {
			p.CreatedBy, p.CreationDate = old.CreatedBy, old.CreationDate
		}
		changes = append(changes, record.Change{Path: path, Value: p, Rev: rev})
	}
	return conflict(s.store.Commit(ctx, append(changes, alive)...))
}

func checkInstancePolicy(p kmsapi.InstancePolicy) error {
	if p.Data.Enabled == nil {
		return invalid("policy_data.enabled", "present")
	}
	on := *p.Data.Enabled
	a := kmsapi.PolicyAttributes{}
	if p.Data.Attributes != nil {
		a = *p.Data.Attributes
	}
	switch p.Type {
	case kmsapi.PolicyDualAuthDelete, kmsapi.PolicyMetrics, kmsapi.PolicyCreateImport:
		return nil
	case kmsapi.PolicyRotation:
		if on && a.IntervalMonth == nil {
			return invalid("interval_month", "present")
		}
		if a.IntervalMonth != nil {
			return checkMonths(*a.IntervalMonth)
		}
		return nil
	case kmsapi.PolicyAllowedNetwork:
		if on && (a.AllowedNetwork == nil || *a.AllowedNetwork != "public-and-private" && *a.AllowedNetwork != privateOnly) {
			return invalid("allowed_network", "public-and-private or private-only")
		}
		return nil
	case kmsapi.PolicyAllowedIP:
		if on && (a.AllowedIP == nil || len(*a.AllowedIP) == 0) {
			return invalid("allowed_ip", "at least one network in CIDR notation")
		}
		if a.AllowedIP != nil {
			for _, n := range *a.AllowedIP {
				if _, err := netip.ParsePrefix(n); err != nil {
					return invalid("allowed_ip", "networks in CIDR notation: %v", err)
				}
			}
		}
		return nil
	}
	return invalid("policy_type", "one of %v", instancePolicyKinds)
}

// instancePolicy gives one policy of an instance; a nil one is not set.
func (s *Service) instancePolicy(ctx context.Context, instance, kind string) (*kmsapi.InstancePolicy, error) {
	var p kmsapi.InstancePolicy
	_, err := s.store.Get(ctx, instancePolicyPath(instance, kind), &p)
	if errors.Is(err, record.ErrNotFound) {
		return nil, nil
	}
	return &p, err
}

// privateOnly is the allowed network of an instance that takes no calls from
// public addresses.
const privateOnly = "private-only"

func on(p *kmsapi.InstancePolicy) bool { return p != nil && p.Data.Enabled != nil && *p.Data.Enabled }

// AllowsAddress says whether an instance may be used from an address.
func (s *Service) AllowsAddress(ctx context.Context, instance, remote string) (bool, error) {
	if s.store.Version(instancePolicyPath(instance, "")) == 0 { // no policy at all: the usual case costs nothing
		return true, nil
	}
	ip, err := netip.ParseAddr(remote)
	if err != nil {
		ip = netip.Addr{} // it is in no network
	}
	ip = ip.Unmap()
	network, err := s.instancePolicy(ctx, instance, kmsapi.PolicyAllowedNetwork)
	if err != nil || on(network) && *network.Data.Attributes.AllowedNetwork == privateOnly && !isPrivate(ip) {
		return false, err
	}
	p, err := s.instancePolicy(ctx, instance, kmsapi.PolicyAllowedIP)
	if err != nil || !on(p) {
		return err == nil, err
	}
	for _, n := range *p.Data.Attributes.AllowedIP {
		if prefix, err := netip.ParsePrefix(n); err == nil && prefix.Contains(ip) {
			return true, nil
		}
	}
	return false, nil
}

// isPrivate says whether an address is of no public network.
func isPrivate(ip netip.Addr) bool {
	return ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast()
}

// instanceRules applies an instance's policies, and the overrides of the
// request, to a new key.
func (s *Service) instanceRules(ctx context.Context, k *keyRecord, in kmsapi.CreateKey, who string) error {
	if err := s.createImportAccess(ctx, k, in); err != nil {
		return err
	}
	dual, err := s.instancePolicy(ctx, k.Instance, kmsapi.PolicyDualAuthDelete)
	if err != nil {
		return err
	}
	if d := in.DualAuthDelete; d != nil && d.Enabled || d == nil && on(dual) {
		k.DualAuth = renew(nil, true, 0, who, k.CreatedAt)
	}
	rotation, err := s.instancePolicy(ctx, k.Instance, kmsapi.PolicyRotation)
	if err != nil {
		return err
	}
	switch {
	case in.Rotation != nil:
		return setRotation(k, *in.Rotation, who, k.CreatedAt)
	case on(rotation) && k.Kind == kindRoot && !k.Imported:
		k.Rotation = renew(nil, true, *rotation.Data.Attributes.IntervalMonth, who, k.CreatedAt)
	}
	return nil
}

func (s *Service) createImportAccess(ctx context.Context, k *keyRecord, in kmsapi.CreateKey) error {
	p, err := s.instancePolicy(ctx, k.Instance, kmsapi.PolicyCreateImport)
	if err != nil || !on(p) {
		return err
	}
	a := kmsapi.PolicyAttributes{}
	if p.Data.Attributes != nil {
		a = *p.Data.Attributes
	}
	allowed := map[[2]bool]*bool{{false, false}: a.CreateStandardKey, {false, true}: a.ImportStandardKey, {true, false}: a.CreateRootKey, {true, true}: a.ImportRootKey}
	if flag := allowed[[2]bool{k.Kind == kindRoot, k.Imported}]; flag != nil && !*flag {
		return refusal(fault.Conflict, "", kmsapi.CreateImportAccess)
	}
	return s.enforceToken(ctx, k.Instance, k.Kind == kindRoot && k.Imported, in.EncryptedNonce)
}

// enforceToken refuses an import without an import token where the instance
// asks for one.
func (s *Service) enforceToken(ctx context.Context, instance string, imports bool, nonce string) error {
	p, err := s.instancePolicy(ctx, instance, kmsapi.PolicyCreateImport)
	if err != nil || !on(p) || !imports || nonce != "" {
		return err
	}
	if a := p.Data.Attributes; a != nil && a.EnforceToken != nil && *a.EnforceToken {
		return refusal(fault.Conflict, "", kmsapi.CreateImportAccess)
	}
	return nil
}
