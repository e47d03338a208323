package pack

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"fmt"
	"io"
	"path"
	"runtime/debug"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
)

// SBOMName is the bill of materials in an archive: CycloneDX in JSON. Loaders
// of others look at the manifests, charts and images alone.
const SBOMName = "kmsctl-sbom.cdx.json"

// parts are the components of images, by their names; where none are known,
// the layers are all that is said.
type parts map[string][]cdx.Component

// withSBOM adds the bill of materials, unless the archive carries one from
// before: what a repack or a delta holds is described by that of its source.
func withSBOM(b *archive.Build, known parts) error {
	if slices.ContainsFunc(b.Files, func(f archive.File) bool { return f.Name == SBOMName }) {
		return nil
	}
	bom := cdx.NewBOM()
	var all []cdx.Component
	for _, f := range b.Files {
		if c, ok := chartComponent(f); ok {
			all = append(all, c)
		}
	}
	for _, m := range b.Members {
		for _, i := range m.Images {
			all = append(all, imageComponents(i, known)...)
		}
	}
	// No time and no serial number: the same content gives the same bytes.
	bom.Components = &all
	var out bytes.Buffer
	if err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return fault.New(fault.Other, "write", SBOMName, err)
	}
	b.Files = append(slices.Clone(b.Files), archive.File{Name: SBOMName, Data: out.Bytes()})
	return nil
}

func chartComponent(f archive.File) (cdx.Component, bool) {
	if archive.RoleOf(f.Name) != archive.ChartPackage {
		return cdx.Component{}, false
	}
	name, version := strings.TrimSuffix(path.Base(f.Name), ".tgz"), ""
	if n := strings.LastIndexByte(name, '-'); n > 0 {
		name, version = name[:n], name[n+1:]
	}
	return cdx.Component{BOMRef: f.Name, Type: cdx.ComponentTypeApplication, Name: name, Version: version, Hashes: sha256Of(archive.DigestOf(f.Data))}, true
}

func sha256Of(digest string) *[]cdx.Hash {
	return &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: strings.TrimPrefix(digest, "sha256:")}}
}

// imageComponents are an image under each of its names, with its layers and
// what is known of their content inside it.
func imageComponents(i archive.NewImage, known parts) (all []cdx.Component) {
	for _, ref := range i.Refs {
		var inside []cdx.Component
		for n, l := range i.Layers {
			inside = append(inside, cdx.Component{BOMRef: fmt.Sprintf("%s#layer-%d", ref, n), Type: cdx.ComponentTypeFile, Name: l.Digest, Hashes: sha256Of(l.Digest)})
		}
		for _, c := range known[ref] {
			c.BOMRef = ref + "#" + c.BOMRef
			inside = append(inside, c)
		}
		n := strings.LastIndexByte(ref, ':')
		name, version := ref[:max(n, 0)], ref[n+1:]
		all = append(all, cdx.Component{BOMRef: ref, Type: cdx.ComponentTypeContainer, Name: name, Version: version,
			PackageURL: "pkg:oci/" + path.Base(name) + "@" + i.Digest() + "?tag=" + version, Hashes: sha256Of(i.Digest()), Components: &inside})
	}
	return all
}

// debComponents are the locked packages of a layer.
func debComponents(softHSM bool) ([]cdx.Component, error) {
	all, err := image.Debs()
	if err != nil {
		return nil, err
	}
	var out []cdx.Component
	for _, d := range all {
		if softHSMDebs[d.Name] != softHSM {
			continue
		}
		purl := fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", d.Name, strings.ReplaceAll(d.Version, "+", "%2B"), d.Arch)
		out = append(out, cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: d.Name, Version: d.Version, PackageURL: purl, Hashes: sha256Of(d.SHA256)})
	}
	return out, nil
}

// programComponents are a Go program and the modules that it is built of; one
// that says nothing of itself is the file alone.
func programComponents(e image.Entry) []cdx.Component {
	prog := cdx.Component{BOMRef: e.Name, Type: cdx.ComponentTypeApplication, Name: path.Base(e.Name), Hashes: sha256Of(archive.DigestOf(e.Data))}
	info, err := buildinfo.Read(bytes.NewReader(e.Data))
	if err != nil {
		return []cdx.Component{prog}
	}
	out := []cdx.Component{prog, goModule(e.Name, &debug.Module{Path: "std", Version: strings.TrimPrefix(info.GoVersion, "go")})}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		out = append(out, goModule(e.Name, m))
	}
	return out
}

func goModule(program string, m *debug.Module) cdx.Component {
	purl := "pkg:golang/" + m.Path + "@" + m.Version
	c := cdx.Component{BOMRef: program + " " + purl, Type: cdx.ComponentTypeLibrary, Name: m.Path, Version: m.Version, PackageURL: purl}
	if m.Sum != "" {
		// Go's own hash of a module's tree, which is no hash of a file.
		c.Properties = &[]cdx.Property{{Name: "go:sum", Value: m.Sum}}
	}
	return c
}

// Bill is an archive's bill of materials.
type Bill struct {
	Raw []byte // as it stands in the archive
	bom cdx.BOM
}

// Component is one line of a bill.
type Component struct{ Kind, Name, Version, In string }

// Components lists all, those inside of others behind them.
func (b *Bill) Components() []Component { return flat(b.bom.Components, "") }

func flat(all *[]cdx.Component, in string) (out []Component) {
	if all == nil {
		return nil
	}
	for _, c := range *all {
		out = append(out, Component{string(c.Type), c.Name, c.Version, in})
		out = append(out, flat(c.Components, strings.TrimSuffix(c.Name+":"+c.Version, ":"))...)
	}
	return out
}

// ReadSBOM reads the bill of materials of an archive.
func ReadSBOM(ctx context.Context, a *archive.Archive, lim archive.Limits) (*Bill, error) {
	var raw []byte
	err := a.Walk(ctx, lim, nil, func(name string, size int64, r io.Reader) (err error) {
		if name != SBOMName {
			return nil
		}
		if raw, err = archive.ReadSmall(name, size, r); err != nil {
			return err
		}
		return archive.ErrStop
	})
	if err != nil {
		return nil, err
	}
	if raw == nil {
		return nil, fault.Newf(fault.NotFound, "find bill of materials in", a.Name, "it has no %s", SBOMName).
			WithHint("an archive that kmsctl builds or repacks has one: kmsctl archive repack %s --output-file NEW", a.Name)
	}
	b := &Bill{Raw: raw}
	if err := cdx.NewBOMDecoder(bytes.NewReader(raw), cdx.BOMFileFormatJSON).Decode(&b.bom); err != nil {
		return nil, fault.New(fault.BadContent, "read", SBOMName, err).WithHint("the archive was damaged or changed; run `kmsctl archive verify`")
	}
	return b, nil
}
