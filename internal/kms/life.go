package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Rotate gives a root key new material; the old one goes on unwrapping.
func (s *Service) Rotate(ctx context.Context, instance, id string, in kmsapi.RotateRequest) error {
	k, _, err := s.load(ctx, instance, id)
	if err != nil {
		return err
	}
	if err := s.mayRotate(k, in); err != nil {
		return err
	}
	if err := s.enforceToken(ctx, instance, k.Imported, in.EncryptedNonce); err != nil {
		return err
	}
	payload, err := s.payload(ctx, instance, kmsapi.CreateKey{Payload: in.Payload, EncryptedNonce: in.EncryptedNonce, IV: in.IV, EncryptionAlgorithm: in.EncryptionAlgorithm})
	if err != nil {
		return err
	}
	defer payload.zero()
	fresh := versionRecord{ID: uuid.NewString(), CreatedAt: s.stamp()}
	filled := keyRecord{Instance: instance}
	return s.making(ctx, func(e Epoch) error {
		more, err := s.fillRoot(ctx, &filled, &fresh, payload)
		if err != nil {
			return err
		}
		made, err := s.made(e, fresh.Blob, nil)
		if err == nil {
			_, err = s.change(ctx, instance, id, func(k *keyRecord, now time.Time) ([]record.Change, error) {
				if err := s.mayRotate(k, in); err != nil {
					return nil, err
				}
				old := k.Version
				k.Version, k.RotatedAt, k.Bits = fresh, &now, filled.Bits
				return slices.Concat(made, more, []record.Change{{Path: versionDir(instance, k.ID) + old.ID, Value: old}}), nil
			})
		}
		return s.unmake(ctx, fresh.Blob, conflict(err))
	})
}

func (s *Service) mayRotate(k *keyRecord, in kmsapi.RotateRequest) error {
	if err := s.checkRoot(k, stateActive, stateDeactivated); err != nil {
		return err
	}
	if s.within(k.RotatedAt, s.window.Rotate) {
		return refusal(fault.Conflict, k.ID, kmsapi.RotationTooSoon)
	}
	if k.Imported && in.Payload == "" {
		return refusal(fault.Usage, k.ID, kmsapi.PayloadRequired)
	}
	if !k.Imported && in.Payload != "" {
		return invalid("payload", "absent: this root key was made in the HSM")
	}
	return nil
}

// clockLeeway is how far the clocks of replicas may be apart.
const clockLeeway = 10 * time.Second

// within says whether now lies in the time d after a moment. A moment that is
// still to come is the mark of a clock that was wrong, and holds nobody up.
func (s *Service) within(at *time.Time, d time.Duration) bool {
	now := s.Time()
	return at != nil && !now.Before(at.Add(-clockLeeway)) && now.Before(at.Add(d))
}

// Disable suspends a key; Enable takes it back.
func (s *Service) Disable(ctx context.Context, instance, id string) error {
	return s.switchState(ctx, instance, id, stateActive, stateSuspended, "Key is not in active state")
}

// Enable makes a suspended key active again, not sooner than the window after
// its last change of state.
func (s *Service) Enable(ctx context.Context, instance, id string) error {
	return s.switchState(ctx, instance, id, stateSuspended, stateActive, "Key is not in suspended state")
}

func (s *Service) switchState(ctx context.Context, instance, id string, from, to int, lead string) error {
	_, err := s.change(ctx, instance, id, func(k *keyRecord, now time.Time) ([]record.Change, error) {
		if k.State == stateDestroyed {
			return nil, refusal(fault.NotFound, id, kmsapi.KeyDeleted)
		}
		if k.Kind != kindRoot {
			return nil, refusal(fault.Usage, id, kmsapi.RootRequired)
		}
		if s.stateNow(k) != from {
			return nil, refuse(fault.Conflict, lead, id, kmsapi.InvalidState)
		}
		if to == stateActive && s.within(k.ActedAt, s.window.Enable) {
			return nil, refusal(fault.Conflict, id, kmsapi.TooEarly)
		}
		k.State, k.ActedAt = to, &now
		return nil, nil
	})
	return err
}

// authorized says whether a first authorization to delete is there and alive.
func (s *Service) authorized(k *keyRecord) bool {
	return s.within(k.SetAt, s.window.DualAuth)
}

