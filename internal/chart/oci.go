package chart

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
)

// Media types of a chart in a registry, as Helm has them.
const (
	typeConfig   = "application/vnd.cncf.helm.config.v1+json"
	typeContent  = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
)

// Registry is what OCI needs of an image registry.
type Registry interface {
	HasBlob(ctx context.Context, repo, digest string) (bool, error)
	PutBytes(ctx context.Context, repo, digest string, b []byte) error
	ManifestDigest(ctx context.Context, repo, ref string) (string, error)
	PutManifest(ctx context.Context, repo, ref, mediaType string, body []byte) error
}

// OCI is a chart repository in an image registry: Path is where the charts'
// own repositories stand.
type OCI struct {
	Registry Registry
	Host     string
	Path     string
}

func (o *OCI) repo(c *Chart) string { return strings.Trim(o.Path+"/"+c.Name, "/") }

// tag is the version; a registry's tag may hold no plus.
func tag(c *Chart) string { return strings.ReplaceAll(c.Version, "+", "_") }

// Location says where a chart is found.
func (o *OCI) Location(c *Chart) string { return "oci://" + o.Host + "/" + o.repo(c) + ":" + tag(c) }

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int    `json:"size"`
}

func describe(mediaType string, b []byte) descriptor {
	h := sha256.Sum256(b)
	return descriptor{mediaType, "sha256:" + hex.EncodeToString(h[:]), len(b)}
}

// manifest is the same for the same chart, so that a second push is none.
func manifest(c *Chart, config, pkg []byte) ([]byte, error) {
	notes := map[string]string{"org.opencontainers.image.title": c.Name, "org.opencontainers.image.version": c.Version}
	if d := text(c.meta["description"]); d != "" {
		notes["org.opencontainers.image.description"] = d
	}
	return json.Marshal(struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Config        descriptor        `json:"config"`
		Layers        []descriptor      `json:"layers"`
		Annotations   map[string]string `json:"annotations"`
	}{2, typeManifest, describe(typeConfig, config), []descriptor{describe(typeContent, pkg)}, notes})
}

// Check says what Put would do.
func (o *OCI) Check(ctx context.Context, c *Chart, pkg []byte) (Result, error) {
	config, err := json.Marshal(c.meta)
	if err != nil {
		return "", err
	}
	m, err := manifest(c, config, pkg)
	if err != nil {
		return "", err
	}
	have, err := o.Registry.ManifestDigest(ctx, o.repo(c), tag(c))
	if err != nil {
		return "", err
	}
	if have == describe("", m).Digest {
		return Present, nil
	}
	return Pushed, nil
}

// Put sends the package and the manifest that names it.
func (o *OCI) Put(ctx context.Context, c *Chart, pkg []byte) (Result, error) {
	if was, err := o.Check(ctx, c, pkg); err != nil || was == Present {
		return was, err
	}
	config, err := json.Marshal(c.meta)
	if err != nil {
		return "", err
	}
	for _, b := range [][]byte{config, pkg} {
		d := describe("", b).Digest
		has, err := o.Registry.HasBlob(ctx, o.repo(c), d)
		if err != nil {
			return "", err
		}
		if has {
			continue
		}
		if err := o.Registry.PutBytes(ctx, o.repo(c), d, b); err != nil {
			return "", err
		}
	}
	m, err := manifest(c, config, pkg)
	if err != nil {
		return "", err
	}
	return Pushed, o.Registry.PutManifest(ctx, o.repo(c), tag(c), typeManifest, m)
}
