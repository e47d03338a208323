package servecmd

import (
	"os"
	"runtime/debug"
	"runtime/metrics"
)

// garbageMost is about how much garbage may lie in memory besides what lives.
// Go's own rule is as much again, by which collecting costs a call the same
// however many keys there are: half as much garbage costs each twice. So the
// rule holds for up to about 100,000 keys, and memory counts more beyond.
const garbageMost = 96 << 20

// Percentages of what lives: Go's own, and the least, below which collecting
// would cost more than memory does.
const (
	usualPercent = 100
	leastPercent = 25
)

// limitGarbage bounds the garbage by what lives now, unless the environment
// says how the collector shall work.
func limitGarbage() {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	debug.SetGCPercent(garbagePercent(live[0].Value.Uint64()))
}

func garbagePercent(live uint64) int {
	if live <= garbageMost {
		return usualPercent
	}
	return max(leastPercent, int(garbageMost*100/live))
}
