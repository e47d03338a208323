package servecmd

import (
	"testing"
	"time"
)

// TestSteadyTimePasses as the process's own clock does.
func TestSteadyTimePasses(t *testing.T) {
	from, own := steady(), time.Now()
	for time.Since(own) < 5*time.Millisecond {
		time.Sleep(time.Millisecond)
	}
	if passed := steady() - from; passed < 5*time.Millisecond {
		t.Errorf("%s passed, and the steady clock counted %s", time.Since(own), passed)
	}
}
