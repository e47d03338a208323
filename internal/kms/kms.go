// Package kms has the rules of the keys: instances, creation, wrapping and
// unwrapping. It holds no policy of who may do what (internal/iam) and speaks
// no protocol (internal/server). Material of root keys that was born in the
// HSM never passes through here: only wrapped blobs do.
package kms

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Store keeps records; see internal/store.
type Store interface {
	Get(ctx context.Context, path string, v any) (rev int64, err error)
	List(ctx context.Context, prefix string, each func(m record.Meta, decode func(v any) error) error) error
	Commit(ctx context.Context, changes ...record.Change) error
}

// HSM does what must happen inside the token.
type HSM interface {
	CreateRootKey(ctx context.Context) (hsm.NewKey, error)
	ImportRootKey(ctx context.Context, material secret.Value) (hsm.NewKey, error)
	Wrap(ctx context.Context, blob, plaintext, aad []byte) (hsm.Sealed, error)
	WrapNew(ctx context.Context, blob []byte, n int, aad []byte) ([]byte, hsm.Sealed, error)
	Unwrap(ctx context.Context, blob []byte, s hsm.Sealed, aad []byte) ([]byte, error)
}

// Sealer encrypts what the service itself must keep.
type Sealer interface {
	Seal(ctx context.Context, plaintext, aad []byte) ([]byte, error)
	SealRandom(ctx context.Context, n int, aad []byte) ([]byte, error)
	Unseal(ctx context.Context, sealed, aad []byte) ([]byte, error)
}

// Service is the KMS of one installation. Safe for concurrent use.
type Service struct {
	store  Store
	hsm    HSM
	sealer Sealer
	now    func() time.Time
}

// New joins a store and an HSM whose master keys are open.
func New(s Store, h HSM, e Sealer, now func() time.Time) *Service {
	return &Service{store: s, hsm: h, sealer: e, now: now}
}

// Dialects of an instance.
const (
	DialectKeyProtect = "key-protect"
	DialectICP        = "icp"
)

// States of a key, with the API's numbers.
const (
	stateActive      = 1
	stateDeactivated = 3
)

// Kinds of keys.
const (
	kindRoot     = "root"
	kindStandard = "standard"
)

// keyRecord is a key as it lies in the store, at keys/<instance>/<id>.
type keyRecord struct {
	ID          string          `json:"id"`
	Instance    string          `json:"instance"`
	Kind        string          `json:"kind"`
	Name        string          `json:"name"`
	Description string          `json:"description,omitempty"`
	KeyRing     string          `json:"keyRing"`
	Imported    bool            `json:"imported,omitempty"`
	State       int             `json:"state"`
	Bits        int             `json:"bits,omitempty"`
	CreatedAt   time.Time       `json:"createdAt"`
	CreatedBy   string          `json:"createdBy"`
	UpdatedAt   time.Time       `json:"updatedAt"`
	Expires     *time.Time      `json:"expires,omitempty"`
	Versions    []versionRecord `json:"versions"` // newest last
}

// versionRecord is one version of the material: of a root key the blob that
// only the HSM's master key opens, of a standard key its sealed bytes.
type versionRecord struct {
	ID        string    `json:"id"`
	CreatedAt time.Time `json:"createdAt"`
	Blob      []byte    `json:"blob,omitempty"`
	KCV       []byte    `json:"kcv,omitempty"`
	Sealed    []byte    `json:"sealed,omitempty"`
}

func (k *keyRecord) latest() versionRecord { return k.Versions[len(k.Versions)-1] }

func keyPath(instance, id string) string { return "keys/" + instance + "/" + id }

// sealAAD binds a standard key's material to its place.
func sealAAD(instance, id, version string) []byte {
	return []byte("kmsctl standard key\x00" + instance + "\x00" + id + "\x00" + version)
}

