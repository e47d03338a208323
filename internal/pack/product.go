// Package pack builds archives: the product's own from programs, Debian
// packages and the chart, others from images and charts that are there. It
// writes no registry.
package pack

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"golang.org/x/sync/errgroup"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/file"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Product says what our own archive is made from.
type Product struct {
	Chart          *chart.Chart
	RepositoryKeys []string // in the chart's values
	Server         string   // path of kms-server, static
	Connector      string   // path of kms-connector
	LunaClient     string   // tar of the vendor's client, or ""
	NShieldClient  string
	Debs           string // folder of the packages' cache
	Batch          bool   // all images in one member, each layer once
}

// imageSpec is one of our images: which layers, and what it runs.
type imageSpec struct {
	name       string
	entrypoint []string
	layers     []string
}

const connectorPath = "usr/bin/kms-connector"

var productImages = []imageSpec{
	{"kms-oss", []string{"/kms-server", "run", "api"}, []string{"base", "server"}},
	{"kms-onboarding", []string{"/kms-server", "run", "storage"}, []string{"base", "server"}},
	{"kms-oss-watcher", []string{"/kms-server", "run", "watcher"}, []string{"base", "server"}},
	{"kms-softhsm", []string{"/" + connectorPath}, []string{"base", "libc", "softhsm", "connector"}},
	{"kms-gemaltov6", []string{"/" + connectorPath}, []string{"base", "libc", "luna", "connector"}},
	{"kms-thalesv12", []string{"/" + connectorPath}, []string{"base", "libc", "nshield", "connector"}},
}

// softHSMDebs are the packages of layer softhsm; all others make layer libc.
var softHSMDebs = map[string]bool{"libssl3": true, "libsofthsm2": true}

// Build makes the images and says what the archive is to hold. warnings are
// what the person should know, one line each.
func (p *Product) Build(ctx context.Context) (b archive.Build, warnings []string, err error) {
	layers, arch, err := p.layers(ctx)
	if err != nil {
		return b, nil, err
	}
	pkg, err := p.Chart.Pack()
	if err != nil {
		return b, nil, err
	}
	chartPath := "charts/" + p.Chart.File()
	b.Manifest = ppa.Manifest{Revision: "1.0", Charts: []ppa.Chart{{Archive: chartPath, RepositoryKeys: p.RepositoryKeys}}}
	b.Files = []archive.File{{Name: chartPath, Data: pkg}}
	repositories, err := p.repositories()
	if err != nil {
		return b, nil, err
	}
	for _, spec := range productImages {
		repo, ok := repositories[spec.name]
		if !ok {
			return b, nil, fault.Newf(fault.BadContent, "read chart", p.Chart.Name, "its values name no repository for image %q", spec.name)
		}
		img, warn, err := p.image(spec, arch, layers)
		if err != nil {
			return b, nil, err
		}
		warnings = append(warnings, warn...)
		entry := ppa.Image{Name: repo, Tag: p.Chart.AppVersion, Archive: "images/" + spec.name + ".tar"}
		if p.Batch {
			entry.Archive = "images/" + p.Chart.Name + ".tar"
		}
		img.Refs = []string{entry.Ref()}
		b.Manifest.Images = append(b.Manifest.Images, entry)
		if n := len(b.Members); n > 0 && b.Members[n-1].Name == entry.Archive {
			b.Members[n-1].Images = append(b.Members[n-1].Images, img)
		} else {
			b.Members = append(b.Members, archive.ImageMember{Name: entry.Archive, Images: []archive.NewImage{img}})
		}
	}
	known, err := p.parts(b.Manifest, layers)
	if err != nil {
		return b, nil, err
	}
	return b, warnings, withSBOM(&b, known)
}

// parts says what our images are made of.
func (p *Product) parts(m ppa.Manifest, layers map[string]*image.Layer) (parts, error) {
	libc, err1 := debComponents(false)
	softHSM, err2 := debComponents(true)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	of := map[string][]cdx.Component{"libc": libc, "softhsm": softHSM}
	for layer, program := range map[string]string{"server": "kms-server", "connector": connectorPath} {
		for _, e := range layers[layer].Entries {
			if e.Name == program { // and not a folder above it
				of[layer] = programComponents(e)
			}
		}
	}
	out := parts{}
	for n, spec := range productImages {
		for _, l := range spec.layers {
			out[m.Images[n].Ref()] = append(out[m.Images[n].Ref()], of[l]...)
		}
	}
	return out, nil
}

