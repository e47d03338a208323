package servecmd

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestTrimGivesBackMappedFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mapped")
	content := bytes.Repeat([]byte("page"), 1<<18)
	if err := os.WriteFile(path, content, 0o600); err != nil { // not on disk yet: its pages are dirty, and no less the file's
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, len(content), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(b) }()
	if !bytes.Equal(b, content) {
		t.Fatal("the mapping is not the file")
	}
	if got := residentKiB(t, path); got == "0" {
		t.Fatal("nothing is mapped: the test shows nothing")
	}
	Trim()
	if got := residentKiB(t, path); got != "0" {
		t.Errorf("%s KiB are still mapped", got)
	}
	if !bytes.Equal(b, content) {
		t.Error("the pages do not come back")
	}
}

// residentKiB reads from smaps how much of a file is mapped and resident.
func residentKiB(t *testing.T, path string) string {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(maps), path)
	if !ok {
		t.Fatal("the file is not mapped")
	}
	_, after, _ = strings.Cut(after, "Rss:")
	return strings.Fields(after)[0]
}
