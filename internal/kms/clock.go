package kms

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// A machine's clock may be set wrong, and no key may be destroyed by that. So
// the life of keys goes by a time of the KMS's own: the newest time that any
// process saw, from the store, plus what this process's steady clock counted
// since. While the machine's clock is ahead of that by no more than
// Windows.ClockJump, it is the time. When it is further ahead it is not
// followed, until it is set right or an administrator confirms it; when it is
// behind, time goes on as if it had not been set back.
//
// Whatever counts how long ago something was goes by this time: purge, the
// windows, rotation by policy, the end of import tokens, and the mark that
// makes an expired key's state final. A date that a person gave, a key's
// expiry, is held against the later of this time and the machine's (late): who
// is refused by a clock that was wrong can go on when it is right.
//
// While no process runs nothing is counted. A gap of up to Windows.Downtime is
// taken for the time that the KMS was stopped, but only by a process beside
// which no other runs: a KMS that lives has no gap, whatever the clock of a
// machine that starts says. And what a process doubted, the next one doubts.
type clock struct {
	store    Store
	wall     func() time.Time
	jump     time.Duration
	downtime time.Duration

	mu       sync.Mutex
	steady   func() time.Duration // nil: nobody keeps the time, and the machine's clock is believed
	id       string               // of this process, in what it wrote
	origin   time.Time            // the time of the KMS when steady was since
	since    time.Duration
	rev      int64 // of the record when it was looked at last
	epoch    int   // its confirmations then
	starting bool  // the gap may be downtime: it shows whether somebody else runs
	doubted  bool  // what was told last
}

// clockRecord is the newest time that any process saw.
type clockRecord struct {
	Seen        time.Time  `json:"seen"`
	By          string     `json:"by"`
	Doubt       bool       `json:"doubt,omitempty"` // its machine's clock was ahead, and not believed
	Epoch       int        `json:"epoch,omitempty"` // counts the confirmations
	ConfirmedAt *time.Time `json:"confirmedAt,omitempty"`
	ConfirmedBy string     `json:"confirmedBy,omitempty"`
}

const (
	clockPath = "clock/seen"
	// beatEvery is how old the record may be while somebody runs. Who starts
	// after a gap looks for aloneAfter whether it moves.
	beatEvery  = time.Minute
	aloneAfter = 3 * beatEvery
	// sameMoment is how long a person may look at a clock before confirming it.
	sameMoment = 10 * time.Minute
)

