package file_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kmsctl/kmsctl/internal/file"
)

func TestWrite(t *testing.T) { testWrite(t, file.Write) }

func TestWriteSoon(t *testing.T) { testWrite(t, file.WriteSoon) }

func testWrite(t *testing.T, write func(string, []byte, os.FileMode) error) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, text := range []string{"first", "second, over the first"} {
		if err := write(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != text {
			t.Errorf("%q, %v", b, err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	// A folder in the file's place: the rename fails, and nothing is left.
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := write(filepath.Join(dir, "d"), nil, 0o600); err == nil {
		t.Error("wrote over a folder")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 {
		t.Errorf("%v, %v", left, err)
	}
	if err := write(filepath.Join(dir, "absent", "f"), nil, 0o600); !os.IsNotExist(err) {
		t.Errorf("%v", err)
	}
}
