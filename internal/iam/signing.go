package iam

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
)

// SigningKey is a key that signs access tokens, at iam/signing-keys/<id>. The
// private key is nowhere: who needs it derives it from the sealed seed and the
// salt. The first key has no salt, and no record until its age is counted or it
// is retired.
type SigningKey struct {
	ID        string     `json:"id"`     // kid in a token's header
	Public    []byte     `json:"public"` // P-256, uncompressed
	Salt      []byte     `json:"salt,omitempty"`
	CreatedAt time.Time  `json:"createdAt,omitzero"` // by Config.Time; of the first key, when its age was first counted
	CreatedBy string     `json:"createdBy,omitempty"`
	RetiredAt *time.Time `json:"retiredAt,omitempty"` // it signs no more
	Withdrawn bool       `json:"withdrawn,omitempty"` // what it signed is worth nothing
}

const signingKeys = "iam/signing-keys/"

// GoodUntil is when the last token of a retired key ends; nil while it signs,
// and of a withdrawn key the moment when it was retired.
func (k SigningKey) GoodUntil() *time.Time {
	if k.RetiredAt == nil {
		return nil
	}
	end := *k.RetiredAt
	if !k.Withdrawn {
		end = end.Add(tokenLife + clockLeeway)
	}
	return &end
}

func (k SigningKey) good(now time.Time) bool {
	end := k.GoodUntil()
	return end == nil || !k.Withdrawn && now.Before(*end)
}

// keyring keeps the signing keys until one changes, and the private keys that
// were derived.
type keyring struct {
	first SigningKey

	mu      sync.RWMutex
	version int64
	all     map[string]SigningKey // never changed; nil: not read yet
	private map[string]*ecdsa.PrivateKey
}

func newKeyring(first *ecdsa.PrivateKey) keyring {
	k := SigningKey{Public: publicOf(first)}
	k.ID = kid(k.Public)
	return keyring{first: k, private: map[string]*ecdsa.PrivateKey{k.ID: first}}
}

func publicOf(k *ecdsa.PrivateKey) []byte {
	b, err := k.PublicKey.Bytes()
	if err != nil {
		panic(err) // a P-256 key always has its point
	}
	return b
}

// sign gives a token as text. For each signature (r, s) of ECDSA, (r, -s) is
// good for the same text; of the two we write the one with the smaller s, and
// take no other, so that nobody can spell a token anew.
func sign(t *jwt.Token, by *ecdsa.PrivateKey) (string, error) {
	text, err := t.SigningString()
	if err != nil {
		return "", err
	}
	sig, err := t.Method.Sign(text, by)
	if err != nil {
		return "", err
	}
	if twin(sig) {
		s := sig[len(sig)/2:]
		new(big.Int).Sub(elliptic.P256().Params().N, new(big.Int).SetBytes(s)).FillBytes(s)
	}
	return text + "." + t.EncodeSegment(sig), nil
}

// twin says whether a signature is the one of two that is not written.
func twin(sig []byte) bool {
	s := new(big.Int).SetBytes(sig[len(sig)/2:])
	return s.Lsh(s, 1).Cmp(elliptic.P256().Params().N) > 0
}

func kid(public []byte) string {
	sum := sha256.Sum256(public)
	return hex.EncodeToString(sum[:8])
}

