package chart

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/file"
)

// Result says what happened to a chart.
type Result string

// The results.
const (
	Pushed  Result = "pushed"
	Present Result = "present"
)

// Dir is a chart repository in a folder: packages and an index.yaml, as
// `helm repo index` makes it and any web server serves it.
type Dir struct {
	Path string
	Now  func() time.Time
}

// Location says where a chart is found.
func (d *Dir) Location(c *Chart) string { return filepath.Join(d.Path, c.File()) }

// Check says what Put would do.
func (d *Dir) Check(_ context.Context, c *Chart, pkg []byte) (Result, error) {
	was, err := os.ReadFile(d.Location(c))
	if err != nil || !bytes.Equal(was, pkg) {
		return Pushed, nil //nolint:nilerr // what cannot be read is written anew
	}
	index, err := d.index()
	if err != nil {
		return "", err
	}
	for _, v := range versions(index, c.Name) {
		if text(v["version"]) == c.Version && text(v["digest"]) == sha(pkg) {
			return Present, nil
		}
	}
	return Pushed, nil
}

// Put writes a package and its line in the index.
func (d *Dir) Put(ctx context.Context, c *Chart, pkg []byte) (Result, error) {
	if err := os.MkdirAll(d.Path, 0o755); err != nil {
		return "", fault.New(fault.Other, "make chart repository", d.Path, err)
	}
	if was, err := d.Check(ctx, c, pkg); err != nil || was == Present {
		return was, err
	}
	if err := writeFile(d.Location(c), pkg); err != nil {
		return "", err
	}
	index, err := d.index()
	if err != nil {
		return "", err
	}
	entry := map[string]any{}
	for k, v := range c.meta {
		entry[k] = v
	}
	now := d.Now().UTC().Format(time.RFC3339Nano)
	entry["urls"], entry["digest"], entry["created"] = []any{c.File()}, sha(pkg), now
	all := []any{entry}
	for _, v := range versions(index, c.Name) {
		if text(v["version"]) != c.Version {
			all = append(all, v)
		}
	}
	entries, _ := index["entries"].(map[string]any) // index made sure of it
	entries[c.Name], index["generated"] = all, now
	b, err := yaml.Marshal(index)
	if err != nil {
		return "", err
	}
	return Pushed, writeFile(filepath.Join(d.Path, "index.yaml"), b)
}

// index reads the index, with entries in any case.
func (d *Dir) index() (map[string]any, error) {
	p := filepath.Join(d.Path, "index.yaml")
	index := map[string]any{"apiVersion": "v1"}
	b, err := os.ReadFile(p)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Other, "read", p, err)
	}
	if err := yaml.Unmarshal(b, &index); err != nil {
		return nil, fault.New(fault.BadContent, "read", p, err).WithHint("repair or remove the file; `helm repo index` makes it anew from the packages")
	}
	if index == nil {
		index = map[string]any{"apiVersion": "v1"}
	}
	if _, ok := index["entries"].(map[string]any); !ok {
		index["entries"] = map[string]any{}
	}
	return index, nil
}

func versions(index map[string]any, name string) []map[string]any {
	entries, _ := index["entries"].(map[string]any)
	list, _ := entries[name].([]any)
	var all []map[string]any
	for _, v := range list {
		if m, ok := v.(map[string]any); ok {
			all = append(all, m)
		}
	}
	return all
}

func writeFile(path string, b []byte) error { return writeMode(path, b, 0o644) }

func writeMode(path string, b []byte, mode os.FileMode) error {
	if err := file.Write(path, b, mode); err != nil {
		return fault.New(fault.Other, "write", path, err)
	}
	return nil
}
