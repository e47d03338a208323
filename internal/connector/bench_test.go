package connector_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/internal/token"
)

// BenchmarkWrap compares wraps through the connector's socket with the same
// operation in this process on a pooled session: scripts/bench-hsm.sh reads it.
func BenchmarkWrap(b *testing.B) {
	for _, at := range []int{1, 8, 64} {
		b.Run(fmt.Sprintf("process-%d", at), func(b *testing.B) {
			dir := b.TempDir()
			if err := token.MakeSoftToken(dir, testkit.SoftHSM, "kms", secret.New([]byte("password"))); err != nil {
				b.Fatal(err)
			}
			tok, err := token.Open(token.Config{Module: testkit.SoftHSM, Label: "kms"})
			if err != nil {
				b.Fatal(err)
			}
			defer tok.Close()
			if err := tok.Login(secret.New([]byte("password"))); err != nil {
				b.Fatal(err)
			}
			if _, err := tok.OpenMaster(ids, true); err != nil {
				b.Fatal(err)
			}
			k, err := tok.CreateRootKey()
			if err != nil {
				b.Fatal(err)
			}
			each(b, at, 0, func() error {
				_, err := tok.Wrap(k.Blob, dek, aad)
				return err
			})
		})
		b.Run(fmt.Sprintf("socket-%d", at), func(b *testing.B) {
			c, k := benchClient(b)
			each(b, at, c.Pid(), func() error {
				_, err := c.Wrap(b.Context(), k.Blob, dek, aad)
				return err
			})
		})
	}
}

// BenchmarkApart makes one wrap at a time with a pause before the next, as
// a service with little to do does, and reports the CPU time of both
// processes.
func BenchmarkApart(b *testing.B) {
	c, k := benchClient(b)
	before := cpu(b, c.Pid())
	for b.Loop() {
		if _, err := c.Wrap(b.Context(), k.Blob, dek, aad); err != nil {
			b.Fatal(err)
		}
		time.Sleep(500 * time.Microsecond)
	}
	b.ReportMetric(float64((cpu(b, c.Pid())-before).Microseconds())/float64(b.N), "cpu-µs/op")
}

var dek, aad = make([]byte, 32), make([]byte, 40)

func benchClient(b *testing.B) (*connector.Client, hsm.NewKey) {
	b.Helper()
	c, err := connector.Start(b.Context(), connector.Options{Path: testkit.Connector(b), Module: testkit.SoftHSM, SoftHSMDir: b.TempDir(), PIN: secret.New([]byte("password"))})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(c.Close)
	if err := unlock(c, &atomic.Int32{})(b.Context()); err != nil {
		b.Fatal(err)
	}
	k, err := c.CreateRootKey(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	return c, k
}

// cpu gives the CPU time that this process and another have used.
func cpu(b *testing.B, other int) time.Duration {
	b.Helper()
	ticks := int64(0)
	for _, pid := range []int{os.Getpid(), other} {
		if pid == 0 {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			b.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		f := strings.Fields(rest) // field 14 of proc(5) is the twelfth after the name
		for _, text := range f[11:13] {
			n, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			ticks += n
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 on all of Linux that we build for
}

// each makes the calls, at most n at once, and reports the CPU time of both
// processes for each, which says more than the clock on a busy machine.
func each(b *testing.B, n, other int, f func() error) {
	b.Helper()
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	before := cpu(b, other)
	b.ResetTimer()
	for range n {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := f(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64((cpu(b, other)-before).Microseconds())/float64(b.N), "cpu-µs/op")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "wraps/s")
}
