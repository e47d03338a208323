// Package ppa reads and writes the manifests of a Passport Advantage archive
// (PPA): manifest.json, which IBM's loader reads, and manifest.yaml, the spec
// that such an archive was made from. It knows the variations that exist in the
// wild and turns both files into one Manifest. It does not read archives.
package ppa

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"sigs.k8s.io/yaml"
)

// Names of the manifests at the root of an archive.
const (
	JSONName = "manifest.json"
	YAMLName = "manifest.yaml"
)

// Manifest is what an archive says about itself.
type Manifest struct {
	Revision string
	Charts   []Chart
	Images   []Image
}

// Chart is a chart package in the archive.
type Chart struct {
	// Archive is the path in the archive, as in charts/x-1.0.0.tgz.
	Archive string
	// RepositoryKeys are dotted paths in values.yaml whose value is an image
	// repository; RegistryKeys such whose value is a registry alone.
	RepositoryKeys, RegistryKeys []string
	// RWXKeys are paths of a storage class for volumes that many pods write.
	RWXKeys []string
}

// Image is one image as it is named in the registry after loading.
type Image struct {
	// Name may hold an organisation, and no tag.
	Name, Tag string
	// Archive is the path of the image's member, "" where the manifest does
	// not say.
	Archive string
	// References, when there are any, are the images of one platform each
	// that Name:Tag is the list of.
	References []Reference
}

// Ref is name:tag.
func (i Image) Ref() string { return i.Name + ":" + i.Tag }

// IsList says whether the image is a list of others. Many specs name an image
// as its own only reference; that is no list, and neither is what has a member.
func (i Image) IsList() bool {
	return i.Archive == "" && (len(i.References) > 1 || (len(i.References) == 1 && i.References[0].Ref() != i.Ref()))
}

// Reference is one platform's image of a list.
type Reference struct {
	Name, Tag string
	// PullRepository is where the archive's maker pulled it from.
	PullRepository string
	Platform       Platform
}

// Ref is name:tag.
func (r Reference) Ref() string { return r.Name + ":" + r.Tag }

// Platform is an operating system and a processor architecture, by Go's names.
type Platform struct {
	OS           string `json:"os,omitempty"`
	Architecture string `json:"architecture,omitempty"`
}

// String is os/architecture.
func (p Platform) String() string { return p.OS + "/" + p.Architecture }

type jsonManifest struct {
	Revision string      `json:"manifest-revision,omitempty"`
	Charts   []jsonChart `json:"charts"`
	Images   []jsonImage `json:"images"`
}

type jsonChart struct {
	Archive  string   `json:"archive"`
	Images   []string `json:"images,omitempty"`
	Registry []string `json:"registry-keys,omitempty"`
}

// jsonImage has archive last and the file is written one key a line, since
// shell loaders in the field look for it there.
type jsonImage struct {
	Image   string `json:"image"`
	Tag     string `json:"tag"`
	Archive string `json:"archive"`
}

// ParseJSON reads a manifest.json. Keys that it does not know are left alone.
func ParseJSON(b []byte) (Manifest, error) {
	var in jsonManifest
	if err := json.Unmarshal(b, &in); err != nil {
		return Manifest{}, fmt.Errorf("read %s: %w", JSONName, err)
	}
	m := Manifest{Revision: in.Revision}
	for _, c := range in.Charts {
		m.Charts = append(m.Charts, Chart{Archive: cleanPath(c.Archive), RepositoryKeys: keys(c.Images), RegistryKeys: keys(c.Registry)})
	}
	for _, i := range in.Images {
		name, tag := SplitRef(i.Image)
		if i.Tag != "" {
			tag = i.Tag
		}
		m.Images = append(m.Images, Image{Name: name, Tag: orLatest(tag), Archive: cleanPath(i.Archive)})
	}
	return m.checked(JSONName)
}

