package iam

import (
	"crypto/sha256"
	"sync"
	"time"
)

// proofs remembers tokens whose signature was checked, by their hash: to
// check one costs more than all the rest of a call. What can change is looked
// at each time: the times in the token, the key that signed it, its API key
// and its service ID.
type proofs struct {
	mu  sync.RWMutex
	all map[[sha256.Size]byte]proof
}

// proof is what a token says, and by which key it was signed.
type proof struct {
	claims
	key string
}

// maxProofs bounds the memory. When it is reached, all are checked anew.
const maxProofs = 4096

// clockLeeway is how far the clocks of replicas may be apart.
const clockLeeway = 10 * time.Second

func (p *proofs) get(token string, now time.Time) (proof, bool) {
	sum := sha256.Sum256([]byte(token))
	p.mu.RLock()
	c, ok := p.all[sum]
	p.mu.RUnlock()
	return c, ok && now.Before(c.ExpiresAt.Add(clockLeeway)) && !now.Add(clockLeeway).Before(c.IssuedAt.Time)
}

func (p *proofs) put(token string, c proof) {
	sum := sha256.Sum256([]byte(token))
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all == nil || len(p.all) >= maxProofs {
		p.all = map[[sha256.Size]byte]proof{}
	}
	p.all[sum] = c
}
