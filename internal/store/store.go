package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
)

// root is the prefix of everything that kmsctl keeps in etcd, with the version
// of the layout. Under plain lie the few things that are needed before the
// HSM is open, under rec the authenticated records.
const (
	root  = "/kmsctl/v1/"
	plain = root + "plain/"
	rec   = root + "rec/"
)

// EtcdClient is the client that Store and Plain work on.
type EtcdClient = *clientv3.Client

// opTimeout bounds each call to etcd whose context has no deadline.
const opTimeout = 5 * time.Second

// Plain reads and writes what must be readable before the HSM is open: the
// installation's record and the ledger of logins. Nobody may trust it.
type Plain struct{ c *clientv3.Client }

// NewPlain works on a client.
func NewPlain(c *clientv3.Client) *Plain { return &Plain{c} }

// Get reads the JSON at name into v and gives its revision; record.ErrNotFound
// when there is none.
func (p *Plain) Get(ctx context.Context, name string, v any) (int64, error) {
	ctx, cancel := bound(ctx)
	defer cancel()
	res, err := p.c.Get(ctx, plain+name)
	if err != nil {
		return 0, unreachable("read", name, err)
	}
	if len(res.Kvs) == 0 {
		return 0, fmt.Errorf("%q: %w", name, record.ErrNotFound)
	}
	if err := json.Unmarshal(res.Kvs[0].Value, v); err != nil {
		return 0, fmt.Errorf("read %q: %w", name, err)
	}
	return res.Kvs[0].ModRevision, nil
}

// Put writes v at name if its revision is still rev (0: it must not exist),
// and gives the new revision; record.ErrConflict otherwise. While a restore is
// unfinished there is no installation, and none is made: fault.NotReady.
func (p *Plain) Put(ctx context.Context, name string, v any, rev int64) (int64, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return 0, err
	}
	ctx, cancel := bound(ctx)
	defer cancel()
	key, mark := plain+name, plain+markName
	cmps := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", rev)}
	if name == installName {
		cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(mark), "=", 0))
	}
	res, err := p.c.Txn(ctx).If(cmps...).Then(clientv3.OpPut(key, string(b))).Else(clientv3.OpGet(mark, clientv3.WithKeysOnly())).Commit()
	if err != nil {
		return 0, unreachable("write", name, err)
	}
	if res.Succeeded {
		return res.Header.Revision, nil
	}
	if name == installName && len(res.Responses[0].GetResponseRange().Kvs) > 0 {
		return 0, errHalf()
	}
	return 0, fmt.Errorf("write %q: %w", name, record.ErrConflict)
}

// Store holds the authenticated records, with a local view of all of them.
// Safe for concurrent use.
type Store struct {
	c      *clientv3.Client
	codec  *record.Codec
	cancel context.CancelFunc
	done   chan struct{}
	now    func() time.Time
	full   atomic.Bool
	shrink chan struct{} // something was deleted, or there is no space
	shrunk chan struct{} // closed when the shrinker has ended
	parsed recent

	shrinking sync.Mutex    // held while Shrink works
	fence     int64         // the revision that made the installation whose records these are
	ended     chan struct{} // closed when the store comes to its end
	ending    sync.Once

	mu    sync.RWMutex
	kv    map[string]map[string]entry // folder → name in it → record
	vers  map[string]int64            // folder → revision of its last change
	diary []change                    // the last changes, oldest first
	since int64                       // the diary is complete from here on
	rev   int64                       // the view is complete up to here
	moved chan struct{}               // closed and replaced when rev grows
	tell  func(path string, was, is []byte)
	heard time.Time // last sign of life of the watch
}

// entry is a record as it came from etcd. One that was proven on its way into
// the view needs no second proof.
type entry struct {
	value  []byte
	rev    int64
	proven bool
	json   *decoded // nil: not kept
}

// decode reads an entry, and checks its origin where that was not done.
func (s *Store) decode(path string, e entry, v any) error {
	var err error
	if e.proven {
		if e.json != nil && e.json.into(v) {
			return nil
		}
		if err = json.Unmarshal(record.Body(e.value), v); err == nil && e.json != nil && e.json.keep(v) {
			s.parsed.add(e.json)
		}
	} else {
		err = s.codec.Decode(path, e.value, v)
	}
	if err != nil {
		return fault.New(fault.BadContent, "read record", path, err)
	}
	return nil
}

