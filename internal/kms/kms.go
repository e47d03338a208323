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
	"slices"
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
	// Version grows with every change of a record directly in the folder.
	Version(dir string) int64
	// Since gives what changed after a version; ok is false when the folder
	// must be listed again.
	Since(dir string, version int64) (paths []string, now int64, ok bool)
}

// HSM does what must happen inside the token.
type HSM interface {
	CreateRootKey(ctx context.Context) (hsm.NewKey, error)
	ImportRootKey(ctx context.Context, material secret.Value) (hsm.NewKey, error)
	Wrap(ctx context.Context, blob, plaintext, aad []byte) (hsm.Sealed, error)
	WrapNew(ctx context.Context, blob []byte, n int, aad []byte) ([]byte, hsm.Sealed, error)
	Unwrap(ctx context.Context, blob []byte, s hsm.Sealed, aad []byte) ([]byte, error)
	// CreatePlacedKey and ImportPlacedKey make keys that stay in the token.
	CreatePlacedKey(ctx context.Context, id []byte) (hsm.NewKey, error)
	ImportPlacedKey(ctx context.Context, id []byte, material secret.Value) (hsm.NewKey, error)
	// NewImportPair makes an RSA pair under which material travels.
	NewImportPair(ctx context.Context, id, aad []byte) (hsm.ImportPair, error)
	// ImportSent brings that material in, with place to stay in the token, and
	// gives its bits. What is wrong with it is one of hsm.Refusals.
	ImportSent(ctx context.Context, p hsm.ImportPair, aad []byte, m hsm.Sent, place []byte) (hsm.NewKey, int, error)
	// Destroy leaves nothing of a blob's key in the HSM.
	Destroy(ctx context.Context, blob []byte) error
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
	clock  clock
	window Windows
	index  index

	masters *Masters
	uses    *Uses
}

// New joins a store and an HSM whose master keys are open. Until KeepTime is
// called, now is believed.
func New(s Store, h HSM, e Sealer, now func() time.Time, w Windows) *Service {
	return &Service{store: s, hsm: h, sealer: e, clock: clock{store: s, wall: now, jump: w.ClockJump, downtime: w.Downtime}, window: w}
}

// Windows are the times of the key life cycle.
type Windows struct {
	Rotate     time.Duration // between two rotations of a key
	Enable     time.Duration // between disable and enable
	RestoreMin time.Duration // from deletion on
	RestoreMax time.Duration // until here a deleted key can be restored
	PurgeMin   time.Duration // from deletion on
	PurgeAuto  time.Duration // then it is purged by itself
	DualAuth   time.Duration // life of an authorization to delete
	Expiry     time.Duration // within it an expired key is marked so
	ClockJump  time.Duration // further ahead, the machine's clock is not followed: see clock
	Downtime   time.Duration // a longer gap at a start is not taken for one in which the KMS was stopped
}

// DefaultWindows are the times that IBM documents, and ours for the clock.
func DefaultWindows() Windows {
	const day = 24 * time.Hour
	return Windows{Rotate: time.Hour, Enable: 30 * time.Second, RestoreMin: 30 * time.Second, RestoreMax: 30 * day, PurgeMin: 4 * time.Hour,
		PurgeAuto: 90 * day, DualAuth: 7 * day, Expiry: time.Hour, ClockJump: time.Hour, Downtime: 3 * day}
}

// WindowNames are the names that Set takes.
var WindowNames = []string{"rotate", "enable", "restore-min", "restore-max", "purge-min", "purge-auto", "dual-auth", "expiry", "clock-jump", "downtime"}

// Set changes one time by its name.
func (w *Windows) Set(name string, d time.Duration) error {
	fields := []*time.Duration{&w.Rotate, &w.Enable, &w.RestoreMin, &w.RestoreMax, &w.PurgeMin, &w.PurgeAuto, &w.DualAuth, &w.Expiry, &w.ClockJump, &w.Downtime}
	i := slices.Index(WindowNames, name)
	if i < 0 {
		return fmt.Errorf("unknown window %q: known are %s", name, strings.Join(WindowNames, ", "))
	}
	if d < 0 {
		return fmt.Errorf("window %s is negative", name)
	}
	*fields[i] = d
	return nil
}

// Dialects of an instance.
const (
	DialectKeyProtect = "key-protect"
	DialectICP        = "icp"
)

