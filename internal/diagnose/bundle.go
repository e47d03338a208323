package diagnose

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/pattern"
)

// Bundle collects files for support. Everything that goes in is scrubbed of
// the secrets that are known, in the forms in which they are written, and of
// what looks like one.
type Bundle struct {
	files map[string][]byte
	known [][]byte
}

const masked = "REDACTED"

// shortest is the length under which a text is too common to be taken out.
const shortest = 4

// Known adds secrets, each in its usual forms. The bytes are copied.
func (b *Bundle) Known(secrets ...[]byte) {
	for _, s := range secrets {
		for _, v := range [][]byte{s, bytes.TrimSpace(s)} {
			if len(v) < shortest {
				continue
			}
			quoted, err := json.Marshal(string(v))
			if err != nil {
				quoted = nil // no text: it cannot stand in JSON
			}
			b.known = append(b.known, bytes.Clone(v), []byte(hex.EncodeToString(v)), []byte(url.QueryEscape(string(v))), bytes.Trim(quoted, `"`))
			b.known = append(b.known, base64Forms(v)...)
			if len(v) > 64 { // a PEM file: its lines stand alone in logs
				for _, line := range bytes.Split(v, []byte("\n")) {
					if len(line) >= 32 {
						b.known = append(b.known, bytes.Clone(line))
					}
				}
			}
		}
	}
}

// base64Forms are the middle parts of v's base64 at each of the three places
// where it can begin inside a longer text.
func base64Forms(v []byte) [][]byte {
	var out [][]byte
	for _, enc := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
		for shift := range 3 {
			padded := append(make([]byte, shift), v...)
			whole := len(padded) / 3 * 3
			from := 0
			if shift > 0 {
				from = 4 // the first group mixes with what stands before
			}
			s := enc.EncodeToString(padded[:whole])
			if len(s)-from >= 2*shortest {
				out = append(out, []byte(s[from:]))
			}
		}
	}
	return out
}

var looksSecret = []func() *regexp.Regexp{
	pattern.Lazy(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)`),
	pattern.Lazy(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`),
	pattern.Lazy(`AGE-SECRET-KEY-1[A-Z0-9]+`),
	pattern.Lazy(`(?i)(authorization["']?\s*[:=]\s*["']?(bearer|basic)?\s*)[^\s"',]+`),
	pattern.Lazy(`(?i)((hsm[-_]?(pw|pass)|password|passwd|passphrase|\bpin|api[-_]?key|secret[-_]?key|token)["']?\s*[:=]\s*["']?)[^\s"',{}]+`),
}

// Scrub takes secrets out of a text.
func (b *Bundle) Scrub(text []byte) []byte {
	// Longest first: a short secret inside a long one must not leave its rest.
	slices.SortFunc(b.known, func(x, y []byte) int { return len(y) - len(x) })
	for _, s := range b.known {
		if len(s) >= shortest {
			text = bytes.ReplaceAll(text, s, []byte(masked))
		}
	}
	for i, re := range looksSecret {
		with := masked
		if i >= 3 {
			with = "${1}" + masked
		}
		text = re().ReplaceAll(text, []byte(with))
	}
	return text
}

// Add puts a file in. Secrets that become known later are taken out too.
func (b *Bundle) Add(name string, text []byte) {
	if b.files == nil {
		b.files = map[string][]byte{}
	}
	b.files[name] = text
}

// AddJSON puts a value in as JSON.
func (b *Bundle) AddJSON(name string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	b.Add(name, append(text, '\n'))
	return nil
}

// Names lists the files.
func (b *Bundle) Names() []string { return slices.Sorted(maps.Keys(b.files)) }

// Write writes the bundle as tar.gz, everything scrubbed.
func (b *Bundle) Write(w io.Writer, at time.Time) error {
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	for _, name := range b.Names() {
		text := b.Scrub(b.files[name])
		h := &tar.Header{Name: "kmsctl-bundle/" + name, Mode: 0o600, Size: int64(len(text)), ModTime: at, Typeflag: tar.TypeReg}
		if err := t.WriteHeader(h); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if _, err := t.Write(text); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	if err := t.Close(); err != nil {
		return err
	}
	return z.Close()
}

// Allowed keeps of a release's values only what the chart itself has, with
// texts where the chart has texts; all else is masked. Lists are masked too.
func Allowed(values, chart map[string]any) map[string]any {
	out := map[string]any{}
	for k, v := range values {
		want, there := chart[k]
		wm, isMap := want.(map[string]any)
		vm, given := v.(map[string]any)
		switch {
		case !there, strings.Contains(strings.ToLower(k), "annotation"), strings.Contains(strings.ToLower(k), "env"):
			out[k] = masked
		case isMap && given && len(wm) > 0:
			out[k] = Allowed(vm, wm)
		case isMap, given:
			out[k] = masked
		default:
			out[k] = v
		}
		if _, list := v.([]any); list {
			out[k] = masked
		}
	}
	return out
}
