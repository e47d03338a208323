package image

import (
	"bytes"
	"testing"

	"github.com/kmsctl/kmsctl/internal/testkit"
)

// FuzzParsers gives any bytes to what reads a client's tar, a Debian package
// and a program: an error is well, a crash is not.
func FuzzParsers(f *testing.F) {
	f.Add(testkit.Tar(testkit.Entry{Name: "usr/lib/x.so", Data: []byte("\x7fELF")}))
	f.Add(testkit.Gzip(testkit.Tar(testkit.Entry{Name: "a", Data: []byte("b")})))
	f.Add([]byte("!<arch>\ndebian-binary   0           0     0     100644  4         `\n2.0\n"))
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := TarEntries("x.tar", bytes.NewReader(b))
		if err == nil {
			if _, err := NewLayer(entries); err != nil {
				t.Logf("no layer: %v", err)
			}
		}
		if _, err := ReadProgram("x", b); err == nil {
			offers(b)
		}
		if es, err := (Deb{Name: "x"}).Entries(b); err == nil && len(b) == 0 {
			t.Errorf("an empty package has %d files", len(es))
		}
	})
}
