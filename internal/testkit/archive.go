package testkit

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"

	"sigs.k8s.io/yaml"
)

// Entry is an entry of a tar, a regular file unless Type says otherwise.
type Entry struct {
	Name string
	Data []byte
	Type byte
	Link string
}

// Tar packs entries.
func Tar(entries ...Entry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Typeflag: e.Type, Name: e.Name, Linkname: e.Link, Mode: 0o644, Size: int64(len(e.Data)), Format: tar.FormatGNU}
		if e.Type == 0 {
			h.Typeflag = tar.TypeReg
		}
		must(w.WriteHeader(h))
		_, err := w.Write(e.Data)
		must(err)
	}
	must(w.Close())
	return b.Bytes()
}

// Gzip compresses.
func Gzip(b []byte) []byte {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	must(err)
	_, err = w.Write(b)
	must(err)
	must(w.Close())
	return out.Bytes()
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// Hex is a SHA-256 in hexadecimal.
func Hex(b []byte) string { h := sha256.Sum256(b); return hex.EncodeToString(h[:]) }

// LayerTar is a layer of about size bytes, half of which compress; seed makes
// it this one and no other.
func LayerTar(seed uint64, size int) []byte {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	b := make([]byte, size)
	for i := 0; i < size; i += 8192 {
		_, err := r.Read(b[i:min(i+4096, size)])
		must(err)
	}
	return Tar(Entry{Name: fmt.Sprintf("data/%d", seed), Data: b})
}

// Image is an image to be saved. Layers are raw tars.
type Image struct {
	Ref    string
	Layers [][]byte
	Arch   string // amd64 when empty
}

// Config is the image's configuration.
func (i Image) Config() []byte {
	var diffs []string
	for _, l := range i.Layers {
		diffs = append(diffs, "sha256:"+Hex(l))
	}
	arch := i.Arch
	if arch == "" {
		arch = "amd64"
	}
	b, err := json.Marshal(map[string]any{"architecture": arch, "os": "linux", "config": map[string]any{"Entrypoint": []string{"/run-" + i.Ref}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs}})
	must(err)
	return b
}

// DockerSave is the tar of `docker save` before version 25: layers first, the
// manifest last, a layer that is there already as a link.
func DockerSave(images ...Image) []byte {
	var entries []Entry
	var list []map[string]any
	at := map[string]string{}
	for _, i := range images {
		var paths []string
		for n, l := range i.Layers {
			id := Hex([]byte(fmt.Sprint(i.Ref, n)))
			p := id + "/layer.tar"
			paths = append(paths, p)
			if was, ok := at[Hex(l)]; ok {
				entries = append(entries, Entry{Name: p, Type: tar.TypeSymlink, Link: "../" + was})
				continue
			}
			at[Hex(l)] = p
			entries = append(entries, Entry{Name: id + "/VERSION", Data: []byte("1.0")}, Entry{Name: id + "/json", Data: []byte("{}")}, Entry{Name: p, Data: l})
		}
		c := i.Config()
		entries = append(entries, Entry{Name: Hex(c) + ".json", Data: c})
		list = append(list, map[string]any{"Config": Hex(c) + ".json", "RepoTags": []string{i.Ref}, "Layers": paths})
	}
	b, err := json.Marshal(list)
	must(err)
	return Tar(append(entries, Entry{Name: "manifest.json", Data: b})...)
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    map[string]string `json:"platform,omitempty"`
}

func describe(mediaType string, b []byte) descriptor {
	return descriptor{MediaType: mediaType, Digest: "sha256:" + Hex(b), Size: len(b)}
}

// OCILayout is the tar of an OCI layout with gzip layers. With list, the images
// are the members of one list of that name.
func OCILayout(list string, images ...Image) []byte {
	entries := []Entry{{Name: "oci-layout", Data: []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
	blob := func(kind string, b []byte) descriptor {
		d := describe(kind, b)
		name := "blobs/sha256/" + Hex(b)
		if !slices.ContainsFunc(entries, func(e Entry) bool { return e.Name == name }) {
			entries = append(entries, Entry{Name: name, Data: b})
		}
		return d
	}
	var top []descriptor
	for _, i := range images {
		var layers []descriptor
		for _, l := range i.Layers {
			layers = append(layers, blob("application/vnd.oci.image.layer.v1.tar+gzip", Gzip(l)))
		}
		m, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
			"config": blob("application/vnd.oci.image.config.v1+json", i.Config()), "layers": layers})
		must(err)
		d := blob("application/vnd.oci.image.manifest.v1+json", m)
		d.Annotations = map[string]string{"org.opencontainers.image.ref.name": i.Ref}
		if list != "" {
			d.Annotations, d.Platform = nil, map[string]string{"os": "linux", "architecture": i.Arch}
		}
		top = append(top, d)
	}
	if list != "" {
		x, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": top})
		must(err)
		d := blob("application/vnd.oci.image.index.v1+json", x)
		d.Annotations = map[string]string{"org.opencontainers.image.ref.name": list}
		top = []descriptor{d}
	}
	x, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": top})
	must(err)
	return Tar(append(entries, Entry{Name: "index.json", Data: x})...)
}

// ChartTgz is a chart with one repository and one registry in its values.
func ChartTgz(name, version, repository string) []byte {
	return Gzip(Tar(
		Entry{Name: name + "/Chart.yaml", Data: []byte("apiVersion: v2\nname: " + name + "\nversion: " + version + "\n")},
		Entry{Name: name + "/values.yaml", Data: []byte("# where the image is\napp:\n  image:\n    repository: " + repository + " # kept\n    tag: \"1\"\nglobal:\n  registry: \"\"\n")},
		Entry{Name: name + "/templates/cm.yaml", Data: []byte("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {image: '{{ .Values.app.image.repository }}'}\n")},
	))
}

// Images are two images that share a layer.
func Images() []Image {
	base := LayerTar(1, 1<<20)
	return []Image{{Ref: "org/one:1.0", Layers: [][]byte{base, LayerTar(2, 300_000), LayerTar(3, 40)}}, {Ref: "org/two:1.0", Layers: [][]byte{base, LayerTar(4, 200_000)}}}
}

// Archives gives whole archives by name, good ones and bad ones, for tests and
// scripts. Each bad one's name says what is wrong.
var Archives = sync.OnceValue(archives)

func archives() map[string][]byte {
	img := Images()
	manifest := Entry{Name: "manifest.json", Data: []byte(`{"manifest-revision": "1.0", "charts": [{"archive": "charts/app-1.0.0.tgz", "images": ["app.image.repository"]}],
 "images": [{"image": "org/one", "tag": "1.0", "archive": "images/one.tar.gz"}, {"image": "org/two", "tag": "1.0", "archive": "images/two.tar.gz"}]}`)}
	spec := Entry{Name: "manifest.yaml", Data: []byte(`charts:
- archive: file:../charts/app-1.0.0.tgz
  repository-keys: [app.image.repository]
  registry-keys: [global.registry]
images:
- image: org/one:1.0
- image: org/two:1.0
`)}
	chart := Entry{Name: "charts/app-1.0.0.tgz", Data: ChartTgz("app", "1.0.0", "org/one")}
	one, two := Entry{Name: "images/one.tar.gz", Data: Gzip(DockerSave(img[0]))}, Entry{Name: "images/two.tar.gz", Data: DockerSave(img[1])}
	good := Gzip(Tar(manifest, chart, one, two))
	flipped := slices.Clone(good)
	flipped[len(good)/2] ^= 4
	lying := bytes.Clone(DockerSave(img[1]))
	lying[bytes.Index(lying, img[1].Layers[1])+2000] ^= 1
	batch := Entry{Name: "images/all.tar.gz", Data: Gzip(DockerSave(img...))}
	intoBatch := Entry{Name: "manifest.json", Data: []byte(strings.NewReplacer("images/one.tar.gz", batch.Name, "images/two.tar.gz", batch.Name).Replace(string(manifest.Data)))}
	intoOne := Entry{Name: "manifest.json", Data: []byte(`{"images": [{"image": "org/one", "tag": "1.0", "archive": "images/one.tar.gz"}]}`)}
	arches := []Image{{Ref: "org/multi-amd64:1.0", Arch: "amd64", Layers: img[0].Layers}, {Ref: "org/multi-ppc64le:1.0", Arch: "ppc64le", Layers: [][]byte{LayerTar(9, 5000)}}}
	multi := Entry{Name: "manifest.yaml", Data: []byte(`images:
- image: org/multi:1.0
  references:
  - {repository: "org/multi-amd64:1.0", pull_repository: "x/org/multi-amd64:1.0", platform: {os: linux, architecture: amd64}}
  - {repository: "org/multi-ppc64le:1.0", platform: {arch: ppc64le}}
`)}
	multiA, multiB := Entry{Name: "images/a.tar.gz", Data: DockerSave(arches[0])}, Entry{Name: "images/b.tar.gz", Data: Gzip(DockerSave(arches[1]))}
	members := Entry{Name: "manifest.json", Data: []byte(`{"images": [{"image": "org/multi-amd64", "tag": "1.0", "archive": "images/a.tar.gz"}, {"image": "org/multi-ppc64le", "tag": "1.0", "archive": "images/b.tar.gz"}]}`)}
	return map[string][]byte{
		"good":          good,
		"big":           Gzip(Tar(manifest, chart, one, Entry{Name: two.Name, Data: DockerSave(Image{Ref: "org/two:1.0", Layers: [][]byte{img[0].Layers[0], LayerTar(5, 14<<20)}})})),
		"manifest-last": Gzip(Tar(chart, one, two, manifest)),
		"both":          Gzip(Tar(one, spec, two, manifest, chart)),
		"spec-only":     Gzip(Tar(spec, chart, one, two)),
		"batch":         Gzip(Tar(intoBatch, chart, batch)),
		"plain-tar":     Tar(manifest, chart, one, two),
		"oci": Gzip(Tar(manifest, chart, Entry{Name: one.Name, Data: Gzip(OCILayout("", img[0]))},
			Entry{Name: two.Name, Data: OCILayout("", img[1])})),
		"multi-arch": Gzip(Tar(multi, multiA, multiB)),
		"two-parts":  Gzip(Tar(intoOne, chart, one, two, Entry{Name: "manifest.yaml", Data: []byte("images: [{image: 'org/one:1.0'}, {image: 'org/two:1.0', archive: images/two.tar.gz}]")})),
		"list-last":  Gzip(Tar(members, multiA, multiB, multi)),
		"oci-list": Gzip(Tar(Entry{Name: "manifest.json", Data: []byte(`{"images": [{"image": "org/multi", "tag": "1.0", "archive": "images/m.tar"}]}`)},
			Entry{Name: "images/m.tar", Data: OCILayout("org/multi:1.0", arches...)})),
		// Images that are their own only reference, and are called by their tars alone.
		"spec-self": Gzip(Tar(Entry{Name: "manifest.yaml", Data: []byte(`images:
- image: org/one:1.0
  references:
  - {repository: "org/one:1.0", pull-repository: "x/org/one:1.0", platform: {os: linux, architecture: amd64}}
`)}, one)),
		"sample-images-first": sampleImagesFirst(img),
		"sample-chart-only":   sampleChartOnly(),
		"sample-by-spec":      sampleBySpec(arches),
		"no-images":           Gzip(Tar(Entry{Name: "manifest.json", Data: []byte(`{"charts": [{"archive": "charts/app-1.0.0.tgz"}], "images": []}`)}, chart)),

		"bad-above-root":    Gzip(Tar(manifest, chart, one, two, Entry{Name: "../evil", Data: []byte("x")})),
		"bad-absolute":      Gzip(Tar(manifest, chart, one, two, Entry{Name: "/etc/evil", Data: []byte("x")})),
		"bad-link":          Gzip(Tar(manifest, chart, one, two, Entry{Name: "images/three.tar", Type: tar.TypeSymlink, Link: "/etc/passwd"})),
		"bad-device":        Gzip(Tar(manifest, chart, one, two, Entry{Name: "images/three.tar", Type: tar.TypeChar})),
		"bad-twice":         Gzip(Tar(manifest, chart, one, two, one)),
		"bad-cut":           good[:len(good)*2/3],
		"bad-cut-plain":     Tar(manifest, chart, one, two)[:512*(3+len(manifest.Data)/512)],
		"bad-tail":          append(slices.Clone(good), "more"...),
		"bad-flipped":       flipped,
		"bad-size":          Gzip(lyingSize(Tar(manifest, chart, one, two))),
		"bad-digest":        Gzip(Tar(manifest, chart, one, Entry{Name: two.Name, Data: lying})),
		"bad-two-manifests": Gzip(Tar(manifest, Entry{Name: "manifest.yaml", Data: []byte("images: [{image: 'org/one:1.0', archive: images/two.tar.gz}]")}, chart, one, two)),
		"bad-absent":        Gzip(Tar(manifest, chart, one)),
		"bad-no-manifest":   Gzip(Tar(chart, one, two)),
		"bad-no-image":      Gzip(Tar(manifest, chart, one, Entry{Name: two.Name, Data: Tar(Entry{Name: "x", Data: []byte("x")})})),
		"bad-other-name":    Gzip(Tar(intoBatch, chart, Entry{Name: batch.Name, Data: DockerSave(Image{Ref: "org/one:1.0", Layers: img[0].Layers}, Image{Ref: "org/else:1.0", Layers: img[1].Layers})})),
		"bad-platform": Gzip(Tar(Entry{Name: "manifest.yaml", Data: []byte("images: [{image: 'org/x:1.0', references: [{repository: 'org/x:1.0', platform: {architecture: amd64}}]}]")},
			Entry{Name: "images/x.tar", Data: DockerSave(Image{Ref: "org/x:1.0", Arch: "s390x", Layers: img[0].Layers})})),
		"bad-no-member": Gzip(Tar(manifest, chart, one, two, Entry{Name: "manifest.yaml", Data: []byte("images: [{image: 'org/three:1.0', references: [{repository: 'org/three-amd64:1.0'}]}]")})),
		"bad-bomb":      Gzip(Tar(manifest, chart, one, Entry{Name: two.Name, Data: DockerSave(Image{Ref: "org/two:1.0", Layers: [][]byte{Gzip(make([]byte, 8<<20))}})})),
		"bad-empty":     {},
		"no-chart":      Gzip(Tar(manifest, Entry{Name: chart.Name, Data: []byte("this is no chart\n")}, one, two)),
		"bad-text":      []byte("this is no archive\n"),
	}
}

// lyingSize makes the last file's header say that it is longer than it is.
func lyingSize(b []byte) []byte {
	b = bytes.Clone(b)
	at := bytes.Index(b, []byte("images/two.tar.gz\x00"))
	h := b[at : at+512]
	copy(h[124:136], "77777777777\x00")
	sum := 0
	copy(h[148:156], "        ")
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// chartOf reads name and version of a chart package.
func chartOf(pkg []byte) (name, version string, ok bool) {
	z, err := gzip.NewReader(bytes.NewReader(pkg))
	if err != nil {
		return "", "", false
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err != nil {
			return "", "", false
		}
		if !strings.HasSuffix(h.Name, "/Chart.yaml") {
			continue
		}
		b, err := io.ReadAll(r)
		must(err)
		var c struct{ Name, Version string }
		must(yaml.Unmarshal(b, &c))
		return c.Name, c.Version, true
	}
}

// The three below are made after public samples, each with its habits.

// sampleImagesFirst is an archive that was packed by hand: images first, plain
// tars that are called .tar.gz, an image that is listed twice, short names of
// members, and a spec whose references have no pull-repository.
func sampleImagesFirst(img []Image) []byte {
	return Gzip(Tar(
		Entry{Name: "images/one.tar.gz", Data: DockerSave(img[0])}, Entry{Name: "images/two.tar.gz", Data: DockerSave(img[1])},
		Entry{Name: "charts/app-1.0.0.tgz", Data: ChartTgz("app", "1.0.0", "org/one")},
		Entry{Name: "manifest.json", Data: []byte(`{
  "manifest-revision": "1.0",
  "charts": [
    { "archive": "charts/app-1.0.0.tgz" }
  ],
  "images": [
    { "image": "org/one", "tag": "1.0",
      "archive": "images/one.tar.gz" },
    { "image": "org/two", "tag": "1.0",
      "archive": "images/two.tar.gz" },
    { "image": "org/one", "tag": "1.0",
      "archive": "images/one.tar.gz" }
  ]
}
`)},
		Entry{Name: "manifest.yaml", Data: []byte(`charts:
- archive: app-1.0.0.tgz
images:
- image: org/one:1.0
  references:
  - repository : org/one:1.0
- image: org/two:1.0
  references:
  - repository: org/two:1.0
`)}))
}

// sampleChartOnly is an archive of a chart whose images are elsewhere: no
// revision, keys into its values, no image.
func sampleChartOnly() []byte {
	return Gzip(Tar(
		Entry{Name: "charts/app-2.0.0.tgz", Data: ChartTgz("app", "2.0.0", "wml/one")},
		Entry{Name: "manifest.json", Data: []byte(`{
  "charts": [
    {
      "archive": "charts/app-2.0.0.tgz",
      "images": ["app.image.repository"]
    }
  ],
  "images": []
}
`)}))
}

// sampleBySpec is an archive as create-archive makes them of a spec for many
// architectures: members by 64 hex digits, manifests last, keys of registries
// alone, placeholders and variables in what it was pulled from.
func sampleBySpec(arches []Image) []byte {
	a, b := "images/"+Hex([]byte("a"))+".tar.gz", "images/"+Hex([]byte("b"))+".tar.gz"
	return Gzip(Tar(
		Entry{Name: "charts/app-3.2.0.tgz", Data: ChartTgz("app", "3.2.0", "org/multi")},
		Entry{Name: a, Data: Gzip(DockerSave(arches[0]))}, Entry{Name: b, Data: Gzip(DockerSave(arches[1]))},
		Entry{Name: "manifest.json", Data: []byte(`{
  "charts": [
    {
      "archive": "charts/app-3.2.0.tgz"
    }
  ],
  "images": [
    {
      "image": "org/multi-amd64",
      "tag": "1.0",
      "archive": "` + a + `"
    },
    {
      "image": "org/multi-ppc64le",
      "tag": "1.0",
      "archive": "` + b + `"
    }
  ]
}
`)},
		Entry{Name: "manifest.yaml", Data: []byte(`output-filename: ""
charts:
- archive: file:../repo/stable/app-3.2.0.tgz
  repository-keys:
  - app.image.repository
  registry-keys:
  - global.registry
images:
- image: org/multi:1.0
  references:
  - repository: org/multi-amd64:1.0
    pull-repository: ${DOCKER_REGISTRY}/multi-amd64:1.0
    pull-authorization:
      username: {{ ARTIFACTORY_USERNAME }}
      password: {env: ARTIFACTORY_PASSWORD}
    platform: {os: linux, architecture: amd64}
  - repository: org/multi-ppc64le:1.0
    pull_repository: ibmcom/multi-ppc64le:1.0
    platform: {arch: ppc64le}
`)}))
}