// Open loads every record and keeps the view fed until Close. It fails when
// a record is not authentic: whoever could write one can have removed others.
func Open(ctx context.Context, c *clientv3.Client, codec *record.Codec) (*Store, error) {
	fence, err := madeAt(ctx, c)
	if err != nil {
		return nil, err
	}
	s := &Store{c: c, fence: fence, codec: codec, done: make(chan struct{}), shrink: make(chan struct{}, 1), shrunk: make(chan struct{}), ended: make(chan struct{}), now: time.Now, kv: map[string]map[string]entry{}, vers: map[string]int64{}, moved: make(chan struct{})}
	if err := s.load(ctx); err != nil {
		return nil, err
	}
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s.cancel = cancel
	go s.watch(wctx)
	go s.shrinker(wctx)
	return s, nil
}

// Close ends the watch. The client stays open: it belongs to the caller.
func (s *Store) Close() {
	s.cancel()
	<-s.done
	<-s.shrunk
}

func (s *Store) load(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := s.same(ctx); err != nil {
		return err
	}
	kv := map[string]map[string]entry{}
	var rev int64
	const page = 2000
	for from, end := rec, clientv3.GetPrefixRangeEnd(rec); ; {
		opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(page)}
		if rev != 0 {
			opts = append(opts, clientv3.WithRev(rev))
		}
		res, err := s.c.Get(ctx, from, opts...)
		if err != nil {
			return unreachable("load", "records", err)
		}
		if rev == 0 {
			rev = res.Header.Revision
		}
		for _, e := range res.Kvs {
			path := strings.TrimPrefix(string(e.Key), rec)
			if err := s.codec.Check(path, e.Value); err != nil {
				f := fault.New(fault.BadContent, "load record", path, err)
				if errors.Is(err, record.ErrNewer) {
					return f.WithHint("go back to the kmsctl that wrote it, or restore a backup that was made before it")
				}
				return f.WithHint("somebody wrote to the store, or it belongs to another HSM master key: compare with a backup before going on")
			}
			put(kv, path, entry{e.Value, e.ModRevision, true, &decoded{}})
		}
		if !res.More {
			break
		}
		from = string(res.Kvs[len(res.Kvs)-1].Key) + "\x00"
	}
	// The watch begins at rev: what ended the installation before is seen here.
	if err := s.same(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	s.kv = kv
	s.diary, s.since = nil, rev
	for dir := range s.vers { // what changed while the watch was away is not known
		s.vers[dir] = rev
	}
	for dir := range kv {
		s.vers[dir] = rev
	}
	s.advance(rev)
	s.mu.Unlock()
	if _, ends := find(kv, record.EndPath); ends {
		s.end()
	}
	return nil
}

// advance notes that the view is complete up to rev. The lock is held.
func (s *Store) advance(rev int64) {
	s.heard = s.now()
	if rev > s.rev {
		s.rev = rev
		close(s.moved)
		s.moved = make(chan struct{})
	}
}

// watch feeds the view. When the watch breaks it starts again where it was; a
// history that was compacted away meanwhile means a fresh load.
func (s *Store) watch(ctx context.Context) {
	defer close(s.done)
	for ctx.Err() == nil {
		s.mu.RLock()
		// From the last revision seen, not the next one: etcd answers progress
		// requests only once it has reached a watch's start. Seeing an event
		// twice does no harm.
		from := s.rev
		s.mu.RUnlock()
		wctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
		ch := s.c.Watch(wctx, root, clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithProgressNotify())
		compacted := s.follow(wctx, ch)
		cancel()
		switch {
		case ctx.Err() != nil:
		case compacted:
			_ = s.load(ctx) // on failure the view stays stale, says so, and the loop tries again
		default:
			s.endOfAnother(ctx)
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond): // a broken etcd must not be asked in a hot loop
		}
	}
}

// endOfAnother ends the store when etcd has not come as far as the view: it
// has lost all its members' data and begun anew, and would say nothing until
// it is as far again, and then only what is new.
func (s *Store) endOfAnother(ctx context.Context) {
	ctx, cancel := bound(ctx)
	defer cancel()
	s.mu.RLock()
	seen := s.rev
	s.mu.RUnlock()
	if res, err := s.c.Get(ctx, root, clientv3.WithCountOnly()); err == nil && res.Header.Revision < seen {
		s.end()
	}
}

