package app

import (
	"encoding/json"
	"os"
	"path/filepath"
	"sync"

	"github.com/kmsctl/kmsctl/internal/file"
	"github.com/kmsctl/kmsctl/internal/push"
)

// StateDir is $XDG_STATE_HOME/kmsctl, as the XDG base directory specification
// has it.
func StateDir(getenv func(string) string) string {
	base := getenv("XDG_STATE_HOME")
	if base == "" {
		base = filepath.Join(getenv("HOME"), ".local", "state")
	}
	return filepath.Join(base, "kmsctl")
}

// CacheDir is KMSCTL_CACHE, else $XDG_CACHE_HOME/kmsctl.
func CacheDir(getenv func(string) string) string {
	if d := getenv("KMSCTL_CACHE"); d != "" {
		return d
	}
	base := getenv("XDG_CACHE_HOME")
	if base == "" {
		base = filepath.Join(getenv("HOME"), ".cache")
	}
	return filepath.Join(base, "kmsctl")
}

// kept is a small table in a file that is safe to lose: what cannot be read is
// empty, what cannot be written is not kept. It is written after every chunk of
// every upload, so that nobody waits for the disk. A table that grows over most is
// begun anew. Two programs at once lose lines, no more.
type kept[T any] struct {
	path string
	most int
	mu   sync.Mutex
	all  map[string]T
}

func openKept[T any](dir, name string, most int) *kept[T] {
	k := &kept[T]{path: filepath.Join(dir, name), most: most, all: map[string]T{}}
	if b, err := os.ReadFile(k.path); err == nil && (json.Unmarshal(b, &k.all) != nil || k.all == nil) {
		k.all = map[string]T{} // torn by a power cut, or another's: no half of it is believed
	}
	return k
}

// Load gives a line.
func (k *kept[T]) Load(key string) (T, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	v, ok := k.all[key]
	return v, ok
}

// Save keeps a line.
func (k *kept[T]) Save(key string, v T) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.all) >= k.most {
		clear(k.all)
	}
	k.all[key] = v
	k.write()
}

// Drop forgets a line.
func (k *kept[T]) Drop(key string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.all[key]; ok {
		delete(k.all, key)
		k.write()
	}
}

func (k *kept[T]) write() {
	b, err := json.Marshal(k.all)
	if err != nil || os.MkdirAll(filepath.Dir(k.path), 0o700) != nil {
		return
	}
	_ = file.WriteSoon(k.path, b, 0o600) // safe to lose
}

// Uploads keeps unfinished uploads between runs.
func (a *App) Uploads() *kept[string] {
	return openKept[string](StateDir(a.Getenv), "uploads.json", 4096)
}

// Layers keeps what layers of foreign archives became.
func (a *App) Layers() push.Known {
	return openKept[push.Layer](StateDir(a.Getenv), "layers.json", 4096)
}
