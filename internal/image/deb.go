package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed" // the lock file
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/kmsctl/kmsctl/internal/fault"
)

//go:embed debs.lock
var debsLock string

// Deb is a Debian package by name, version, architecture and SHA-256: one line
// of the lock file.
type Deb struct{ Name, Version, Arch, SHA256 string }

// Debs reads the lock file of the Debian packages in our images.
func Debs() ([]Deb, error) {
	var all []Deb
	for n, line := range strings.Split(debsLock, "\n") {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) != 4 || len(f[3]) != 64 {
			return nil, fmt.Errorf("debs.lock:%d: want NAME VERSION ARCHITECTURE SHA256", n+1)
		}
		all = append(all, Deb{f[0], f[1], f[2], f[3]})
	}
	return all, nil
}

// file is the name that apt gives a package; a colon in a version is escaped.
func (d Deb) file() string {
	return d.Name + "_" + strings.ReplaceAll(d.Version, ":", "%3a") + "_" + d.Arch + ".deb"
}

// Fetch gives the package's file: from the folder cache, where another run or
// a person put it, else by apt-get. Its SHA-256 must be the lock's.
func (d Deb) Fetch(ctx context.Context, cache string) ([]byte, error) {
	p := filepath.Join(cache, d.file())
	b, err := os.ReadFile(p)
	if err == nil {
		return b, d.check(b, p)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, fault.New(fault.Other, "make folder", cache, err)
	}
	tmp, err := os.MkdirTemp(cache, ".download-")
	if err != nil {
		return nil, fault.New(fault.Other, "make folder in", cache, err)
	}
	defer func() { _ = os.RemoveAll(tmp) }() // a temporary folder
	if err := d.download(ctx, tmp); err != nil {
		return nil, err
	}
	b, err = os.ReadFile(filepath.Join(tmp, d.file()))
	if err != nil {
		return nil, fault.New(fault.NotFound, "download Debian package", d.Name+"="+d.Version, err).WithHint("run `make lock` to renew the lock file")
	}
	if err := d.check(b, d.file()); err != nil {
		return nil, err
	}
	if err := os.Rename(filepath.Join(tmp, d.file()), p); err != nil {
		return nil, fault.New(fault.Other, "keep Debian package", p, err)
	}
	return b, nil
}

func (d Deb) download(ctx context.Context, dir string) error {
	hint := fmt.Sprintf("the version may be gone from the mirrors: run `make lock` to renew the lock file; or put %s into the cache folder by hand (KMSCTL_CACHE), where there must be room", d.file())
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fault.New(fault.NotFound, "download Debian package", d.Name+"="+d.Version, errors.New("there is no apt-get here, and the package is not in the cache")).WithHint("%s", hint)
	}
	c := exec.CommandContext(ctx, "apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", d.Name+":"+d.Arch+"="+d.Version)
	if d.Arch == "all" {
		c.Args[len(c.Args)-1] = d.Name + "=" + d.Version
	}
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		return fault.Newf(fault.NotFound, "download Debian package", d.Name+"="+d.Version, "apt-get: %s", lastLine(out, err)).WithHint("%s", hint)
	}
	return nil
}

func lastLine(out []byte, err error) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if s := strings.TrimSpace(lines[len(lines)-1]); s != "" {
		return s
	}
	return err.Error()
}

func (d Deb) check(b []byte, p string) error {
	h := sha256.Sum256(b)
	if got := hex.EncodeToString(h[:]); got != d.SHA256 {
		return fault.Newf(fault.BadContent, "check Debian package", p, "its SHA-256 is %s, the lock file says %s", got, d.SHA256).
			WithHint("remove the file from the cache and try again; if it stays so, run `make lock` and look at what changed")
	}
	return nil
}

// Entries unpacks a package's files, without those that no image needs.
func (d Deb) Entries(b []byte) ([]Entry, error) {
	data, err := dataTar(b)
	if err != nil {
		return nil, fault.New(fault.BadContent, "unpack Debian package", d.file(), err)
	}
	var all []Entry
	tr := tar.NewReader(data)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, fault.New(fault.BadContent, "unpack Debian package", d.file(), err)
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		if h.Typeflag == tar.TypeDir || !needed(name) {
			continue
		}
		e, err := entryOf(h, name, tr)
		if err != nil {
			return nil, fault.New(fault.BadContent, "unpack Debian package", d.file(), err)
		}
		all = append(all, e)
	}
}

// needed leaves out documentation, character set tables and loadable engines:
// two thirds of the bytes. Copyright files stay.
func needed(name string) bool {
	if strings.HasPrefix(name, "usr/share/doc/") {
		return path.Base(name) == "copyright"
	}
	for _, p := range []string{"usr/share/", "etc/ld.so.conf"} {
		if strings.HasPrefix(name, p) {
			return false
		}
	}
	for _, part := range []string{"/gconv/", "/engines-", "/ossl-modules/", "/audit/"} {
		if strings.Contains(name, part) {
			return false
		}
	}
	return true
}

func entryOf(h *tar.Header, name string, r io.Reader) (Entry, error) {
	e := Entry{Name: name, Mode: h.Mode & 0o7777}
	switch h.Typeflag {
	case tar.TypeReg:
		const most = 512 << 20
		b, err := io.ReadAll(io.LimitReader(r, most+1))
		if err != nil {
			return e, err
		}
		if len(b) > most {
			return e, fmt.Errorf("%q has more than %d bytes", name, most)
		}
		e.Data = b
	case tar.TypeDir:
		e.Dir = true
	case tar.TypeSymlink:
		e.Link = h.Linkname
	case tar.TypeLink:
		e.Hard = strings.TrimPrefix(path.Clean("/"+h.Linkname), "/")
	default:
		return e, fmt.Errorf("%q is a device or another special file", name)
	}
	return e, nil
}

// dataTar finds data.tar in a .deb, which is an ar archive.
func dataTar(b []byte) (io.Reader, error) {
	const magic, head = "!<arch>\n", 60
	if !bytes.HasPrefix(b, []byte(magic)) {
		return nil, errors.New("it is not a .deb")
	}
	for b = b[len(magic):]; len(b) >= head; {
		name := strings.TrimSuffix(strings.TrimSpace(string(b[:16])), "/")
		size, err := strconv.Atoi(strings.TrimSpace(string(b[48:58])))
		if err != nil || size < 0 || size > len(b)-head {
			return nil, errors.New("it is cut off")
		}
		body := b[head : head+size]
		switch name {
		case "data.tar.xz":
			return xz.NewReader(bufio.NewReader(bytes.NewReader(body)))
		case "data.tar.zst":
			z, err := zstd.NewReader(bytes.NewReader(body))
			return z, err
		case "data.tar.gz":
			return gzip.NewReader(bytes.NewReader(body))
		case "data.tar":
			return bytes.NewReader(body), nil
		}
		b = b[min(head+size+size%2, len(b)):]
	}
	return nil, errors.New("it has no data.tar")
}
