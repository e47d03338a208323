// Package chart reads, rewrites and packs Helm charts, and puts them into
// chart repositories: a folder with an index.yaml, an OCI registry,
// ChartMuseum, and ICP's helm repositories, one type each. It installs
// nothing. The same chart always packs into the same bytes.
package chart

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Limits of a chart package: Helm's own are of this size.
const (
	maxPackage = 20 << 20
	maxFiles   = 10_000
)

// Chart is a chart in memory.
type Chart struct {
	Name, Version, AppVersion string
	meta                      map[string]any
	files                     map[string][]byte // by path below the chart's folder
}

// FromFS reads a chart from a folder, Chart.yaml at its root.
func FromFS(fsys fs.FS) (*Chart, error) {
	c := &Chart{files: map[string][]byte{}}
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(fsys, p)
		c.files[p] = b
		return err
	})
	if err != nil {
		return nil, fault.New(fault.NotFound, "read chart", "", err)
	}
	return c, c.readMeta()
}

// Open reads a chart package (.tgz).
func Open(name string, pkg []byte) (*Chart, error) {
	c := &Chart{files: map[string][]byte{}}
	err := c.unpack(pkg)
	if err == nil {
		err = c.readMeta()
	}
	if err != nil {
		return nil, fault.New(fault.BadContent, "read chart", name, err).WithHint("it is not a chart package that helm would read")
	}
	return c, nil
}

func (c *Chart) unpack(pkg []byte) error {
	z, err := gzip.NewReader(bytes.NewReader(pkg))
	if err != nil {
		return err
	}
	tr, root, total := tar.NewReader(io.LimitReader(z, 8*maxPackage)), "", int64(0)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeDir || h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("%q is a link or a device", h.Name)
		}
		name := path.Clean(strings.ReplaceAll(h.Name, "\\", "/"))
		folder, rest, ok := strings.Cut(name, "/")
		if !ok || folder == ".." || path.IsAbs(name) || (root != "" && folder != root) {
			return fmt.Errorf("%q is not in the chart's folder", h.Name)
		}
		root = folder
		if total += h.Size; total > 4*maxPackage || len(c.files) > maxFiles {
			return errors.New("it is too large for a chart")
		}
		if _, twice := c.files[rest]; twice {
			return fmt.Errorf("%q is there twice", h.Name)
		}
		if c.files[rest], err = io.ReadAll(tr); err != nil {
			return err
		}
	}
}

func (c *Chart) readMeta() error {
	b, ok := c.files["Chart.yaml"]
	if !ok {
		return fault.Newf(fault.BadContent, "read chart", c.Name, "it has no Chart.yaml")
	}
	c.meta = map[string]any{}
	if err := yaml.Unmarshal(b, &c.meta); err != nil {
		return fault.New(fault.BadContent, "read", "Chart.yaml", err)
	}
	c.Name, c.Version, c.AppVersion = text(c.meta["name"]), text(c.meta["version"]), text(c.meta["appVersion"])
	if c.Name == "" || c.Version == "" || strings.ContainsAny(c.Name+c.Version, "/\\ ") {
		return fault.Newf(fault.BadContent, "read", "Chart.yaml", "it has no usable name and version (%q, %q)", c.Name, c.Version)
	}
	return nil
}

func text(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	}
	return fmt.Sprint(v)
}

// File is the package's file name.
func (c *Chart) File() string { return c.Name + "-" + c.Version + ".tgz" }

// Values are the bytes of values.yaml.
func (c *Chart) Values() []byte { return c.files["values.yaml"] }

// SetValues replaces values.yaml.
func (c *Chart) SetValues(b []byte) { c.files["values.yaml"] = b }

// Pack packs the chart as helm package does, with fixed times and order.
func (c *Chart) Pack() ([]byte, error) {
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, 9)
	if err != nil {
		return nil, err
	}
	tw := tar.NewWriter(z)
	names := make([]string, 0, len(c.files))
	for n := range c.files {
		names = append(names, n)
	}
	slices.SortFunc(names, func(a, b string) int {
		if (a == "Chart.yaml") != (b == "Chart.yaml") { // first, as Helm writes it
			if a == "Chart.yaml" {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	for _, n := range names {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: c.Name + "/" + n, Mode: 0o644, Size: int64(len(c.files[n])), ModTime: time.Unix(0, 0)}
		if err := tw.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("pack %q: %w", n, err)
		}
		if _, err := tw.Write(c.files[n]); err != nil {
			return nil, fmt.Errorf("pack %q: %w", n, err)
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func sha(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}