// KeepTime guards the time from now on against a machine's clock that is set.
// steady counts the time that passes, whatever is set; alone says that no
// other process can run on this store.
func (s *Service) KeepTime(ctx context.Context, steady func() time.Duration, alone bool) error {
	c := &s.clock
	id := uuid.NewString()
	have, rev, err := c.read(ctx)
	if err == nil && rev == 0 { // nothing is older than this KMS
		err = ignoreConflict(c.store.Commit(ctx, record.Change{Path: clockPath, Value: clockRecord{Seen: c.machine(), By: id}}))
		if err == nil {
			have, rev, err = c.read(ctx)
		}
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.steady, c.id, c.since, c.rev, c.epoch = steady, id, steady(), rev, have.Epoch
	wall := c.machine()
	gap := wall.Sub(have.Seen)
	stopped := gap > c.jump && gap <= c.downtime && !have.Doubt
	c.origin, c.starting = have.Seen, stopped && !alone
	if gap > 0 && gap <= c.jump || stopped && alone {
		c.origin = wall
	}
	c.mu.Unlock()
	return c.beat(ctx)
}

// Time is the time of the KMS.
func (s *Service) Time() time.Time {
	now, _, _ := s.clock.look()
	return now
}

// late is the later of the time of the KMS and the machine's.
func (s *Service) late() time.Time {
	now, wall, _ := s.clock.look()
	if wall.After(now) {
		return wall
	}
	return now
}

// machine is the machine's clock, without the monotonic reading by which Go
// would hide that it was set.
func (c *clock) machine() time.Time { return c.wall().Round(0) }

// own is the time without the machine's clock; the lock is held.
func (c *clock) own() time.Time { return c.origin.Add(c.steady() - c.since) }

// look gives the time of the KMS, the machine's, and whether that is too far
// ahead to be believed.
func (c *clock) look() (now, wall time.Time, ahead bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall = c.machine()
	if c.steady == nil {
		return wall, wall, false
	}
	own := c.own()
	ahead = wall.Sub(own) > c.jump
	if !ahead && wall.After(own) {
		own = wall
	}
	return own, wall, ahead
}

// read gives the record; its revision is 0 when there is none.
func (c *clock) read(ctx context.Context) (have clockRecord, rev int64, err error) {
	rev, err = c.store.Get(ctx, clockPath, &have)
	if errors.Is(err, record.ErrNotFound) {
		return have, 0, nil
	}
	return have, rev, err
}

// follow takes over what another process saw later, or somebody confirmed.
func (c *clock) follow(ctx context.Context) (clockRecord, error) {
	have, rev, err := c.read(ctx)
	if err != nil {
		return have, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.steady == nil || rev == c.rev {
		return have, nil
	}
	c.rev = rev
	if have.By == c.id {
		return have, nil
	}
	c.starting = false
	if have.Epoch != c.epoch || have.Seen.After(c.own()) {
		c.set(have.Seen, have.Epoch)
	}
	return have, nil
}

// set makes it a time of the KMS now; the lock is held.
func (c *clock) set(t time.Time, epoch int) {
	c.origin, c.since, c.epoch, c.starting = t, c.steady(), epoch, false
}

// beat writes down how late it is, once in beatEvery whichever process does.
func (c *clock) beat(ctx context.Context) error {
	have, err := c.follow(ctx)
	if err != nil {
		return err
	}
	now, wall, ahead := c.look()
	c.mu.Lock()
	rev, keeps, starting := c.rev, c.steady != nil, c.starting
	waited := keeps && c.steady()-c.since >= aloneAfter
	c.mu.Unlock()
	switch {
	case !keeps, starting && !waited:
		return nil
	case starting:
		if wall.Sub(now) <= c.downtime {
			now, ahead = wall, false
		}
	case now.Sub(have.Seen) < beatEvery && ahead == have.Doubt:
		return nil
	}
	have.Seen, have.By, have.Doubt = now, c.id, ahead
	err = c.store.Commit(ctx, record.Change{Path: clockPath, Value: have, Rev: rev})
	if err == nil && starting { // nobody else wrote all the while: the KMS was stopped
		c.mu.Lock()
		c.set(now, have.Epoch)
		c.mu.Unlock()
	}
	return ignoreConflict(err)
}

// ClockFault says what is wrong with the machine's clock; nil when it is right.
func (s *Service) ClockFault() error {
	now, wall, ahead := s.clock.look()
	off, shows := wall.Sub(now).Round(time.Second), wall.UTC().Format(time.RFC3339)
	switch {
	case ahead:
		return fault.Newf(fault.Conflict, "", "", "%s: it shows %s, %s ahead", kmsapi.MessageOf(kmsapi.ClockAhead), shows, off).WithReason(kmsapi.ClockAhead)
	case -off > s.clock.jump:
		return fault.Newf(fault.Conflict, "", "", "The machine's clock was set back: it shows %s, %s behind what was seen before; time goes on from there", shows, -off).WithReason(kmsapi.Conflict)
	}
	return nil
}

// stands is both times, and how they stand to each other.
func (c *clock) stands() (now, wall time.Time, state string) {
	now, wall, ahead := c.look()
	c.mu.Lock()
	starting := c.starting
	c.mu.Unlock()
	switch {
	case ahead && starting:
		return now, wall, kmsapi.ClockStarting
	case ahead:
		return now, wall, kmsapi.ClockIsAhead
	case now.Sub(wall) > c.jump:
		return now, wall, kmsapi.ClockBehind
	}
	return now, wall, kmsapi.ClockRight
}

// ClockState is how the machine's clock stands to the time of the KMS.
func (s *Service) ClockState() (state string, ahead time.Duration) {
	now, wall, state := s.clock.stands()
	return state, wall.Sub(now)
}

// ClockAhead is how far the machine's clock is ahead of the time of the KMS.
func (s *Service) ClockAhead() time.Duration {
	now, wall, _ := s.clock.look()
	return wall.Sub(now)
}

// tellClock says once that the machine's clock is wrong, and once that it is
// right again.
func (s *Service) tellClock() []Swept {
	why := s.ClockFault()
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()
	if s.clock.starting || s.clock.doubted == (why != nil) {
		return nil
	}
	s.clock.doubted = why != nil
	return []Swept{{Action: "kmsctl.clock.check", Err: why}}
}

// ClockStatus shows both times, and what would be done at once if the
// machine's were confirmed.
func (s *Service) ClockStatus(ctx context.Context) (kmsapi.ClockStatus, error) {
	have, err := s.clock.follow(ctx)
	if err != nil {
		return kmsapi.ClockStatus{}, err
	}
	now, wall, state := s.clock.stands()
	out := kmsapi.ClockStatus{State: state, Machine: wall.UTC(), Time: now.UTC(), AheadSeconds: int64(wall.Sub(now) / time.Second),
		ConfirmedAt: have.ConfirmedAt, ConfirmedBy: have.ConfirmedBy}
	instances, err := s.Instances(ctx)
	if err != nil {
		return out, err
	}
	for _, in := range instances {
		keys, err := s.index.keys(ctx, s.store, in.ID)
		if err != nil {
			return out, err
		}
		for _, k := range keys {
			switch s.due(k, momentOf(&wall)) {
			case duePurge:
				out.Purges++
			case dueExpire:
				out.Expires++
			}
		}
	}
	return out, nil
}

// ConfirmClock makes the machine's clock the time of the KMS, whichever way it
// is off. seen is what a person saw on it: another machine's clock, or one that
// was set meanwhile, is not confirmed.
func (s *Service) ConfirmClock(ctx context.Context, by string, seen time.Time) (changed bool, err error) {
	c := &s.clock
	for range maxTries {
		have, rev, err := c.read(ctx)
		if err == nil {
			_, err = c.follow(ctx)
		}
		if err != nil {
			return false, err
		}
		now, wall, _ := c.look()
		if wall.Sub(seen).Abs() > sameMoment {
			return false, fault.Newf(fault.Conflict, "", "", "The clock of the machine that answers shows %s, which is not what was confirmed: look at it again", wall.UTC().Format(time.RFC3339)).
				WithReason(kmsapi.ClockAhead)
		}
		if wall.Sub(now).Abs() <= c.jump {
			return false, nil
		}
		at := wall.UTC().Truncate(time.Second)
		have.Seen, have.By, have.Doubt, have.Epoch, have.ConfirmedAt, have.ConfirmedBy = wall, c.id, false, have.Epoch+1, &at, by
		err = c.store.Commit(ctx, record.Change{Path: clockPath, Value: have, Rev: rev})
		if errors.Is(err, record.ErrConflict) {
			continue
		}
		if err == nil {
			c.mu.Lock()
			c.set(wall, have.Epoch)
			c.mu.Unlock()
		}
		return err == nil, err
	}
	return false, refusal(fault.Conflict, "", kmsapi.Conflict)
}
