package iam

import (
	"crypto/sha256"
	"sync"
	"time"
)

// proofs remembers tokens whose signature was checked, by their hash: to
// check one costs more than all the rest of a call. What can change is looked
// at each time: the times in the token, its API key and its service ID.
type proofs struct {
	mu  sync.RWMutex
	all map[[sha256.Size]byte]claims
}

// maxProofs bounds the memory. When it is reached, all are checked anew.
const maxProofs = 4096

// clockLeeway is how far the clocks of replicas may be apart.
const clockLeeway = 10 * time.Second

func (p *proofs) get(token string, now time.Time) (claims, bool) {
	sum := sha256.Sum256([]byte(token))
	p.mu.RLock()
	c, ok := p.all[sum]
	p.mu.RUnlock()
	return c, ok && now.Before(c.ExpiresAt.Add(clockLeeway)) && !now.Add(clockLeeway).Before(c.IssuedAt.Time)
}

func (p *proofs) put(token string, c claims) {
	sum := sha256.Sum256([]byte(token))
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all == nil || len(p.all) >= maxProofs {
		p.all = map[[sha256.Size]byte]claims{}
	}
	p.all[sum] = c
}
