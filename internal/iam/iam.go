// Package iam says who somebody is and what they may do: service IDs, API
// keys, access tokens, policies, and the roles of two families on one table of
// actions. It keeps API keys as hashes only. It decides; it knows no HTTP.
package iam

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Store keeps records; see internal/store.
type Store interface {
	Get(ctx context.Context, path string, v any) (rev int64, err error)
	List(ctx context.Context, prefix string, each func(m record.Meta, decode func(v any) error) error) error
	Commit(ctx context.Context, changes ...record.Change) error
	// Version grows with every change of a record directly in the folder.
	Version(dir string) int64
}

// Config of a Service.
type Config struct {
	// SigningKey is the first key that signs access tokens: a P-256 key that is
	// the same in every replica and never stored in the clear.
	SigningKey *ecdsa.PrivateKey
	// Derive gives a further one, the same for the same salt in every replica.
	Derive func(ctx context.Context, salt []byte) (*ecdsa.PrivateKey, error)
	Now    func() time.Time
	// Time is a time that no machine's clock can jump; nil: Now.
	Time func() time.Time
	// Period is for how long a key signs access tokens before SweepSigningKey
	// rotates it; 0: until somebody does.
	Period time.Duration
}

// Service answers who and whether. Safe for concurrent use.
type Service struct {
	store  Store
	derive func(ctx context.Context, salt []byte) (*ecdsa.PrivateKey, error)
	now    func() time.Time
	time   func() time.Time
	period time.Duration

	keys   keyring
	proofs proofs
	rights rights
}

// New makes a Service.
func New(s Store, c Config) *Service {
	if c.Time == nil {
		c.Time = c.Now
	}
	return &Service{store: s, keys: newKeyring(c.SigningKey), derive: c.Derive, now: c.Now, time: c.Time, period: c.Period}
}

// ServiceID is somebody who is not a person, at iam/serviceids/<id>.
type ServiceID struct {
	ID          string    `json:"id"` // ServiceId-<uuid>
	Name        string    `json:"name"`
	Description string    `json:"description,omitempty"`
	CreatedAt   time.Time `json:"createdAt"`
	CreatedBy   string    `json:"createdBy"`
	Subjects    []string  `json:"subjects,omitempty"` // see subject.go
	// Instance binds it: it belongs to the instance's managers, and nobody can
	// give it rights anywhere else.
	Instance string `json:"instance,omitempty"`
}

// APIKey proves a service ID, or an administrator. Hash is the SHA-256 of the
// whole key: it has 256 random bits, so a slow hash would add nothing.
type APIKey struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	ServiceID string    `json:"serviceId,omitempty"`
	Admin     bool      `json:"admin,omitempty"`
	Hash      string    `json:"hash"`
	CreatedAt time.Time `json:"createdAt"`
	CreatedBy string    `json:"createdBy"`
}

const (
	serviceIDs = "iam/serviceids/"
	names      = "iam/names/" // name of a service ID, or <instance>/<name> of a bound one → its id
	apiKeys    = "iam/apikeys/"
	policies   = "iam/policies/" // <service id>/<policy id>
	keyPrefix  = "kms_"
)

// Kind of a Principal.
type Kind string

// The kinds: the user who runs the embedded KMS, an administrator by API key,
// and a service ID.
const (
	KindLocal   Kind = "local-admin"
	KindAdmin   Kind = "admin"
	KindService Kind = "service"
)

// Principal is somebody who has proved who they are. The zero value is nobody.
type Principal struct {
	Kind      Kind
	ServiceID string
	APIKeyID  string
	instance  string // see In
}

// LocalAdmin is the user of this machine who runs the embedded KMS.
func LocalAdmin() Principal { return Principal{Kind: KindLocal} }

// String is how a principal appears in records and in the audit log.
func (p Principal) String() string {
	switch p.Kind {
	case KindLocal:
		return "local-admin"
	case KindAdmin:
		return "admin:" + p.APIKeyID
	case KindService:
		return p.ServiceID
	}
	return "nobody"
}