const (
	// heartbeat is how often the watch is asked for a sign of life.
	heartbeat = 250 * time.Millisecond
	// silence is when it is begun anew: etcd's client takes a broken one up
	// at the next revision by itself, and that one says nothing until somebody
	// writes, which a server with a stale view does not.
	silence = 6 * heartbeat
)

func (s *Store) follow(ctx context.Context, ch clientv3.WatchChan) (compacted bool) {
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	heard := time.Now()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
			if time.Since(heard) > silence {
				return false
			}
			_ = s.c.RequestProgress(clientv3.WithRequireLeader(ctx)) // its failure shows as silence
		case res, ok := <-ch:
			if !ok || res.Err() != nil {
				return ok && errors.Is(res.Err(), rpctypes.ErrCompacted)
			}
			s.apply(res)
			heard = time.Now()
		}
	}
}

func (s *Store) apply(res clientv3.WatchResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	upTo := res.Header.Revision
	for _, e := range res.Events {
		// While a watch catches up, the header is ahead of the events.
		upTo = e.Kv.ModRevision
		path, ok := strings.CutPrefix(string(e.Kv.Key), rec)
		if !ok { // the installation goes when it is cleared, or something is restored
			if e.Type == clientv3.EventTypeDelete && string(e.Kv.Key) == plain+installName {
				s.end()
			}
			continue
		}
		dir, _ := split(path)
		s.vers[dir] = e.Kv.ModRevision
		s.note(change{path, e.Kv.ModRevision})
		old, had := find(s.kv, path)
		had = had && old.proven && old.rev != e.Kv.ModRevision && s.tell != nil
		if e.Type == clientv3.EventTypeDelete {
			if had {
				s.tell(path, record.Body(old.value), nil)
			}
			drop(s.kv, path)
			continue
		}
		proven := s.codec.Check(path, e.Kv.Value) == nil
		if had && proven {
			s.tell(path, record.Body(old.value), record.Body(e.Kv.Value))
		}
		put(s.kv, path, entry{e.Kv.Value, e.Kv.ModRevision, proven, &decoded{}})
		if proven && path == record.EndPath {
			s.end()
		}
	}
	s.advance(upTo)
}

// Tell calls f for each record that any process changes or removes from now
// on, with its old value and its new one, which is nil for one that is gone.
// f must not block, nor change what it is given.
func (s *Store) Tell(f func(path string, was, is []byte)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tell = f
}

// Lag is the time since the watch last gave a sign of life.
func (s *Store) Lag() time.Duration {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.now().Sub(s.heard)
}

// Get reads the record at path from the view. A path that the view lacks is
// read once from etcd itself, since another replica may just have made it.
func (s *Store) Get(ctx context.Context, path string, v any) (int64, error) {
	s.mu.RLock()
	e, ok := find(s.kv, path)
	s.mu.RUnlock()
	if !ok {
		ctx, cancel := bound(ctx)
		defer cancel()
		res, err := s.c.Get(ctx, rec+path)
		if err != nil {
			return 0, unreachable("read", path, err)
		}
		if len(res.Kvs) == 0 {
			return 0, fmt.Errorf("record %q: %w", path, record.ErrNotFound)
		}
		e = entry{res.Kvs[0].Value, res.Kvs[0].ModRevision, false, nil}
	}
	return e.rev, s.decode(path, e, v)
}

// keepListed is the size of folders whose records are kept parsed by List.
const keepListed = 64

// List calls each for every record that lies directly in the folder, which
// ends with a slash, in path order, from the view. It costs as much as the
// folder has records, whatever else there is.
func (s *Store) List(_ context.Context, dir string, each func(m record.Meta, decode func(v any) error) error) error {
	type found struct {
		name string
		entry
	}
	s.mu.RLock()
	part := make([]found, 0, len(s.kv[dir]))
	for name, e := range s.kv[dir] {
		part = append(part, found{name, e})
	}
	s.mu.RUnlock()
	slices.SortFunc(part, func(a, b found) int { return strings.Compare(a.name, b.name) })
	for _, f := range part {
		path, e := dir+f.name, f.entry
		if len(part) > keepListed {
			e.json = nil // who lists many keeps what it needs itself
		}
		decode := func(v any) error { return s.decode(path, e, v) }
		if err := each(record.Meta{Path: path, Name: f.name, Rev: e.rev}, decode); err != nil {
			return err
		}
	}
	return nil
}

