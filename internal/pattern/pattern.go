// Package pattern makes regular expressions that are compiled when they are
// first used: every start of the program would pay for those of all packages.
package pattern

import (
	"regexp"
	"sync"
)

// Lazy compiles expr at the first call, and panics then when expr is wrong.
func Lazy(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}
