package audit_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/fault"
)

type signer struct {
	key  *ecdsa.PrivateKey
	pub  []byte
	mu   sync.Mutex
	head *audit.Head
}

func newSigner(tb testing.TB) *signer {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		tb.Fatal(err)
	}
	return &signer{key: k, pub: pub}
}

func (s *signer) config() audit.Config {
	return audit.Config{PublicKey: s.pub, Now: time.Now,
		Sign: func(_ context.Context, m []byte) ([]byte, error) {
			sum := sha256.Sum256(m)
			return ecdsa.SignASN1(rand.Reader, s.key, sum[:])
		},
		SaveHead: func(_ context.Context, h audit.Head) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.head = &h
			return nil
		}}
}

func event(i int) audit.Event {
	return audit.Event{Action: "kms.secrets.wrap", Outcome: "success", Status: 200, Principal: "p", Key: fmt.Sprint(i)}
}

func open(tb testing.TB, dir string, s *signer) *audit.Log {
	tb.Helper()
	l, err := audit.Open(dir, s.config())
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

// write makes a closed log of n events and gives its bytes.
func write(t *testing.T, dir string, s *signer, n int) []byte {
	t.Helper()
	l := open(t, dir, s)
	for i := range n {
		if err := l.Append(t.Context(), event(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return read(t, dir)
}

// verify checks a log of one file.
func verify(b, pub []byte, want *audit.Head) (audit.Report, error) {
	return audit.Verify([]audit.File{{Name: audit.FileName, Reader: bytes.NewReader(b)}}, [][]byte{pub}, want, false)
}

func read(t *testing.T, dir string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, audit.FileName))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestWholeLogOverSeveralRuns(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	write(t, dir, s, 3)
	b := write(t, dir, s, 2)
	r, err := verify(b, s.pub, s.head)
	if err != nil || r.Events != 5 || r.Tail != audit.TailProven || r.SignedUpTo != r.Lines {
		t.Errorf("%+v %v", r, err)
	}
	if r, err := verify(b, s.pub, nil); err != nil || r.Tail != audit.TailSigned {
		t.Errorf("%+v %v", r, err)
	}
	pemKey, err := os.ReadFile(filepath.Join(dir, audit.KeyName))
	if err != nil {
		t.Fatal(err)
	}
	if keys, err := audit.ParsePublicKeys(pemKey); err != nil || len(keys) != 1 || !bytes.Equal(keys[0], s.pub) {
		t.Errorf("public key file: %v", err)
	}
}

// TestAnotherKeySignsOn: after a clearing the log goes on under a new key. Both
// keys are needed, in their order, and a later one vouches for nothing earlier.
func TestAnotherKeySignsOn(t *testing.T) {
	dir, one, two := t.TempDir(), newSigner(t), newSigner(t)
	write(t, dir, one, 3)
	two.head = one.head
	b := write(t, dir, two, 2)
	log := func(keys ...[]byte) (audit.Report, error) {
		return audit.Verify([]audit.File{{Name: audit.FileName, Reader: bytes.NewReader(b)}}, keys, two.head, false)
	}
	if r, err := log(one.pub, two.pub); err != nil || r.Events != 5 || r.Keys != 2 || r.Tail != audit.TailProven {
		t.Errorf("%+v %v", r, err)
	}
	for name, keys := range map[string][][]byte{"the first": {one.pub}, "the second": {two.pub}, "the wrong order": {two.pub, one.pub}, "another between": {newSigner(t).pub, two.pub}} {
		if _, err := log(keys...); fault.KindOf(err) != fault.BadContent {
			t.Errorf("with %s: %v", name, err)
		}
	}
	pemKeys, err := os.ReadFile(filepath.Join(dir, audit.KeyName))
	if err != nil {
		t.Fatal(err)
	}
	if keys, err := audit.ParsePublicKeys(pemKeys); err != nil || len(keys) != 2 || !bytes.Equal(keys[0], one.pub) || !bytes.Equal(keys[1], two.pub) {
		t.Errorf("beside the log: %d keys, %v", len(keys), err)
	}
}

func TestEveryChangeIsSeen(t *testing.T) {
	s := newSigner(t)
	good := write(t, t.TempDir(), s, 4)
	refused := func(what string, b []byte) {
		t.Helper()
		if _, err := verify(b, s.pub, s.head); fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		refused(fmt.Sprintf("byte %d flipped", i), bad)
	}
	lines := bytes.SplitAfter(good, []byte("\n"))
	lines = lines[:len(lines)-1]
	for i := range lines {
		refused(fmt.Sprintf("line %d removed", i+1), bytes.Join(slices.Delete(slices.Clone(lines), i, i+1), nil))
		refused(fmt.Sprintf("line %d doubled", i+1), bytes.Join(slices.Insert(slices.Clone(lines), i, lines[i]), nil))
		refused(fmt.Sprintf("cut after line %d", i), bytes.Join(lines[:i], nil))
		if i > 0 {
			swapped := slices.Clone(lines)
			swapped[i-1], swapped[i] = swapped[i], swapped[i-1]
			refused(fmt.Sprintf("lines %d and %d swapped", i, i+1), bytes.Join(swapped, nil))
		}
	}
	other := newSigner(t)
	if _, err := verify(good, other.pub, nil); err == nil {
		t.Error("another key's log was believed")
	}
}

func TestTornTailIsClosedAndCounted(t *testing.T) {
	s := newSigner(t)
	whole := write(t, t.TempDir(), s, 2)
	last := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	// A crash may leave any part of the last line.
	for _, cut := range []int{last + 1, last + 20, len(whole) - 2, len(whole) - 1} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, audit.FileName), whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := verify(whole[:cut], s.pub, nil); fault.KindOf(err) != fault.BadContent {
			t.Errorf("cut at %d before recovery: %v", cut, err)
		}
		b := write(t, dir, s, 1)
		r, err := verify(b, s.pub, s.head)
		want := 1
		if cut == len(whole)-1 {
			want = 0 // nothing but the line break was lost
		}
		if err != nil || r.Recoveries != want {
			t.Errorf("cut at %d: %+v %v", cut, r, err)
		}
	}
}

func TestConcurrentAppends(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := open(t, dir, s)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 25 {
				if err := l.Append(context.Background(), event(i*100+j)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := strings.Count(string(read(t, dir)), `"kind":"event"`); n != 200 {
		t.Errorf("%d events are on disk after Append returned, want 200", n)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(t.Context(), event(0)); err == nil {
		t.Error("append after close")
	}
	r, err := verify(read(t, dir), s.pub, s.head)
	if err != nil || r.Events != 200 {
		t.Errorf("%+v %v", r, err)
	}
}

func BenchmarkAppend(b *testing.B) {
	l := open(b, b.TempDir(), newSigner(b))
	defer l.Close()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := l.Append(context.Background(), event(1)); err != nil {
				b.Error(err)
			}
		}
	})
}

// TestExpectedCallsAreCounted: whatever becomes of the calls that were said to
// come, nobody waits for them in the end.
func TestExpectedCallsAreCounted(t *testing.T) {
	l := open(t, t.TempDir(), newSigner(t))
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	var wg sync.WaitGroup
	for i := range 40 {
		l.Expect(1)
		ctx := t.Context()
		if i%4 == 0 {
			ctx = stopped
		}
		wg.Go(func() { _ = l.Append(ctx, audit.Event{Action: "x", Expected: true}) })
	}
	l.Expect(1)
	l.Expect(-1)
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.Expect(1)
	if err := l.Append(t.Context(), audit.Event{Action: "x", Expected: true}); err == nil {
		t.Error("a closed log took a line")
	}
	if n := l.ComingForTest(); n != 0 {
		t.Errorf("%d calls are still expected", n)
	}
}