// Version grows with every change of a record directly in the folder; it is 0
// for a folder that never held one.
func (s *Store) Version(dir string) int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.vers[dir]
}

// change is a path that was written or removed.
type change struct {
	path string
	rev  int64
}

// maxDiary bounds the changes that are remembered; who was away for longer
// lists the folder again.
const maxDiary = 4096

// note remembers a change. The lock is held.
func (s *Store) note(c change) {
	if len(s.diary) >= 2*maxDiary {
		s.since = s.diary[len(s.diary)-maxDiary-1].rev
		s.diary = slices.Clone(s.diary[len(s.diary)-maxDiary:])
	}
	s.diary = append(s.diary, c)
}

// Since gives the paths of a folder that changed after a version, and the
// version up to which that is complete; ok is false when that is too long ago.
func (s *Store) Since(dir string, version int64) (paths []string, now int64, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if version < s.since {
		return nil, 0, false
	}
	for i := len(s.diary) - 1; i >= 0 && s.diary[i].rev > version; i-- {
		p := s.diary[i].path
		if in, _ := split(p); in == dir && !slices.Contains(paths, p) {
			paths = append(paths, p)
		}
	}
	return paths, max(version, s.vers[dir]), true
}

// split gives a path's folder, up to and with its last slash, and its name there.
func split(path string) (dir, name string) {
	n := strings.LastIndexByte(path, '/') + 1
	return path[:n], path[n:]
}

func find(kv map[string]map[string]entry, path string) (entry, bool) {
	dir, name := split(path)
	e, ok := kv[dir][name]
	return e, ok
}

// put keeps the name without its path: there are as many as there are keys.
func put(kv map[string]map[string]entry, path string, e entry) {
	dir, name := split(path)
	if kv[dir] == nil {
		kv[dir] = map[string]entry{}
	}
	kv[dir][strings.Clone(name)] = e
}

func drop(kv map[string]map[string]entry, path string) {
	dir, name := split(path)
	delete(kv[dir], name)
	if len(kv[dir]) == 0 {
		delete(kv, dir)
	}
}

// Commit does all changes in one transaction or none. A revision that does
// not fit is record.ErrConflict. When it returns, the view has the changes.
func (s *Store) Commit(ctx context.Context, changes ...record.Change) error {
	var cmps []clientv3.Cmp
	var ops []clientv3.Op
	deletes := false
	for _, ch := range changes {
		key := rec + ch.Path
		if ch.Path == record.Installation {
			key = plain + installName
		}
		cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(key), "=", ch.Rev))
		if ch.Same {
			continue
		}
		if ch.Value == nil {
			deletes = true
			ops = append(ops, clientv3.OpDelete(key))
			continue
		}
		b, err := s.codec.Encode(ch.Path, ch.Value)
		if err != nil {
			return err
		}
		ops = append(ops, clientv3.OpPut(key, string(b)))
	}
	ctx, cancel := bound(ctx)
	defer cancel()
	cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(plain+installName), "=", s.fence))
	res, err := s.c.Txn(ctx).If(cmps...).Then(ops...).Else(clientv3.OpGet(plain+installName, clientv3.WithKeysOnly())).Commit()
	if err != nil {
		return s.refused("write", changes[0].Path, err)
	}
	if !res.Succeeded {
		if err := s.fenced(res.Responses[0].GetResponseRange().Kvs); err != nil {
			return err
		}
		return fmt.Errorf("write record %q: %w", changes[0].Path, record.ErrConflict)
	}
	if deletes {
		s.wantShrink()
	}
	return s.wait(ctx, res.Header.Revision)
}

// wait blocks until the view is complete up to rev, so that a client reads
// what it wrote.
func (s *Store) wait(ctx context.Context, rev int64) error {
	for {
		s.mu.RLock()
		have, moved := s.rev, s.moved
		s.mu.RUnlock()
		if have >= rev {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return unreachable("follow", "the store", ctx.Err())
		}
	}
}

func bound(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, opTimeout)
}

func unreachable(verb, what string, err error) error {
	if errors.Is(err, rpctypes.ErrNoSpace) {
		return fault.Newf(fault.Unreachable, verb+" in the store", what, "it is full").
			WithHint("what was purged makes room by itself within a minute; else it needs a larger volume, of which it may hold half, and a new start")
	}
	return fault.New(fault.Unreachable, verb+" in the store", what, err).WithHint("is etcd running and reachable?")
}
