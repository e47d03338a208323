package servecmd

import "testing"

func TestGarbagePercent(t *testing.T) {
	for live, want := range map[uint64]int{0: 100, 8 << 20: 100, 96 << 20: 100, 128 << 20: 75, 200 << 20: 48, 1 << 30: 25} {
		if got := garbagePercent(live); got != want {
			t.Errorf("%d MiB live: %d %%, want %d %%", live>>20, got, want)
		}
	}
}