// SetForDeletion is the first of two authorizations to delete a key.
func (s *Service) SetForDeletion(ctx context.Context, instance, id, who string) error {
	return s.authorize(ctx, instance, id, func(k *keyRecord, now time.Time) { k.SetBy, k.SetAt = who, &now })
}

// UnsetForDeletion takes it back.
func (s *Service) UnsetForDeletion(ctx context.Context, instance, id string) error {
	return s.authorize(ctx, instance, id, func(k *keyRecord, _ time.Time) { k.SetBy, k.SetAt = "", nil })
}

func (s *Service) authorize(ctx context.Context, instance, id string, f func(*keyRecord, time.Time)) error {
	_, err := s.change(ctx, instance, id, func(k *keyRecord, now time.Time) ([]record.Change, error) {
		if k.State == stateDestroyed {
			return nil, refusal(fault.NotFound, id, kmsapi.KeyDeleted)
		}
		if !k.dual() {
			return nil, refusal(fault.Conflict, id, kmsapi.NotDualAuth)
		}
		f(k, now)
		return nil, nil
	})
	return err
}

// Delete destroys a key; it can be restored for a while, unless its instance
// speaks ICP's dialect, where deletion is final.
func (s *Service) Delete(ctx context.Context, instance, id, who string, force bool) (kmsapi.Key, error) {
	in, err := s.Instance(ctx, instance)
	if err != nil {
		return kmsapi.Key{}, err
	}
	var gone [][]byte
	var later []record.Change
	k, err := s.change(ctx, instance, id, func(k *keyRecord, now time.Time) ([]record.Change, error) {
		if err := s.mayDelete(ctx, k, who, force); err != nil {
			return nil, err
		}
		k.State, k.DeletedAt, k.DeletedBy, k.ActedAt, k.SetBy, k.SetAt = stateDestroyed, &now, who, &now, "", nil
		if in.Dialect != DialectICP {
			return nil, nil
		}
		var changes []record.Change
		changes, gone, err = s.dropVersions(ctx, k)
		fits := min(len(changes), batch)
		later = changes[fits:]
		k.Final, k.Version.Blob, k.Version.Sealed = true, nil, nil
		return changes[:fits], err
	})
	if err != nil {
		return kmsapi.Key{}, err
	}
	return s.show(k), errors.Join(s.commitAll(ctx, later), s.destroy(ctx, gone))
}

func (s *Service) mayDelete(ctx context.Context, k *keyRecord, who string, force bool) error {
	if k.State == stateDestroyed {
		return refusal(fault.NotFound, k.ID, kmsapi.KeyDeleted)
	}
	if k.dual() && (!s.authorized(k) || k.SetBy == who) {
		return refuse(fault.Conflict, "1 prior authorization(s) are required for deletion", k.ID, kmsapi.AuthorizationsLack)
	}
	regs, err := s.registrations(ctx, k.Instance, k.ID)
	if err != nil {
		return err
	}
	for _, r := range regs {
		if r.PreventKeyDeletion {
			return refusal(fault.Conflict, k.ID, kmsapi.PreventDeletion)
		}
	}
	if len(regs) > 0 && !force {
		return refusal(fault.Conflict, k.ID, kmsapi.ProtectedResource)
	}
	return nil
}

// dropVersions are the changes that remove all older versions, and the blobs
// that the HSM should forget.
func (s *Service) dropVersions(ctx context.Context, k *keyRecord) (changes []record.Change, blobs [][]byte, err error) {
	blobs = append(blobs, k.Version.Blob)
	err = s.store.List(ctx, versionDir(k.Instance, k.ID), func(m record.Meta, decode func(any) error) error {
		var v versionRecord
		if err := decode(&v); err != nil {
			return err
		}
		changes, blobs = append(changes, record.Change{Path: m.Path, Rev: m.Rev}), append(blobs, v.Blob)
		return nil
	})
	return changes, blobs, err
}

// destroy makes an end of keys in the HSM.
func (s *Service) destroy(ctx context.Context, blobs [][]byte) error {
	var errs []error
	for _, b := range blobs {
		if len(b) > 0 {
			errs = append(errs, s.hsm.Destroy(ctx, b))
		}
	}
	return errors.Join(errs...)
}