// CreateKey makes a key, or imports one when a payload is given, and gives it
// as the API shows it; a standard key's payload is in the answer.
func (s *Service) CreateKey(ctx context.Context, instance, ring, who string, in kmsapi.CreateKey) (kmsapi.Key, error) {
	if _, err := s.Instance(ctx, instance); err != nil {
		return kmsapi.Key{}, err
	}
	if err := s.checkNew(in); err != nil {
		return kmsapi.Key{}, err
	}
	now := s.now().UTC().Truncate(time.Second)
	k := keyRecord{ID: uuid.NewString(), Instance: instance, Kind: kindRoot, Name: in.Name, Description: in.Description, KeyRing: ring,
		Imported: in.Payload != "", State: stateActive, CreatedAt: now, CreatedBy: who, UpdatedAt: now, Expires: in.ExpirationDate}
	v := versionRecord{ID: uuid.NewString(), CreatedAt: now}
	payload, err := decodePayload(in)
	if err != nil {
		return kmsapi.Key{}, err
	}
	defer clear(payload)
	if in.Extractable {
		k.Kind = kindStandard
		err = s.fillStandard(ctx, &k, &v, payload)
	} else {
		err = s.fillRoot(ctx, &k, &v, payload)
	}
	if err != nil {
		return kmsapi.Key{}, err
	}
	k.Versions = []versionRecord{v}
	if err := s.store.Commit(ctx, record.Change{Path: keyPath(instance, k.ID), Value: k}); err != nil {
		return kmsapi.Key{}, err
	}
	if k.Kind == kindStandard {
		return s.withPayload(ctx, &k)
	}
	return s.show(&k), nil
}

func (s *Service) fillRoot(ctx context.Context, k *keyRecord, v *versionRecord, payload []byte) error {
	made, err := hsm.NewKey{}, error(nil)
	if payload != nil {
		made, err = s.hsm.ImportRootKey(ctx, secret.New(payload))
		k.Bits = len(payload) * 8
	} else {
		made, err = s.hsm.CreateRootKey(ctx)
		k.Bits = 256
	}
	v.Blob, v.KCV = made.Blob, made.KCV
	return err
}

func (s *Service) fillStandard(ctx context.Context, k *keyRecord, v *versionRecord, payload []byte) (err error) {
	aad := sealAAD(k.Instance, k.ID, v.ID)
	if payload != nil {
		k.Bits = len(payload) * 8
		v.Sealed, err = s.sealer.Seal(ctx, payload, aad)
		return err
	}
	k.Bits = 256
	v.Sealed, err = s.sealer.SealRandom(ctx, 32, aad)
	return err
}

func invalid(field, format string, a ...any) error {
	return fault.Newf(fault.Usage, "", "", "The field `%s` must be: %s", field, fmt.Sprintf(format, a...)).WithReason(kmsapi.InvalidField)
}

func (s *Service) checkNew(in kmsapi.CreateKey) error {
	if in.Type != "" && in.Type != kmsapi.TypeKey {
		return invalid("type", "%s", kmsapi.TypeKey)
	}
	if n := len([]rune(in.Name)); n < 2 || n > 90 {
		return invalid("name", "between 2 and 90 characters")
	}
	if n := len([]rune(in.Description)); n != 0 && (n < 2 || n > 240) {
		return invalid("description", "between 2 and 240 characters")
	}
	if in.ExpirationDate != nil && !in.ExpirationDate.After(s.now()) {
		return invalid("expirationDate", "in the future")
	}
	for name, given := range map[string]bool{"aliases": len(in.Aliases) > 0, "tags": len(in.Tags) > 0, "encryptedNonce": in.EncryptedNonce != "",
		"iv": in.IV != "", "encryptionAlgorithm": in.EncryptionAlgorithm != ""} {
		if given {
			return fault.Newf(fault.Usage, "", "", "the field `%s` is not served yet", name).WithReason(kmsapi.NotBuilt)
		}
	}
	return nil
}

