package kms

import (
	"context"
	"encoding/base64"
	"errors"
	"slices"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// rootFor loads a key for an action that only root keys in one of the states
// can do.
func (s *Service) rootFor(ctx context.Context, instance, id string, states ...int) (*keyRecord, error) {
	k, _, err := s.load(ctx, instance, id)
	if err != nil {
		return nil, err
	}
	return k, s.checkRoot(k, states...)
}

func (s *Service) checkRoot(k *keyRecord, states ...int) error {
	now := s.stateNow(k)
	switch {
	case k.State == stateDestroyed:
		return refusal(fault.NotFound, k.ID, kmsapi.KeyDeleted)
	case k.Kind != kindRoot:
		return refusal(fault.Usage, k.ID, kmsapi.RootRequired)
	case slices.Contains(states, now):
		return nil
	case now == stateDeactivated && k.Expires != nil:
		return refuse(fault.Conflict, "The key expired on "+k.Expires.UTC().Format("2006-01-02T15:04:05Z"), k.ID, kmsapi.KeyExpired)
	}
	return refuse(fault.Conflict, "Key is not in active state", k.ID, kmsapi.InvalidState)
}

// Wrap encrypts a data encryption key under a root key. Without plaintext the
// HSM makes one of 32 bytes, which the answer has.
func (s *Service) Wrap(ctx context.Context, instance, id string, in kmsapi.WrapRequest) (kmsapi.ActionAnswer, error) {
	if err := checkAAD(in.AAD); err != nil {
		return kmsapi.ActionAnswer{}, err
	}
	plain, err := base64.StdEncoding.DecodeString(in.Plaintext)
	if err != nil {
		return kmsapi.ActionAnswer{}, invalid("plaintext", "a base64 encoded key material: %v", err)
	}
	defer clear(plain)
	if len(plain) > kmsapi.MaxPlaintext {
		return kmsapi.ActionAnswer{}, invalid("plaintext", "at most %d bytes", kmsapi.MaxPlaintext)
	}
	k, err := s.rootFor(ctx, instance, id, stateActive)
	if err != nil {
		return kmsapi.ActionAnswer{}, err
	}
	return s.wrap(ctx, k, plain, in.AAD)
}

// wrap encrypts by the newest version of a key.
func (s *Service) wrap(ctx context.Context, k *keyRecord, plain []byte, extra []string) (out kmsapi.ActionAnswer, err error) {
	v := k.Version
	if err := s.uses.take(ctx, useKey{k.Instance, k.ID, v.ID}); err != nil {
		return out, err
	}
	out.KeyVersion = &kmsapi.KeyVersion{ID: v.ID}
	aad := bindAAD(kmsapi.CiphertextVersion, v.ID, extra)
	var sealed hsm.Sealed
	if len(plain) > 0 {
		sealed, err = s.hsm.Wrap(ctx, v.Blob, plain, aad)
	} else {
		var dek []byte
		dek, sealed, err = s.hsm.WrapNew(ctx, v.Blob, kmsapi.GeneratedDEK, aad)
		out.Plaintext = base64.StdEncoding.EncodeToString(dek)
		clear(dek)
	}
	if err != nil {
		return kmsapi.ActionAnswer{}, err
	}
	out.Ciphertext, err = encodeCiphertext(sealed, v.ID)
	return out, err
}

// Unwrap decrypts what Wrap made, by this key or by another key with the same
// imported material. Every reason why it cannot is one and the same error, so
// that nobody learns from the difference. What an older version had wrapped is
// given wrapped by the newest too.
func (s *Service) Unwrap(ctx context.Context, instance, id string, in kmsapi.UnwrapRequest) (kmsapi.ActionAnswer, error) {
	plain, out, err := s.unwrap(ctx, instance, id, in)
	if err != nil {
		return kmsapi.ActionAnswer{}, err
	}
	defer clear(plain)
	out.Plaintext = base64.StdEncoding.EncodeToString(plain)
	return out, nil
}

// Rewrap wraps anew, by the newest version, what any version had wrapped. The
// plaintext stays here.
func (s *Service) Rewrap(ctx context.Context, instance, id string, in kmsapi.UnwrapRequest) (kmsapi.ActionAnswer, error) {
	plain, out, err := s.unwrap(ctx, instance, id, in)
	if err != nil {
		return kmsapi.ActionAnswer{}, err
	}
	defer clear(plain)
	if out.Ciphertext == "" { // the newest had wrapped it: fresh all the same
		k, err := s.rootFor(ctx, instance, id, stateActive, stateDeactivated)
		if err != nil {
			return kmsapi.ActionAnswer{}, err
		}
		fresh, err := s.wrap(ctx, k, plain, in.AAD)
		if err != nil {
			return kmsapi.ActionAnswer{}, err
		}
		out.Ciphertext, out.RewrappedKeyVersion = fresh.Ciphertext, fresh.KeyVersion
	}
	return out, nil
}

func (s *Service) unwrap(ctx context.Context, instance, id string, in kmsapi.UnwrapRequest) (plain []byte, out kmsapi.ActionAnswer, err error) {
	if err := checkAAD(in.AAD); err != nil {
		return nil, out, err
	}
	if in.Ciphertext == "" {
		return nil, out, refusal(fault.Usage, id, kmsapi.NoBody)
	}
	k, err := s.rootFor(ctx, instance, id, stateActive, stateDeactivated)
	if err != nil {
		return nil, out, err
	}
	c, err := decodeCiphertext(in.Ciphertext)
	if err != nil {
		return nil, out, badCiphertext(err)
	}
	versions, err := s.candidates(ctx, k, c.Handle)
	if err != nil {
		return nil, out, err
	}
	aad := bindAAD(c.Version, c.Handle, in.AAD)
	sealed := hsm.Sealed{Suite: c.Suite, IV: c.IV, Ciphertext: c.Ciphertext}
	for _, v := range versions {
		plain, err := s.hsm.Unwrap(ctx, v.Blob, sealed, aad)
		if fault.KindOf(err) == fault.BadContent {
			continue
		}
		if err != nil {
			return nil, out, err
		}
		out.KeyVersion = &kmsapi.KeyVersion{ID: v.ID}
		if v.ID != k.Version.ID && s.stateNow(k) == stateActive && len(plain) > 0 {
			fresh, err := s.wrap(ctx, k, plain, in.AAD)
			if err != nil && !isUsedUp(err) { // what was asked for is the plaintext
				clear(plain)
				return nil, out, err
			}
			out.Ciphertext, out.RewrappedKeyVersion = fresh.Ciphertext, fresh.KeyVersion
		}
		return plain, out, nil
	}
	return nil, out, badCiphertext(nil)
}

// candidates are the versions that may open a ciphertext: the one it names,
// else (material imported into another key) all, newest first.
func (s *Service) candidates(ctx context.Context, k *keyRecord, handle string) ([]versionRecord, error) {
	if k.Version.ID == handle {
		return []versionRecord{k.Version}, nil
	}
	if uuid.Validate(handle) == nil { // the caller's text: nothing else may become a path
		var v versionRecord
		_, err := s.store.Get(ctx, versionDir(k.Instance, k.ID)+handle, &v)
		if err == nil {
			return []versionRecord{v}, nil
		}
		if !errors.Is(err, record.ErrNotFound) {
			return nil, err
		}
	}
	if !k.Imported {
		return nil, nil // material born in the HSM is in no other key
	}
	return s.versions(ctx, k)
}

// versions are all versions of a key, newest first.
func (s *Service) versions(ctx context.Context, k *keyRecord) ([]versionRecord, error) {
	all := []versionRecord{k.Version}
	err := s.store.List(ctx, versionDir(k.Instance, k.ID), func(_ record.Meta, decode func(any) error) error {
		var v versionRecord
		if err := decode(&v); err != nil {
			return err
		}
		all = append(all, v)
		return nil
	})
	slices.SortStableFunc(all[1:], func(a, b versionRecord) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return all, err
}

func badCiphertext(cause error) error {
	if cause == nil {
		cause = errors.New("it does not open")
	}
	return fault.New(fault.BadContent, "unwrap", "", cause).WithReason(kmsapi.BadCiphertext)
}

func checkAAD(aad []string) error {
	if len(aad) > kmsapi.MaxAADStrings {
		return invalid("aad", "at most %d strings", kmsapi.MaxAADStrings)
	}
	for _, a := range aad {
		if len([]rune(a)) > kmsapi.MaxAADLength {
			return invalid("aad", "strings of at most %d characters", kmsapi.MaxAADLength)
		}
	}
	return nil
}
