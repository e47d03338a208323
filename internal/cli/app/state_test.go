package app

import (
	"os"
	"path/filepath"
	"testing"
)

// TestKept keeps lines between runs, and takes a table that is torn, of another
// shape or empty for none, whole: no line of it is believed.
func TestKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	first := openKept[string](dir, "uploads.json", 2)
	first.Save("a", "1")
	first.Save("b", "2")
	first.Drop("a")
	again := openKept[string](dir, "uploads.json", 2)
	if v, ok := again.Load("b"); !ok || v != "2" {
		t.Errorf("b: %q, %v", v, ok)
	}
	if _, ok := again.Load("a"); ok {
		t.Error("a was dropped, and is there")
	}
	whole, err := os.ReadFile(filepath.Join(dir, "uploads.json"))
	if err != nil {
		t.Fatal(err)
	}
	torn := [][]byte{{}, make([]byte, len(whole)), []byte("null"), []byte("[]"), []byte(`{"c":"3","b":4}`), append(whole, 0)}
	for n := range whole {
		torn = append(torn, whole[:n])
	}
	for _, b := range torn {
		if err := os.WriteFile(filepath.Join(dir, "uploads.json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		k := openKept[string](dir, "uploads.json", 2)
		if len(k.all) != 0 {
			t.Errorf("%q: %v was believed", b, k.all)
		}
		k.Save("d", "5")
		if v, _ := openKept[string](dir, "uploads.json", 2).Load("d"); v != "5" {
			t.Errorf("%q: what was written over it is %q", b, v)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("%v, %v", left, err)
	}
}