func decodePayload(in kmsapi.CreateKey) ([]byte, error) {
	if in.Payload == "" {
		return nil, nil
	}
	b, err := base64.StdEncoding.DecodeString(in.Payload)
	if err != nil {
		return nil, invalid("payload", "a base64 encoded key material: %v", err)
	}
	switch n := len(b); {
	case in.Extractable && (n == 0 || n > kmsapi.MaxStandard):
		return nil, invalid("payload", "between 1 and %d bytes", kmsapi.MaxStandard)
	case !in.Extractable && n != 16 && n != 24 && n != 32:
		return nil, invalid("payload", "a key of 128, 192 or 256 bits")
	}
	return b, nil
}

// load reads a key; what is not there is KEY_NOT_FOUND_ERR.
func (s *Service) load(ctx context.Context, instance, id string) (*keyRecord, int64, error) {
	var k keyRecord
	rev, err := s.store.Get(ctx, keyPath(instance, id), &k)
	if errors.Is(err, record.ErrNotFound) {
		return nil, 0, fault.Newf(fault.NotFound, "", id, "key does not exist").WithReason(kmsapi.KeyNotFound)
	}
	if err != nil {
		return nil, 0, err
	}
	return &k, rev, nil
}

// stateNow is the key's state with its expiry taken into account.
func (s *Service) stateNow(k *keyRecord) int {
	if k.State == stateActive && k.Expires != nil && !s.now().Before(*k.Expires) {
		return stateDeactivated
	}
	return k.State
}

func (s *Service) show(k *keyRecord) kmsapi.Key {
	v := k.latest()
	no := false
	return kmsapi.Key{
		Type: kmsapi.TypeKey, ID: k.ID, Name: k.Name, Description: k.Description, State: s.stateNow(k), Expiration: k.Expires,
		Extractable: k.Kind == kindStandard, CRN: fmt.Sprintf("crn:v1:kmsctl:private:kms:::%s:key:%s", k.Instance, k.ID), Imported: k.Imported,
		KeyRingID: k.KeyRing, CreationDate: &k.CreatedAt, CreatedBy: k.CreatedBy, AlgorithmType: "AES",
		AlgorithmMetadata: &kmsapi.AlgorithmMetadata{BitLength: fmt.Sprint(k.Bits), Mode: "GCM"}, AlgorithmBitSize: k.Bits, AlgorithmMode: "GCM",
		LastUpdateDate: &k.UpdatedAt, KeyVersion: &kmsapi.KeyVersion{ID: v.ID, CreationDate: &v.CreatedAt},
		DualAuthDelete: &kmsapi.DualAuthDelete{}, Deleted: &no,
	}
}

func (s *Service) withPayload(ctx context.Context, k *keyRecord) (kmsapi.Key, error) {
	out := s.show(k)
	v := k.latest()
	b, err := s.sealer.Unseal(ctx, v.Sealed, sealAAD(k.Instance, k.ID, v.ID))
	if err != nil {
		return kmsapi.Key{}, err
	}
	out.Payload = base64.StdEncoding.EncodeToString(b)
	clear(b)
	return out, nil
}

// Key gives one key; of a standard key with its payload when material is set.
func (s *Service) Key(ctx context.Context, instance, id string, material bool) (kmsapi.Key, error) {
	k, _, err := s.load(ctx, instance, id)
	if err != nil {
		return kmsapi.Key{}, err
	}
	if material && k.Kind == kindStandard {
		return s.withPayload(ctx, k)
	}
	return s.show(k), nil
}

// Query selects keys of a list. A nil Extractable or empty States means any of
// the states that are shown by default (1, 2, 3). An empty Ring means all.
type Query struct {
	Limit, Offset int
	States        []int
	Extractable   *bool
	Ring          string
}