// repositories gives each image's repository as the chart's values have it.
func (p *Product) repositories() (map[string]string, error) {
	found := map[string]string{}
	_, missing, err := chart.Edit(p.Chart.Values(), p.RepositoryKeys, func(_, old string) string {
		found[path.Base(old)] = old
		return old
	})
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("its values have no %s", strings.Join(missing, ", "))
	}
	if err != nil {
		return nil, fault.New(fault.BadContent, "read chart", p.Chart.Name, err)
	}
	return found, nil
}

// layers makes every layer that the images share, side by side.
func (p *Product) layers(ctx context.Context) (map[string]*image.Layer, string, error) {
	server, prog, err := readProgram(p.Server, "kms-server")
	if err != nil {
		return nil, "", err
	}
	if !prog.Static {
		return nil, "", fault.Newf(fault.BadContent, "read program", p.Server, "it is not static, so it does not run in an empty image").WithHint("build it with CGO_ENABLED=0 (`make build` does), or name another by --kms-server")
	}
	connector, cprog, err := readProgram(p.Connector, connectorPath)
	if err != nil {
		return nil, "", err
	}
	if cprog.Arch != prog.Arch {
		return nil, "", fault.Newf(fault.BadContent, "read program", p.Connector, "it is for %s, kms-server for %s", cprog.Arch, prog.Arch)
	}
	work := map[string]func() ([]image.Entry, error){
		"base":      func() ([]image.Entry, error) { return image.BaseEntries(), nil },
		"server":    func() ([]image.Entry, error) { return []image.Entry{server}, nil },
		"connector": func() ([]image.Entry, error) { return []image.Entry{connector}, nil },
		"libc":      func() ([]image.Entry, error) { return p.debs(ctx, prog.Arch, false) },
		"softhsm":   func() ([]image.Entry, error) { return p.debs(ctx, prog.Arch, true) },
	}
	for name, file := range map[string]string{"luna": p.LunaClient, "nshield": p.NShieldClient} {
		if file != "" {
			work[name] = func() ([]image.Entry, error) { return clientEntries(file) }
		}
	}
	out := map[string]*image.Layer{}
	for name := range work {
		out[name] = &image.Layer{}
	}
	g, _ := errgroup.WithContext(ctx)
	for name, entries := range work {
		g.Go(func() error {
			all, err := entries()
			if err == nil {
				*out[name], err = image.NewLayer(all)
			}
			return err
		})
	}
	return out, prog.Arch, g.Wait()
}

func readProgram(file, as string) (image.Entry, image.Program, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return image.Entry{}, image.Program{}, fault.New(fault.NotFound, "read program", file, reason(err)).WithHint("check --kms-server and --connector")
	}
	prog, err := image.ReadProgram(file, b)
	return image.Entry{Name: as, Mode: 0o755, Data: b}, prog, err
}

// reason leaves the path out of an error whose fault names it already.
func reason(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// debs unpacks the locked packages of a layer.
func (p *Product) debs(ctx context.Context, arch string, softHSM bool) ([]image.Entry, error) {
	all, err := image.Debs()
	if err != nil {
		return nil, err
	}
	var entries []image.Entry
	for _, d := range all {
		if softHSMDebs[d.Name] != softHSM {
			continue
		}
		if d.Arch != arch && d.Arch != "all" {
			return nil, fault.Newf(fault.Usage, "find Debian package", d.Name, "the lock file has it for %s, the programs are for %s", d.Arch, arch)
		}
		b, err := d.Fetch(ctx, p.Debs)
		if err != nil {
			return nil, err
		}
		es, err := d.Entries(b)
		if err != nil {
			return nil, err
		}
		entries = append(entries, es...)
	}
	return entries, nil
}

func clientEntries(file string) ([]image.Entry, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fault.New(fault.NotFound, "read client", file, err).WithHint("check --luna-client and --nshield-client")
	}
	defer f.Close()
	return image.TarEntries(file, bufio.NewReader(f))
}