// In narrows what p sees and changes here to the service IDs of an instance.
// Who is no administrator can only act as the manager of an instance.
func (p Principal) In(instance string) Principal {
	p.instance = instance
	return p
}

// Admin says whether p may administer everything.
func (p Principal) Admin() bool { return p.Kind == KindLocal || p.Kind == KindAdmin }

var (
	errNotAllowed = errors.New("the policies do not allow it")
	errNotKnown   = errors.New("the token does not prove anybody")
)

// NewAPIKey makes an API key: kms_ and the unpadded URL-safe base64 of 16
// bytes id and 32 bytes secret. id is in hex, hash is hex SHA-256 of the key.
func NewAPIKey() (key secret.Value, id, hash string, err error) {
	raw := make([]byte, 48)
	if _, err := rand.Read(raw); err != nil {
		return key, "", "", err
	}
	text := []byte(keyPrefix + base64.RawURLEncoding.EncodeToString(raw))
	clear(raw[16:])
	sum := sha256.Sum256(text)
	return secret.New(text), hex.EncodeToString(raw[:16]), hex.EncodeToString(sum[:]), nil
}

// keyID is the id inside an API key, or "" when it is none.
func keyID(key []byte) string {
	rest, ok := strings.CutPrefix(string(key), keyPrefix)
	raw, err := base64.RawURLEncoding.DecodeString(rest)
	if !ok || err != nil || len(raw) != 48 {
		return ""
	}
	return hex.EncodeToString(raw[:16])
}

// Token is an access token; ExpiresIn is in seconds, Expiration in Unix
// seconds.
type Token struct {
	AccessToken string
	Principal   Principal // whom it proves
	ExpiresIn   int64
	Expiration  int64
}

const (
	tokenLife = time.Hour
	issuer    = "kmsctl"
	// CodeUnknownKey is what ICP and IBM Cloud answer to a wrong API key.
	CodeUnknownKey = "BXNIM0415E"
)

type claims struct {
	jwt.RegisteredClaims
	IAMID  string `json:"iam_id"`
	KeyID  string `json:"key_id"`
	Kind   Kind   `json:"kind"`
	Scopes string `json:"scope,omitempty"`
}

// Issue exchanges an API key for an access token (JWT, ES256, one hour).
func (s *Service) Issue(ctx context.Context, key secret.Value) (Token, error) {
	k, err := s.liveKey(ctx, keyID(key.Reveal()))
	sum := sha256.Sum256(key.Reveal())
	if err == nil && subtle.ConstantTimeCompare([]byte(k.Hash), []byte(hex.EncodeToString(sum[:]))) != 1 {
		err = errNotKnown
	}
	if errors.Is(err, errNotKnown) {
		return Token{}, fault.Newf(fault.Denied, "", "", "Provided API key could not be found").WithReason(CodeUnknownKey)
	}
	if err != nil {
		return Token{}, err
	}
	now := s.now()
	p := principalOf(k)
	c := claims{IAMID: "iam-" + p.String(), KeyID: k.ID, Kind: p.Kind, RegisteredClaims: jwt.RegisteredClaims{
		Issuer: issuer, Subject: p.String(), ID: uuid.NewString(), IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(tokenLife))}}
	by, private, err := s.signs(ctx)
	if err != nil {
		return Token{}, err
	}
	t := jwt.NewWithClaims(jwt.SigningMethodES256, c)
	t.Header["kid"] = by.ID
	signed, err := sign(t, private)
	if err != nil {
		return Token{}, fmt.Errorf("sign token: %w", err)
	}
	return Token{AccessToken: signed, Principal: p, ExpiresIn: int64(tokenLife / time.Second), Expiration: now.Add(tokenLife).Unix()}, nil
}

