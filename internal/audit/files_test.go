package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// openWith opens a log whose configuration f changes.
func openWith(t *testing.T, dir string, s *signer, f func(*audit.Config)) *audit.Log {
	t.Helper()
	c := s.config()
	f(&c)
	l, err := audit.Open(dir, c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func appendAll(t *testing.T, l *audit.Log, from, n int) {
	t.Helper()
	for i := range n {
		if err := l.Append(t.Context(), event(from+i)); err != nil {
			t.Fatal(err)
		}
	}
}

// files reads the files of a log.
func files(t *testing.T, dir string) (names []string, content [][]byte) {
	t.Helper()
	paths, err := audit.Files(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		names, content = append(names, filepath.Base(p)), append(content, b)
	}
	return names, content
}

func verifyFiles(s *signer, names []string, content [][]byte, partial bool) (audit.Report, error) {
	var all []audit.File
	for i, n := range names {
		all = append(all, audit.File{Name: n, Reader: bytes.NewReader(content[i])})
	}
	return audit.Verify(all, [][]byte{s.pub}, s.head, partial)
}

func small(c *audit.Config) { c.MaxBytes = 4 << 10 }

func TestTheChainGoesOnOverFilesAndRuns(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	for run := range 3 {
		l := openWith(t, dir, s, small)
		appendAll(t, l, run*100, 40)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	names, content := files(t, dir)
	if len(names) < 6 || names[len(names)-1] != audit.FileName || names[0] != fmt.Sprintf("audit-%020d.log", 1) {
		t.Fatalf("%v", names)
	}
	r, err := verifyFiles(s, names, content, false)
	if err != nil || r.Events != 120 || r.Files != len(names) || r.Tail != audit.TailProven || r.First != 1 {
		t.Errorf("%+v %v", r, err)
	}
	for i := range names[:len(names)-1] {
		if !bytes.Contains(content[i][bytes.LastIndexByte(content[i][:len(content[i])-1], '\n')+1:], []byte(`"kind":"head"`)) {
			t.Errorf("%s does not end with a signed head", names[i])
		}
	}
}

func TestEveryMissingFileIsSeen(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := openWith(t, dir, s, small)
	appendAll(t, l, 0, 60)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	names, content := files(t, dir)
	without := func(i int) ([]string, [][]byte) {
		return slices.Delete(slices.Clone(names), i, i+1), slices.Delete(slices.Clone(content), i, i+1)
	}
	for i := range names {
		n, c := without(i)
		if _, err := verifyFiles(s, n, c, false); fault.KindOf(err) != fault.BadContent {
			t.Errorf("without %s: %v", names[i], err)
		}
		_, err := verifyFiles(s, n, c, true)
		if i == 0 && err != nil {
			t.Errorf("partial, without the first: %v", err)
		}
		if i > 0 && fault.KindOf(err) != fault.BadContent {
			t.Errorf("partial, without %s: %v", names[i], err)
		}
	}
	// The error names the file and its line.
	bad := slices.Clone(content)
	bad[1] = bytes.Replace(bad[1], []byte(`"status":200`), []byte(`"status":201`), 1)
	if _, err := verifyFiles(s, names, bad, false); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("verify audit log %q, line", names[1])) {
		t.Errorf("%v", err)
	}
}

// TestKilledBetweenTwoFiles: the closed file has its new name and there is no
// audit.log yet.
func TestKilledBetweenTwoFiles(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := openWith(t, dir, s, func(c *audit.Config) { c.MaxBytes = 1 << 20 })
	appendAll(t, l, 0, 5)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, audit.FileName), filepath.Join(dir, fmt.Sprintf("audit-%020d.log", 1))); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir, s)
	appendAll(t, l, 5, 5)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	names, content := files(t, dir)
	if r, err := verifyFiles(s, names, content, false); err != nil || r.Events != 10 || len(names) != 2 {
		t.Errorf("%v %+v %v", names, r, err)
	}
}

// limitFiles lets no file of this process grow beyond n bytes, until the test
// ends or release is called: a full disk for whoever writes.
func limitFiles(t *testing.T, n uint64) (release func()) {
	t.Helper()
	signal.Ignore(syscall.SIGXFSZ)
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &was); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: n, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	release = func() {
		once.Do(func() {
			if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &was); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(release)
	return release
}

// fillUp appends until the log says that it cannot, or n events went by.
func fillUp(l *audit.Log, n int) (written int, err error) {
	for i := range n {
		if err := l.Append(context.Background(), event(i)); err != nil {
			return i, err
		}
	}
	return n, nil
}

// ready waits until the log can write again, which it finds out by itself.
func ready(t *testing.T, l *audit.Log, failures func() bool) {
	t.Helper()
	for until := time.Now().Add(10 * time.Second); !failures(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("the log did not go on: %v", l.Ready())
		}
	}
}

