package servecmd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/sha256"
	"math/big"
	"time"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
)

// SigningFlags say how the key is kept that signs access tokens.
type SigningFlags struct {
	Period time.Duration `json:"period,omitempty"`
}

const usualPeriod = 90 * 24 * time.Hour

// Add puts the flag into fs.
func (f *SigningFlags) Add(fs *pflag.FlagSet) {
	fs.DurationVar(&f.Period, "signing-key-period", usualPeriod,
		"how long one key signs access tokens before a new one does; what it signed stays good until it ends; 0: until 'kmsctl iam signing-key rotate'")
}

// Check holds the rule of the flag.
func (f *SigningFlags) Check() error {
	if f.Period < 0 {
		return fault.Usagef("--signing-key-period: %s is negative", f.Period).WithHint("as in 2160h, which is 90 days; 0 never rotates by itself")
	}
	return nil
}

// sweepSigningKey rotates the key when its period is over.
func (k *KMS) sweepSigningKey(ctx context.Context) []kms.Swept {
	fresh, err := k.IAM.SweepSigningKey(ctx)
	if fresh == nil && err == nil {
		return nil
	}
	act := kms.Swept{Action: "iam.signing-keys.rotate", Err: err}
	if fresh != nil {
		act.Key = fresh.ID
	}
	return []kms.Swept{act}
}

// signingKeyAge is for how long the key signs that signs now, in seconds.
func (k *KMS) signingKeyAge() float64 {
	all, err := k.IAM.SigningKeys(context.Background())
	if err != nil {
		return 0
	}
	for _, key := range all {
		if key.RetiredAt == nil {
			return k.IAM.SigningKeyAge(key).Seconds()
		}
	}
	return 0
}

// deriveSigningKey opens the sealed seed for a moment: it does not stay here.
func (k *KMS) deriveSigningKey(ctx context.Context, salt []byte) (*ecdsa.PrivateKey, error) {
	seed, err := kms.TokenKey(ctx, k.plain, k.Token)
	if err != nil {
		return nil, err
	}
	defer clear(seed)
	return signingKey(seed, salt)
}

// signingKey derives a P-256 key that signs access tokens from the sealed
// seed, so that all replicas have the same one. The seed is 32 random bytes
// of the HSM; the scalar is its HKDF output of 48 bytes reduced into [1, n-1]
// (FIPS 186-5, A.2.1).
func signingKey(seed, salt []byte) (*ecdsa.PrivateKey, error) {
	wide, err := hkdf.Key(sha256.New, seed, salt, "kmsctl access token", 48)
	if err != nil {
		return nil, err
	}
	defer clear(wide)
	curve := elliptic.P256()
	n := new(big.Int).Sub(curve.Params().N, big.NewInt(1))
	d := new(big.Int).Mod(new(big.Int).SetBytes(wide), n)
	d.Add(d, big.NewInt(1))
	b := d.FillBytes(make([]byte, 32))
	defer clear(b)
	return ecdsa.ParseRawPrivateKey(curve, b)
}