// Authenticate checks a token, and that its API key and service ID still
// exist: a token outlives neither.
func (s *Service) Authenticate(ctx context.Context, token string) (Principal, error) {
	if strings.ContainsAny(token, "\r\n") { // base64 would skip them
		return Principal{}, fault.New(fault.Denied, "", "", errNotKnown)
	}
	c, proven := s.proofs.get(token, s.now())
	if proven {
		if _, err := s.goodKey(ctx, c.key); err != nil {
			return Principal{}, unproven(err)
		}
	} else {
		fresh, err := s.check(ctx, token)
		if err != nil {
			return Principal{}, err
		}
		c = *fresh
	}
	k, err := s.liveKey(ctx, c.KeyID)
	if err != nil {
		return Principal{}, unproven(err)
	}
	return principalOf(k), nil
}

// check checks a token's signature and times, and remembers that they were
// right.
func (s *Service) check(ctx context.Context, token string) (*proof, error) {
	c := &proof{}
	t, err := jwt.ParseWithClaims(token, &c.claims, func(t *jwt.Token) (any, error) {
		c.key, _ = t.Header["kid"].(string)
		return s.verifies(ctx, c.key)
	}, jwt.WithValidMethods([]string{"ES256"}), jwt.WithIssuer(issuer), jwt.WithExpirationRequired(), jwt.WithIssuedAt(),
		jwt.WithLeeway(clockLeeway), jwt.WithTimeFunc(s.now), jwt.WithStrictDecoding())
	if err != nil || c.IssuedAt == nil || twin(t.Signature) {
		return nil, fault.New(fault.Denied, "", "", errNotKnown)
	}
	s.proofs.put(token, *c)
	return c, nil
}

// unproven makes a refusal of what proves nobody, and leaves faults of the
// store as they are.
func unproven(err error) error {
	if errors.Is(err, errNotKnown) {
		return fault.New(fault.Denied, "", "", errNotKnown)
	}
	return err
}

func principalOf(k APIKey) Principal {
	if k.Admin {
		return Principal{Kind: KindAdmin, APIKeyID: k.ID}
	}
	return Principal{Kind: KindService, ServiceID: k.ServiceID, APIKeyID: k.ID}
}

// liveKey is the API key with this id, if it and its service ID exist.
func (s *Service) liveKey(ctx context.Context, id string) (APIKey, error) {
	var k APIKey
	if id == "" || strings.Contains(id, "/") {
		return k, errNotKnown
	}
	if _, err := s.store.Get(ctx, apiKeys+id, &k); err != nil {
		return k, gone(err)
	}
	if k.Admin {
		return k, nil
	}
	var sid ServiceID
	_, err := s.store.Get(ctx, serviceIDs+k.ServiceID, &sid)
	return k, gone(err)
}

func gone(err error) error {
	if errors.Is(err, record.ErrNotFound) {
		return errNotKnown
	}
	return err
}

// EnsureAdmin registers an administrator's API key by its id and hash. A
// second call with the same key does nothing.
func (s *Service) EnsureAdmin(ctx context.Context, id, hash string) error {
	if b, err := hex.DecodeString(hash); err != nil || len(b) != sha256.Size {
		return fault.Usagef("the administrator's key hash is not a SHA-256 in hex")
	}
	if b, err := hex.DecodeString(id); err != nil || len(b) != 16 {
		return fault.Usagef("the administrator's key id is not 16 bytes in hex")
	}
	k := APIKey{ID: id, Name: "first administrator", Admin: true, Hash: hash, CreatedAt: s.stamp(), CreatedBy: "install"}
	err := s.store.Commit(ctx, record.Change{Path: apiKeys + id, Value: k})
	if errors.Is(err, record.ErrConflict) {
		var have APIKey
		if _, err := s.store.Get(ctx, apiKeys+id, &have); err != nil {
			return err
		}
		if have.Hash != hash || !have.Admin {
			return fault.Newf(fault.Conflict, "register administrator's key", id, "another key has this id")
		}
		return nil
	}
	return err
}

