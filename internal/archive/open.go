package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pattern"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Archive is an opened archive. Its methods may be called side by side, but
// one that came from a stream can be walked once only. Close it.
type Archive struct {
	Name string
	// Index is there when the archive is one of ours and seekable; Raw are its
	// bytes and Signature the signature over them, or nil.
	Index     *Index
	Raw       []byte
	Signature []byte

	base   int64 // where the index's offsets start
	in     io.ReaderAt
	size   int64
	stream io.Reader
	files  []*os.File
	last   string // the last part of a split archive
	full   bool   // it is as long as the first one: there may be another
}

// Open opens a file, a folder with the parts of a split archive, or, by the
// name "-", the stream stdin.
func Open(name string, stdin io.Reader) (*Archive, error) {
	if name == "-" {
		return &Archive{Name: "standard input", stream: stdin}, nil
	}
	a := &Archive{Name: name}
	if err := a.openFiles(name); err != nil {
		a.Close()
		return nil, err
	}
	if err := a.readIndex(); err != nil {
		a.Close()
		return nil, named(name, err)
	}
	return a, nil
}

func (a *Archive) openFiles(name string) error {
	st, err := os.Stat(name)
	if err != nil {
		return fault.New(fault.NotFound, "open archive", name, reason(err)).WithHint("check the path")
	}
	paths := []string{name}
	if st.IsDir() {
		if paths, err = parts(name); err != nil {
			return err
		}
	}
	var all concatenated
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			return fault.New(fault.Other, "open archive", p, reason(err))
		}
		a.files = append(a.files, f)
		st, err := f.Stat()
		if err != nil {
			return fault.New(fault.Other, "open archive", p, reason(err))
		}
		if !st.Mode().IsRegular() {
			return fault.Newf(fault.Usage, "open archive", p, "it is not a file").WithHint("give a file, a folder with the parts of a split archive, or - for standard input")
		}
		all = append(all, section{f, a.size, st.Size()})
		a.size += st.Size()
	}
	if st.IsDir() {
		a.last, a.full = filepath.Base(paths[len(paths)-1]), all[len(all)-1].size == all[0].size
	}
	if a.in = all; len(all) == 1 {
		a.in = a.files[0]
	}
	return nil
}

// reason leaves the path out of an error whose fault names it already.
func reason(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// partName is the name of a part as split makes it: a stem and a count of
// digits or letters.
var partName = pattern.Lazy(`^(.+[._-](?:part|tar|gz|tgz)?[._-]?)([0-9]+|[a-z]{2,})$`)

// parts lists the parts of a split archive in a folder, in order.
func parts(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fault.New(fault.Other, "read folder", dir, reason(err))
	}
	var names []string
	stems := map[string]bool{}
	for _, e := range entries {
		m := partName().FindStringSubmatch(e.Name())
		if e.IsDir() || m == nil {
			continue
		}
		names = append(names, e.Name())
		stems[m[1]] = true
	}
	bad := func(format string, a ...any) error {
		return fault.Newf(fault.Usage, "read parts of an archive in", dir, format, a...).WithHint("the folder must hold the parts of one archive and no others, named as split names them: x.tar.gz.aa, x.tar.gz.ab")
	}
	if len(names) == 0 {
		return nil, bad("there is none")
	}
	if len(stems) > 1 {
		return nil, bad("there are parts of %d archives", len(stems))
	}
	slices.SortFunc(names, func(x, y string) int {
		if len(x) != len(y) {
			return len(x) - len(y) // .9 before .10
		}
		if x < y {
			return -1
		}
		return 1
	})
	for i := 1; i < len(names); i++ {
		if want := following(names[i-1]); want != "" && want != names[i] && names[i] != widened(names[i-1]) {
			return nil, bad("%q is missing", want)
		}
	}
	if m := partName().FindStringSubmatch(names[0]); strings.Trim(m[2], "a0123456789") != "" {
		return nil, bad("%q is missing", m[1]+strings.Repeat("a", len(m[2])))
	}
	for i := range names {
		names[i] = filepath.Join(dir, names[i])
	}
	return names, nil
}

