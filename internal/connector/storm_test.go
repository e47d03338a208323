package connector_test

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// network is a connector whose HSM is SoftHSM behind the quirk library.
func network(t *testing.T, modes ...string) (*connector.Client, *testkit.Quirk, *atomic.Int32) {
	t.Helper()
	return networkWithin(t, time.Second, modes...)
}

// networkWithin is network whose calls of the library may take so long.
func networkWithin(t *testing.T, limit time.Duration, modes ...string) (*connector.Client, *testkit.Quirk, *atomic.Int32) {
	t.Helper()
	o := options(t, "password")
	c, err := connector.Start(t.Context(), o) // makes the token
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	q := testkit.NewQuirk(t, modes...)
	o.Env = []string{"SOFTHSM2_CONF=" + filepath.Join(o.SoftHSMDir, "softhsm2.conf")}
	o.SoftHSMDir, o.TokenLabel, o.Module, o.CallTimeout = "", "kms", q.Module, limit
	c, logins := opened(t, o)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the connector's log:\n%s", o.Stderr)
		}
		q.Set(t)
	})
	return c, q, logins
}

// load wraps and unwraps until it is stopped, and counts.
type load struct {
	stop         context.CancelFunc
	done         sync.WaitGroup
	good, failed atomic.Int64
	wrong        atomic.Int64 // an answer that is not true: must never be
	kinds        sync.Map

	mu    sync.Mutex
	since time.Time
	back  chan time.Time // takes the end of the first good call that begins after since
}

func startLoad(t *testing.T, c *connector.Client) *load {
	t.Helper()
	k, err := c.CreateRootKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kept, err := c.Wrap(t.Context(), k.Blob, []byte("kept"), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel}
	for g := range 6 {
		l.done.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				l.once(ctx, c, k.Blob, kept, fmt.Sprint(g, i))
			}
		})
	}
	return l
}

func (l *load) once(ctx context.Context, c *connector.Client, blob []byte, kept hsm.Sealed, text string) {
	began := time.Now()
	s, err := c.Wrap(ctx, blob, []byte(text), nil)
	if err == nil {
		var got []byte
		if got, err = c.Unwrap(ctx, blob, s, nil); err == nil && string(got) != text {
			l.wrong.Add(1)
		}
	}
	if err == nil {
		var got []byte
		if got, err = c.Unwrap(ctx, blob, kept, nil); err == nil && string(got) != "kept" {
			l.wrong.Add(1)
		}
	}
	switch {
	case ctx.Err() != nil:
	case err != nil:
		l.failed.Add(1)
		l.kinds.Store(fault.KindOf(err), err.Error())
		select {
		case <-time.After(5 * time.Millisecond): // a caller that was refused takes a breath
		case <-ctx.Done():
		}
	default:
		l.good.Add(1)
		l.mu.Lock()
		if l.back != nil && began.After(l.since) {
			l.back <- time.Now()
			l.back = nil
		}
		l.mu.Unlock()
	}
}

// recovered waits for the end of a good call that began after since: the
// answer to an older one may be from before the fault.
func (l *load) recovered(since time.Time) time.Duration {
	back := make(chan time.Time, 1)
	l.mu.Lock()
	l.since, l.back = since, back
	l.mu.Unlock()
	return (<-back).Sub(since) // go test's own limit is the last resort
}

func (l *load) end(t *testing.T) {
	t.Helper()
	l.stop()
	l.done.Wait()
	if n := l.wrong.Load(); n > 0 {
		t.Errorf("%d wrong answers", n)
	}
	l.kinds.Range(func(k, v any) bool {
		if k.(fault.Kind) != fault.Unreachable {
			t.Errorf("a fault of another kind: %v: %v", k, v)
		}
		return true
	})
}

