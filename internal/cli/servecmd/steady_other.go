//go:build !linux

package servecmd

import "time"

var began = time.Now()

// steady is the time since this process started, whatever the clock is set to.
func steady() time.Duration { return time.Since(began) }