// following is the name of the next part, or "" where the width changes.
func following(name string) string {
	m := partName().FindStringSubmatch(name)
	if n, err := strconv.Atoi(m[2]); err == nil {
		return fmt.Sprintf("%s%0*d", m[1], len(m[2]), n+1)
	}
	b := []byte(m[2])
	for i := len(b) - 1; i >= 0; i-- {
		if b[i]++; b[i] <= 'z' {
			return m[1] + string(b)
		}
		b[i] = 'a'
	}
	return ""
}

// widened is the name of the next part where split takes to longer names: zaaa
// comes behind yz, 9000 behind 89; else "".
func widened(name string) string {
	m := partName().FindStringSubmatch(name)
	first, last := "a", "z"
	if m[2][0] <= '9' {
		first, last = "0", "9"
	}
	rest := strings.TrimLeft(m[2], last)
	if rest == "" || rest[0] != last[0]-1 || strings.Trim(rest[1:], last) != "" {
		return ""
	}
	return m[1] + strings.Repeat(last, len(m[2])-len(rest)+1) + strings.Repeat(first, len(rest)+1)
}

type section struct {
	f        *os.File
	at, size int64
}

// concatenated reads files one behind the other.
type concatenated []section

func (c concatenated) ReadAt(p []byte, off int64) (n int, err error) {
	for _, s := range c {
		if off >= s.at+s.size {
			continue
		}
		k := min(int64(len(p)-n), s.at+s.size-off)
		m, err := s.f.ReadAt(p[n:n+int(k)], off-s.at)
		n, off = n+m, off+int64(m)
		if n == len(p) {
			return n, nil
		}
		if int64(m) < k {
			return n, err
		}
	}
	return n, io.EOF
}

// Close closes the files.
func (a *Archive) Close() {
	for _, f := range a.files {
		_ = f.Close() // only read from
	}
}

// Seekable says whether the archive can be read more than once.
func (a *Archive) Seekable() bool { return a.in != nil }

// Size is the archive's length, 0 for a stream.
func (a *Archive) Size() int64 { return a.size }

// readIndex reads the index of an archive of ours; with another's, nothing
// happens.
func (a *Archive) readIndex() error {
	raw, next, err := a.piece(0, IndexName)
	if raw == nil || err != nil {
		return a.partMissing(err)
	}
	x, err := parseIndex(raw)
	if err != nil {
		return badContent(err).WithHint("the archive was made by a newer kmsctl, or was changed; `tar -xzf` reads it still")
	}
	sig, after, err := a.piece(next, SignatureName)
	if err != nil {
		return a.partMissing(err)
	}
	if sig != nil {
		next = after
	}
	a.Index, a.Raw, a.Signature, a.base = x, raw, sig, next
	last := a.base
	for _, b := range x.Blobs {
		last = max(last, a.base+b.Offset+storedSize(b.Size))
	}
	if last > a.size {
		return a.partMissing(cutOff(io.ErrUnexpectedEOF))
	}
	return nil
}

// piece reads the stored piece at offset when it starts a member of that name;
// else the answer is nil.
func (a *Archive) piece(offset int64, name string) (content []byte, next int64, err error) {
	var head [storedHead + blockHead + 512]byte
	if n, _ := a.in.ReadAt(head[:], offset); n < len(head) || !bytes.HasPrefix(head[:], storedHeader[:]) {
		return nil, 0, nil
	}
	if binary.LittleEndian.Uint16(head[storedHead+1:]) < 512 {
		return nil, 0, nil
	}
	h, err := tar.NewReader(bytes.NewReader(head[storedHead+blockHead:])).Next()
	if err != nil || h.Name != name {
		return nil, 0, nil //nolint:nilerr // then it is no archive of ours
	}
	const most = 64 << 20
	if h.Size > most {
		return nil, 0, damaged("its %s has %d bytes", name, h.Size)
	}
	total := 512 + (h.Size+511)/512*512
	b, err := io.ReadAll(openStored(a.in, offset, total, 0))
	if err != nil {
		return nil, 0, err
	}
	return b[512 : 512+h.Size], offset + storedSize(total), nil
}

