package token

import (
	"container/list"
	"sync"

	"github.com/miekg/pkcs11"
)

// cache holds the root keys that were brought back into the token: bounded,
// least recently used goes first, and never one that is in use.
type cache struct {
	mu   sync.Mutex
	max  int
	keys map[[32]byte]*cached
	lru  *list.List // of *cached, newest first
}

type cached struct {
	id     [32]byte
	handle pkcs11.ObjectHandle
	err    error
	ready  chan struct{}
	users  int
	gone   bool // dropped: destroyed when the last user is done
	elem   *list.Element
}

func newCache(n int) *cache { return &cache{max: n, keys: map[[32]byte]*cached{}, lru: list.New()} }

// get gives the key, made by bring when it is not there; callers that ask for
// the same key meanwhile wait for that one. release must follow.
func (c *cache) get(id [32]byte, bring func() (pkcs11.ObjectHandle, error), forget func(pkcs11.ObjectHandle)) (*cached, error) {
	c.mu.Lock()
	if k := c.keys[id]; k != nil {
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
	k := &cached{id: id, ready: make(chan struct{}), users: 1}
	k.elem = c.lru.PushFront(k)
	c.keys[id] = k
	out := c.overflow()
	c.mu.Unlock()
	for _, h := range out {
		forget(h)
	}
	k.handle, k.err = bring()
	close(k.ready)
	if k.err != nil {
		c.drop(k)
		c.release(k, func(pkcs11.ObjectHandle) {})
		return nil, k.err
	}
	return k, nil
}

// overflow takes out what is too much and not in use. The lock is held.
func (c *cache) overflow() (out []pkcs11.ObjectHandle) {
	for e := c.lru.Back(); e != nil && len(c.keys) > c.max; {
		k, before := e.Value.(*cached), e.Prev()
		if k.users == 0 {
			c.remove(k)
			out = append(out, k.handle)
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
func (c *cache) release(k *cached, forget func(pkcs11.ObjectHandle)) {
	c.mu.Lock()
	k.users--
	last := k.gone && k.users == 0 && k.err == nil
	c.mu.Unlock()
	if last {
		forget(k.handle)
	}
}

// drop takes a key out; who uses it may go on.
func (c *cache) drop(k *cached) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(k)
}

func (c *cache) evict(id [32]byte, forget func(pkcs11.ObjectHandle)) {
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
		forget(k.handle)
	}
}
