package image

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/ulikunitz/xz"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// deb packs a .deb as dpkg does.
func deb(t *testing.T, entries ...testkit.Entry) []byte {
	t.Helper()
	var data bytes.Buffer
	w, err := xz.NewWriter(&data)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(testkit.Tar(entries...)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	out := []byte("!<arch>\n")
	for _, m := range []struct {
		name string
		b    []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar.xz", []byte("odd")}, {"data.tar.xz", data.Bytes()}} {
		head := []byte(strings.Repeat(" ", 60))
		copy(head, m.name)
		copy(head[48:], strings.TrimSpace(strings.Join([]string{"", itoa(len(m.b))}, "")))
		copy(head[58:], "`\n")
		out = append(append(out, head...), m.b...)
		if len(m.b)%2 == 1 {
			out = append(out, '\n')
		}
	}
	return out
}

func itoa(n int) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + string(rune('0'+n%10))
}

func TestDebEntries(t *testing.T) {
	b := deb(t, testkit.Entry{Name: "./usr/lib/libx.so.1", Data: []byte("x")}, testkit.Entry{Name: "./usr/lib/libx.so", Type: tar.TypeSymlink, Link: "libx.so.1"},
		testkit.Entry{Name: "./usr/share/doc/x/copyright", Data: []byte("c")}, testkit.Entry{Name: "./usr/share/man/x.1", Data: []byte("m")},
		testkit.Entry{Name: "./usr/lib/x86_64-linux-gnu/gconv/UTF-7.so", Data: []byte("g")})
	all, err := Deb{Name: "x"}.Entries(b)
	if err != nil || len(all) != 3 || all[1].Link != "libx.so.1" || all[2].Name != "usr/share/doc/x/copyright" {
		t.Errorf("%+v, %v", all, err)
	}
	for name, bad := range map[string][]byte{"cut": b[:len(b)-10], "text": []byte("no"), "empty": []byte("!<arch>\n")} {
		if _, err := (Deb{Name: "x"}).Entries(bad); fault.KindOf(err) != fault.BadContent {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLockFile(t *testing.T) {
	all, err := Debs()
	if err != nil || len(all) < 5 {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestLayerIsReproducible(t *testing.T) {
	entries := append(BaseEntries(), Entry{Name: "usr/bin/x", Mode: 0o755, Data: []byte("x")}, Entry{Name: "usr/bin/y", Link: "x"})
	one, err := NewLayer(entries)
	if err != nil {
		t.Fatal(err)
	}
	entries[0], entries[1] = entries[1], entries[0]
	two, err := NewLayer(entries)
	if err != nil || one.Digest != two.Digest || one.DiffID != two.DiffID {
		t.Errorf("the order of entries shows: %v", err)
	}
	z, err := gzip.NewReader(bytes.NewReader(one.Blob))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s belongs to %d, is of %v", h.Name, h.Uid, h.ModTime)
		}
		names = append(names, h.Name)
	}
	if got := strings.Join(names, " "); got != "etc/ etc/group etc/nsswitch.conf etc/passwd tmp/ usr/ usr/bin/ usr/bin/x usr/bin/y" {
		t.Errorf("names %s", got)
	}
}

// TestMissing asks a real program of this machine for its libraries.
func TestMissing(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(sh)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ReadProgram(sh, b)
	if err != nil || p.Static || len(p.Needs) == 0 {
		t.Fatalf("%+v, %v", p, err)
	}
	l := Layer{Entries: []Entry{{Name: "bin/sh", Data: b}}}
	all := func(string) bool { return true }
	if got := Missing([]Layer{l}, all); len(got) == 0 || got[0] != "bin/sh needs "+p.Needs[0] {
		t.Errorf("missing %q", got)
	}
	var libs []Entry
	for _, n := range p.Needs {
		libs = append(libs, Entry{Name: "lib/" + n, Data: b}) // has none of the versions, as far as it says
	}
	if got := Missing([]Layer{l, {Entries: libs}}, func(n string) bool { return n == "bin/sh" }); len(got) != 0 {
		t.Errorf("missing %q", got)
	}
}

func TestTarEntries(t *testing.T) {
	good := testkit.Gzip(testkit.Tar(testkit.Entry{Name: "usr/safenet/lib/libCryptoki2.so", Data: []byte("x")}))
	if all, err := TarEntries("c.tar.gz", bytes.NewReader(good)); err != nil || len(all) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
	for name, bad := range map[string][]byte{"empty": nil, "text": []byte("hello"), "no files": testkit.Tar(), "above": testkit.Tar(testkit.Entry{Name: "../x"}),
		"device": testkit.Tar(testkit.Entry{Name: "x", Type: tar.TypeChar})} {
		if _, err := TarEntries(name, bytes.NewReader(bad)); fault.KindOf(err) != fault.BadContent || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
