package kms

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pattern"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

var aliasForm = pattern.Lazy(`^[A-Za-z0-9_-]{2,90}$`)

// notAliases would be mistaken for parts of a path.
var notAliases = strings.Fields("allowed_ip key keys metadata policy policies registration registrations ring rings rotate wrap unwrap rewrap version versions")

func checkAlias(a string) error {
	if !aliasForm().MatchString(a) || uuid.Validate(a) == nil || slices.Contains(notAliases, strings.ToLower(a)) {
		return invalid("alias", "2 to 90 letters, digits, hyphens and underscores, no UUID and no word of the API")
	}
	return nil
}

// CreateAlias gives a key one more name.
func (s *Service) CreateAlias(ctx context.Context, instance, id, alias, who string) (kmsapi.Alias, error) {
	if err := checkAlias(alias); err != nil {
		return kmsapi.Alias{}, err
	}
	var out kmsapi.Alias
	_, err := s.change(ctx, instance, id, func(k *keyRecord, now time.Time) ([]record.Change, error) {
		var have kmsapi.Alias
		_, err := s.store.Get(ctx, aliasPath(instance, alias), &have)
		switch {
		case k.State == stateDestroyed:
			return nil, refusal(fault.NotFound, id, kmsapi.KeyDeleted)
		case err == nil: // taken, be it by this key
			return nil, refusal(fault.Conflict, alias, kmsapi.Conflict)
		case !errors.Is(err, record.ErrNotFound):
			return nil, err
		case len(k.Aliases) >= kmsapi.MaxAliases:
			return nil, invalid("aliases", "at most %d of a key", kmsapi.MaxAliases)
		}
		k.Aliases = append(slices.Clone(k.Aliases), alias)
		out = kmsapi.Alias{KeyID: id, Alias: alias, CreatedBy: who, CreationDate: &now}
		return []record.Change{{Path: aliasPath(instance, alias), Value: out}}, nil
	})
	return out, err
}

// DeleteAlias takes a name from a key.
func (s *Service) DeleteAlias(ctx context.Context, instance, id, alias string) error {
	_, err := s.change(ctx, instance, id, func(k *keyRecord, _ time.Time) ([]record.Change, error) {
		i := slices.Index(k.Aliases, alias)
		if i < 0 {
			return nil, refusal(fault.NotFound, alias, kmsapi.AliasNotFound)
		}
		var have kmsapi.Alias
		rev, err := s.store.Get(ctx, aliasPath(instance, alias), &have)
		if err != nil {
			return nil, err
		}
		k.Aliases = slices.Delete(slices.Clone(k.Aliases), i, i+1)
		return []record.Change{{Path: aliasPath(instance, alias), Rev: rev}}, nil
	})
	return err
}

var ringForm = pattern.Lazy(`^[A-Za-z0-9-]{2,100}$`)

func ringPath(instance, ring string) string { return "rings/" + instance + "/" + ring }

func (s *Service) ringExists(ctx context.Context, instance, ring string) error {
	if ring == kmsapi.DefaultKeyRing {
		return nil
	}
	if !ringForm().MatchString(ring) {
		return invalid("keyRingID", "2 to 100 letters, digits and hyphens")
	}
	var r kmsapi.KeyRing
	_, err := s.store.Get(ctx, ringPath(instance, ring), &r)
	if errors.Is(err, record.ErrNotFound) {
		return refusal(fault.NotFound, ring, kmsapi.RingNotFound)
	}
	return err
}

// CreateRing makes a key ring.
func (s *Service) CreateRing(ctx context.Context, instance, ring, who string) error {
	alive, err := s.alive(ctx, instance)
	if err != nil {
		return err
	}
	if !ringForm().MatchString(ring) {
		return invalid("id", "2 to 100 letters, digits and hyphens")
	}
	all, err := s.Rings(ctx, instance)
	if err != nil {
		return err
	}
	switch {
	case slices.ContainsFunc(all, func(r kmsapi.KeyRing) bool { return r.ID == ring }):
		return refusal(fault.Conflict, ring, kmsapi.Conflict)
	case len(all) >= kmsapi.MaxKeyRings:
		return refusal(fault.Conflict, ring, kmsapi.RingLimit)
	}
	now := s.stamp()
	return conflict(s.store.Commit(ctx, alive, record.Change{Path: ringPath(instance, ring), Value: kmsapi.KeyRing{ID: ring, CreationDate: &now, CreatedBy: who}}))
}

// Rings lists an instance's key rings; the default one is always there.
func (s *Service) Rings(ctx context.Context, instance string) ([]kmsapi.KeyRing, error) {
	in, err := s.Instance(ctx, instance)
	if err != nil {
		return nil, err
	}
	out := []kmsapi.KeyRing{{ID: kmsapi.DefaultKeyRing, CreationDate: &in.CreatedAt, CreatedBy: in.CreatedBy}}
	err = s.store.List(ctx, ringPath(instance, ""), func(_ record.Meta, decode func(any) error) error {
		var r kmsapi.KeyRing
		if err := decode(&r); err != nil {
			return err
		}
		out = append(out, r)
		return nil
	})
	return out, err
}

