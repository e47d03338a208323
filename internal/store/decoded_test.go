package store_test

import (
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
)

type inner struct {
	Names []string          `json:"names"`
	Map   map[string][]byte `json:"map"`
}

type rich struct {
	N     int        `json:"n"`
	At    *time.Time `json:"at"`
	Bytes []byte     `json:"bytes"`
	Inner inner      `json:"inner"`
	Many  []inner    `json:"many"`
	None  []string   `json:"none"`
}

type withAny struct {
	V any `json:"v"`
}

type list struct {
	Next *list `json:"next"`
}

// TestReadersShareNothing: what one reader does to its record, no other sees.
func TestReadersShareNothing(t *testing.T) {
	_, c := member(t, t.TempDir())
	s := open(t, c)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := func() rich {
		a := at
		in := inner{Names: []string{"a", "b"}, Map: map[string][]byte{"k": {1, 2}}}
		other := inner{Names: []string{"c"}, Map: map[string][]byte{"l": {3}}}
		return rich{1, &a, []byte{1, 2, 3}, in, []inner{other}, nil}
	}
	if err := s.Commit(t.Context(), record.Change{Path: "x/1", Value: want()}); err != nil {
		t.Fatal(err)
	}
	read := func() rich {
		t.Helper()
		var r rich
		if _, err := s.Get(t.Context(), "x/1", &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	for i := range 3 {
		r := read()
		if !reflect.DeepEqual(r, want()) {
			t.Fatalf("read %d: %+v", i, r)
		}
		r.N, r.Bytes[0], r.Inner.Names[0], r.Inner.Map["k"][0], r.Many[0].Names[0] = 9, 9, "z", 9, "z"
		r.Inner.Map["new"] = nil
		*r.At = time.Time{}
		r.Inner.Names = append(r.Inner.Names[:1], "x")
	}
	var n struct{ N int } // another type of the same record
	if _, err := s.Get(t.Context(), "x/1", &n); err != nil || n.N != 1 {
		t.Errorf("%+v %v", n, err)
	}
	if r := read(); !reflect.DeepEqual(r, want()) {
		t.Errorf("after another type: %+v", r)
	}
	if err := s.Commit(t.Context(), record.Change{Path: "x/2", Value: withAny{map[string]any{"a": 1.0}}}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // what cannot be copied is parsed each time
		var w withAny
		if _, err := s.Get(t.Context(), "x/2", &w); err != nil {
			t.Fatal(err)
		}
		m := w.V.(map[string]any)
		if m["a"] != 1.0 {
			t.Errorf("%+v", w)
		}
		m["a"] = 2.0
	}
	if err := s.Commit(t.Context(), record.Change{Path: "x/3", Value: &list{Next: &list{}}}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // nor one that holds itself
		var l list
		if _, err := s.Get(t.Context(), "x/3", &l); err != nil || l.Next == nil {
			t.Fatal(l, err)
		}
	}
	// A list of a small folder keeps, and shares nothing either.
	for range 2 {
		err := s.List(t.Context(), "x/", func(m record.Meta, decode func(any) error) error {
			if m.Path != "x/1" {
				return nil
			}
			var r rich
			if err := decode(&r); err != nil {
				return err
			}
			if !reflect.DeepEqual(r, want()) {
				t.Errorf("%+v", r)
			}
			r.Bytes[0] = 9
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// A change is seen at once.
	rev, _ := s.Get(t.Context(), "x/1", &rich{})
	if err := s.Commit(t.Context(), record.Change{Path: "x/1", Value: rich{N: 2}, Rev: rev}); err != nil {
		t.Fatal(err)
	}
	if r := read(); r.N != 2 || r.Bytes != nil {
		t.Errorf("%+v", r)
	}
}

// TestParsedRecordsAreBounded: who reads through a large store leaves no more
// than a part of it parsed in memory.
func TestParsedRecordsAreBounded(t *testing.T) {
	_, c := member(t, t.TempDir())
	s := open(t, c)
	const n = store.KeepParsedForTest + 500
	for at := 0; at < n; at += 100 {
		var batch []record.Change
		for i := at; i < min(at+100, n); i++ {
			batch = append(batch, record.Change{Path: fmt.Sprintf("many/%d", i), Value: inner{Names: []string{fmt.Sprint(i)}}})
		}
		if err := s.Commit(t.Context(), batch...); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		for i := range n {
			var got inner
			if _, err := s.Get(t.Context(), fmt.Sprintf("many/%d", i), &got); err != nil || got.Names[0] != fmt.Sprint(i) {
				t.Fatalf("record %d: %+v, %v", i, got, err)
			}
		}
		if got := s.ParsedForTest("many/"); got != store.KeepParsedForTest {
			t.Errorf("%d of %d records are kept parsed, want %d", got, n, store.KeepParsedForTest)
		}
	}
}