func TestFullDiskRefuses(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := open(t, dir, s)
	release := limitFiles(t, 6000)
	n, err := fillUp(l, 100)
	if err == nil || n == 0 || fault.HintOf(err) == "" {
		t.Fatalf("%d events, %v", n, err)
	}
	if l.Ready() == nil {
		t.Error("the log says that it can write")
	}
	if err := l.Append(t.Context(), event(1)); err == nil {
		t.Error("a call that is not written down was let through")
	}
	release()
	ready(t, l, func() bool { return l.Ready() == nil })
	appendAll(t, l, 500, 2)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := verify(read(t, dir), s.pub, s.head)
	if err != nil || r.Events != uint64(n+2) || r.Lost != 0 || r.Recoveries != 0 {
		t.Errorf("%d written before: %+v %v", n, r, err)
	}
}

func TestFullDiskGoesOnAndCounts(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := openWith(t, dir, s, func(c *audit.Config) { c.WhenFull = audit.GoOn })
	release := limitFiles(t, 6000)
	if n, err := fillUp(l, 100); err != nil || l.Ready() != nil {
		t.Fatalf("%d events, %v, ready: %v", n, err, l.Ready())
	}
	lost := l.Stats().Lost.Load()
	if lost == 0 || lost >= 100 {
		t.Fatalf("%d lost", lost)
	}
	release()
	appendAll(t, l, 500, 1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := verify(read(t, dir), s.pub, s.head)
	if err != nil || r.Lost != lost || r.Events != 101-lost {
		t.Errorf("%d lost: %+v %v", lost, r, err)
	}
}

// TestAnHSMThatHangsHoldsUpLittle: calls are written while heads cannot be
// signed, and the HSM is not asked again and again.
func TestAnHSMThatHangsHoldsUpLittle(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	var hangs atomic.Bool
	var asked, gaveUp atomic.Int32
	l := openWith(t, dir, s, func(c *audit.Config) {
		sign := c.Sign
		c.Sign = func(ctx context.Context, m []byte) ([]byte, error) {
			if !hangs.Load() {
				return sign(ctx, m)
			}
			asked.Add(1)
			<-ctx.Done()
			gaveUp.Add(1)
			return nil, ctx.Err()
		}
	})
	hangs.Store(true)
	n := 0
	for ; gaveUp.Load() == 0; n++ {
		appendAll(t, l, n, 1)
	}
	appendAll(t, l, n, 100)
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	hangs.Store(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := verify(read(t, dir), s.pub, s.head); err != nil || r.Events < 100 {
		t.Errorf("%+v %v", r, err)
	}
}

func TestMirrorGetsEveryLine(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	var copied bytes.Buffer
	l := openWith(t, dir, s, func(c *audit.Config) { c.Mirror = &copied })
	appendAll(t, l, 0, 3)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(copied.Bytes(), read(t, dir)) {
		t.Errorf("%s", copied.Bytes())
	}
}

// TestATailThatWasCutBeforeTheStart: the store's head is of a line that the
// file does not have when it is opened; from then on every check says so.
func TestATailThatWasCutBeforeTheStart(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	whole := write(t, dir, s, 5)
	known := *s.head
	lines := bytes.SplitAfter(whole, []byte("\n"))
	if err := os.WriteFile(filepath.Join(dir, audit.FileName), bytes.Join(lines[:4], nil), 0o600); err != nil {
		t.Fatal(err)
	}
	l := openWith(t, dir, s, func(c *audit.Config) { c.Known = &known })
	appendAll(t, l, 9, 1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := verify(read(t, dir), s.pub, s.head)
	if fault.KindOf(err) != fault.BadContent || !strings.Contains(err.Error(), `line "6"`) || !strings.Contains(err.Error(), known.Chain) {
		t.Errorf("%v", err)
	}
	// A whole file says nothing of the kind.
	if err := os.WriteFile(filepath.Join(dir, audit.FileName), whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := openWith(t, dir, s, func(c *audit.Config) { c.Known = &known }).Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := verify(read(t, dir), s.pub, s.head); err != nil {
		t.Error(err)
	}
}

func TestRemovalsAfterAMoment(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	clock := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	l := openWith(t, dir, s, func(c *audit.Config) { c.Now = func() time.Time { return clock } })
	say := func(action, key, outcome string) {
		t.Helper()
		if err := l.Append(t.Context(), audit.Event{Action: action, Key: key, Instance: "inst", Outcome: outcome, Principal: "p"}); err != nil {
			t.Fatal(err)
		}
	}
	say("kms.secrets.delete", "early", "success")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	since := clock.Add(time.Hour)
	clock = since.Add(time.Hour)
	l = openWith(t, dir, s, func(c *audit.Config) { c.Now = func() time.Time { return clock } })
	say("kms.secrets.purge", "k1", "success")
	say("kms.secrets.delete", "k2", "failure")
	say("kms.secrets.wrap", "k3", "success")
	say("iam.api-keys.delete", "a1", "success")
	say("kmsctl.instances.delete", "", "success")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	if err := audit.Removals(bytes.NewReader(read(t, dir)), since, func(id, why string) { got[id] = why }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || !strings.Contains(got["k1"], "kms.secrets.purge by p at 2026-01-01T02:00:00Z") || got["a1"] == "" || got["inst"] == "" {
		t.Errorf("%v", got)
	}
	if err := audit.Removals(failing{}, since, func(string, string) {}); !errors.Is(err, errFailing) {
		t.Errorf("%v", err)
	}
}

var errFailing = errors.New("disk")

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errFailing }
