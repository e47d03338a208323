package kms_test

import (
	"slices"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

const (
	day  = 24 * time.Hour
	year = 365 * day
)

// site is a KMS of several machines: time passes for all, and each has a clock
// that is off by something.
type site struct {
	*world
	passed time.Duration
}

// machine is one of them. What runs on it counts the time that passes.
type machine struct {
	*kms.Service
	site *site
	off  time.Duration
}

// boot starts the KMS on a machine, perhaps again.
func (m *machine) boot(t *testing.T, alone bool) {
	t.Helper()
	s := m.site
	m.Service = kms.New(s.store, s.token, s.token, m.shows, kms.DefaultWindows())
	if err := m.KeepTime(t.Context(), func() time.Duration { return s.passed }, alone); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) shows() time.Time { return m.site.now.Add(m.site.passed + m.off) }

// swept is what a sweep did, and the reasons of what it refused.
func (m *machine) swept(t *testing.T) (out []string) {
	t.Helper()
	acts, err := m.Sweep(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range acts {
		did := a.Action
		if a.Err != nil {
			did += " " + reason(a.Err)
		}
		out = append(out, did)
	}
	slices.Sort(out)
	return out
}

func (m *machine) sweeps(t *testing.T, want ...string) {
	t.Helper()
	if got := m.swept(t); !slices.Equal(got, want) {
		t.Errorf("swept %q, want %q", got, want)
	}
}

// is checks the state of the machine's clock, and whether the time of the KMS
// is the true one, but for some leeway.
func (m *machine) is(t *testing.T, state string, leeway time.Duration) {
	t.Helper()
	s, err := m.ClockStatus(t.Context())
	if err != nil || s.State != state {
		t.Errorf("the clock is %q, want %q: %+v %v", s.State, state, s, err)
	}
	if got := m.Time().Sub(m.site.now.Add(m.site.passed)); got.Abs() > leeway {
		t.Errorf("the time is off by %s, want at most %s", got, leeway)
	}
}

func newSite(t *testing.T, alone bool) (*site, *machine) {
	t.Helper()
	s := &site{world: newWorld(t)}
	m := &machine{site: s}
	m.boot(t, alone)
	return s, m
}

// keys are a deleted key, one that expires in a day, and one that the rotation
// policy rotates in a month.
type dueKeys struct{ deleted, expires, rotates kmsapi.Key }

func (m *machine) dueKeys(t *testing.T) dueKeys {
	t.Helper()
	w, end := m.site.world, m.shows().Add(day)
	k := dueKeys{w.key(t, w.instance, kmsapi.CreateKey{Name: "deleted"}), w.key(t, w.instance, kmsapi.CreateKey{Name: "expires", ExpirationDate: &end}), w.key(t, w.instance, kmsapi.CreateKey{Name: "rotates"})}
	on, months := true, 1
	_, err := m.SetKeyPolicies(t.Context(), w.instance, k.rotates.ID, "rotation", "me", []kmsapi.KeyPolicy{{Rotation: &kmsapi.Rotation{Enabled: &on, IntervalMonth: months}}})
	if err == nil {
		_, err = m.Delete(t.Context(), w.instance, k.deleted.ID, "me", false)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (m *machine) state(t *testing.T, k kmsapi.Key) int {
	t.Helper()
	got, err := m.Key(t.Context(), m.site.instance, k.ID, false)
	if err != nil {
		t.Fatal(err)
	}
	return got.State
}

func (m *machine) purge(t *testing.T, k kmsapi.Key) string {
	t.Helper()
	_, err := m.Purge(t.Context(), m.site.instance, k.ID)
	if err != nil && reason(err) == "" {
		t.Fatal(err)
	}
	return reason(err)
}

// TestAClockSetForwardDestroysNothing: ten years at once purge no key, mark none
// and end no import token; what a person may undo comes back when the clock is
// right, and all of it is due when the clock is confirmed.
func TestAClockSetForwardDestroysNothing(t *testing.T) {
	s, m := newSite(t, true)
	k := m.dueKeys(t)
	if _, err := m.CreateImportToken(t.Context(), s.instance, kmsapi.ImportTokenRequest{}); err != nil {
		t.Fatal(err)
	}
	m.sweeps(t)
	m.off = 10 * year
	m.sweeps(t, "kmsctl.clock.check "+kmsapi.ClockAhead)
	m.sweeps(t) // it is told once
	m.is(t, kmsapi.ClockIsAhead, time.Second)
	if got := m.purge(t, k.deleted); got != kmsapi.ClockAhead {
		t.Errorf("purge: %q", got)
	}
	if got := m.state(t, k.expires); got != 3 {
		t.Errorf("by the machine's clock it has expired: state %d", got)
	}
	if _, err := m.ImportToken(t.Context(), s.instance); err != nil {
		t.Errorf("import token: %v", err)
	}
	if got, _ := m.ClockStatus(t.Context()); got.Purges != 1 || got.Expires != 1 || got.AheadSeconds != int64(10*year/time.Second) {
		t.Errorf("%+v", got)
	}

	m.off = 0
	m.sweeps(t, "kmsctl.clock.check")
	m.is(t, kmsapi.ClockRight, 0)
	if got := m.state(t, k.expires); got != 1 {
		t.Errorf("set right, the key is in state %d", got)
	}

	// Time that truly passes counts, whatever the machine's clock shows.
	m.off = 10 * year
	if got := m.purge(t, k.deleted); got != kmsapi.ClockAhead {
		t.Errorf("purge: %q", got)
	}
	other := s.key(t, s.instance, kmsapi.CreateKey{Name: "other"})
	if _, err := m.Delete(t.Context(), s.instance, other.ID, "me", false); err != nil {
		t.Fatal(err)
	}
	s.passed += 4 * time.Hour
	if got := m.purge(t, other); got != "" {
		t.Errorf("purge after four hours: %q", got)
	}

	for _, seen := range []time.Time{{}, m.shows().Add(-10 * year), m.shows().Add(time.Hour)} {
		if changed, err := m.ConfirmClock(t.Context(), "me", seen); changed || reason(err) != kmsapi.ClockAhead || fault.KindOf(err) != fault.Conflict {
			t.Errorf("confirmed %s: %v %v", seen, changed, err)
		}
	}
	m.sweeps(t, "kmsctl.clock.check "+kmsapi.ClockAhead)
	for _, want := range []bool{true, false} {
		if changed, err := m.ConfirmClock(t.Context(), "me", m.shows().Add(-time.Minute)); changed != want || err != nil {
			t.Errorf("%v %v", changed, err)
		}
	}
	if got, err := m.ClockStatus(t.Context()); err != nil || got.ConfirmedBy != "me" || got.ConfirmedAt == nil || got.AheadSeconds != 0 {
		t.Errorf("%+v %v", got, err)
	}
	m.sweeps(t, "kms.secrets.expire", "kms.secrets.purge", "kms.secrets.rotate", "kmsctl.clock.check")
	if got := m.purge(t, k.deleted); got != kmsapi.KeyNotFound {
		t.Errorf("it is purged: %q", got)
	}
}

// TestAClockSetBack: nothing that expired comes back, no window grows, and a
// clock that was confirmed wrongly can be confirmed right.
func TestAClockSetBack(t *testing.T) {
	s, m := newSite(t, true)
	k := m.dueKeys(t)
	s.passed += 2 * day
	m.off = -10 * year
	if got := m.state(t, k.expires); got != 3 {
		t.Errorf("state %d", got)
	}
	if got := m.purge(t, k.deleted); got != "" {
		t.Errorf("purge: %q", got)
	}
	m.sweeps(t, "kms.secrets.expire", "kmsctl.clock.check "+kmsapi.Conflict)
	m.is(t, kmsapi.ClockBehind, 0)
	m.boot(t, true)
	m.is(t, kmsapi.ClockBehind, 0)

	m.off = 10 * year
	if _, err := m.ConfirmClock(t.Context(), "me", m.shows()); err != nil {
		t.Fatal(err)
	}
	m.off = 0
	m.is(t, kmsapi.ClockBehind, 10*year)
	if changed, err := m.ConfirmClock(t.Context(), "me", m.shows()); !changed || err != nil {
		t.Fatal(changed, err)
	}
	m.is(t, kmsapi.ClockRight, 0)
}

// TestStartsAfterAStop: how long the KMS was stopped cannot be known. A gap
// that a stop explains is one; a longer one, and one that was doubted before
// the stop, is confirmed by a person.
func TestStartsAfterAStop(t *testing.T) {
	for name, c := range map[string]struct {
		jump, stopped time.Duration // while it runs, and while it does not
		alone         bool
		then, later   string // state at the start, and some minutes after
		leeway        time.Duration
	}{
		"a moment":                    {0, time.Minute, true, kmsapi.ClockRight, kmsapi.ClockRight, 0},
		"a weekend":                   {0, 2 * day, true, kmsapi.ClockRight, kmsapi.ClockRight, 0},
		"a weekend, with a neighbour": {0, 2 * day, false, kmsapi.ClockStarting, kmsapi.ClockRight, 0},
		"a month":                     {0, 30 * day, true, kmsapi.ClockIsAhead, kmsapi.ClockIsAhead, 30 * day},
		"a month, with a neighbour":   {0, 30 * day, false, kmsapi.ClockIsAhead, kmsapi.ClockIsAhead, 30 * day},
		"years ahead before":          {10 * year, 0, true, kmsapi.ClockIsAhead, kmsapi.ClockIsAhead, 0},
		"two days ahead before":       {2 * day, 0, true, kmsapi.ClockIsAhead, kmsapi.ClockIsAhead, 0},
		"set forward in between":      {0, 10 * year, true, kmsapi.ClockIsAhead, kmsapi.ClockIsAhead, 10 * year},
	} {
		t.Run(name, func(t *testing.T) {
			s, m := newSite(t, c.alone)
			m.off = c.jump
			m.swept(t)
			s.now = s.now.Add(c.stopped) // nobody counts it
			m.boot(t, c.alone)
			m.is(t, c.then, max(c.leeway, map[bool]time.Duration{true: c.stopped}[c.then == kmsapi.ClockStarting]))
			for range 4 {
				s.passed += time.Minute
				m.swept(t)
			}
			m.is(t, c.later, c.leeway)
			if c.later == kmsapi.ClockRight {
				return
			}
			m.boot(t, c.alone) // a further start makes it no better
			m.is(t, c.later, c.leeway)
			if changed, err := m.ConfirmClock(t.Context(), "me", m.shows()); !changed || err != nil {
				t.Error(changed, err)
			}
			m.is(t, kmsapi.ClockRight, c.jump)
		})
	}
}

// TestOneOfTwoMachinesIsWrong: it holds back by itself, and the other neither
// follows it nor waits for it, whichever of them starts again.
func TestOneOfTwoMachinesIsWrong(t *testing.T) {
	for _, off := range []time.Duration{10 * year, 2 * day, 50 * time.Minute, -2 * day} {
		t.Run(off.String(), func(t *testing.T) {
			s, right := newSite(t, false)
			k := right.dueKeys(t)
			wrong := &machine{site: s, off: off}
			state, leeway := kmsapi.ClockIsAhead, time.Duration(0)
			switch {
			case off < 0:
				state = kmsapi.ClockBehind
			case off < time.Hour: // as much as is believed
				state, leeway = kmsapi.ClockRight, off
			}
			wrong.boot(t, false)
			for i := range 10 {
				s.passed += time.Minute
				wrong.swept(t)
				right.swept(t)
				if i == 4 {
					wrong.boot(t, false)
				}
				if i == 6 {
					right.boot(t, false)
				}
			}
			right.is(t, kmsapi.ClockRight, leeway)
			wrong.is(t, state, leeway)
			for _, m := range []*machine{right, wrong} {
				if got := m.purge(t, k.deleted); got != kmsapi.TooEarly && (m == right || got != kmsapi.ClockAhead) {
					t.Errorf("purge: %q", got)
				}
			}
			s.passed += 4 * time.Hour
			if got := wrong.purge(t, k.deleted); got != "" {
				t.Errorf("purge, when its time has come: %q", got)
			}
		})
	}
}

// TestTwoMachinesStartAfterAStop: the first that has waited says how late it
// is, the other takes it over. What is confirmed on one holds on both.
func TestTwoMachinesStartAfterAStop(t *testing.T) {
	s, a := newSite(t, false)
	b := &machine{site: s}
	s.now = s.now.Add(2 * day)
	a.boot(t, false)
	b.boot(t, false)
	for range 4 {
		s.passed += time.Minute
		a.swept(t)
		b.swept(t)
	}
	a.is(t, kmsapi.ClockRight, 0)
	b.is(t, kmsapi.ClockRight, 0)

	s.now = s.now.Add(30 * day)
	a.boot(t, false)
	b.boot(t, false)
	b.is(t, kmsapi.ClockIsAhead, 30*day)
	for _, off := range []time.Duration{0, year, 0} { // forward, wrongly, and back
		a.off, b.off = off, off
		if changed, err := a.ConfirmClock(t.Context(), "me", a.shows()); !changed || err != nil {
			t.Fatal(changed, err)
		}
		b.is(t, kmsapi.ClockRight, off)
	}
}

// TestAShortStopCostsNoLeeway: what a start has explained does not count
// against a clock that is set a little later on.
func TestAShortStopCostsNoLeeway(t *testing.T) {
	s, m := newSite(t, false)
	s.now = s.now.Add(50 * time.Minute)
	m.boot(t, false)
	m.off = 50 * time.Minute
	m.is(t, kmsapi.ClockRight, m.off)
	m.off += 20 * time.Minute
	m.is(t, kmsapi.ClockIsAhead, m.off)
}
