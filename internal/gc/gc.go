// Package gc puts off a program's first garbage collection, for programs that
// mostly end before they would need one: the libraries' initialisation alone
// makes enough garbage for three collections, a third of the CPU time of a
// start. It works by being imported.
//
// Packages are initialised in the order of their import paths, after those
// that they import ("Package initialization" in the Go specification): this
// one imports so little that it comes before the dear ones.
package gc

import (
	"os"
	"runtime"
	"runtime/debug"
)

// firstHeap is the size of the heap, in percent of the runtime's smallest
// (4 MiB), at which the first collection begins.
const firstHeap = 400

func init() {
	if os.Getenv("GOGC") == "" {
		putOff()
	}
}

// putOff lets the heap grow to firstHeap once. It returns what is closed when
// the first collection is over, and the heap grows as it does everywhere.
func putOff() <-chan struct{} {
	over := make(chan struct{})
	usual := debug.SetGCPercent(firstHeap)
	// Nothing holds this object: the first collection finds it.
	runtime.SetFinalizer(new(*byte), func(**byte) {
		debug.SetGCPercent(usual)
		close(over)
	})
	return over
}