// DeleteRing removes a key ring that holds no key. With force it may hold
// destroyed keys, which move to the default ring.
func (s *Service) DeleteRing(ctx context.Context, instance, ring string, force bool) error {
	if ring == kmsapi.DefaultKeyRing {
		return invalid("id", "another than the default key ring, which stays")
	}
	var r kmsapi.KeyRing
	rev, err := s.store.Get(ctx, ringPath(instance, ring), &r)
	if errors.Is(err, record.ErrNotFound) || !ringForm().MatchString(ring) {
		return refusal(fault.NotFound, ring, kmsapi.RingNotFound)
	}
	if err != nil {
		return err
	}
	keys, err := s.index.keys(ctx, s.store, instance)
	if err != nil {
		return err
	}
	for _, k := range keys {
		if k.ring != ring {
			continue
		}
		if !force || k.state != stateDestroyed {
			return refusal(fault.Conflict, ring, kmsapi.RingNotEmpty)
		}
		if _, err := s.change(ctx, instance, k.id, func(k *keyRecord, _ time.Time) ([]record.Change, error) {
			k.KeyRing = kmsapi.DefaultKeyRing
			return nil, nil
		}); err != nil {
			return err
		}
	}
	err = s.store.Commit(ctx, record.Change{Path: ringPath(instance, ring), Rev: rev})
	if errors.Is(err, record.ErrConflict) {
		return refusal(fault.Conflict, ring, kmsapi.Conflict)
	}
	return err
}

func registrationDir(instance string) string { return "registrations/" + instance + "/" }

func registrationPath(instance, key, crn string) string {
	sum := sha256.Sum256([]byte(crn))
	return registrationDir(instance) + key + "." + hex.EncodeToString(sum[:])
}

// Register notes that a resource is protected by a root key.
func (s *Service) Register(ctx context.Context, instance, id, crn, who string, in kmsapi.CreateRegistration) (kmsapi.Registration, error) {
	k, _, err := s.load(ctx, instance, id)
	switch {
	case err != nil:
		return kmsapi.Registration{}, err
	case k.State == stateDestroyed:
		return kmsapi.Registration{}, refusal(fault.NotFound, id, kmsapi.KeyDeleted)
	case k.Kind != kindRoot:
		return kmsapi.Registration{}, refusal(fault.Usage, id, kmsapi.RootRequiredReg)
	case s.stateNow(k) != stateActive:
		return kmsapi.Registration{}, refusal(fault.Conflict, id, kmsapi.InvalidKeyState)
	case !strings.HasPrefix(crn, "crn:") || len(crn) > 1024:
		return kmsapi.Registration{}, invalid("resourceCrn", "a CRN")
	}
	now := s.stamp()
	out := kmsapi.Registration{KeyID: id, ResourceCRN: crn, CreatedBy: who, CreationDate: &now, Description: in.Description,
		PreventKeyDeletion: in.PreventKeyDeletion, KeyVersion: &kmsapi.KeyVersion{ID: k.Version.ID, CreationDate: &k.Version.CreatedAt}}
	err = s.store.Commit(ctx, record.Change{Path: registrationPath(instance, id, crn), Value: out})
	if errors.Is(err, record.ErrConflict) {
		err = refusal(fault.Conflict, crn, kmsapi.Conflict)
	}
	return out, err
}

// Unregister takes that back.
func (s *Service) Unregister(ctx context.Context, instance, id, crn string) error {
	var have kmsapi.Registration
	rev, err := s.store.Get(ctx, registrationPath(instance, id, crn), &have)
	if errors.Is(err, record.ErrNotFound) {
		return refusal(fault.NotFound, crn, kmsapi.RegistrationAbsent)
	}
	if err != nil {
		return err
	}
	return s.store.Commit(ctx, record.Change{Path: registrationPath(instance, id, crn), Rev: rev})
}

// registrations are those of one key, or with an empty id all of the instance.
func (s *Service) registrations(ctx context.Context, instance, id string) ([]kmsapi.Registration, error) {
	var out []kmsapi.Registration
	err := s.store.List(ctx, registrationDir(instance), func(m record.Meta, decode func(any) error) error {
		if id != "" && !strings.HasPrefix(m.Path, registrationDir(instance)+id+".") {
			return nil
		}
		var r kmsapi.Registration
		if err := decode(&r); err != nil {
			return err
		}
		out = append(out, r)
		return nil
	})
	return out, err
}

// RegistrationQuery selects registrations. CRN may end with a star.
type RegistrationQuery struct {
	Key, CRN      string
	Prevent       *bool
	Limit, Offset int
}

// Registrations lists registrations and gives their total.
func (s *Service) Registrations(ctx context.Context, instance string, q RegistrationQuery) ([]kmsapi.Registration, int, error) {
	if _, err := s.Instance(ctx, instance); err != nil {
		return nil, 0, err
	}
	if q.Key != "" {
		k, _, err := s.load(ctx, instance, q.Key)
		if err != nil {
			return nil, 0, err
		}
		if k.Kind != kindRoot {
			return nil, 0, refusal(fault.Usage, q.Key, kmsapi.RootRequiredReg)
		}
	}
	all, err := s.registrations(ctx, instance, q.Key)
	all = slices.DeleteFunc(all, func(r kmsapi.Registration) bool {
		prefix, wild := strings.CutSuffix(q.CRN, "*")
		return q.CRN != "" && r.ResourceCRN != q.CRN && (!wild || !strings.HasPrefix(r.ResourceCRN, prefix)) || q.Prevent != nil && r.PreventKeyDeletion != *q.Prevent
	})
	return page(all, q.Limit, q.Offset), len(all), err
}