func (s *Service) stamp() time.Time { return seconds(s.now()) }

func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

func checkName(name string) error {
	if n := len([]rune(name)); n < 1 || n > 90 || strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, "ServiceId-") {
		return fault.Usagef("name %q must have 1 to 90 characters, no slash, and not begin with ServiceId-", name)
	}
	return nil
}

// CreateServiceID makes a service ID; its name is unique.
// Subjects are further ways to prove it, besides API keys.
func (s *Service) CreateServiceID(ctx context.Context, who Principal, name, description string, subjects ...string) (ServiceID, error) {
	if err := s.mayManage(ctx, who); err != nil {
		return ServiceID{}, err
	}
	sid, changes, err := s.newServiceID(who, name, description, subjects...)
	if err != nil {
		return sid, err
	}
	return sid, taken(name, s.store.Commit(ctx, changes...))
}

func taken(name string, err error) error {
	if errors.Is(err, record.ErrConflict) {
		return fault.Newf(fault.Conflict, "create service ID", name, "a service ID of this name, or with one of its subjects, exists").WithHint("choose another name, or delete it first: kmsctl iam service-ids delete %s", name)
	}
	return err
}

func (s *Service) newServiceID(who Principal, name, description string, subjects ...string) (ServiceID, []record.Change, error) {
	if err := checkName(name); err != nil {
		return ServiceID{}, nil, err
	}
	if len(subjects) > 0 && !who.Admin() {
		return ServiceID{}, nil, fault.Newf(fault.Denied, "", "", "only an administrator says whose certificate or ServiceAccount a service ID is")
	}
	sid := ServiceID{ID: "ServiceId-" + uuid.NewString(), Name: name, Description: description, CreatedAt: s.stamp(), CreatedBy: who.String(), Subjects: subjects, Instance: who.instance}
	proofs, err := subjectChanges(sid)
	return sid, append([]record.Change{{Path: serviceIDs + sid.ID, Value: sid}, {Path: namePath(sid.Instance, name), Value: sid.ID}}, proofs...), err
}

// namePath is where a name leads to its service ID: bound ones have names of
// their own, so that no instance learns another's.
func namePath(instance, name string) string {
	if instance != "" {
		instance += "/"
	}
	return names + instance + name
}

// ServiceIDs lists the service IDs that who administers.
func (s *Service) ServiceIDs(ctx context.Context, who Principal) ([]ServiceID, error) {
	if err := s.mayManage(ctx, who); err != nil {
		return nil, err
	}
	out := []ServiceID{}
	err := s.store.List(ctx, serviceIDs, func(_ record.Meta, decode func(any) error) error {
		var sid ServiceID
		if err := decode(&sid); err != nil {
			return err
		}
		if who.sees(sid) {
			out = append(out, sid)
		}
		return nil
	})
	return out, err
}

// sees says whether a service ID is among those that p administers.
func (p Principal) sees(sid ServiceID) bool { return p.instance == "" || p.instance == sid.Instance }

// Find gives a service ID that who administers, by id or name, with its
// revision. Another's looks like none.
func (s *Service) Find(ctx context.Context, who Principal, nameOrID string) (ServiceID, int64, error) {
	if err := s.mayManage(ctx, who); err != nil {
		return ServiceID{}, 0, err
	}
	id := nameOrID
	if strings.Contains(id, "/") {
		return ServiceID{}, 0, notThere("service ID", nameOrID)
	}
	if !strings.HasPrefix(nameOrID, "ServiceId-") {
		if _, err := s.store.Get(ctx, namePath(who.instance, nameOrID), &id); err != nil {
			return ServiceID{}, 0, absent("service ID", nameOrID, err)
		}
	}
	var sid ServiceID
	rev, err := s.store.Get(ctx, serviceIDs+id, &sid)
	if err == nil && !who.sees(sid) {
		return ServiceID{}, 0, notThere("service ID", nameOrID)
	}
	return sid, rev, absent("service ID", nameOrID, err)
}

