package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// How what is compressed begins.
var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// Unpack gives r itself, or what r holds compressed by gzip or zstd: the first
// bytes decide, since names lie.
func Unpack(r io.Reader) (io.Reader, error) {
	br, ok := r.(*bufio.Reader)
	if !ok {
		br = bufio.NewReaderSize(r, 256<<10)
	}
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, cutOff(err)
	}
	switch {
	case len(head) == 0:
		return nil, badContent(errors.New("it is empty")).WithHint(copyAgain)
	case bytes.HasPrefix(head, gzipMagic):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, cutOff(err)
		}
		z.Multistream(false)
		return &members{br, z}, nil
	case bytes.HasPrefix(head, zstdMagic):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(32<<20))
		if err != nil {
			return nil, badContent(err)
		}
		return z.IOReadCloser(), nil
	}
	return br, nil
}

// members reads gzip members up to the end, and tells bytes that are none from
// a member that is cut off.
type members struct {
	in *bufio.Reader
	z  *gzip.Reader
}

func (m *members) Read(p []byte) (int, error) {
	for {
		n, err := m.z.Read(p)
		if n > 0 || !errors.Is(err, io.EOF) {
			if errors.Is(err, io.EOF) {
				err = nil // asked for again at the next read
			}
			return n, err
		}
		head, err := m.in.Peek(2)
		switch {
		case len(head) == 0 && errors.Is(err, io.EOF):
			return 0, io.EOF
		case bytes.Equal(head, gzipMagic):
			if err := m.z.Reset(m.in); err != nil {
				return 0, cutOff(err)
			}
			m.z.Multistream(false)
		case err != nil && !errors.Is(err, io.EOF):
			return 0, err
		default:
			return 0, badContent(errors.New("there are bytes behind the end of the gzip stream")).WithHint("the file is not the archive alone; copy it again")
		}
	}
}

// tail remembers whether the last bytes that were read are zero, which is how
// a tar ends; a tar cut between two files looks like the end to package tar.
type tail struct {
	r     io.Reader
	zeros int64
}

func (t *tail) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if trimmed := bytes.TrimRight(p[:n], "\x00"); len(trimmed) == 0 {
		t.zeros += int64(n)
	} else {
		t.zeros = int64(n - len(trimmed))
	}
	return n, err
}

// file is one regular file of a tar.
type file struct {
	name string
	size int64
	link string // in an image's tar: the name of the file that this one stands for
}

// walkTar visits every regular file of the tar in r, in order, and holds the
// rules of names. Links are refused, unless links: then those that stay inside
// are visited, with a nil reader. what names the tar in errors.
func walkTar(r io.Reader, what string, lim Limits, links bool, visit func(f file, r io.Reader) error) error {
	in := &tail{r: r}
	tr := tar.NewReader(in)
	seen := map[string]bool{}
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return endOfTar(in, what)
		}
		if err != nil {
			return tarError(what, err)
		}
		f, skip, err := checkHeader(h, what, links)
		if err != nil {
			return err
		}
		if skip {
			continue
		}
		if seen[f.name] {
			return badContent(fmt.Errorf("%s: %q is there twice", what, f.name)).WithHint(notOurs)
		}
		if seen[f.name] = true; len(seen) > lim.Entries {
			return badContent(fmt.Errorf("%s: more than %d files", what, lim.Entries)).WithHint("if that is meant, raise --max-entries")
		}
		var body io.Reader
		if f.link == "" {
			body = content{tr, what}
		}
		if err := visit(f, body); err != nil {
			return err
		}
		if f.link == "" {
			// What the visitor left is read here, so that a cut in it is seen.
			if _, err := io.Copy(io.Discard, tr); err != nil { //nolint:gosec // bounded by Limits.Unpacked
				return tarError(what, err)
			}
		}
	}
}

// content is a file's bytes, with the errors of the archive in our own words.
type content struct {
	r    io.Reader
	what string
}

func (c content) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = tarError(c.what, err)
	}
	return n, err
}

const notOurs = "no known tool writes such an archive; get it again from its maker"

// checkHeader gives the file of a header, skip for what carries nothing.
func checkHeader(h *tar.Header, what string, links bool) (f file, skip bool, err error) {
	name := path.Clean(strings.ReplaceAll(h.Name, "\\", "/"))
	bad := func(why string) (file, bool, error) {
		return file{}, false, badContent(fmt.Errorf("%s: %q %s", what, h.Name, why)).WithHint(notOurs)
	}
	if path.IsAbs(name) || h.Name == "" {
		return bad("is an absolute path")
	}
	if name == ".." || strings.HasPrefix(name, "../") {
		return bad("leads above the root")
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		if name == "." {
			return bad("is no file name")
		}
		return file{name: name, size: h.Size}, false, nil
	case tar.TypeDir, tar.TypeXGlobalHeader:
		return file{}, true, nil
	case tar.TypeSymlink, tar.TypeLink:
		if !links {
			return bad("is a link")
		}
		target := path.Clean(h.Linkname)
		if h.Typeflag == tar.TypeSymlink {
			target = path.Join(path.Dir(name), h.Linkname) //nolint:gosec // checked below, and nothing is unpacked
		}
		if path.IsAbs(h.Linkname) || target == ".." || strings.HasPrefix(target, "../") {
			return bad("is a link that leads out")
		}
		return file{name: name, link: target}, false, nil
	}
	return bad("is a device or another thing that carries no content")
}

// endOfTar reads what is behind the last file: zeros up to the end.
func endOfTar(in *tail, what string) error {
	if in.zeros < 512 {
		return badContent(fmt.Errorf("%s: it is cut off between two files", what)).WithHint(copyAgain)
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := in.r.Read(buf)
		if len(bytes.TrimRight(buf[:n], "\x00")) > 0 {
			return badContent(fmt.Errorf("%s: there are bytes behind its end", what)).WithHint("the file is not the archive alone; copy it again")
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return tarError(what, err)
		}
	}
}

func tarError(what string, err error) error {
	if errors.Is(err, tar.ErrHeader) {
		return badContent(fmt.Errorf("%s: it is not a tar, or a header in it is damaged", what)).WithHint(copyAgain)
	}
	return cutOff(err)
}
