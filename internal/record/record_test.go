package record_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/kmsctl/kmsctl/internal/record"
)

type body struct{ A, B string }

func codec(t *testing.T, fill byte) *record.Codec {
	t.Helper()
	c, err := record.NewCodec(bytes.Repeat([]byte{fill}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRoundTrip(t *testing.T) {
	c := codec(t, 1)
	b, err := c.Encode("/k/1", body{"x", "y"})
	if err != nil {
		t.Fatal(err)
	}
	var got body
	if err := c.Decode("/k/1", b, &got); err != nil || got != (body{"x", "y"}) {
		t.Fatalf("%+v, %v", got, err)
	}
}

func TestForgeriesAreRefused(t *testing.T) {
	c := codec(t, 1)
	good, err := c.Encode("/k/1", body{"x", "y"})
	if err != nil {
		t.Fatal(err)
	}
	var got body
	if err := c.Decode("/k/2", good, &got); !errors.Is(err, record.ErrForged) {
		t.Errorf("moved record: %v", err)
	}
	if err := codec(t, 2).Decode("/k/1", good, &got); !errors.Is(err, record.ErrForged) {
		t.Errorf("other key: %v", err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if err := c.Decode("/k/1", bad, &got); !errors.Is(err, record.ErrForged) {
			t.Fatalf("bit flipped in byte %d: %v", i, err)
		}
	}
	for n := range good {
		if err := c.Decode("/k/1", good[:n], &got); !errors.Is(err, record.ErrForged) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestKeyLength(t *testing.T) {
	if _, err := record.NewCodec(make([]byte, 16)); err == nil {
		t.Error("a short key must be refused")
	}
}

// TestANewerVersion: what another kmsctl of this installation wrote is no
// forgery, and is not read as something else.
func TestANewerVersion(t *testing.T) {
	c := codec(t, 1)
	newer := c.SealForTest(record.Version+1, "/k/1", []byte(`{"A":"x"}`))
	var got body
	if err := c.Decode("/k/1", newer, &got); !errors.Is(err, record.ErrNewer) || got != (body{}) || record.Body(newer) != nil {
		t.Errorf("%v %+v", err, got)
	}
	newer[0] = record.Version
	if err := c.Check("/k/1", newer); !errors.Is(err, record.ErrForged) {
		t.Errorf("passed for today's: %v", err)
	}
	if err := codec(t, 2).Check("/k/1", c.SealForTest(record.Version+1, "/k/1", nil)); !errors.Is(err, record.ErrForged) {
		t.Errorf("of another key: %v", err)
	}
}