// States of a key, with the API's numbers.
const (
	stateActive      = 1
	stateSuspended   = 2
	stateDeactivated = 3
	stateDestroyed   = 5
)

// Kinds of keys.
const (
	kindRoot     = "root"
	kindStandard = "standard"
)

// keyRecord is a key as it lies in the store, at keys/<instance>/<id>. Older
// versions lie apart, so that a rotation and a wrap cost the same however
// often the key was rotated.
type keyRecord struct {
	ID          string        `json:"id"`
	Instance    string        `json:"instance"`
	Kind        string        `json:"kind"`
	Name        string        `json:"name"`
	Description string        `json:"description,omitempty"`
	Aliases     []string      `json:"aliases,omitempty"`
	Tags        []string      `json:"tags,omitempty"`
	KeyRing     string        `json:"keyRing"`
	Imported    bool          `json:"imported,omitempty"`
	State       int           `json:"state"`
	Bits        int           `json:"bits,omitempty"`
	CreatedAt   time.Time     `json:"createdAt"`
	CreatedBy   string        `json:"createdBy"`
	UpdatedAt   time.Time     `json:"updatedAt"`
	RotatedAt   *time.Time    `json:"rotatedAt,omitempty"`
	ActedAt     *time.Time    `json:"actedAt,omitempty"` // last disable, enable, delete or restore
	Expires     *time.Time    `json:"expires,omitempty"`
	DeletedAt   *time.Time    `json:"deletedAt,omitempty"`
	DeletedBy   string        `json:"deletedBy,omitempty"`
	Final       bool          `json:"final,omitempty"` // its material is gone: it cannot be restored
	DualAuth    *policyRecord `json:"dualAuth,omitempty"`
	SetBy       string        `json:"setBy,omitempty"` // who authorized a deletion first
	SetAt       *time.Time    `json:"setAt,omitempty"`
	Rotation    *policyRecord `json:"rotation,omitempty"`
	Version     versionRecord `json:"version"` // the newest
}

// policyRecord is one policy of a key.
type policyRecord struct {
	ID        string    `json:"id"`
	Enabled   bool      `json:"enabled"`
	Months    int       `json:"months,omitempty"`
	CreatedAt time.Time `json:"createdAt"`
	CreatedBy string    `json:"createdBy"`
	UpdatedAt time.Time `json:"updatedAt"`
	UpdatedBy string    `json:"updatedBy"`
}

// versionRecord is one version of the material: of a root key the blob that
// only the HSM's master key opens, of a standard key its sealed bytes. Older
// ones lie at versions/<instance>/<key>/<id>.
type versionRecord struct {
	ID        string    `json:"id"`
	CreatedAt time.Time `json:"createdAt"`
	Blob      []byte    `json:"blob,omitempty"`
	KCV       []byte    `json:"kcv,omitempty"`
	Sealed    []byte    `json:"sealed,omitempty"`
}

// Folders of the records of keys, and of their older versions.
const (
	keysDir     = "keys/"
	versionsDir = "versions/"
)

func keyPath(instance, id string) string          { return keysDir + instance + "/" + id }
func versionDir(instance, key string) string      { return versionsDir + instance + "/" + key + "/" }
func aliasPath(instance, alias string) string     { return "aliases/" + instance + "/" + alias }
func (k *keyRecord) path() string                 { return keyPath(k.Instance, k.ID) }
func (k *keyRecord) dual() bool                   { return k.DualAuth != nil && k.DualAuth.Enabled }
func (s *Service) stamp() time.Time               { return s.Time().UTC().Truncate(time.Second) }
func refusal(k fault.Kind, id, code string) error { return refuse(k, "", id, code) }

// refuse is a refusal with one of the API's codes; lead says more than the
// code does.
func refuse(k fault.Kind, lead, id, code string) error {
	return fault.New(k, lead, id, errors.New(kmsapi.MessageOf(code))).WithReason(code)
}

// sealAAD binds a standard key's material to its place.
func sealAAD(instance, id, version string) []byte {
	return []byte("kmsctl standard key\x00" + instance + "\x00" + id + "\x00" + version)
}