// Keys lists an instance's keys by id, and gives their total before limit and
// offset.
func (s *Service) Keys(ctx context.Context, instance string, q Query) ([]kmsapi.Key, int, error) {
	if _, err := s.Instance(ctx, instance); err != nil {
		return nil, 0, err
	}
	states := map[int]bool{1: true, 2: true, 3: true}
	if len(q.States) > 0 {
		clear(states)
		for _, n := range q.States {
			states[n] = true
		}
	}
	out, total := []kmsapi.Key{}, 0
	err := s.store.List(ctx, "keys/"+instance+"/", func(_ record.Meta, decode func(any) error) error {
		var k keyRecord
		if err := decode(&k); err != nil {
			return err
		}
		if !states[s.stateNow(&k)] || (q.Extractable != nil && *q.Extractable != (k.Kind == kindStandard)) || (q.Ring != "" && q.Ring != k.KeyRing) {
			return nil
		}
		if total++; total > q.Offset && len(out) < q.Limit {
			out = append(out, s.show(&k))
		}
		return nil
	})
	return out, total, err
}

// Ring gives the key ring of a key, for authorization; an absent key is in
// none.
func (s *Service) Ring(ctx context.Context, instance, id string) string {
	k, _, err := s.load(ctx, instance, id)
	if err != nil {
		return ""
	}
	return k.KeyRing
}

