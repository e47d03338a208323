package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Entry is a file of a layer. Link is a symbolic link's target, Hard a hard
// link's.
type Entry struct {
	Name       string // without a leading slash
	Mode       int64
	Data       []byte
	Dir        bool
	Link, Hard string
}

// Layer is a layer ready to be stored or sent: a gzip blob.
type Layer struct {
	Blob           []byte
	Digest, DiffID string
	Entries        []Entry
}

// NewLayer packs entries into a layer. Names are sorted and every file belongs
// to root with the time 0, so that the same files always give the same bytes.
func NewLayer(entries []Entry) (Layer, error) {
	entries = withFolders(entries)
	var blob bytes.Buffer
	z, err := gzip.NewWriterLevel(&blob, 6)
	if err != nil {
		return Layer{}, err
	}
	diff := sha256.New()
	tw := tar.NewWriter(io.MultiWriter(z, diff))
	for _, e := range entries {
		if err := tw.WriteHeader(header(e)); err != nil {
			return Layer{}, fmt.Errorf("pack %q: %w", e.Name, err)
		}
		if _, err := tw.Write(e.Data); err != nil {
			return Layer{}, fmt.Errorf("pack %q: %w", e.Name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return Layer{}, err
	}
	if err := z.Close(); err != nil {
		return Layer{}, err
	}
	return Layer{Blob: blob.Bytes(), Digest: digestOf(blob.Bytes()), DiffID: "sha256:" + hex.EncodeToString(diff.Sum(nil)), Entries: entries}, nil
}

func header(e Entry) *tar.Header {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: e.Name, Mode: e.Mode, Size: int64(len(e.Data)), ModTime: time.Unix(0, 0)}
	switch {
	case e.Dir:
		h.Typeflag, h.Name = tar.TypeDir, e.Name+"/"
	case e.Link != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.Link
	case e.Hard != "":
		h.Typeflag, h.Linkname = tar.TypeLink, e.Hard
	}
	return h
}

// withFolders adds the folders that files need, and sorts; a file that is
// given twice counts as given last.
func withFolders(entries []Entry) []Entry {
	byName := map[string]Entry{}
	for _, e := range entries {
		byName[e.Name] = e
	}
	for _, e := range entries {
		for d := path.Dir(e.Name); d != "." && d != "/"; d = path.Dir(d) {
			if _, there := byName[d]; !there {
				byName[d] = Entry{Name: d, Mode: 0o755, Dir: true}
			}
		}
	}
	all := make([]Entry, 0, len(byName))
	for _, e := range byName {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// BaseEntries are what a program expects of any root: users, groups and /tmp.
// The user has no rights of its own; what may be written belongs to group 0.
func BaseEntries() []Entry {
	return []Entry{
		{Name: "etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0:root:/:/sbin/nologin\nkms:x:65532:0:kms:/tmp:/sbin/nologin\n")},
		{Name: "etc/group", Mode: 0o644, Data: []byte("root:x:0:\n")},
		{Name: "etc/nsswitch.conf", Mode: 0o644, Data: []byte("hosts: files dns\n")},
		{Name: "tmp", Mode: 0o1777, Dir: true},
	}
}

// TarEntries reads the tar of a vendor's client as it is to stand in the
// image: names from the root on.
func TarEntries(what string, r io.Reader) ([]Entry, error) {
	bad := func(err error) error {
		return fault.New(fault.BadContent, "read client", what, err).WithHint("give a tar (or tar.gz) of the installed client, made as in: tar -C / -czf client.tar.gz usr/safenet")
	}
	head := make([]byte, 2)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, bad(err)
	}
	r = io.MultiReader(bytes.NewReader(head), r)
	if head[0] == 0x1f && head[1] == 0x8b {
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, bad(err)
		}
		r = z
	}
	var all []Entry
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, bad(err)
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		if name == "" || h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if strings.HasPrefix(path.Clean(h.Name), "../") {
			return nil, bad(fmt.Errorf("%q leads above the root", h.Name))
		}
		e, err := entryOf(h, name, tr)
		if err != nil {
			return nil, bad(err)
		}
		all = append(all, e)
	}
	if len(all) == 0 {
		return nil, bad(errors.New("it is empty"))
	}
	return all, nil
}

// machines are the architectures by Go's names.
var machines = map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_PPC64: "ppc64le", elf.EM_S390: "s390x"}

