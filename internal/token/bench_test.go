package token

import (
	"syscall"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// BenchmarkMiss compares the CPU time of a wrap whose root key is in the token
// with one whose key must be brought back first, and with C_UnwrapKey alone:
// scripts/bench-hsm.sh reads it.
func BenchmarkMiss(b *testing.B) {
	tok := benchToken(b)
	k, err := tok.CreateRootKey()
	if err != nil {
		b.Fatal(err)
	}
	dek, aad := make([]byte, 32), make([]byte, 40)
	wrap := func(b *testing.B) {
		b.Helper()
		if _, err := tok.Wrap(k.Blob, dek, aad); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("hit", func(b *testing.B) { timed(b, func() { wrap(b) }, func() {}) })
	b.Run("miss", func(b *testing.B) { timed(b, func() { tok.Evict(k.Blob); wrap(b) }, func() {}) })
	b.Run("unwrap", func(b *testing.B) {
		w, err := parseBlob(k.Blob)
		if err != nil {
			b.Fatal(err)
		}
		tpl := unwrapTemplate(tok.sessionTemplate(false), pkcs11.CKK_AES)
		m := []*pkcs11.Mechanism{pkcs11.NewMechanism(tok.can.way.mechanism, nil)}
		var made []pkcs11.ObjectHandle
		timed(b, func() {
			h, err := tok.ctx.UnwrapKey(tok.login, m, tok.master.wrap.enc, w.enc, tpl)
			if err != nil {
				b.Fatal(err)
			}
			made = append(made, h)
		}, func() {
			for _, h := range made {
				tok.destroy(tok.login, h)
			}
			made = nil
		})
	})
}

// BenchmarkRootKeys makes root keys, of which the token must keep nothing.
func BenchmarkRootKeys(b *testing.B) {
	tok := benchToken(b)
	objects := func() (n int) {
		if err := tok.with(func(s pkcs11.SessionHandle) error {
			all, err := tok.listAll(s)
			n = len(all)
			return err
		}); err != nil {
			b.Fatal(err)
		}
		return n
	}
	before := objects()
	b.ResetTimer()
	timed(b, func() {
		if _, err := tok.CreateRootKey(); err != nil {
			b.Fatal(err)
		}
	}, func() {})
	if n := objects(); n != before {
		b.Errorf("%d objects in the token, %d before", n, before)
	}
	b.ReportMetric(float64(objects()-before), "objects")
}

func benchToken(b *testing.B) *Token {
	b.Helper()
	const module = "/usr/lib/softhsm/libsofthsm2.so"
	if err := MakeSoftToken(b.TempDir(), module, "kms", secret.New([]byte("password"))); err != nil {
		b.Fatal(err)
	}
	tok, err := Open(Config{Module: module, Label: "kms"})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(tok.Close)
	if err := tok.Login(secret.New([]byte("password"))); err != nil {
		b.Fatal(err)
	}
	if _, err := tok.OpenMaster(hsm.MasterIDs{Install: "bench", Wrap: []byte("wrap-id-16-bytes"), Seal: []byte("seal-id-16-bytes"), Sign: []byte("sign-id-16-bytes")}, true); err != nil {
		b.Fatal(err)
	}
	return tok
}

// timed reports the CPU time of f, and leaves that of clear out, which runs
// now and then.
func timed(b *testing.B, f, clear func()) {
	b.Helper()
	cpu := func() int64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	used, before := int64(0), cpu()
	for i := range b.N {
		f()
		if i%64 == 63 {
			used += cpu() - before
			clear()
			before = cpu()
		}
	}
	used += cpu() - before
	clear()
	b.ReportMetric(float64(used)/1000/float64(b.N), "cpu-µs/op")
}
