package store

import (
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// decoded keeps what a record's JSON said, so that a record which many calls
// read (a key, a policy) is parsed once. Each reader gets a copy of its own.
type decoded struct{ at atomic.Pointer[reflect.Value] }

// into gives the kept value to v, a pointer, if it is of v's type.
func (d *decoded) into(v any) bool {
	kept := d.at.Load()
	if kept == nil {
		return false
	}
	to := reflect.ValueOf(v).Elem()
	if to.Type() != kept.Type() {
		return false
	}
	to.Set(*kept)
	own(to)
	return true
}

// keep keeps a copy of what v points to, where its type can be copied, and
// says whether it is the first.
func (d *decoded) keep(v any) bool {
	from := reflect.ValueOf(v).Elem()
	if kindOf(from.Type()) == opaque {
		return false
	}
	kept := reflect.New(from.Type()).Elem()
	kept.Set(from)
	own(kept)
	return d.at.Swap(&kept) == nil
}

// keepParsed is how many records are kept parsed: a parsed one takes more
// memory than its JSON, and who walks through all keys once needs none again.
const keepParsed = 4096

// recent are the records that are kept parsed, the oldest of which goes first.
type recent struct {
	mu   sync.Mutex
	ring [keepParsed]*decoded
	next int
}

func (r *recent) add(d *decoded) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.ring[r.next]; old != nil {
		old.at.Store(nil)
	}
	r.ring[r.next] = d
	r.next = (r.next + 1) % keepParsed
}

// kinds of types: what a plain copy copies whole, what has parts to copy, and
// what cannot be copied from outside.
type copying int

const (
	flat copying = iota + 1
	deep
	opaque
)

var kindsOf sync.Map // reflect.Type → copying

func kindOf(t reflect.Type) copying {
	if k, ok := kindsOf.Load(t); ok {
		return k.(copying)
	}
	k := findKind(t, nil)
	kindsOf.Store(t, k)
	return k
}

// findKind looks into t; within are the types that hold it. One that holds
// itself is opaque.
func findKind(t reflect.Type, within []reflect.Type) copying {
	if slices.Contains(within, t) {
		return opaque
	}
	within = append(within, t)
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		if findKind(t.Elem(), within) == opaque {
			return opaque
		}
		return deep
	case reflect.Struct:
		return structKind(t, within)
	case reflect.Interface, reflect.Func, reflect.Chan, reflect.UnsafePointer, reflect.Array:
		return opaque
	default:
		return flat
	}
}

func structKind(t reflect.Type, within []reflect.Type) copying {
	if t == reflect.TypeFor[time.Time]() {
		return flat // its location is never changed
	}
	k := flat
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			return opaque
		}
		switch findKind(f.Type, within) {
		case opaque:
			return opaque
		case deep:
			k = deep
		case flat:
		}
	}
	return k
}

// own makes everything that v reaches its own. v is settable, and no type of
// it is opaque or holds itself.
func own(v reflect.Value) {
	if kindOf(v.Type()) == flat {
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return
		}
		n := reflect.New(v.Type().Elem())
		n.Elem().Set(v.Elem())
		own(n.Elem())
		v.Set(n)
	case reflect.Slice:
		if v.IsNil() {
			return
		}
		n := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		reflect.Copy(n, v)
		if kindOf(v.Type().Elem()) != flat {
			for i := range n.Len() {
				own(n.Index(i))
			}
		}
		v.Set(n)
	case reflect.Map:
		ownMap(v)
	default: // a struct
		for i := range v.NumField() {
			own(v.Field(i))
		}
	}
}

func ownMap(v reflect.Value) {
	if v.IsNil() {
		return
	}
	n := reflect.MakeMapWithSize(v.Type(), v.Len())
	for it := v.MapRange(); it.Next(); {
		e := reflect.New(v.Type().Elem()).Elem()
		e.Set(it.Value())
		own(e)
		n.SetMapIndex(it.Key(), e)
	}
	v.Set(n)
}