// Restore brings a deleted key back.
func (s *Service) Restore(ctx context.Context, instance, id string) (kmsapi.Key, error) {
	k, err := s.change(ctx, instance, id, func(k *keyRecord, now time.Time) ([]record.Change, error) {
		switch {
		case k.State != stateDestroyed:
			return nil, refusal(fault.Conflict, id, kmsapi.InvalidState)
		case k.Final || s.Time().After(k.DeletedAt.Add(s.window.RestoreMax)):
			return nil, refusal(fault.Usage, id, kmsapi.RestoreExpired)
		case s.within(k.DeletedAt, s.window.RestoreMin):
			return nil, refusal(fault.Conflict, id, kmsapi.TooEarly)
		case k.Expires != nil && !s.late().Before(*k.Expires):
			return nil, refuse(fault.Usage, "The key expired on "+k.Expires.UTC().Format(time.RFC3339), id, kmsapi.KeyExpired)
		}
		k.State, k.DeletedAt, k.DeletedBy, k.ActedAt = stateActive, nil, "", &now
		return nil, nil
	})
	if err != nil {
		return kmsapi.Key{}, err
	}
	return s.show(k), nil
}

// Purge removes a deleted key for good, with everything that belongs to it.
func (s *Service) Purge(ctx context.Context, instance, id string) (kmsapi.Key, error) {
	k, rev, err := s.load(ctx, instance, id)
	if err != nil {
		return kmsapi.Key{}, err
	}
	if k.State != stateDestroyed {
		return kmsapi.Key{}, refusal(fault.Conflict, id, kmsapi.InvalidState)
	}
	if _, err := s.clock.follow(ctx); err != nil { // it may have been confirmed at this moment
		return kmsapi.Key{}, err
	}
	if from := k.DeletedAt.Add(s.window.PurgeMin); s.Time().Before(from) {
		if why := s.ClockFault(); why != nil && !s.late().Before(from) {
			return kmsapi.Key{}, why
		}
		f := refusal(fault.Conflict, id, kmsapi.TooEarly)
		var e *fault.Error
		if errors.As(f, &e) {
			e.Err = fmt.Errorf("%s: Purge operation is allowed %s after key is deleted", kmsapi.MessageOf(kmsapi.TooEarly), s.window.PurgeMin)
		}
		return kmsapi.Key{}, f
	}
	out := s.show(k)
	return out, s.purge(ctx, k, rev)
}

func (s *Service) purge(ctx context.Context, k *keyRecord, rev int64) error {
	rest, blobs, err := s.dropVersions(ctx, k)
	if err != nil {
		return err
	}
	uses, err := s.uses.drop(ctx, k.Instance, k.ID)
	if err != nil {
		return err
	}
	changes := append([]record.Change{{Path: k.path(), Rev: rev}}, uses...)
	for _, a := range k.Aliases {
		var have kmsapi.Alias
		rev, err := s.store.Get(ctx, aliasPath(k.Instance, a), &have)
		if err != nil {
			return err
		}
		changes = append(changes, record.Change{Path: aliasPath(k.Instance, a), Rev: rev})
	}
	err = s.store.List(ctx, registrationDir(k.Instance), func(m record.Meta, _ func(any) error) error {
		if strings.HasPrefix(m.Path, registrationDir(k.Instance)+k.ID+".") {
			rest = append(rest, record.Change{Path: m.Path, Rev: m.Rev})
		}
		return nil
	})
	if err != nil {
		return err
	}
	// What a transaction cannot take goes before, so that a second purge goes on
	// where this one was cut short.
	fits := min(len(rest), batch-len(changes))
	if err := s.commitAll(ctx, rest[fits:]); err != nil {
		return err
	}
	if err := conflict(s.store.Commit(ctx, append(changes, rest[:fits]...)...)); err != nil {
		return err
	}
	return s.destroy(ctx, blobs)
}

// Sync notes that the services which use a key should look at it again; ours
// read it each time, so there is nothing to bring up to date.
func (s *Service) Sync(ctx context.Context, instance, id string) error {
	k, _, err := s.load(ctx, instance, id)
	if err == nil && k.State == stateDestroyed {
		err = refusal(fault.NotFound, id, kmsapi.KeyDeleted)
	}
	return err
}