// yamlManifest has the keys as they are written in the field: pull-repository
// is often misspelt, and arch stands for architecture.
type yamlManifest struct {
	Revision any `json:"revision"`
	Charts   []struct {
		Archive        string   `json:"archive"`
		RepositoryKeys []string `json:"repository-keys"`
		RegistryKeys   []string `json:"registry-keys"`
		RWXKeys        []string `json:"rwx-keys"`
	} `json:"charts"`
	Images []struct {
		Image      string `json:"image"`
		Tag        string `json:"tag"`
		Archive    string `json:"archive"`
		References []struct {
			Repository string `json:"repository"`
			Pull       string `json:"pull-repository"`
			PullTypo   string `json:"pull_repository"`
			Platform   struct {
				OS           string `json:"os"`
				Architecture string `json:"architecture"`
				Arch         string `json:"arch"`
			} `json:"platform"`
		} `json:"references"`
	} `json:"images"`
}

// placeholder is a Go-template placeholder without quotes, which YAML would
// take for a mapping; makers replace them by sed before use.
var placeholder = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?m)^(\s*(?:- )?[\w.-]+\s*:\s*)(\{\{[^{}\n]*\}\})\s*$`)
})

// readYAML reads a spec, in which passwords may stand: no error repeats a text
// of it.
func readYAML(b []byte, into any) error {
	err := yaml.Unmarshal(placeholder().ReplaceAll(b, []byte(`$1"$2"`)), into)
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		kind, _, _ := strings.Cut(wrong.Value, " ")
		return fmt.Errorf("%s: %s is not what belongs there", strings.TrimPrefix(wrong.Field, "."), kind)
	}
	if err != nil && strings.HasPrefix(err.Error(), "error converting YAML") && strings.ContainsAny(token().ReplaceAllString(err.Error(), ""), "'\"`{") {
		return errors.New("it is no YAML: a text that begins with * or !, or a key that is none, has to stand in quotes")
	}
	return err
}

// token is a sign of YAML itself in an error, as in: did not find expected ','.
var token = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`'.'`) })

// ParseYAML reads a manifest.yaml. Keys that it does not know are left alone.
func ParseYAML(b []byte) (Manifest, error) {
	var in yamlManifest
	if err := readYAML(b, &in); err != nil {
		return Manifest{}, fmt.Errorf("read %s: %w", YAMLName, err)
	}
	m := Manifest{}
	if in.Revision != nil {
		m.Revision = fmt.Sprint(in.Revision)
	}
	for _, c := range in.Charts {
		m.Charts = append(m.Charts, Chart{Archive: cleanPath(c.Archive), RepositoryKeys: keys(c.RepositoryKeys), RegistryKeys: keys(c.RegistryKeys), RWXKeys: keys(c.RWXKeys)})
	}
	for _, i := range in.Images {
		out := Image{Archive: cleanPath(i.Archive)}
		out.Name, out.Tag = SplitRef(i.Image)
		if i.Tag != "" {
			out.Tag = i.Tag
		}
		out.Tag = orLatest(out.Tag)
		for _, r := range i.References {
			ref := Reference{PullRepository: first(r.Pull, r.PullTypo), Platform: Platform{OS: first(r.Platform.OS, "linux"), Architecture: first(r.Platform.Architecture, r.Platform.Arch)}}
			ref.Name, ref.Tag = SplitRef(r.Repository)
			ref.Tag = orLatest(ref.Tag)
			out.References = append(out.References, ref)
		}
		m.Images = append(m.Images, out)
	}
	return m.checked(YAMLName)
}