// Program is what an executable says of itself.
type Program struct {
	Arch   string
	Static bool
	Needs  []string // shared libraries
}

// ReadProgram reads an executable's header.
func ReadProgram(name string, b []byte) (Program, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return Program{}, fault.New(fault.BadContent, "read program", name, fmt.Errorf("it is no Linux program: %w", err)).WithHint("images need a program built for linux")
	}
	p := Program{Arch: machines[f.Machine], Static: true}
	if p.Arch == "" {
		return p, fault.Newf(fault.BadContent, "read program", name, "its architecture is %s", f.Machine)
	}
	for _, prog := range f.Progs {
		if prog.Type == elf.PT_INTERP {
			p.Static = false
		}
	}
	if p.Needs, err = f.ImportedLibraries(); err != nil && !p.Static {
		return p, fault.New(fault.BadContent, "read program", name, err)
	}
	return p, nil
}

// Missing lists the shared libraries, and versions of their symbols, that the
// programs of an image need and that none of its layers has, each with who
// needs it. Only files for which check says true are asked.
func Missing(layers []Layer, check func(name string) bool) []string {
	have := map[string][]byte{}
	for _, l := range layers {
		for _, e := range l.Entries {
			if base := path.Base(e.Name); have[base] == nil || e.Link == "" {
				have[base] = e.Data
			}
		}
	}
	var missing []string
	for _, l := range layers {
		for _, e := range l.Entries {
			if bytes.HasPrefix(e.Data, []byte(elf.ELFMAG)) && check(e.Name) {
				missing = append(missing, missingFor(e, have)...)
			}
		}
	}
	return missing
}

func missingFor(e Entry, have map[string][]byte) (missing []string) {
	f, err := elf.NewFile(bytes.NewReader(e.Data))
	if err != nil {
		return nil // no program that could run
	}
	needs, err := f.ImportedLibraries()
	if err != nil {
		return nil
	}
	for _, n := range needs {
		if _, ok := have[n]; !ok {
			missing = append(missing, fmt.Sprintf("%s needs %s", e.Name, n))
		}
	}
	versions, err := f.DynamicVersionNeeds()
	if err != nil {
		return missing
	}
	for _, v := range versions {
		offered := offers(have[v.Name])
		for _, n := range v.Needs {
			if offered != nil && !offered[n.Dep] {
				missing = append(missing, fmt.Sprintf("%s needs %s of %s", e.Name, n.Dep, v.Name))
			}
		}
	}
	return missing
}

// offers are the symbol versions that a library has, nil when that is not
// known.
func offers(lib []byte) map[string]bool {
	f, err := elf.NewFile(bytes.NewReader(lib))
	if err != nil {
		return nil
	}
	defined, err := f.DynamicVersions()
	if err != nil || len(defined) == 0 {
		return nil
	}
	out := map[string]bool{}
	for _, d := range defined {
		out[d.Name] = true
	}
	return out
}

// Config is an image's configuration, as the bytes that its digest is over.
func Config(arch string, entrypoint []string, labels map[string]string, layers []Layer) ([]byte, error) {
	type rootfs struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	type config struct {
		User       string            `json:"User"`
		Env        []string          `json:"Env"`
		Entrypoint []string          `json:"Entrypoint"`
		WorkingDir string            `json:"WorkingDir"`
		Labels     map[string]string `json:"Labels,omitempty"`
	}
	out := struct {
		Created      string  `json:"created"`
		Architecture string  `json:"architecture"`
		OS           string  `json:"os"`
		Config       config  `json:"config"`
		RootFS       rootfs  `json:"rootfs"`
		History      []event `json:"history"`
	}{Created: "1970-01-01T00:00:00Z", Architecture: arch, OS: "linux",
		Config: config{User: "65532:0", Env: []string{"PATH=/usr/local/bin:/usr/bin:/bin:/", "HOME=/tmp"}, Entrypoint: entrypoint, WorkingDir: "/", Labels: labels},
		RootFS: rootfs{Type: "layers", DiffIDs: []string{}}}
	for range layers {
		out.History = append(out.History, event{Created: out.Created, By: "kmsctl archive build"})
	}
	for _, l := range layers {
		out.RootFS.DiffIDs = append(out.RootFS.DiffIDs, l.DiffID)
	}
	return json.Marshal(out)
}

type event struct {
	Created string `json:"created"`
	By      string `json:"created_by"`
}