// Patch moves a key to another ring.
func (s *Service) Patch(ctx context.Context, instance, id string, in kmsapi.PatchKey) (kmsapi.Key, error) {
	if in.KeyRingID == "" {
		return kmsapi.Key{}, invalid("keyRingID", "present")
	}
	if err := s.ringExists(ctx, instance, in.KeyRingID); err != nil {
		return kmsapi.Key{}, err
	}
	k, err := s.change(ctx, instance, id, func(k *keyRecord, _ time.Time) ([]record.Change, error) {
		if k.State == stateDestroyed {
			return nil, refusal(fault.NotFound, id, kmsapi.KeyDeleted)
		}
		k.KeyRing = in.KeyRingID
		return nil, nil
	})
	if err != nil {
		return kmsapi.Key{}, err
	}
	return s.show(k), nil
}

// Versions lists a key's versions, newest first, and their total.
func (s *Service) Versions(ctx context.Context, instance, id string, limit, offset int, allStates bool) ([]kmsapi.KeyVersion, int, error) {
	k, _, err := s.load(ctx, instance, id)
	if err != nil {
		return nil, 0, err
	}
	if k.Kind != kindRoot {
		return nil, 0, refusal(fault.Usage, id, kmsapi.RootRequired)
	}
	if k.State == stateDestroyed && !allStates {
		return nil, 0, refusal(fault.NotFound, id, kmsapi.KeyDeleted)
	}
	all, err := s.versions(ctx, k)
	if err != nil {
		return nil, 0, err
	}
	out := []kmsapi.KeyVersion{}
	for _, v := range page(all, limit, offset) {
		out = append(out, kmsapi.KeyVersion{ID: v.ID, CreationDate: &v.CreatedAt})
	}
	shown := make([]*kmsapi.KeyVersion, len(out))
	for i := range out {
		shown[i] = &out[i]
	}
	return out, len(all), s.withUses(ctx, k, shown...)
}

func page[T any](all []T, limit, offset int) []T {
	offset = min(offset, len(all))
	return all[offset:min(offset+limit, len(all))]
}

// Swept is something that the service did by itself.
type Swept struct {
	Action, Instance, Key string
	Err                   error
}

// month of a rotation policy, as IBM counts it.
const month = 30 * 24 * time.Hour

// Sweep does what is due without anybody asking: it marks expired keys,
// rotates by policy, purges what was deleted long ago, and destroys the keys
// of import tokens that ended and of processes that did. Several replicas may do it at the same time.
func (s *Service) Sweep(ctx context.Context) ([]Swept, error) {
	instances, err := s.Instances(ctx)
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(instances))
	beaten := s.clock.beat(ctx) // a store that is full takes no beat, and purging frees it
	out := s.tellClock()
	now := s.Time()
	for _, in := range instances {
		ids = append(ids, in.ID)
		keys, err := s.index.keys(ctx, s.store, in.ID)
		if err != nil {
			return out, err
		}
		for _, k := range keys {
			if what := s.due(k, momentOf(&now)); what != "" {
				out = append(out, Swept{what, in.ID, k.id, s.do(ctx, what, in.ID, k.id)})
			}
		}
		if err := s.dropEndedToken(ctx, in.ID); err != nil {
			out = append(out, Swept{"kms.import-token.expire", in.ID, "", err})
		}
	}
	return out, errors.Join(beaten, s.dropUnfinished(ctx), s.uses.look(ctx, ids, s.encrypts(ctx)))
}

// What can be due, by its audit action.
const (
	duePurge  = "kms.secrets.purge"
	dueExpire = "kms.secrets.expire"
	dueRotate = "kms.secrets.rotate"
)

// due says what is to be done with a key, if anything.
func (s *Service) due(k *listed, now moment) string {
	switch {
	case k.state == stateDestroyed && now > k.deleted+moment(s.window.PurgeAuto.Microseconds()):
		return duePurge
	case k.state == stateActive && k.stateAt(now) == stateDeactivated:
		return dueExpire
	case k.state == stateActive && k.rotateOn != 0 && now > k.rotateOn:
		return dueRotate
	}
	return ""
}

func (s *Service) do(ctx context.Context, what, instance, id string) error {
	switch what {
	case duePurge:
		k, rev, err := s.load(ctx, instance, id)
		if err != nil || k.State != stateDestroyed {
			return err
		}
		return s.purge(ctx, k, rev)
	case dueExpire:
		_, err := s.change(ctx, instance, id, func(k *keyRecord, _ time.Time) ([]record.Change, error) {
			if k.State == stateActive {
				k.State = stateDeactivated
			}
			return nil, nil
		})
		return err
	}
	return s.Rotate(ctx, instance, id, kmsapi.RotateRequest{})
}