// CreateKey makes a key, or imports one when a payload is given, and gives it
// as the API shows it; a standard key's payload is in the answer.
func (s *Service) CreateKey(ctx context.Context, instance, ring, who string, in kmsapi.CreateKey) (kmsapi.Key, error) {
	alive, err := s.alive(ctx, instance)
	if err != nil {
		return kmsapi.Key{}, err
	}
	if err := s.checkNew(in); err != nil {
		return kmsapi.Key{}, err
	}
	if err := s.ringExists(ctx, instance, ring); err != nil {
		return kmsapi.Key{}, err
	}
	now := s.stamp()
	k := keyRecord{ID: uuid.NewString(), Instance: instance, Kind: kindRoot, Name: in.Name, Description: in.Description, Aliases: in.Aliases, Tags: in.Tags,
		KeyRing: ring, Imported: in.Payload != "", State: stateActive, CreatedAt: now, CreatedBy: who, UpdatedAt: now, Expires: in.ExpirationDate,
		Version: versionRecord{ID: uuid.NewString(), CreatedAt: now}}
	if in.Extractable {
		k.Kind = kindStandard
	}
	if err := s.instanceRules(ctx, &k, in, who); err != nil {
		return kmsapi.Key{}, err
	}
	payload, err := s.payload(ctx, instance, in)
	if err != nil {
		return kmsapi.Key{}, err
	}
	defer payload.zero()
	changes := []record.Change{alive}
	for _, a := range in.Aliases {
		changes = append(changes, record.Change{Path: aliasPath(instance, a), Value: kmsapi.Alias{KeyID: k.ID, Alias: a, CreatedBy: who, CreationDate: &now}})
	}
	err = s.making(ctx, func(e Epoch) (err error) {
		var more []record.Change
		if k.Kind == kindStandard {
			err = s.fillStandard(ctx, e, &k, &k.Version, payload)
		} else {
			more, err = s.fillRoot(ctx, &k, &k.Version, payload)
		}
		if err != nil {
			return err
		}
		made, err := s.made(e, k.Version.Blob, k.Version.Sealed)
		if err == nil {
			err = s.store.Commit(ctx, slices.Concat(changes, made, more, []record.Change{{Path: k.path(), Value: k}})...)
		}
		return s.unmake(ctx, k.Version.Blob, conflict(err)) // a new key's path is free: an alias is taken
	})
	if err != nil {
		return kmsapi.Key{}, err
	}
	if k.Kind == kindStandard {
		return s.withPayload(ctx, &k)
	}
	return s.show(&k), nil
}

// fillRoot makes a root key in the HSM, and gives what else must change when
// the key comes into the store.
func (s *Service) fillRoot(ctx context.Context, k *keyRecord, v *versionRecord, payload *material) (more []record.Change, err error) {
	in, err := s.Instance(ctx, k.Instance)
	if err != nil {
		return nil, err
	}
	var id []byte // of a key that stays in the token
	if in.Placement == hsm.PlacementToken {
		var end record.Change
		if id, end, err = s.announce(ctx, func(id []byte) []byte { return hsm.PlacedBlob(id, true) }); err != nil {
			return nil, err
		}
		more = append(more, end)
	}
	var made hsm.NewKey
	switch {
	case payload == nil:
		k.Bits = 256
		made, err = s.newKey(ctx, id)
	case payload.sent != nil:
		made, k.Bits, err = s.hsm.ImportSent(ctx, payload.pair, payload.aad, *payload.sent, id)
		err = refusedMaterial(err)
	default:
		k.Bits = len(payload.clear) * 8
		made, err = s.importKey(ctx, id, secret.New(payload.clear))
	}
	v.Blob, v.KCV = made.Blob, made.KCV
	return more, err
}

func (s *Service) newKey(ctx context.Context, id []byte) (hsm.NewKey, error) {
	if id == nil {
		return s.hsm.CreateRootKey(ctx)
	}
	return s.hsm.CreatePlacedKey(ctx, id)
}

func (s *Service) importKey(ctx context.Context, id []byte, material secret.Value) (hsm.NewKey, error) {
	if id == nil {
		return s.hsm.ImportRootKey(ctx, material)
	}
	return s.hsm.ImportPlacedKey(ctx, id, material)
}

// unmake destroys what was made in the HSM and did not come into the store, for
// a reason that it gives back: what stays in the token would be left over. When
// it is not known whether the store took it, it stays: see making.
func (s *Service) unmake(ctx context.Context, blob []byte, why error) error {
	switch fault.KindOf(why) {
	case fault.Conflict, fault.NotFound, fault.Usage:
		if len(hsm.HeldID(blob)) > 0 {
			return errors.Join(why, s.hsm.Destroy(context.WithoutCancel(ctx), blob))
		}
	}
	return why
}