func notThere(what, object string) error {
	return fault.Newf(fault.NotFound, "find "+what, object, "there is none")
}

func absent(what, object string, err error) error {
	if errors.Is(err, record.ErrNotFound) {
		return notThere(what, object)
	}
	return err
}

// DeleteServiceID removes a service ID with its API keys and policies, and
// gives what it was.
func (s *Service) DeleteServiceID(ctx context.Context, who Principal, nameOrID string) (ServiceID, error) {
	sid, rev, err := s.Find(ctx, who, nameOrID)
	if err != nil {
		return sid, err
	}
	if err := s.covers(ctx, who, sid); err != nil {
		return sid, err
	}
	return sid, s.removeServiceID(ctx, sid, rev)
}

func (s *Service) removeServiceID(ctx context.Context, sid ServiceID, rev int64) error {
	var id string
	name := namePath(sid.Instance, sid.Name)
	nameRev, err := s.store.Get(ctx, name, &id)
	if err != nil {
		return err
	}
	changes := []record.Change{{Path: serviceIDs + sid.ID, Rev: rev}, {Path: name, Rev: nameRev}}
	freed, err := s.dropSubjects(ctx, sid)
	if err != nil {
		return err
	}
	changes = append(changes, freed...)
	var rest []record.Change
	err = s.store.List(ctx, apiKeys, func(m record.Meta, decode func(any) error) error {
		var k APIKey
		if err := decode(&k); err != nil {
			return err
		}
		if k.ServiceID == sid.ID {
			rest = append(rest, record.Change{Path: m.Path, Rev: m.Rev})
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = s.store.List(ctx, policies+sid.ID+"/", func(m record.Meta, _ func(any) error) error {
		rest = append(rest, record.Change{Path: m.Path, Rev: m.Rev})
		return nil
	})
	if err != nil {
		return err
	}
	// What a transaction cannot take goes before, so that a second call goes on
	// where this one was cut short.
	fits := min(len(rest), batch-len(changes))
	if err := s.commitAll(ctx, rest[fits:]); err != nil {
		return err
	}
	return s.store.Commit(ctx, append(changes, rest[:fits]...)...)
}

// ForgetInstance removes the service IDs that are bound to an instance, and
// from all others what they may do in it. Cut short, a second call goes on.
func (s *Service) ForgetInstance(ctx context.Context, instance string) error {
	var all []ServiceID
	revs := map[string]int64{}
	err := s.store.List(ctx, serviceIDs, func(m record.Meta, decode func(any) error) error {
		var sid ServiceID
		err := decode(&sid)
		all, revs[sid.ID] = append(all, sid), m.Rev
		return err
	})
	if err != nil {
		return err
	}
	for _, sid := range all {
		if sid.Instance == instance {
			err = s.removeServiceID(ctx, sid, revs[sid.ID])
		} else {
			err = s.withdraw(ctx, sid, instance)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// CreateAPIKey makes an API key for a service ID. The key is in the answer,
// and nowhere else.
func (s *Service) CreateAPIKey(ctx context.Context, who Principal, name, service string) (APIKey, secret.Value, error) {
	if err := checkName(name); err != nil {
		return APIKey{}, secret.Value{}, err
	}
	sid, _, err := s.Find(ctx, who, service)
	if err != nil {
		return APIKey{}, secret.Value{}, err
	}
	if err := s.covers(ctx, who, sid); err != nil {
		return APIKey{}, secret.Value{}, err
	}
	k, key, err := s.newAPIKey(who, name, sid.ID)
	if err != nil {
		return k, key, err
	}
	return k, key, s.store.Commit(ctx, record.Change{Path: apiKeys + k.ID, Value: k})
}

func (s *Service) newAPIKey(who Principal, name, service string) (APIKey, secret.Value, error) {
	key, id, hash, err := NewAPIKey()
	return APIKey{ID: id, Name: name, ServiceID: service, Hash: hash, CreatedAt: s.stamp(), CreatedBy: who.String()}, key, err
}

// APIKeys lists API keys, of one service ID when it is named; administrators'
// keys have none. Hashes are left out.
func (s *Service) APIKeys(ctx context.Context, who Principal, service string) ([]APIKey, error) {
	mine := map[string]bool{}
	if service != "" {
		sid, _, err := s.Find(ctx, who, service)
		if err != nil {
			return nil, err
		}
		mine[sid.ID] = true
	} else {
		all, err := s.ServiceIDs(ctx, who)
		if err != nil {
			return nil, err
		}
		for _, sid := range all {
			mine[sid.ID] = true
		}
		mine[""] = who.Admin() && who.instance == ""
	}
	out := []APIKey{}
	err := s.store.List(ctx, apiKeys, func(_ record.Meta, decode func(any) error) error {
		var k APIKey
		if err := decode(&k); err != nil {
			return err
		}
		if k.Hash = ""; mine[k.ServiceID] {
			out = append(out, k)
		}
		return nil
	})
	return out, err
}

// DeleteAPIKey revokes an API key, and with it every token that it gave.
func (s *Service) DeleteAPIKey(ctx context.Context, who Principal, id string) error {
	if err := s.mayManage(ctx, who); err != nil {
		return err
	}
	if strings.Contains(id, "/") {
		return notThere("API key", id)
	}
	var k APIKey
	rev, err := s.store.Get(ctx, apiKeys+id, &k)
	if err != nil {
		return absent("API key", id, err)
	}
	if who.instance != "" {
		var sid ServiceID
		_, err := s.store.Get(ctx, serviceIDs+k.ServiceID, &sid)
		if k.ServiceID == "" || errors.Is(err, record.ErrNotFound) || err == nil && !who.sees(sid) {
			return notThere("API key", id)
		}
		if err == nil {
			err = s.covers(ctx, who, sid)
		}
		if err != nil {
			return err
		}
	}
	return s.store.Commit(ctx, record.Change{Path: apiKeys + id, Rev: rev})
}

// Onboarded is what Onboard made.
type Onboarded struct {
	ServiceID ServiceID
	APIKey    secret.Value
	PolicyID  string
}

// MayOnboard says beforehand whether Onboard would refuse a name or a role, so
// that nothing is made for it in vain. The instance may be one that is not
// there yet.
func (s *Service) MayOnboard(ctx context.Context, who Principal, name, instance, role string) error {
	if err := checkName(name); err != nil {
		return err
	}
	p, err := NewPolicy(cmp.Or(instance, uuid.NewString()), uuid.NewString(), "", role)
	if err != nil {
		return err
	}
	return s.MayGrant(ctx, who, p)
}

// Onboard makes a service ID, an API key and a policy on one key, all or none.
func (s *Service) Onboard(ctx context.Context, who Principal, name, instance, key, role string) (Onboarded, error) {
	if err := s.mayManage(ctx, who); err != nil {
		return Onboarded{}, err
	}
	sid, changes, err := s.newServiceID(who, name, "")
	if err != nil {
		return Onboarded{}, err
	}
	k, value, err := s.newAPIKey(who, name, sid.ID)
	if err != nil {
		return Onboarded{}, err
	}
	p, err := NewPolicy(instance, key, "", role)
	if err != nil {
		return Onboarded{}, err
	}
	if err := s.MayGrant(ctx, who, p); err != nil {
		return Onboarded{}, err
	}
	p.ID = uuid.NewString()
	changes = append(changes, record.Change{Path: apiKeys + k.ID, Value: k}, record.Change{Path: policies + sid.ID + "/" + p.ID, Value: p})
	if err := taken(name, s.store.Commit(ctx, changes...)); err != nil {
		return Onboarded{}, err
	}
	return Onboarded{sid, value, p.ID}, nil
}
