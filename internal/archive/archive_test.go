package archive

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

func write(t *testing.T, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "a.tar.gz")
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func open(t *testing.T, p string) *Archive {
	t.Helper()
	a, err := Open(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

// TestForeign verifies every archive of testkit: good ones pass, from a file
// and from a stream; each bad one is a fault of content that says what is
// wrong and has a hint.
func TestForeign(t *testing.T) {
	wrong := map[string]string{
		"bad-above-root": `"../evil" leads above the root`, "bad-absolute": `"/etc/evil" is an absolute path`, "bad-link": "is a link",
		"bad-device": "is a device", "bad-twice": `"images/one.tar.gz" is there twice`, "bad-cut": "cut off", "bad-cut-plain": "cut off",
		"bad-tail": "bytes behind the end", "bad-flipped": "", "bad-size": "cut off", "bad-digest": "diff ID",
		"bad-two-manifests": `manifest.json has it in "images/one.tar.gz", manifest.yaml in "images/two.tar.gz"`, "bad-absent": `its member "images/two.tar.gz" is missing`,
		"bad-no-manifest": "neither a manifest.json nor a manifest.yaml", "bad-no-image": "neither a manifest.json nor an index.json",
		"bad-bomb": "diff ID", "bad-empty": "it is empty", "bad-text": "cut off", "bad-other-name": `member "images/all.tar.gz" does not hold it`,
		"bad-platform": "is for amd64, as the manifest says, and for s390x", "bad-no-member": `image "org/three:1.0" is in no member`,
	}
	for name, b := range testkit.Archives() {
		t.Run(name, func(t *testing.T) {
			for _, in := range []string{"file", "stream"} {
				a := &Archive{Name: "standard input", stream: bytes.NewReader(b)}
				if in == "file" {
					a = open(t, write(t, b))
				}
				_, err := a.Verify(t.Context(), DefaultLimits, nil)
				text, bad := wrong[name]
				if !bad {
					if err != nil {
						t.Errorf("%s: %v", in, err)
					}
					continue
				}
				if fault.KindOf(err) != fault.BadContent || fault.HintOf(err) == "" || !strings.Contains(fmt.Sprint(err), text) {
					t.Errorf("%s: got kind %v, %v, hint %q; want bad content with %q", in, fault.KindOf(err), err, fault.HintOf(err), text)
				}
			}
		})
	}
}

// TestCutAnywhere cuts a small archive at every length, and ours too.
func TestCutAnywhere(t *testing.T) {
	layer := testkit.LayerTar(1, 100)
	img := testkit.Image{Ref: "a:1", Layers: [][]byte{layer}}
	foreign := testkit.Gzip(testkit.Tar(testkit.Entry{Name: "manifest.json", Data: []byte(`{"images":[{"image":"a","tag":"1","archive":"images/a.tar"}]}`)},
		testkit.Entry{Name: "images/a.tar", Data: testkit.DockerSave(img)}))
	for name, whole := range map[string][]byte{"foreign": foreign, "ours": ours(t, false, nil)} {
		step := 1 + len(whole)/400
		for n := 0; n < len(whole); n += step {
			a, err := Open(write(t, whole[:n]), nil)
			if err == nil {
				_, err = a.Verify(t.Context(), DefaultLimits, nil)
				a.Close()
			}
			if fault.KindOf(err) != fault.BadContent {
				t.Fatalf("%s cut to %d of %d bytes: got %v", name, n, len(whole), err)
			}
		}
	}
}

// TestFlipAnywhere flips single bits of an archive of ours: verify sees each.
func TestFlipAnywhere(t *testing.T) {
	whole := ours(t, false, nil)
	for n := 0; n < len(whole); n += 1 + len(whole)/300 {
		b := bytes.Clone(whole)
		b[n] ^= 1 << (n % 8)
		a, err := Open(write(t, b), nil)
		if err == nil {
			_, err = a.Verify(t.Context(), DefaultLimits, nil)
			a.Close()
		}
		if err == nil && n >= 10 { // a gzip header's own flags carry nothing
			t.Errorf("bit flipped in byte %d of %d is not seen", n, len(whole))
		}
	}
}

func TestBomb(t *testing.T) {
	a := open(t, write(t, testkit.Archives()["good"]))
	_, err := a.Verify(t.Context(), Limits{Unpacked: 1 << 20, Entries: 100}, nil)
	if fault.KindOf(err) != fault.BadContent || !strings.Contains(err.Error(), "unpacks to more than 1048576 bytes") {
		t.Errorf("got %v", err)
	}
	// A compressed layer is small in the archive.
	_, err = open(t, write(t, testkit.Archives()["bad-bomb"])).Verify(t.Context(), Limits{Unpacked: 4 << 20, Entries: 100}, nil)
	if fault.KindOf(err) != fault.BadContent || !strings.Contains(err.Error(), "unpacks to more than 4194304 bytes") {
		t.Errorf("got %v", err)
	}
	_, err = a.Verify(t.Context(), Limits{Unpacked: 1 << 30, Entries: 2}, nil)
	if fault.KindOf(err) != fault.BadContent || !strings.Contains(err.Error(), "more than 2 files") {
		t.Errorf("got %v", err)
	}
}

// ours is an archive of ours with two images that share a layer.
func ours(t *testing.T, batch bool, sign func([]byte) ([]byte, error)) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := Write(&out, sample(batch, sign)); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func sample(batch bool, sign func([]byte) ([]byte, error)) Build {
	b := Build{Manifest: ppa.Manifest{Charts: []ppa.Chart{{Archive: "charts/app-1.0.0.tgz"}}}, Sign: sign,
		Files: []File{{"charts/app-1.0.0.tgz", testkit.ChartTgz("app", "1.0.0", "org/one")}}}
	base := testkit.LayerTar(1, 200_000)
	for n, name := range []string{"one", "two"} {
		own := testkit.LayerTar(uint64(10+n), 70_000)
		img := testkit.Image{Ref: "org/" + name + ":1", Layers: [][]byte{base, own}}
		i := NewImage{Refs: []string{img.Ref}, Platform: ppa.Platform{OS: "linux", Architecture: "amd64"}, Config: img.Config()}
		for _, l := range img.Layers {
			bl := BytesBlob(TypeLayer, testkit.Gzip(l))
			bl.DiffID = DigestOf(l)
			i.Layers = append(i.Layers, bl)
		}
		member := "images/" + name + ".tar"
		if batch {
			member = "images/all.tar"
		}
		b.Manifest.Images = append(b.Manifest.Images, ppa.Image{Name: "org/" + name, Tag: "1", Archive: member})
		if n > 0 && batch {
			b.Members[0].Images = append(b.Members[0].Images, i)
		} else {
			b.Members = append(b.Members, ImageMember{member, []NewImage{i}})
		}
	}
	return b
}

func TestOurs(t *testing.T) {
	for _, batch := range []bool{false, true} {
		whole := ours(t, batch, nil)
		if !bytes.Equal(whole, ours(t, batch, nil)) {
			t.Error("two runs give two archives")
		}
		a := open(t, write(t, whole))
		if a.Index == nil || len(a.Index.Images) != 2 || len(a.Index.Blobs) != 7 {
			t.Fatalf("index %+v", a.Index)
		}
		if _, err := a.Verify(t.Context(), DefaultLimits, nil); err != nil {
			t.Error(err)
		}
		for _, b := range a.Index.Blobs {
			all := read(t, a, b.Digest, 0)
			if DigestOf(all) != b.Digest {
				t.Errorf("blob %s is not what its name says", b.Digest)
			}
			for _, from := range []int64{1, b.Size / 2, 65534, 65535, 65536, b.Size - 1, b.Size} {
				if from < 0 || from > b.Size {
					continue
				}
				if !bytes.Equal(read(t, a, b.Digest, from), all[from:]) {
					t.Errorf("blob %s from %d is not its end", b.Digest, from)
				}
			}
		}
		// What every tar reads: the same images, without the index.
		stream := &Archive{Name: "x", stream: bytes.NewReader(whole)}
		c, err := stream.Verify(t.Context(), DefaultLimits, nil)
		if err != nil || len(c.Images) != 2 {
			t.Errorf("as a stream: %d images, %v", len(c.Images), err)
		}
	}
}

func read(t *testing.T, a *Archive, digest string, from int64) []byte {
	t.Helper()
	r, err := a.Blob(digest, from)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestIndexNamesAnImageOnce: an index of ours with two images of one name in
// one member is none.
func TestIndexNamesAnImageOnce(t *testing.T) {
	d := Descriptor{Digest: "sha256:" + strings.Repeat("a", 64), Size: 1}
	x := &Index{Format: indexFormat, Members: []IndexMember{{Name: "images/a", Digest: d.Digest}}, Blobs: []IndexBlob{{Digest: d.Digest, Size: 1}},
		Images: []IndexImage{{Refs: []string{"org/one:1.0"}, Member: "images/a", Manifest: d, Config: d}}}
	if _, err := parseIndex(x.Encode()); err != nil {
		t.Fatal(err)
	}
	x.Images = append(x.Images, x.Images[0])
	if _, err := parseIndex(x.Encode()); err == nil || !strings.Contains(err.Error(), `two images of member "images/a" are "org/one:1.0"`) {
		t.Errorf("got %v", err)
	}
}

func TestSignatureStandsBehindTheIndex(t *testing.T) {
	a := open(t, write(t, ours(t, false, func(index []byte) ([]byte, error) { return []byte("signed " + DigestOf(index)), nil })))
	if string(a.Signature) != "signed "+DigestOf(a.Raw) {
		t.Errorf("signature %q", a.Signature)
	}
	if _, err := a.Verify(t.Context(), DefaultLimits, nil); err != nil {
		t.Error(err)
	}
}

// TestStored holds our gzip to what every gunzip reads.
func TestStored(t *testing.T) {
	for _, n := range []int{0, 1, 65534, 65535, 65536, 131070, 131071, 1_000_000} {
		data := make([]byte, n)
		_, _ = rand.Read(data)
		var out bytes.Buffer
		if err := writeStored(&out, bytes.NewReader(data), int64(n)); err != nil {
			t.Fatal(err)
		}
		if int64(out.Len()) != storedSize(int64(n)) {
			t.Errorf("%d bytes take %d, foretold were %d", n, out.Len(), storedSize(int64(n)))
		}
		z, err := gzip.NewReader(bytes.NewReader(out.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		back, err := io.ReadAll(z)
		if err != nil || !bytes.Equal(back, data) {
			t.Errorf("%d bytes do not come back: %v", n, err)
		}
		var copied bytes.Buffer
		if _, err := openStored(bytes.NewReader(out.Bytes()), 0, int64(n), 0).WriteTo(&copied); err != nil || !bytes.Equal(copied.Bytes(), data) {
			t.Errorf("%d bytes are not copied: %v", n, err)
		}
		if got := inSections(t, out.Bytes(), int64(n)); !bytes.Equal(got, data) {
			t.Errorf("%d bytes do not come in sections: %d", n, len(got))
		}
	}
}

// inSections reads a piece in a file by turns: some bytes, and a section.
func inSections(t *testing.T, piece []byte, size int64) (got []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "piece"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(piece); err != nil {
		t.Fatal(err)
	}
	r := openStored(f, 0, size, 0)
	for {
		some := make([]byte, 1000)
		n, err := r.Read(some)
		got = append(got, some[:n]...)
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		if in, at, n := r.Section(50_000); n > 0 {
			part := make([]byte, n)
			if _, err := in.ReadAt(part, at); err != nil {
				t.Fatal(err)
			}
			got = append(got, part...)
		}
	}
}

func TestParts(t *testing.T) {
	whole := testkit.Archives()["good"]
	for name, names := range map[string][]string{"letters": {"x.tar.gz.aa", "x.tar.gz.ab", "x.tar.gz.ac"}, "digits": {"x.tar.gz.part9", "x.tar.gz.part10", "x.tar.gz.part11"}, "padded": {"x.001", "x.002", "x.003"}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for i, n := range names {
				part := whole[i*len(whole)/3 : (i+1)*len(whole)/3]
				if err := os.WriteFile(filepath.Join(dir, n), part, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(dir, "README"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := open(t, dir).Verify(t.Context(), DefaultLimits, nil); err != nil {
				t.Error(err)
			}
			if err := open(t, dir).Whole(t.Context(), DefaultLimits); err != nil {
				t.Error(err)
			}
			if err := os.Remove(filepath.Join(dir, names[1])); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(dir, nil); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), names[1]) {
				t.Errorf("a part is missing: %v", err)
			}
		})
	}
	if _, err := Open(t.TempDir(), nil); fault.KindOf(err) != fault.Usage {
		t.Errorf("empty folder: %v", err)
	}
}

// TestLastPartIsMissing: parts of one length say nothing of a further one, so
// the archive is read to its end before it is used.
func TestLastPartIsMissing(t *testing.T) {
	whole := testkit.Archives()["good"]
	for _, n := range []int{2, 3} {
		dir, size := t.TempDir(), len(whole)/n+1
		for i := range n - 1 {
			if err := os.WriteFile(filepath.Join(dir, "x.tar.gz.a"+string(rune('a'+i))), whole[i*size:(i+1)*size], 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := open(t, dir).Whole(t.Context(), DefaultLimits)
		if fault.KindOf(err) != fault.BadContent || !strings.Contains(fault.HintOf(err), `"x.tar.gz.a`+string(rune('a'+n-2))+`": is one missing`) {
			t.Errorf("%d parts: %v, hint %q", n, err, fault.HintOf(err))
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "x.tar.gz.aa"), ours(t, false, nil)[:4000], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, nil); fault.KindOf(err) != fault.BadContent || !strings.Contains(fault.HintOf(err), `"x.tar.gz.aa": is one missing`) {
		t.Errorf("ours: %v, hint %q", err, fault.HintOf(err))
	}
	// As long as the first one, and nothing missing all the same.
	dir = t.TempDir()
	whole = testkit.Tar(testkit.Entry{Name: "a", Data: make([]byte, 3000)})
	for i, name := range []string{"x.tar.0", "x.tar.1"} {
		if err := os.WriteFile(filepath.Join(dir, name), whole[i*len(whole)/2:(i+1)*len(whole)/2], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := open(t, dir).Whole(t.Context(), DefaultLimits); err != nil {
		t.Error(err)
	}
}

// TestNamesOfSplit: parts have the names that split gives them, however many
// there are; without the first one they are no archive.
func TestNamesOfSplit(t *testing.T) {
	for _, flags := range [][]string{{"-b", "1"}, {"-b", "1", "-d"}, {"-b", "1", "-a", "3"}} {
		dir := t.TempDir()
		c := exec.Command("split", append(flags, "-", "x.tar.gz.")...)
		c.Dir, c.Stdin = dir, strings.NewReader(strings.Repeat("x", 700))
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		names, err := parts(dir)
		if err != nil || len(names) != 700 {
			t.Fatalf("%q: %d parts, %v", flags, len(names), err)
		}
		for _, n := range []int{0, 300} {
			if err := os.Remove(names[n]); err != nil {
				t.Fatal(err)
			}
			_, err := parts(dir)
			if n == 0 && filepath.Base(names[0]) == "x.tar.gz.00" {
				continue // --numeric-suffixes=1 begins there
			}
			if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), filepath.Base(names[n])) {
				t.Errorf("%q without %s: %v", flags, filepath.Base(names[n]), err)
			}
			if err := os.WriteFile(names[n], []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestHead(t *testing.T) {
	for name, early := range map[string]bool{"good": true, "manifest-last": false, "both": true} {
		m, got, err := open(t, write(t, testkit.Archives()[name])).Head(t.Context(), DefaultLimits)
		if err != nil || got != early || len(m.Images) != 2 {
			t.Errorf("%s: early %v, %+v, %v", name, got, m, err)
		}
	}
}

func TestStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := open(t, write(t, testkit.Archives()["good"])).Verify(ctx, DefaultLimits, nil)
	if fault.KindOf(err) != fault.Stopped {
		t.Errorf("got %v", err)
	}
}

func TestSchema2IsStable(t *testing.T) {
	b := Schema2(Descriptor{Digest: "sha256:c", Size: 1}, nil)
	if d := cmp.Diff("{\n   \"schemaVersion\": 2,\n   \"mediaType\": \""+TypeManifest+"\",\n   \"config\": {\n      \"mediaType\": \""+TypeConfig+"\",\n      \"size\": 1,\n      \"digest\": \"sha256:c\"\n   },\n   \"layers\": []\n}", string(b)); d != "" {
		t.Error(d)
	}
}

func FuzzImages(f *testing.F) {
	img := testkit.Image{Ref: "a:1", Layers: [][]byte{testkit.LayerTar(1, 5000), testkit.LayerTar(2, 10)}}
	f.Add(testkit.DockerSave(img))
	f.Add(testkit.Gzip(testkit.DockerSave(img, img)))
	f.Add(testkit.OCILayout("", img))
	f.Add(testkit.OCILayout("l:1", img))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := ReadImages(bytes.NewReader(b), "images/x.tar", Limits{Unpacked: 1 << 24, Entries: 1000}, func(_ string, _ int64, _ string, r io.Reader) error {
			_, err := io.Copy(io.Discard, io.LimitReader(r, 1<<24))
			return err
		})
		ownError(t, err)
	})
}

func FuzzOpen(f *testing.F) {
	for _, b := range testkit.Archives() {
		if len(b) < 1<<16 {
			f.Add(b)
		}
	}
	var out bytes.Buffer
	if _, err := Write(&out, Build{Files: []File{{"charts/x.tgz", []byte("x")}}}); err != nil {
		f.Fatal(err)
	}
	f.Add(out.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		a := &Archive{Name: "x", in: bytes.NewReader(b), size: int64(len(b))}
		err := a.readIndex()
		if err == nil {
			_, err = a.Verify(t.Context(), Limits{Unpacked: 1 << 24, Entries: 1000}, nil)
		}
		ownError(t, err)
	})
}

func ownError(t *testing.T, err error) {
	t.Helper()
	var f *fault.Error
	if err != nil && !errors.As(err, &f) {
		t.Errorf("not our own error: %T %v", err, err)
	}
}
