package store

import (
	"context"
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// What is deleted lies on in etcd's history until it is compacted, and in the
// free pages of its file until that is written anew. (In etcd's write-ahead
// log it lies until that is cut: after 10,000 changes, or a few files.)
const (
	shrinkAfter = time.Second      // deletions that come together share one
	shrinkEvery = 30 * time.Second // to write the file anew holds up writes
	shrinkLimit = 2 * time.Minute
)

// Shrink forgets the history and writes etcd's files anew, one member after
// the other, but for those that are away. A store that was full takes writes
// again if there is room now.
func (s *Store) Shrink(ctx context.Context) (away []string, err error) {
	// Two at a time would get in each other's way: the second finds the history
	// compacted, does not wait for the pages to be free, and gains nothing.
	s.shrinking.Lock()
	defer s.shrinking.Unlock()
	ctx, cancel := context.WithTimeout(ctx, shrinkLimit)
	defer cancel()
	s.mu.RLock()
	rev := s.rev
	s.mu.RUnlock()
	if away, err = shrink(ctx, s.c, rev); err != nil {
		return away, err
	}
	return away, s.disarm(ctx)
}

// shrink forgets the history before rev, and writes the files anew.
func shrink(ctx context.Context, c *clientv3.Client, rev int64) (away []string, err error) {
	if _, err := c.Compact(ctx, rev, clientv3.WithCompactPhysical()); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		return nil, unreachable("compact", "the store", err)
	}
	if len(c.Endpoints()) > 0 {
		return rewrite(ctx, c, c.Endpoints())
	}
	_, err = c.Defragment(ctx, "") // of the one in this process
	return nil, err
}

// rewrite writes the files of members anew, and gives those who are away.
func rewrite(ctx context.Context, c *clientv3.Client, members []string) (away []string, err error) {
	for _, m := range members {
		if !answers(ctx, c, m) {
			away = append(away, m)
			continue
		}
		if _, err := c.Defragment(ctx, m); err != nil {
			return away, unreachable("defragment", m, err)
		}
	}
	return away, nil
}

// answers says whether a member does: etcd's client waits for one that does
// not for as long as ctx has.
func answers(ctx context.Context, c *clientv3.Client, member string) bool {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	_, err := c.Status(ctx, member)
	return err == nil
}

// disarm takes the alarm of a full store away; a store without room raises it
// again at the next write.
func (s *Store) disarm(ctx context.Context) error {
	all, err := s.c.AlarmList(ctx)
	if err != nil {
		return unreachable("read the alarms of", "the store", err)
	}
	for _, a := range all.Alarms {
		if a.Alarm != etcdserverpb.AlarmType_NOSPACE {
			continue
		}
		if _, err := s.c.AlarmDisarm(ctx, (*clientv3.AlarmMember)(a)); err != nil {
			return unreachable("take the alarm from", "the store", err)
		}
	}
	s.full.Store(false)
	return nil
}

// Full says whether etcd refused the last write for want of space.
func (s *Store) Full() bool { return s.full.Load() }

// noteFull remembers that the store is full and has it shrunk at once.
func (s *Store) noteFull() {
	s.full.Store(true)
	s.wantShrink()
}

func (s *Store) wantShrink() {
	select {
	case s.shrink <- struct{}{}:
	default:
	}
}

// shrinker shrinks after deletions, and while the store is full. Members that
// were away are seen to when they are back.
func (s *Store) shrinker(ctx context.Context) {
	defer close(s.shrunk)
	var away []string
	for {
		var later <-chan time.Time
		if len(away) > 0 {
			later = time.After(shrinkEvery)
		}
		var err error
		select {
		case <-ctx.Done():
			return
		case <-later:
			if still, err := rewrite(ctx, s.c, away); err == nil {
				away = still
			}
			continue
		case <-s.shrink:
		}
		if !s.Full() && !pause(ctx, shrinkAfter) {
			return
		}
		select { // what came while it waited is done with it
		case <-s.shrink:
		default:
		}
		away, err = s.Shrink(ctx)
		if !pause(ctx, shrinkEvery) {
			return
		}
		if err != nil {
			s.wantShrink()
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// refused is unreachable for a write; that there is no space is remembered.
func (s *Store) refused(verb, what string, err error) error {
	if errors.Is(err, rpctypes.ErrNoSpace) {
		s.noteFull()
	}
	return unreachable(verb, what, err)
}