// image puts an image together and checks that its programs find their
// libraries.
func (p *Product) image(spec imageSpec, arch string, layers map[string]*image.Layer) (archive.NewImage, []string, error) {
	var used []image.Layer
	for _, l := range spec.layers {
		if made := layers[l]; made != nil { // a client that was not given is left out
			used = append(used, *made)
		}
	}
	vendor := func(name string) bool { // what we did not choose may need what only its other programs use
		return spec.name != "kms-softhsm" && name != connectorPath && !ours(layers["libc"], name)
	}
	if missing := image.Missing(used, func(name string) bool { return !vendor(name) }); len(missing) > 0 {
		return archive.NewImage{}, nil, fault.New(fault.BadContent, "build image", spec.name, errors.New(strings.Join(missing, "; "))).
			WithHint("build kms-connector on the Debian release that the lock file is for, or renew the lock file by `make lock`")
	}
	var warnings []string
	for _, m := range image.Missing(used, vendor) {
		warnings = append(warnings, fmt.Sprintf("image %s: %s, which is not in it", spec.name, m))
	}
	if len(used) == len(spec.layers) {
		warnings = append(warnings, unfound(spec.name, used)...)
	}
	config, err := image.Config(arch, spec.entrypoint, map[string]string{"org.opencontainers.image.title": spec.name, "org.opencontainers.image.version": p.Chart.AppVersion}, used)
	if err != nil {
		return archive.NewImage{}, nil, err
	}
	img := archive.NewImage{Platform: ppa.Platform{OS: "linux", Architecture: arch}, Config: config}
	for _, l := range used {
		img.Layers = append(img.Layers, layerBlob(l))
	}
	return img, warnings, nil
}

// unfound says which files the chart's configuration of a model names that its
// image lacks: a client that was packed from another folder is seen here, and
// not when the pod starts.
func unfound(name string, layers []image.Layer) (warnings []string) {
	m, ok := hsm.OfImage(name)
	if !ok {
		return nil
	}
	for _, f := range append([]string{m.Module}, m.Files...) {
		if !slices.ContainsFunc(layers, func(l image.Layer) bool { return ours(&l, strings.TrimPrefix(f, "/")) }) {
			warnings = append(warnings, fmt.Sprintf("image %s: the chart's configuration names %s, which is not in it", name, f))
		}
	}
	return warnings
}

func ours(l *image.Layer, name string) bool {
	return slices.ContainsFunc(l.Entries, func(e image.Entry) bool { return e.Name == name })
}

func layerBlob(l image.Layer) archive.Blob {
	return archive.Blob{
		Descriptor: archive.Descriptor{MediaType: archive.TypeLayer, Size: int64(len(l.Blob)), Digest: l.Digest}, DiffID: l.DiffID,
		Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(l.Blob)), nil },
	}
}

// Written is what was written.
type Written struct {
	File   string `json:"file"`
	Size   int64  `json:"size"`
	Digest string `json:"digest"` // of the whole file
	Index  string `json:"index"`  // of its index, which names all the rest
}

// WriteFile writes an archive under a temporary name, then renames it.
func WriteFile(name string, b archive.Build) (Written, error) {
	fail := func(err error) (Written, error) {
		var f *fault.Error
		if errors.As(err, &f) {
			return Written{}, err
		}
		return Written{}, fault.New(fault.Other, "write archive", name, reason(err)).WithHint("is there room for it, and may you write there?")
	}
	if err := withSBOM(&b, nil); err != nil {
		return fail(err)
	}
	var out *summer
	var index string
	err := file.WriteFrom(name, 0o644, func(w io.Writer) (err error) {
		out = newSummer(w)
		buf := bufio.NewWriterSize(out, 1<<20)
		if index, err = archive.Write(buf, b); err != nil {
			return err
		}
		return buf.Flush()
	})
	if err != nil {
		return fail(err)
	}
	return Written{File: name, Size: out.n, Digest: out.digest(), Index: index}, nil
}