// strikes is how often each fault strikes: a few times, or as KMSCTL_STRIKES says.
func strikes(t *testing.T, few int) int {
	t.Helper()
	n, err := strconv.Atoi(cmp.Or(os.Getenv("KMSCTL_STRIKES"), strconv.Itoa(few)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// measured says that a person measures, on a machine that does nothing else.
func measured() bool { return os.Getenv("KMSCTL_STRIKES") != "" }

// TestFaultsUnderLoad kills and hangs the connector, crashes the library and
// takes the HSM away, each many times under load. Requests may fail meanwhile
// as unreachable; no answer is wrong, nothing is lost, each login is one that
// had to be, and it is back (within 2 s, where that is measured).
func TestFaultsUnderLoad(t *testing.T) {
	for _, f := range []struct {
		name   string
		strike func(t *testing.T, c *connector.Client, q *testkit.Quirk) (back time.Time)
	}{
		{"connector killed", func(t *testing.T, c *connector.Client, _ *testkit.Quirk) time.Time {
			t.Helper()
			pid := c.Pid()
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			_ = unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) // its parent may have been faster
			return time.Now()
		}},
		{"library crashes", func(t *testing.T, c *connector.Client, q *testkit.Quirk) time.Time {
			t.Helper()
			old := c.Pid()
			q.Set(t, "die")
			for c.Pid() == old {
				time.Sleep(time.Millisecond)
			}
			q.Set(t)
			return time.Now()
		}},
		{"library hangs", func(t *testing.T, c *connector.Client, q *testkit.Quirk) time.Time {
			t.Helper()
			old := c.Pid()
			q.Set(t, "hang")
			for c.Pid() == old {
				time.Sleep(time.Millisecond)
			}
			q.Set(t)
			return time.Now()
		}},
		{"connector hangs", func(t *testing.T, c *connector.Client, _ *testkit.Quirk) time.Time {
			t.Helper()
			old := c.Pid()
			if err := syscall.Kill(old, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			for c.Pid() == old {
				time.Sleep(time.Millisecond)
			}
			return time.Now()
		}},
		{"HSM away and back", func(t *testing.T, _ *connector.Client, q *testkit.Quirk) time.Time {
			t.Helper()
			q.Set(t, "gone")
			time.Sleep(300 * time.Millisecond) // as long as it is away
			q.Set(t)
			return time.Now()
		}},
	} {
		t.Run(f.name, func(t *testing.T) {
			limit := 3 * time.Second // a machine that is busy with other tests stops a call for longer than a hang is waited for
			if measured() {
				limit = time.Second
			}
			c, q, logins := networkWithin(t, limit)
			l := startLoad(t, c)
			var took []time.Duration
			times := strikes(t, 2)
			for range times {
				before := l.good.Load()
				for l.good.Load() < before+20 {
					time.Sleep(time.Millisecond)
				}
				took = append(took, l.recovered(f.strike(t, c, q)))
			}
			l.end(t)
			slices.Sort(took)
			if m := took[len(took)-1]; measured() && m > 2*time.Second {
				t.Errorf("back after %s", m)
			}
			got := q.Logins()
			if slices.ContainsFunc(got, func(s string) bool { return s != "good" }) || len(got) > 1+2*times {
				t.Errorf("%d logins: %v", len(got), got)
			}
			t.Logf("%d strikes: %d good, %d failed, back after %s (median) to %s, %d logins of the token, %d runs of the hook",
				times, l.good.Load(), l.failed.Load(), took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond), len(got), logins.Load())
		})
	}
}

// TestGroup: two connectors to two clones of one token. Either may be killed,
// hang or lose its HSM under load, and no request fails.
func TestGroup(t *testing.T) {
	o := options(t, "password")
	first, _ := opened(t, o) // makes the master keys, which the clone must hold
	first.Close()
	clone := t.TempDir()
	if err := os.CopyFS(filepath.Join(clone, "tokens"), os.DirFS(filepath.Join(o.SoftHSMDir, "tokens"))); err != nil {
		t.Fatal(err)
	}
	var members []*connector.Client
	var quirks []*testkit.Quirk
	for _, dir := range []string{o.SoftHSMDir, clone} {
		q := testkit.NewQuirk(t)
		conf := filepath.Join(dir, "member.conf")
		if err := os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nobjectstore.backend = file\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		m := o
		m.SoftHSMDir, m.TokenLabel, m.Module, m.CallTimeout, m.Stderr = "", "kms", q.Module, time.Second, &log{}
		m.Env = append(q.Env(), "SOFTHSM2_CONF="+conf)
		c, err := connector.Start(t.Context(), m)
		if err != nil {
			t.Fatalf("%v\n%s", err, m.Stderr)
		}
		members, quirks = append(members, c), append(quirks, q)
	}
	head := members[0]
	head.Join(members[1])
	t.Cleanup(head.Close)
	for _, m := range head.Members() {
		hook := unlock(m, &atomic.Int32{})
		if err := hook(connector.Only(t.Context())); err != nil {
			t.Fatal(err)
		}
		m.Reopen(hook)
	}
	l := startLoad(t, head)
	for i := range strikes(t, 4) {
		before := l.good.Load()
		for l.good.Load() < before+200 {
			time.Sleep(time.Millisecond)
		}
		m, q := members[i%2], quirks[i%2]
		switch i / 2 % 3 {
		case 0:
			_ = syscall.Kill(m.Pid(), syscall.SIGKILL)
		case 1:
			q.Set(t, "gone")
		case 2:
			q.Set(t, "hang")
		}
		time.Sleep(1500 * time.Millisecond) // as long as it is away
		q.Set(t)
		back(t, m)
	}
	l.end(t)
	if n := l.failed.Load(); n > 0 {
		t.Errorf("%d requests failed", n)
	}
	for i, q := range quirks {
		if got := q.Logins(); slices.ContainsFunc(got, func(s string) bool { return s != "good" }) {
			t.Errorf("member %d: logins %v", i, got)
		}
	}
	t.Logf("%d strikes: %d good, %d failed; logins: %d and %d", strikes(t, 4), l.good.Load(), l.failed.Load(), len(quirks[0].Logins()), len(quirks[1].Logins()))
	if err := head.Ready(t.Context()); err != nil {
		t.Errorf("%v", err)
	}
}

// back waits until a member works by itself again.
func back(t *testing.T, m *connector.Client) {
	t.Helper()
	for ; ; time.Sleep(10 * time.Millisecond) { // go test's own limit is the last resort
		if _, err := m.Sign(connector.Only(t.Context()), []byte("x")); err == nil {
			return
		}
	}
}

// TestAStoppedConnectorIsReplaced: it cannot end itself, so its parent does.
func TestAStoppedConnectorIsReplaced(t *testing.T) {
	c, q, _ := network(t)
	k, err := c.CreateRootKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	old, began := c.Pid(), time.Now()
	if err := syscall.Kill(old, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// kill returns before every thread stands still; waitid after (waitid(2), WSTOPPED).
	if err := unix.Waitid(unix.P_PID, old, nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wrap(t.Context(), k.Blob, []byte("x"), nil); err != nil {
		t.Errorf("%v", err)
	}
	if c.Pid() == old {
		t.Errorf("answered after %s, by the old process: %v", time.Since(began), c.Pid() == old)
	}
	if got := q.Logins(); len(got) != 2 {
		t.Errorf("logins: %v", got)
	}
}

// TestAWrongPINAfterARestartIsTriedOnce: the secret is wrong from now on, the
// connector dies again and again, and the token sees one wrong PIN.
func TestAWrongPINAfterARestartIsTriedOnce(t *testing.T) {
	c, q, _ := network(t)
	ledger := &atomic.Bool{}
	var tries atomic.Int32
	c.Reopen(func(ctx context.Context) error { // kms.Unlock's ledger, in short
		if ledger.Load() {
			return fault.Newf(fault.Denied, "log in", "", "this password was refused before")
		}
		tries.Add(1)
		err := c.Login(ctx)
		if fault.KindOf(err) == fault.Denied {
			ledger.Store(true)
		}
		return err
	})
	connector.SetTestPIN(c, secret.New([]byte("wrongpin")))
	for range 3 {
		pid := c.Pid()
		_ = syscall.Kill(pid, syscall.SIGKILL)
		for c.Pid() == pid || c.Pid() == 0 {
			time.Sleep(time.Millisecond)
		}
		if _, err := c.Random(t.Context(), 8); err != nil && fault.KindOf(err) == fault.Other {
			t.Errorf("%v", err)
		}
		if _, err := c.CreateRootKey(t.Context()); fault.KindOf(err) != fault.Denied && fault.KindOf(err) != fault.Unreachable {
			t.Errorf("%v", err)
		}
	}
	if got := q.Logins(); !slices.Equal(got, []string{"good", "wrong"}) || tries.Load() != 1 {
		t.Errorf("logins %v, %d tries", got, tries.Load())
	}
}

// TestWhoReadsForAllMayLeave: one of those who wait reads the replies of all;
// when he gives up, or is late, another one goes on.
func TestWhoReadsForAllMayLeave(t *testing.T) {
	c, _, _ := network(t)
	k, err := c.CreateRootKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wrap(t.Context(), k.Blob, []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	pid := c.Pid()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := unix.Waitid(unix.P_PID, pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	gone, leave := context.WithCancel(t.Context())
	late, end := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer end()
	var patient sync.WaitGroup
	impatient := make(chan error, 2)
	for _, ctx := range []context.Context{gone, late} {
		go func() {
			_, err := c.Wrap(ctx, k.Blob, []byte("x"), nil)
			impatient <- err
		}()
	}
	for range 4 {
		patient.Go(func() {
			if _, err := c.Wrap(t.Context(), k.Blob, []byte("x"), nil); err != nil {
				t.Errorf("%v", err)
			}
		})
	}
	<-late.Done()
	leave()
	kinds := []fault.Kind{fault.KindOf(<-impatient), fault.KindOf(<-impatient)}
	slices.Sort(kinds)
	if !slices.Equal(kinds, []fault.Kind{min(fault.Stopped, fault.Unreachable), max(fault.Stopped, fault.Unreachable)}) {
		t.Errorf("%v", kinds)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	patient.Wait()
	if _, err := c.Wrap(t.Context(), k.Blob, []byte("x"), nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
