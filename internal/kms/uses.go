package kms

import (
	"context"
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// DefaultUses is how many texts AES-GCM may encrypt under one key when its IVs
// are random (NIST SP 800-38D, 8.3). It holds for IVs that the token makes,
// too: nobody outside knows how, and the vendors promise no counter.
const DefaultUses = 1 << 32

// Uses counts what is encrypted by AES-GCM under each version of a root key,
// and under the key that seals. Each process takes its numbers in blocks from
// a record per key, by compare-and-set, before it uses the first of a block:
// so no process and no crash makes the count too low, most encryptions write
// nothing, and what a process had left when it ended counts as used. Safe for
// concurrent use; a nil one counts nothing.
type Uses struct {
	store Store
	limit uint64
	gcm   atomic.Bool
	one   singleflight.Group

	mu   sync.Mutex
	own  map[useKey]block
	near map[useKey]uint64 // what has come to half of the limit
	seen map[string]int64  // folder → version up to which it was looked through
}

// useKey names a version of a key.
type useKey struct{ instance, key, version string }

// block is what this process may still use, and how much it takes next.
type block struct{ left, next uint64 }

const (
	firstBlock = 64
	maxBlock   = 1 << 20
)

// The sealing key is counted beside the instances' keys: no instance has this
// name, theirs are UUIDs.
const (
	masterUses = "master"
	sealUses   = "seal"
)

// usesRecord lies at uses/<instance>/<key>. Versions that encrypt no more stay
// in it: a process that has not seen a rotation yet must not bring the count
// of the new version back to nothing.
type usesRecord struct {
	Versions map[string]uint64 `json:"versions"`
}

func usesDir(instance string) string { return "uses/" + instance + "/" }

func (k useKey) path() string { return usesDir(k.instance) + k.key }

// NewUses counts up to a limit, once a token has shown a suite that uses GCM
// (Saw) and a service counts by it (Count).
func NewUses(limit uint64) *Uses {
	return &Uses{limit: limit, own: map[useKey]block{}, near: map[useKey]uint64{}, seen: map[string]int64{}}
}

// Saw notes the cipher suite that a token encrypts by. From the first that is
// GCM on everything counts: the tokens of a group may differ.
func (u *Uses) Saw(suite uint8) {
	if u != nil && (suite == hsm.SuiteGCM || suite == hsm.SuiteGCMToken) {
		u.gcm.Store(true)
	}
}

// take counts one encryption that is about to happen. An encryption that the
// connector repeats because its token went away counts once: nobody ever sees
// the lost one's ciphertext.
func (u *Uses) take(ctx context.Context, k useKey) error {
	if u == nil || !u.gcm.Load() {
		return nil
	}
	for !u.taken(k) {
		flight := u.one.DoChan(k.path()+"/"+k.version, func() (any, error) {
			rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reserveTime) // for all who wait
			defer cancel()
			return nil, u.reserve(rctx, k)
		})
		select {
		case r := <-flight:
			if r.Err != nil {
				return r.Err
			}
		case <-ctx.Done():
			return fault.New(fault.Unreachable, "count the use of", k.key, ctx.Err())
		}
	}
	return nil
}

// reserveTime bounds the taking of a block.
const reserveTime = 5 * time.Second

func (u *Uses) taken(k useKey) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	b := u.own[k]
	if b.left == 0 {
		return false
	}
	b.left--
	u.own[k] = b
	return true
}

// reserve takes the next block.
func (u *Uses) reserve(ctx context.Context, k useKey) error {
	u.mu.Lock()
	b := u.own[k]
	u.mu.Unlock()
	if b.left > 0 { // another flight has landed meanwhile
		return nil
	}
	b.next = max(b.next, firstBlock)
	for try := 1; ; try++ {
		r := usesRecord{}
		rev, err := u.store.Get(ctx, k.path(), &r)
		if err != nil && !errors.Is(err, record.ErrNotFound) {
			return err
		}
		used := r.Versions[k.version]
		if used >= u.limit {
			return usedUp(k, used)
		}
		b.left = min(b.next, u.limit-used)
		if r.Versions == nil {
			r.Versions = map[string]uint64{}
		}
		r.Versions[k.version] = used + b.left
		err = u.store.Commit(ctx, record.Change{Path: k.path(), Value: r, Rev: rev})
		if err == nil {
			u.got(k, b, used+b.left)
			return nil
		}
		if !errors.Is(err, record.ErrConflict) {
			return err
		}
		select {
		case <-time.After(time.Duration(try) * time.Millisecond): // until the view has what the other wrote
		case <-ctx.Done():
			return fault.New(fault.Unreachable, "count the use of", k.key, ctx.Err())
		}
	}
}

func (u *Uses) got(k useKey, b block, used uint64) {
	b.next = min(2*b.next, maxBlock)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.own[k] = b
	u.note(k, used)
}

// note remembers what is near its limit. The lock is held.
func (u *Uses) note(k useKey, used uint64) {
	if used >= u.warn() {
		u.near[k] = used
	}
}

// warn is where warnings begin.
func (u *Uses) warn() uint64 { return u.limit - u.limit/2 }

func usedUp(k useKey, used uint64) error {
	f := fault.New(fault.Conflict, "", k.key, errors.New(kmsapi.MessageOf(kmsapi.UsedUp)+" ("+strconv.FormatUint(used, 10)+")")).WithReason(kmsapi.UsedUp)
	if k.instance == masterUses {
		return f.WithHint("change the master keys: `kmsctl hsm rotate-master start`")
	}
	return f.WithHint("rotate the key: `kmsctl keys rotate %s`", k.key)
}