// signingKeys are all that are known, by id.
func (s *Service) signingKeys(ctx context.Context) (map[string]SigningKey, error) {
	version := s.store.Version(signingKeys) // before the list: what comes meanwhile is read again
	s.keys.mu.RLock()
	all, same := s.keys.all, s.keys.version == version
	s.keys.mu.RUnlock()
	if all != nil && same {
		return all, nil
	}
	all = map[string]SigningKey{s.keys.first.ID: s.keys.first}
	err := s.store.List(ctx, signingKeys, func(_ record.Meta, decode func(any) error) error {
		var k SigningKey
		if err := decode(&k); err != nil {
			return err
		}
		all[k.ID] = k
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.keys.mu.Lock()
	defer s.keys.mu.Unlock()
	s.keys.all, s.keys.version = all, version
	return all, nil
}

// goodKey gives the key of an id, while what it signed is good.
func (s *Service) goodKey(ctx context.Context, id string) (SigningKey, error) {
	all, err := s.signingKeys(ctx)
	if err != nil {
		return SigningKey{}, err
	}
	k, ok := all[id]
	if !ok || !k.good(s.now()) {
		return SigningKey{}, errNotKnown
	}
	return k, nil
}

// verifies gives the public key of an id, while what it signed is good.
func (s *Service) verifies(ctx context.Context, id string) (*ecdsa.PublicKey, error) {
	k, err := s.goodKey(ctx, id)
	if err != nil {
		return nil, err
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), k.Public)
}

// signs gives the key that signs now.
func (s *Service) signs(ctx context.Context) (SigningKey, *ecdsa.PrivateKey, error) {
	all, err := s.signingKeys(ctx)
	if err != nil {
		return SigningKey{}, nil, err
	}
	for _, k := range all {
		if k.RetiredAt == nil {
			private, err := s.private(ctx, k)
			return k, private, err
		}
	}
	return SigningKey{}, nil, errors.New("no key signs access tokens") // a rotation retires one and makes one
}

func (s *Service) private(ctx context.Context, k SigningKey) (*ecdsa.PrivateKey, error) {
	s.keys.mu.RLock()
	private := s.keys.private[k.ID]
	s.keys.mu.RUnlock()
	if private != nil {
		return private, nil
	}
	private, err := s.derive(ctx, k.Salt)
	if err != nil {
		return nil, fmt.Errorf("derive the key that signs access tokens: %w", err)
	}
	if kid(publicOf(private)) != k.ID {
		return nil, fault.Newf(fault.BadContent, "derive signing key", k.ID, "the seed gives another key")
	}
	s.keys.mu.Lock()
	defer s.keys.mu.Unlock()
	s.keys.private[k.ID] = private
	return private, nil
}

// SigningKeys lists them, newest first.
func (s *Service) SigningKeys(ctx context.Context) ([]SigningKey, error) {
	all, err := s.signingKeys(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]SigningKey, 0, len(all))
	for _, k := range all {
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b SigningKey) int { return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

// RotateSigningKey makes a new key, which signs from now on in all replicas.
// What the old one signed is good until it ends; with now it is good no more,
// nor is what older keys signed.
func (s *Service) RotateSigningKey(ctx context.Context, who Principal, now bool) (SigningKey, error) {
	return s.rotateSigningKey(ctx, who.String(), now)
}

func (s *Service) rotateSigningKey(ctx context.Context, by string, now bool) (SigningKey, error) {
	salt := make([]byte, 32)
	if _, err := rand.Read(salt); err != nil {
		return SigningKey{}, err
	}
	private, err := s.derive(ctx, salt)
	if err != nil {
		return SigningKey{}, err
	}
	fresh := SigningKey{Public: publicOf(private), Salt: salt, CreatedAt: seconds(s.time()), CreatedBy: by}
	fresh.ID = kid(fresh.Public)
	changes := []record.Change{{Path: signingKeys + fresh.ID, Value: fresh}}
	at := s.retirement()
	all, err := s.signingKeys(ctx)
	if err != nil {
		return SigningKey{}, err
	}
	for _, k := range all {
		var ch []record.Change
		if ch, err = s.retire(ctx, k, at, now); err != nil {
			break
		}
		changes = append(changes, ch...)
	}
	if err == nil {
		err = s.store.Commit(ctx, changes...)
	}
	if errors.Is(err, record.ErrConflict) {
		return SigningKey{}, fault.Newf(fault.Conflict, "rotate", "the signing key", "somebody else did at this moment").WithHint("see: kmsctl iam signing-key list")
	}
	return fresh, err
}

// retirement is when a key that signed until now is retired: what another
// replica signed by a clock that is ahead of this machine's must live on too.
func (s *Service) retirement() time.Time {
	at := s.stamp()
	if t := seconds(s.time()); t.After(at) {
		return t
	}
	return at
}

// lifeCycle is in the records who did what is done by itself.
const lifeCycle = "life-cycle"

// SigningKeyDue is when the key that signs is to be rotated by itself; zero
// when it is not, or nobody counts its age yet.
func (s *Service) SigningKeyDue(k SigningKey) time.Time {
	if s.period == 0 || k.RetiredAt != nil || k.CreatedAt.IsZero() {
		return time.Time{}
	}
	return k.CreatedAt.Add(s.period)
}

// SigningKeyAge is for how long a key signs, or signed; 0 where nobody counts.
func (s *Service) SigningKeyAge(k SigningKey) time.Duration {
	if k.CreatedAt.IsZero() {
		return 0
	}
	end := s.time()
	if k.RetiredAt != nil {
		end = *k.RetiredAt
	}
	return max(0, end.Sub(k.CreatedAt))
}

// SweepSigningKey rotates the key that signs when its period is over, and gives
// the new one; nil when it is not over, or another replica was first.
func (s *Service) SweepSigningKey(ctx context.Context) (*SigningKey, error) {
	if s.period == 0 {
		return nil, nil
	}
	all, err := s.signingKeys(ctx)
	if err != nil {
		return nil, err
	}
	now := s.time()
	for _, k := range all {
		switch {
		case k.RetiredAt != nil:
		case k.CreatedAt.IsZero() || k.CreatedAt.After(now.Add(time.Minute)):
			return nil, s.countFrom(ctx, k, now)
		case !now.Before(s.SigningKeyDue(k)):
			fresh, err := s.rotateSigningKey(ctx, lifeCycle, false)
			if fault.KindOf(err) == fault.Conflict {
				return nil, nil
			}
			if err != nil {
				return nil, err
			}
			return &fresh, nil
		}
	}
	return nil, nil
}

// countFrom has the age of a key count from now on: the first key's, which has
// no day, and that of a key which was made while the time was wrong and was
// confirmed as something earlier since.
func (s *Service) countFrom(ctx context.Context, k SigningKey, now time.Time) error {
	var have SigningKey
	rev, err := s.store.Get(ctx, signingKeys+k.ID, &have)
	if err != nil && !errors.Is(err, record.ErrNotFound) {
		return err
	}
	if have.RetiredAt != nil {
		return nil // somebody rotated it meanwhile
	}
	k.CreatedAt = seconds(now)
	err = s.store.Commit(ctx, record.Change{Path: signingKeys + k.ID, Value: k, Rev: rev})
	if errors.Is(err, record.ErrConflict) {
		return nil // another replica counts
	}
	return err
}

// retire is the change that ends a key's signing, or removes it when its last
// token has ended long ago. The first key's record stays: without it, the key
// would sign again.
func (s *Service) retire(ctx context.Context, k SigningKey, at time.Time, now bool) ([]record.Change, error) {
	var have SigningKey
	rev, err := s.store.Get(ctx, signingKeys+k.ID, &have)
	absent := errors.Is(err, record.ErrNotFound)
	if err != nil && !absent {
		return nil, err
	}
	// Changed since the keys were listed: then there is a newer one too.
	if absent && k.ID != s.keys.first.ID || (have.RetiredAt == nil) != (k.RetiredAt == nil) {
		return nil, record.ErrConflict
	}
	long := k.RetiredAt != nil && !k.good(at.Add(-24*time.Hour))
	switch {
	case long && k.ID != s.keys.first.ID:
		return []record.Change{{Path: signingKeys + k.ID, Rev: rev}}, nil
	case k.RetiredAt == nil:
		k.RetiredAt, k.Withdrawn = &at, now
	case now && !k.Withdrawn:
		k.Withdrawn = true
	default:
		return nil, nil
	}
	return []record.Change{{Path: signingKeys + k.ID, Value: k, Rev: rev}}, nil
}
