// Package render makes and reads the two files of the manual: hsm-Secret.yaml
// (the Secret hsm-secret) and overrides_hsm.yaml (the chart's values). What it
// renders it reads back; what the manual prints with faults it reads with
// warnings. It touches neither disk nor cluster.
package render

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/template"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/templates"
)

// SecretName is the name of the Secret that the chart's pods mount.
const SecretName = "hsm-secret"

// Pair is a client certificate and its key, both PEM.
type Pair struct{ Cert, Key []byte }

// Secret is the content of hsm-Secret.yaml.
type Secret struct {
	Namespace string
	Password  secret.Value
	ServerCA  []byte          // gemalto: the appliances' certificates
	Clients   map[string]Pair // gemalto: by management node IP
	Part      bool            // what is absent stays as it is in the cluster
	Warnings  []string        // what ParseSecret accepted although it is not right
}

type clientEntry struct {
	IP string
	Pair
}

// SortedClients lists the client pairs by IP, for the template.
func (s Secret) SortedClients() []clientEntry {
	var out []clientEntry
	for _, ip := range slices.Sorted(maps.Keys(s.Clients)) {
		out = append(out, clientEntry{ip, s.Clients[ip]})
	}
	return out
}

// Data is the Secret's data as Kubernetes keeps it.
func (s Secret) Data() map[string][]byte {
	d := map[string][]byte{}
	if !s.Password.Empty() {
		d[passKey] = s.Password.Reveal()
	}
	if len(s.ServerCA) > 0 {
		d[serverCAKey] = s.ServerCA
	}
	for ip, p := range s.Clients {
		d[ip], d[ip+keySuffix] = p.Cert, p.Key
	}
	return d
}

// YAML is hsm-Secret.yaml. The caller clears it after use.
func (s Secret) YAML() ([]byte, error) { return execute("hsm-Secret.yaml.tmpl", s) }

// Image is where an image of the chart comes from.
type Image struct {
	Block           string // key in the values: oss, storage, watcher, or the model
	Repository, Tag string
}

// Overrides is the content of overrides_hsm.yaml.
type Overrides struct {
	HSM      hsm.Settings
	Images   map[string]Image
	Password secret.Value    // hsm.hsm_pw: to be moved into hsm-secret
	Clients  map[string]Pair // client_certs: to be moved into hsm-secret
	Values   map[string]any  // what Helm gets: everything but secrets and clear_data
	Warnings []string
}

// SortedImages lists the images in the manual's order.
func (o Overrides) SortedImages() []Image {
	var out []Image
	for _, b := range []string{"oss", "storage", o.HSM.Model, "watcher"} {
		if i, ok := o.Images[b]; ok {
			i.Block = b
			out = append(out, i)
		}
	}
	return out
}

// YAML is overrides_hsm.yaml with the manual's keys.
func (o Overrides) YAML() ([]byte, error) { return execute("overrides_hsm.yaml.tmpl", o) }

// Organisation is the folder of the images in the site's registry.
const Organisation = "ibmcom"

// Images gives the image blocks of a model for a registry. A registry without
// a path gets the manual's organisation.
func Images(registry, tag string, m hsm.Model) map[string]Image {
	registry = strings.TrimSuffix(registry, "/")
	if !strings.Contains(registry, "/") {
		registry += "/" + Organisation
	}
	out := map[string]Image{}
	for block, name := range map[string]string{"oss": "kms-oss", "storage": "kms-onboarding", m.Name: m.Image, "watcher": "kms-oss-watcher"} {
		out[block] = Image{Block: block, Repository: registry + "/" + name, Tag: tag}
	}
	return out
}

func execute(name string, data any) ([]byte, error) {
	t, err := template.New(name).Option("missingkey=error").Funcs(template.FuncMap{
		"base64": base64.StdEncoding.EncodeToString, "scalar": scalar,
	}).Parse(templates.Text(name))
	if err != nil {
		return nil, fmt.Errorf("read template %q: %w", name, err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, data); err != nil {
		return nil, fmt.Errorf("render %q: %w", name, err)
	}
	return b.Bytes(), nil
}

// scalar writes a string so that YAML reads a string, quoted where it must be.
func scalar(s string) (string, error) {
	b, err := yaml.Marshal(s)
	return strings.TrimSpace(string(b)), err
}

// Helm is what Helm gets: the file's other values with the settings and images
// in them. It holds no secret, and not clear_data, which must never act again
// on a rollback or a plain upgrade.
func (o Overrides) Helm() map[string]any {
	out := map[string]any{}
	maps.Copy(out, o.Values)
	block := map[string]any{}
	if old, ok := out["hsm"].(map[string]any); ok {
		maps.Copy(block, old)
	}
	for k, v := range map[string]string{"hsm_model": o.HSM.Model, "hsm_ip": o.HSM.HSMIP, "rfs_ip": o.HSM.RFSIP, "slotId": o.HSM.SlotID,
		"esn": o.HSM.ESN, "keyhash": o.HSM.KeyHash, "tokenLabel": o.HSM.TokenLabel} {
		if v != "" {
			block[k] = v
		}
	}
	if o.HSM.FIPS {
		block["fips"] = true
	}
	out["hsm"] = block
	for name, img := range o.Images {
		b := map[string]any{}
		if old, ok := out[name].(map[string]any); ok {
			maps.Copy(b, old)
		}
		image := map[string]any{}
		if old, ok := b["image"].(map[string]any); ok {
			maps.Copy(image, old)
		}
		if img.Repository != "" {
			image["repository"] = img.Repository
		}
		if img.Tag != "" {
			image["tag"] = img.Tag
		}
		b["image"] = image
		out[name] = b
	}
	return out
}