// checked drops repeated entries and refuses what cannot be meant.
func (m Manifest) checked(file string) (Manifest, error) {
	var errs []error
	seen := map[string]Image{}
	images := make([]Image, 0, len(m.Images))
	for n, i := range m.Images {
		if err := i.check(); err != nil {
			errs = append(errs, fmt.Errorf("%s: images[%d]: %w", file, n, err))
			continue
		}
		if was, again := seen[i.Ref()]; again {
			if was.Archive != i.Archive {
				errs = append(errs, fmt.Errorf("%s: image %q stands in %q and in %q", file, i.Ref(), was.Archive, i.Archive))
			}
			continue
		}
		seen[i.Ref()] = i
		images = append(images, i)
	}
	m.Images = images
	for n, c := range m.Charts {
		// A spec's charts stand where its maker had them, also above the spec.
		if c.Archive == "" || (file == JSONName && !local(c.Archive)) {
			errs = append(errs, fmt.Errorf("%s: charts[%d]: archive %q is not a path in the archive", file, n, c.Archive))
		}
	}
	return m, errors.Join(errs...)
}

func (i Image) check() error {
	if err := checkName(i.Name, i.Tag); err != nil {
		return err
	}
	if i.Archive != "" && !local(i.Archive) {
		return fmt.Errorf("archive %q is not a path in the archive", i.Archive)
	}
	for _, r := range i.References {
		if err := checkName(r.Name, r.Tag); err != nil {
			return fmt.Errorf("references: %w", err)
		}
	}
	return nil
}

var (
	nameRule = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?::[0-9]+)?(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*$`)
	})
	tagRule = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`) })
)

func checkName(name, tag string) error {
	if !nameRule().MatchString(name) {
		return fmt.Errorf("%q is not the name of an image", name)
	}
	if !tagRule().MatchString(tag) {
		return fmt.Errorf("%q is not the tag of an image", tag)
	}
	return nil
}

// SplitRef cuts name:tag; the tag is "" when there is none. A port of a
// registry in front is not taken for a tag.
func SplitRef(ref string) (name, tag string) {
	ref = strings.TrimSpace(ref)
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}

// cleanPath is a path in the archive without ./ and without the file: of a
// spec.
func cleanPath(p string) string {
	for { // what cleaning leaves may begin so again
		was := p
		if p = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(p), "file:")); p == "" {
			return ""
		}
		if p = path.Clean(p); p == was {
			return p
		}
	}
}

// local says whether a clean path stays inside.
func local(p string) bool {
	return !path.IsAbs(p) && p != ".." && !strings.HasPrefix(p, "../") && p != "."
}

// keys are nil when there are none: an empty list says no more than none does.
func keys(all []string) []string { return append([]string(nil), all...) }

func orLatest(tag string) string { return first(tag, "latest") }

func first(all ...string) string {
	for _, s := range all {
		if s != "" {
			return s
		}
	}
	return ""
}