// Blob opens a blob of an archive of ours from its byte from.
func (a *Archive) Blob(digest string, from int64) (io.Reader, error) {
	for _, b := range a.Index.Blobs {
		if b.Digest == digest {
			return openStored(a.in, a.base+b.Offset, b.Size, min(from, b.Size)), nil
		}
	}
	return nil, named(a.Name, badContent(fmt.Errorf("blob %s is not in it", digest)))
}

// Member reads a small member of an archive of ours and checks its digest.
func (a *Archive) Member(name string) ([]byte, error) {
	for _, m := range a.Index.Members {
		if m.Name != name {
			continue
		}
		z, err := gzip.NewReader(bufio.NewReader(io.NewSectionReader(a.in, a.base+m.Offset, a.size-a.base-m.Offset)))
		if err != nil {
			return nil, named(a.Name, cutOff(err))
		}
		tr := tar.NewReader(z)
		h, err := tr.Next()
		if err != nil || h.Name != name || h.Size != m.Size {
			return nil, named(a.Name, damaged("%q is not where the index has it", name))
		}
		b, err := io.ReadAll(io.LimitReader(tr, maxSmall+1))
		if err != nil {
			return nil, named(a.Name, cutOff(err))
		}
		if DigestOf(b) != m.Digest {
			return nil, named(a.Name, damaged("%q does not have the digest that the index has", name))
		}
		return b, nil
	}
	return nil, named(a.Name, badContent(fmt.Errorf("%q is not in it", name)))
}

// Manifest reads the manifest of an archive of ours.
func (a *Archive) Manifest() (ppa.Manifest, error) {
	b, err := a.Member(ppa.JSONName)
	if err != nil {
		return ppa.Manifest{}, err
	}
	j, err := ppa.ParseJSON(b)
	if err != nil {
		return j, named(a.Name, badContent(err))
	}
	b, err = a.Member(ppa.YAMLName)
	if err != nil {
		return j, err
	}
	y, err := ppa.ParseYAML(b)
	if err != nil {
		return j, named(a.Name, badContent(err))
	}
	m, err := ppa.Merge(&j, &y)
	if err != nil {
		return m, named(a.Name, badContent(err))
	}
	return m, nil
}

// errStop ends a walk early without an error.
var errStop = errors.New("enough")

// ErrStop is what a visitor returns to end a walk without an error.
var ErrStop = errStop

// Walk visits every file of the archive in order. A stream can be walked once.
// tap, when there is one, gets the archive's own bytes as they are read.
func (a *Archive) Walk(ctx context.Context, lim Limits, tap io.Writer, visit func(name string, size int64, r io.Reader) error) error {
	in := a.stream
	if a.in != nil {
		in = io.NewSectionReader(a.in, 0, a.size)
	}
	if tap != nil {
		in = io.TeeReader(in, tap)
	}
	raw := bufio.NewReaderSize(stopped{ctx, in}, 1<<20)
	r, err := Unpack(raw)
	if err != nil {
		return named(a.Name, err)
	}
	err = walkTar(lim.Budget().Reader(r), "the archive", lim, false, func(f file, r io.Reader) error {
		return visit(f.name, f.size, r)
	})
	if errors.Is(err, errStop) {
		return nil
	}
	return named(a.Name, err)
}

// Fingerprint is the SHA-256 of the whole file, and that of the file with
// suffix behind it: a value that only who has the file can know.
func (a *Archive) Fingerprint(ctx context.Context, suffix string) (digest string, key []byte, err error) {
	h := sha256.New()
	if _, err := io.CopyBuffer(onlyWriter{h}, stopped{ctx, io.NewSectionReader(a.in, 0, a.size)}, make([]byte, 1<<20)); err != nil {
		return "", nil, err
	}
	digest = sum(h)
	h.Write([]byte(suffix)) // a hash never fails
	return digest, h.Sum(nil), nil
}

type onlyWriter struct{ io.Writer }

// stopped ends reading when the context does.
type stopped struct {
	ctx context.Context
	r   io.Reader
}

func (s stopped) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, fault.New(fault.Stopped, "", "", fmt.Errorf("stopped: %w", err)).WithHint("run the same command again to go on")
	}
	return s.r.Read(p)
}
