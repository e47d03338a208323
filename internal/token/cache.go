package token

import (
	"container/list"
	"sync"
	"time"
)

// A root key stays in the token for as long as it is used, and at most for
// cacheTime, or until the cache is looked through next.
const (
	cacheSize = 256
	cacheTime = 15 * time.Minute
)

// cache holds the root keys that were brought back into the token: bounded,
// least recently used goes first, and never one that is in use.
type cache struct {
	mu   sync.Mutex
	max  int
	ttl  time.Duration
	keys map[[32]byte]*cached
	lru  *list.List // of *cached, newest first
}

type cached struct {
	id    [32]byte
	keys  keyPair
	since time.Time
	err   error
	ready chan struct{}
	users int
	gone  bool // dropped: destroyed when the last user is done
	elem  *list.Element
}

func newCache(n int, ttl time.Duration) *cache {
	return &cache{max: n, ttl: ttl, keys: map[[32]byte]*cached{}, lru: list.New()}
}

// get gives the key, made by bring when it is not there; callers that ask for
// the same key meanwhile wait for that one. release must follow.
func (c *cache) get(id [32]byte, bring func() (keyPair, error), forget func(keyPair)) (*cached, error) {
	c.mu.Lock()
	if k := c.keys[id]; k != nil && time.Since(k.since) < c.ttl {
		k.users++
		c.lru.MoveToFront(k.elem)
		c.mu.Unlock()
		<-k.ready
		if k.err != nil {
			c.release(k, forget)
			return nil, k.err
		}
		return k, nil
	}
	var out []keyPair
	if old := c.keys[id]; old != nil { // it has been here for too long
		c.remove(old)
		if old.users == 0 {
			out = append(out, old.keys)
		}
	}
	k := &cached{id: id, ready: make(chan struct{}), users: 1, since: time.Now()}
	k.elem = c.lru.PushFront(k)
	c.keys[id] = k
	out = append(out, c.overflow()...)
	c.mu.Unlock()
	for _, h := range out {
		forget(h)
	}
	k.keys, k.err = bring()
	close(k.ready)
	if k.err != nil {
		c.drop(k)
		c.release(k, func(keyPair) {})
		return nil, k.err
	}
	return k, nil
}

// overflow takes out what is too much and not in use. The lock is held.
func (c *cache) overflow() (out []keyPair) {
	for e := c.lru.Back(); e != nil && len(c.keys) > c.max; {
		k, before := e.Value.(*cached), e.Prev()
		if k.users == 0 {
			c.remove(k)
			out = append(out, k.keys)
		}
		e = before
	}
	return out
}

func (c *cache) remove(k *cached) {
	if !k.gone {
		k.gone = true
		delete(c.keys, k.id)
		c.lru.Remove(k.elem)
	}
}

// release ends one use; the last one of a dropped key destroys it.
func (c *cache) release(k *cached, forget func(keyPair)) {
	c.mu.Lock()
	k.users--
	last := k.gone && k.users == 0 && k.err == nil
	c.mu.Unlock()
	if last {
		forget(k.keys)
	}
}

// drop takes a key out; who uses it may go on.
func (c *cache) drop(k *cached) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(k)
}

func (c *cache) evict(id [32]byte, forget func(keyPair)) {
	c.mu.Lock()
	k := c.keys[id]
	if k == nil {
		c.mu.Unlock()
		return
	}
	c.remove(k)
	idle := k.users == 0
	c.mu.Unlock()
	if idle {
		forget(k.keys)
	}
}

// empty takes every key out; who uses one may go on.
func (c *cache) empty(forget func(keyPair)) { c.takeOut(0, forget) }

// tidy takes out, until stop is closed, what has been here for too long: a key
// that nobody asks for any more, and that may have been destroyed by another
// process of the KMS.
func (c *cache) tidy(stop <-chan struct{}, forget func(keyPair)) {
	tick := time.NewTicker(c.ttl / tidyEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			c.takeOut(c.ttl, forget)
		}
	}
}

// tidyEvery is how often in the life of a key the cache is looked through.
const tidyEvery = 15

func (c *cache) takeOut(age time.Duration, forget func(keyPair)) {
	c.mu.Lock()
	var out []keyPair
	for _, k := range c.keys {
		if time.Since(k.since) < age {
			continue
		}
		if k.users == 0 {
			out = append(out, k.keys)
		}
		c.remove(k)
	}
	c.mu.Unlock()
	for _, h := range out {
		forget(h)
	}
}