// JSON is the manifest.json: indented, one key a line, archive last. Lists are
// not in it: its readers open the member of whatever it names, and a list has
// none. Who makes lists reads them from the manifest.yaml.
func (m Manifest) JSON() []byte {
	out := jsonManifest{Revision: m.Revision, Charts: []jsonChart{}, Images: []jsonImage{}}
	for _, c := range m.Charts {
		out.Charts = append(out.Charts, jsonChart{Archive: c.Archive, Images: c.RepositoryKeys, Registry: c.RegistryKeys})
	}
	for _, i := range m.Images {
		if i.IsList() {
			continue
		}
		out.Images = append(out.Images, jsonImage{Image: i.Name, Tag: i.Tag, Archive: i.Archive})
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(out); err != nil {
		panic(err) // plain strings only
	}
	return b.Bytes()
}

// YAML is the manifest.yaml. It names each image's member too, which specs in
// the field leave out and readers of them ignore.
func (m Manifest) YAML() []byte {
	type reference struct {
		Repository string    `json:"repository"`
		Pull       string    `json:"pull-repository,omitempty"`
		Platform   *Platform `json:"platform,omitempty"`
	}
	type image struct {
		Image      string      `json:"image"`
		Archive    string      `json:"archive,omitempty"`
		References []reference `json:"references,omitempty"`
	}
	type chart struct {
		Archive        string   `json:"archive"`
		RepositoryKeys []string `json:"repository-keys,omitempty"`
		RegistryKeys   []string `json:"registry-keys,omitempty"`
		RWXKeys        []string `json:"rwx-keys,omitempty"`
	}
	out := struct {
		Revision string  `json:"revision,omitempty"`
		Charts   []chart `json:"charts,omitempty"`
		Images   []image `json:"images"`
	}{Revision: m.Revision, Images: []image{}}
	for _, c := range m.Charts {
		out.Charts = append(out.Charts, chart(c))
	}
	for _, i := range m.Images {
		o := image{Image: i.Ref(), Archive: i.Archive}
		for _, r := range i.References {
			ref := reference{Repository: r.Ref(), Pull: r.PullRepository}
			if r.Platform != (Platform{}) && r.Platform != (Platform{OS: "linux"}) { // what a reader takes for granted
				ref.Platform = &r.Platform
			}
			o.References = append(o.References, ref)
		}
		out.Images = append(out.Images, o)
	}
	b, err := yaml.Marshal(out)
	if err != nil {
		panic(err) // plain strings only
	}
	return b
}

// Merge joins the two manifests of an archive. What both say must agree;
// members and platforms come from whichever says them. Either may be nil.
func Merge(fromJSON, fromYAML *Manifest) (Manifest, error) {
	switch {
	case fromJSON == nil && fromYAML == nil:
		return Manifest{}, errors.New("there is neither a manifest.json nor a manifest.yaml")
	case fromJSON == nil:
		m := *fromYAML
		m.Charts, _ = mergeCharts(nil, m.Charts)
		return m, nil
	case fromYAML == nil:
		return *fromJSON, nil
	}
	m := Manifest{Revision: fromJSON.Revision}
	var errs []error
	m.Charts, errs = mergeCharts(fromJSON.Charts, fromYAML.Charts)
	members := map[string]int{}
	for n, i := range fromJSON.Images {
		m.Images = append(m.Images, i)
		members[i.Ref()] = n
	}
	for _, i := range fromYAML.Images {
		n, both := members[i.Ref()]
		switch {
		case both:
			was := &m.Images[n]
			if i.Archive != "" && was.Archive != "" && i.Archive != was.Archive {
				errs = append(errs, fmt.Errorf("image %q: manifest.json has it in %q, manifest.yaml in %q", i.Ref(), was.Archive, i.Archive))
			}
			was.Archive, was.References = first(was.Archive, i.Archive), i.References
		case len(i.References) == 0 && i.Archive == "" && len(fromJSON.Images) > 0:
			errs = append(errs, fmt.Errorf("image %q: manifest.yaml has it, manifest.json has not", i.Ref()))
		default: // a list's plain name, or an image that only the spec names with its member
			m.Images = append(m.Images, i)
		}
	}
	return m, errors.Join(errs...)
}

func mergeCharts(fromJSON, fromYAML []Chart) (all []Chart, errs []error) {
	all = slices.Clone(fromJSON)
	for _, c := range fromYAML {
		// The spec's path is relative to the spec, the archive's to charts/.
		n := slices.IndexFunc(all, func(o Chart) bool { return path.Base(o.Archive) == path.Base(c.Archive) })
		if n < 0 {
			if len(fromJSON) > 0 {
				errs = append(errs, fmt.Errorf("chart %q: manifest.yaml has it, manifest.json has not", c.Archive))
			}
			if !local(c.Archive) || path.Dir(c.Archive) == "." {
				c.Archive = "charts/" + path.Base(c.Archive)
			}
			all = append(all, c)
			continue
		}
		o := &all[n]
		if len(o.RepositoryKeys) == 0 {
			o.RepositoryKeys = c.RepositoryKeys
		}
		if len(o.RegistryKeys) == 0 {
			o.RegistryKeys = c.RegistryKeys
		}
		o.RWXKeys = c.RWXKeys
	}
	return all, errs
}
