package kms_test

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// BenchmarkLargeInstance lists, searches and changes an instance of 100,000
// keys, and opens its store.
func BenchmarkLargeInstance(b *testing.B) {
	const n = 100_000
	m, err := store.OpenEmbedded(b.Context(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	c := m.Client()
	codec, err := record.NewCodec(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		b.Fatal(err)
	}
	st, err := store.Open(b.Context(), c, codec)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { st.Close(); _ = c.Close(); m.Close() })
	tok := testkit.NewToken("p", "p")
	s := kms.New(st, tok, tok, time.Now, kms.DefaultWindows())
	in, err := s.CreateInstance(b.Context(), kmsapi.CreateInstance{Name: "large"}, "me")
	if err != nil {
		b.Fatal(err)
	}
	for part := range slices.Chunk(kms.RecordsForTest(in.ID, n), 120) {
		if err := st.Commit(b.Context(), part...); err != nil {
			b.Fatal(err)
		}
	}
	list := func(b *testing.B, q kms.Query, want int) {
		b.Helper()
		p, err := s.Keys(b.Context(), in.ID, q)
		if err != nil || p.Total < want {
			b.Fatalf("%d keys: %v", p.Total, err)
		}
	}
	list(b, kms.Query{Limit: 1}, n) // the first list parses all keys
	b.Run("page", func(b *testing.B) {
		for b.Loop() {
			list(b, kms.Query{Limit: 200, Offset: n / 2}, n)
		}
	})
	b.Run("page of sorted", func(b *testing.B) {
		for b.Loop() {
			list(b, kms.Query{Limit: 200, Sort: "-creationDate"}, n)
		}
	})
	b.Run("create, then page", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.CreateKey(b.Context(), in.ID, "default", "me", kmsapi.CreateKey{Name: "one more"}); err != nil {
				b.Fatal(err)
			}
			list(b, kms.Query{Limit: 200}, n)
		}
	})
	b.Run("wrap", func(b *testing.B) {
		p, err := s.Keys(b.Context(), in.ID, kms.Query{Limit: 1, Sort: "-creationDate"})
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if _, err := s.Wrap(b.Context(), in.ID, p.Keys[0].ID, kmsapi.WrapRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			again, err := store.Open(b.Context(), c, codec)
			if err != nil {
				b.Fatal(err)
			}
			again.Close()
		}
	})
}