func isUsedUp(err error) bool {
	var f *fault.Error
	return errors.As(err, &f) && f.Reason == kmsapi.UsedUp
}

// of gives what was taken for each version of a key: no fewer encryptions
// than there were.
func (u *Uses) of(ctx context.Context, instance, key string) (map[string]uint64, error) {
	if u == nil || !u.gcm.Load() {
		return nil, nil
	}
	r := usesRecord{}
	_, err := u.store.Get(ctx, useKey{instance: instance, key: key}.path(), &r)
	if errors.Is(err, record.ErrNotFound) {
		err = nil
	}
	return r.Versions, err
}

// drop is the change that forgets a key's counts, and none when it has none.
func (u *Uses) drop(ctx context.Context, instance, key string) ([]record.Change, error) {
	if u == nil {
		return nil, nil
	}
	path, r := useKey{instance: instance, key: key}.path(), usesRecord{}
	rev, err := u.store.Get(ctx, path, &r)
	if errors.Is(err, record.ErrNotFound) {
		return nil, nil
	}
	return []record.Change{{Path: path, Rev: rev}}, err
}

// look finds what other processes brought near the limit, and forgets what
// encrypts no more. It reads only what was changed since the last look.
func (u *Uses) look(ctx context.Context, instances []string, encrypts func(useKey) bool) error {
	if u == nil {
		return nil
	}
	for _, in := range append([]string{masterUses}, instances...) {
		if err := u.lookAt(ctx, in); err != nil {
			return err
		}
	}
	u.mu.Lock()
	near := make([]useKey, 0, len(u.near))
	for k := range u.near {
		near = append(near, k)
	}
	u.mu.Unlock()
	for _, k := range near {
		if !encrypts(k) {
			u.mu.Lock()
			delete(u.near, k)
			delete(u.own, k)
			u.mu.Unlock()
		}
	}
	return nil
}

func (u *Uses) lookAt(ctx context.Context, instance string) error {
	dir := usesDir(instance)
	u.mu.Lock()
	since, known := u.seen[dir]
	u.mu.Unlock()
	paths, now, ok := u.store.Since(dir, since)
	if !known || !ok {
		now, paths = u.store.Version(dir), nil
		err := u.store.List(ctx, dir, func(m record.Meta, decode func(any) error) error {
			return u.noteRecord(instance, m.Path, decode)
		})
		if err != nil {
			return err
		}
	}
	for _, p := range paths {
		err := u.noteRecord(instance, p, func(v any) error { _, err := u.store.Get(ctx, p, v); return err })
		if err != nil && !errors.Is(err, record.ErrNotFound) {
			return err
		}
	}
	u.mu.Lock()
	u.seen[dir] = now
	u.mu.Unlock()
	return nil
}

func (u *Uses) noteRecord(instance, path string, decode func(any) error) error {
	r := usesRecord{}
	if err := decode(&r); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for v, used := range r.Versions {
		u.note(useKey{instance, strings.TrimPrefix(path, usesDir(instance)), v}, used)
	}
	return nil
}

// Near tells how many keys have come to half of the limit or more, and what
// share of it the furthest has; 0 when there are none.
func (u *Uses) Near() (keys int, share float64) {
	if u == nil {
		return 0, 0
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, used := range u.near {
		share = math.Max(share, float64(used)/float64(u.limit))
	}
	return len(u.near), share
}

// Nearest names some of those keys, as instance/key.
func (u *Uses) Nearest() (names []string) {
	const most = 20
	u.mu.Lock()
	defer u.mu.Unlock()
	for k := range u.near {
		names = append(names, k.instance+"/"+k.key)
	}
	slices.Sort(names)
	return names[:min(len(names), most)]
}

// Near is that of the service's keys.
func (s *Service) Near() (keys int, share float64) { return s.uses.Near() }

// Count makes the service count. Without it nothing is counted.
func (s *Service) Count(u *Uses) { u.store, s.uses = s.store, u }

func masterKey(version uint16) useKey {
	return useKey{masterUses, sealUses, strconv.Itoa(int(version))}
}

// sealing counts one use of the key that seals, by the version that this
// process has open: after a change of the master keys that is another one for
// a moment, whose work is made again (making).
func (s *Service) sealing(ctx context.Context, e Epoch) error {
	return s.uses.take(ctx, masterKey(max(e.Version, hsm.FirstMaster)))
}

// encrypts says whether a version of a key is one that wraps or seals.
func (s *Service) encrypts(ctx context.Context) func(useKey) bool {
	return func(k useKey) bool {
		if k.instance == masterUses {
			return s.masters == nil || strconv.Itoa(int(s.masters.epoch().Version)) == k.version
		}
		r, _, err := s.load(ctx, k.instance, k.key)
		if err != nil {
			return fault.KindOf(err) != fault.NotFound
		}
		return r.State != stateDestroyed && r.Version.ID == k.version
	}
}

// withUses adds the counts to what is shown of a key's versions.
func (s *Service) withUses(ctx context.Context, k *keyRecord, versions ...*kmsapi.KeyVersion) error {
	if k.Kind != kindRoot {
		return nil
	}
	counts, err := s.uses.of(ctx, k.Instance, k.ID)
	if err != nil || counts == nil {
		return err
	}
	for _, v := range versions {
		n := counts[v.ID]
		v.Encryptions = &n
	}
	return nil
}
