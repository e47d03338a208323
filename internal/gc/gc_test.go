package gc

import (
	"runtime"
	"runtime/debug"
	"testing"
)

func TestOnlyTheFirstCollectionIsLate(t *testing.T) {
	usual := debug.SetGCPercent(100)
	defer debug.SetGCPercent(usual)
	over := putOff()
	if late := debug.SetGCPercent(firstHeap); late != firstHeap {
		t.Errorf("before the first collection the heap grows by %d %%, want %d", late, firstHeap)
	}
	runtime.GC()
	<-over
	if after := debug.SetGCPercent(100); after != 100 {
		t.Errorf("after the first collection the heap grows by %d %%, want 100", after)
	}
}