// rootFor loads a key for a cryptographic action.
func (s *Service) rootFor(ctx context.Context, instance, id string, states ...int) (*keyRecord, error) {
	k, _, err := s.load(ctx, instance, id)
	if err != nil {
		return nil, err
	}
	if k.Kind != kindRoot {
		return nil, fault.Newf(fault.Usage, "", id, "the key is a standard key").WithReason(kmsapi.RootRequired)
	}
	now := s.stateNow(k)
	for _, st := range states {
		if now == st {
			return k, nil
		}
	}
	if k.Expires != nil && now == stateDeactivated {
		return nil, fault.Newf(fault.Conflict, "", id, "the key has expired").WithReason(kmsapi.KeyExpired)
	}
	return nil, fault.Newf(fault.Conflict, "", id, "the key is in state %d", now).WithReason(kmsapi.InvalidState)
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
	v := k.latest()
	out := kmsapi.ActionAnswer{KeyVersion: &kmsapi.KeyVersion{ID: v.ID}}
	aad := bindAAD(kmsapi.CiphertextVersion, v.ID, in.AAD)
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
// that nobody learns from the difference.
func (s *Service) Unwrap(ctx context.Context, instance, id string, in kmsapi.UnwrapRequest) (kmsapi.ActionAnswer, error) {
	if err := checkAAD(in.AAD); err != nil {
		return kmsapi.ActionAnswer{}, err
	}
	if in.Ciphertext == "" {
		return kmsapi.ActionAnswer{}, invalid("ciphertext", "present")
	}
	k, err := s.rootFor(ctx, instance, id, stateActive, stateDeactivated)
	if err != nil {
		return kmsapi.ActionAnswer{}, err
	}
	c, err := decodeCiphertext(in.Ciphertext)
	if err != nil {
		return kmsapi.ActionAnswer{}, badCiphertext(err)
	}
	aad := bindAAD(c.Version, c.Handle, in.AAD)
	sealed := hsm.Sealed{Suite: c.Suite, IV: c.IV, Ciphertext: c.Ciphertext}
	for _, v := range candidates(k, c.Handle) {
		plain, err := s.hsm.Unwrap(ctx, v.Blob, sealed, aad)
		if err == nil {
			out := kmsapi.ActionAnswer{Plaintext: base64.StdEncoding.EncodeToString(plain), KeyVersion: &kmsapi.KeyVersion{ID: v.ID}}
			clear(plain)
			return out, nil
		}
		if fault.KindOf(err) != fault.BadContent {
			return kmsapi.ActionAnswer{}, err
		}
	}
	return kmsapi.ActionAnswer{}, badCiphertext(nil)
}

// candidates are the versions that may open a ciphertext: the one it names,
// else (material imported into another key) all, newest first.
func candidates(k *keyRecord, handle string) []versionRecord {
	var all []versionRecord
	for i := len(k.Versions) - 1; i >= 0; i-- {
		if k.Versions[i].ID == handle {
			return k.Versions[i : i+1]
		}
		all = append(all, k.Versions[i])
	}
	if !k.Imported {
		return nil // material born in the HSM is in no other key
	}
	return all
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

// Instance gives an instance; what is not there, or is no UUID, is an error of
// its own code.
func (s *Service) Instance(ctx context.Context, id string) (kmsapi.Instance, error) {
	if uuid.Validate(id) != nil || id != strings.ToLower(id) {
		return kmsapi.Instance{}, fault.Newf(fault.Usage, "", id, "not a UUID").WithReason(kmsapi.InvalidInstance)
	}
	var in kmsapi.Instance
	_, err := s.store.Get(ctx, "instances/"+id, &in)
	if errors.Is(err, record.ErrNotFound) {
		return in, fault.Newf(fault.NotFound, "", id, "instance does not exist").WithReason(kmsapi.InstanceNotFound)
	}
	return in, err
}

// CreateInstance makes an instance; its name is unique.
func (s *Service) CreateInstance(ctx context.Context, in kmsapi.CreateInstance, who string) (kmsapi.Instance, error) {
	if n := len([]rune(in.Name)); n < 2 || n > 90 || strings.ContainsAny(in.Name, "/\x00") {
		return kmsapi.Instance{}, invalid("name", "between 2 and 90 characters, without a slash")
	}
	if in.Dialect == "" {
		in.Dialect = DialectKeyProtect
	}
	if in.Dialect != DialectKeyProtect && in.Dialect != DialectICP {
		return kmsapi.Instance{}, invalid("dialect", "%s or %s", DialectKeyProtect, DialectICP)
	}
	out := kmsapi.Instance{ID: uuid.NewString(), Name: in.Name, Dialect: in.Dialect, CreatedAt: s.now().UTC().Truncate(time.Second), CreatedBy: who}
	err := s.store.Commit(ctx, record.Change{Path: "instances/" + out.ID, Value: out}, record.Change{Path: "instancenames/" + in.Name, Value: out.ID})
	if errors.Is(err, record.ErrConflict) {
		return kmsapi.Instance{}, fault.Newf(fault.Conflict, "create instance", in.Name, "an instance of this name exists").
			WithHint("choose another name, or use the one that `kmsctl instances list` shows").WithReason(kmsapi.Conflict)
	}
	return out, err
}

// Instances lists all instances by id.
func (s *Service) Instances(ctx context.Context) ([]kmsapi.Instance, error) {
	out := []kmsapi.Instance{}
	err := s.store.List(ctx, "instances/", func(_ record.Meta, decode func(any) error) error {
		var in kmsapi.Instance
		if err := decode(&in); err != nil {
			return err
		}
		out = append(out, in)
		return nil
	})
	return out, err
}

// DeleteInstance removes an instance that holds no key.
func (s *Service) DeleteInstance(ctx context.Context, id string) error {
	in, err := s.Instance(ctx, id)
	if err != nil {
		return err
	}
	_, total, err := s.Keys(ctx, id, Query{Limit: 0, States: []int{0, 1, 2, 3, 5}})
	if err != nil {
		return err
	}
	if total > 0 {
		return fault.Newf(fault.Conflict, "delete instance", in.Name, "it holds %d keys", total).WithReason(kmsapi.Conflict)
	}
	rev, err := s.store.Get(ctx, "instances/"+id, &in)
	if err != nil {
		return err
	}
	var name string
	nameRev, err := s.store.Get(ctx, "instancenames/"+in.Name, &name)
	if err != nil {
		return err
	}
	return s.store.Commit(ctx, record.Change{Path: "instances/" + id, Rev: rev}, record.Change{Path: "instancenames/" + in.Name, Rev: nameRev})
}