func (s *Service) fillStandard(ctx context.Context, e Epoch, k *keyRecord, v *versionRecord, payload *material) (err error) {
	if err := s.sealing(ctx, e); err != nil {
		return err
	}
	aad := sealAAD(k.Instance, k.ID, v.ID)
	if payload != nil {
		k.Bits = len(payload.clear) * 8
		v.Sealed, err = s.sealer.Seal(ctx, payload.clear, aad)
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
	if in.ExpirationDate != nil && !in.ExpirationDate.After(s.late()) {
		return invalid("expirationDate", "in the future")
	}
	if len(in.Tags) > kmsapi.MaxTags {
		return invalid("tags", "at most %d", kmsapi.MaxTags)
	}
	for _, t := range in.Tags {
		if len([]rune(t)) > 30 || strings.ContainsAny(t, "<>,:&|") {
			return invalid("tags", "of at most 30 characters, without any of <>,:&|")
		}
	}
	if len(in.Aliases) > kmsapi.MaxAliases {
		return invalid("aliases", "at most %d", kmsapi.MaxAliases)
	}
	for i, a := range in.Aliases {
		if err := checkAlias(a); err != nil {
			return err
		}
		if slices.Contains(in.Aliases[:i], a) {
			return invalid("aliases", "different from each other")
		}
	}
	return nil
}

func checkSize(extractable bool, n int) error {
	switch {
	case extractable && (n == 0 || n > kmsapi.MaxStandard):
		return invalid("payload", "between 1 and %d bytes", kmsapi.MaxStandard)
	case !extractable && n != 16 && n != 24 && n != 32:
		return invalid("payload", "a key of 128, 192 or 256 bits")
	}
	return nil
}

// load reads a key; what is not there is KEY_NOT_FOUND_ERR.
func (s *Service) load(ctx context.Context, instance, id string) (*keyRecord, int64, error) {
	var k keyRecord
	rev, err := s.store.Get(ctx, keyPath(instance, id), &k)
	if errors.Is(err, record.ErrNotFound) {
		return nil, 0, fault.Newf(fault.NotFound, "", id, "key does not exist").WithReason(kmsapi.KeyNotFound)
	}
	if errors.Is(err, record.ErrForged) { // somebody wrote to the store past us, and is not believed
		return nil, 0, fault.New(fault.BadContent, "", id, err).WithReason(kmsapi.IncompleteMetadata)
	}
	if err != nil {
		return nil, 0, err
	}
	return &k, rev, nil
}

// Resolve gives the id and the key ring of a key that is named by its id or
// by an alias.
func (s *Service) Resolve(ctx context.Context, instance, idOrAlias string) (id, ring string, err error) {
	id = idOrAlias
	if uuid.Validate(id) != nil {
		var a kmsapi.Alias
		if _, err := s.store.Get(ctx, aliasPath(instance, idOrAlias), &a); err != nil || strings.Contains(idOrAlias, "/") {
			if err == nil || errors.Is(err, record.ErrNotFound) {
				err = refusal(fault.NotFound, idOrAlias, kmsapi.KeyNotFound)
			}
			return "", "", err
		}
		id = a.KeyID
	}
	k, _, err := s.load(ctx, instance, id)
	if err != nil {
		return "", "", err
	}
	return id, k.KeyRing, nil
}

// change loads a key, lets f change it, and stores it with further changes in
// one transaction. Who comes second starts again from what the first left.
func (s *Service) change(ctx context.Context, instance, id string, f func(k *keyRecord, now time.Time) ([]record.Change, error)) (*keyRecord, error) {
	for try := range maxTries {
		k, rev, err := s.load(ctx, instance, id)
		if err != nil {
			return nil, err
		}
		now := s.stamp()
		more, err := f(k, now)
		if err != nil {
			return nil, err
		}
		k.UpdatedAt = now
		err = s.store.Commit(ctx, append([]record.Change{{Path: k.path(), Value: k, Rev: rev}}, more...)...)
		if !errors.Is(err, record.ErrConflict) {
			return k, err
		}
		select {
		case <-time.After(time.Duration(try) * 5 * time.Millisecond): // until the view has what the other wrote
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return nil, refusal(fault.Conflict, id, kmsapi.Conflict)
}

const maxTries = 10

// stateNow is the key's state with its expiry taken into account.
func (s *Service) stateNow(k *keyRecord) int {
	if k.State == stateActive && k.Expires != nil && !s.late().Before(*k.Expires) {
		return stateDeactivated
	}
	return k.State
}

func (s *Service) show(k *keyRecord) kmsapi.Key {
	v := k.Version
	deleted := k.State == stateDestroyed
	out := kmsapi.Key{
		Type: kmsapi.TypeKey, ID: k.ID, Name: k.Name, Description: k.Description, Aliases: k.Aliases, Tags: k.Tags, State: s.stateNow(k), Expiration: k.Expires,
		Extractable: k.Kind == kindStandard, CRN: crn(k.Instance, "key", k.ID), Imported: k.Imported,
		KeyRingID: k.KeyRing, CreationDate: &k.CreatedAt, CreatedBy: k.CreatedBy, AlgorithmType: "AES",
		AlgorithmMetadata: &kmsapi.AlgorithmMetadata{BitLength: fmt.Sprint(k.Bits), Mode: "GCM"}, AlgorithmBitSize: k.Bits, AlgorithmMode: "GCM",
		LastUpdateDate: &k.UpdatedAt, LastRotateDate: k.RotatedAt, KeyVersion: &kmsapi.KeyVersion{ID: v.ID, CreationDate: &v.CreatedAt},
		DualAuthDelete: &kmsapi.DualAuthDelete{Enabled: k.dual()}, Deleted: &deleted,
	}
	if k.dual() {
		set := s.authorized(k)
		out.DualAuthDelete.KeySetForDeletion = &set
		if set {
			end := k.SetAt.Add(s.window.DualAuth)
			out.DualAuthDelete.AuthExpiration = &end
		}
	}
	if r := k.Rotation; r != nil {
		out.Rotation = &kmsapi.Rotation{Enabled: &r.Enabled, IntervalMonth: r.Months}
	}
	if out.State != stateActive {
		why := reasonOf(k, out.State)
		out.NonactiveStateReason = &why
	}
	if deleted {
		s.showDeleted(k, &out)
	}
	return out
}

// Reasons for not being active, as the API numbers them.
const (
	reasonSuspended = 1
	reasonDeleted   = 2
	reasonExpired   = 3
)

func reasonOf(_ *keyRecord, state int) int {
	switch state {
	case stateDestroyed:
		return reasonDeleted
	case stateDeactivated:
		return reasonExpired
	}
	return reasonSuspended
}

func (s *Service) showDeleted(k *keyRecord, out *kmsapi.Key) {
	at := func(d time.Duration) *time.Time { t := k.DeletedAt.Add(d); return &t }
	out.DeletedBy, out.DeletionDate = k.DeletedBy, k.DeletedAt
	out.RestoreExpiration, out.PurgeAllowedFrom, out.PurgeScheduledOn = at(s.window.RestoreMax), at(s.window.PurgeMin), at(s.window.PurgeAuto)
	restore, purge := !k.Final && !s.Time().After(*out.RestoreExpiration), !s.Time().Before(*out.PurgeAllowedFrom)
	out.RestoreAllowed, out.PurgeAllowed = &restore, &purge
	if k.Final {
		out.RestoreExpiration = nil
	}
}

func crn(instance, kind, id string) string {
	return fmt.Sprintf("crn:v1:kmsctl:private:kms:::%s:%s:%s", instance, kind, id)
}

func (s *Service) withPayload(ctx context.Context, k *keyRecord) (kmsapi.Key, error) {
	out := s.show(k)
	v := k.Version
	if v.Sealed == nil { // destroyed for good
		return out, nil
	}
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
	if material && k.Kind == kindStandard && k.State != stateDestroyed {
		return s.withPayload(ctx, k)
	}
	out := s.show(k)
	return out, s.withUses(ctx, k, out.KeyVersion)
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
	if in.Placement == "" {
		in.Placement = hsm.PlacementWrapped
	}
	if in.Placement != hsm.PlacementWrapped && in.Placement != hsm.PlacementToken {
		return kmsapi.Instance{}, invalid("placement", "%s or %s", hsm.PlacementWrapped, hsm.PlacementToken)
	}
	out := kmsapi.Instance{ID: uuid.NewString(), Name: in.Name, Dialect: in.Dialect, Placement: in.Placement, CreatedAt: s.stamp(), CreatedBy: who}
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
