package push

import (
	"encoding/json"
	"testing"

	"github.com/kmsctl/kmsctl/internal/archive"
)

// FuzzMarker gives markers to a load: one whose code is not of the archive is
// not believed, and one that is may say what it likes without doing harm.
func FuzzMarker(f *testing.F) {
	key := []byte("made from the archive's bytes")
	for _, body := range []string{
		`{"version":1,"compression":"gzip","images":[{"name":"org/one","tag":"1.0","digest":"sha256:00","config":"sha256:01","diffIDs":["sha256:02"]}],"manifests":{"manifest.json":"eyJpbWFnZXMiOltdfQ=="},"charts":{"charts/app.tgz":"H4sI"}}`,
		`{"version":2}`, `{"manifests":{"manifest.yaml":"aW1hZ2VzOg=="}}`, `[]`, ``,
	} {
		f.Add([]byte(body), []byte{})
		f.Add([]byte(body), []byte("{"))
	}
	f.Fuzz(func(t *testing.T, body, raw []byte) {
		if _, ok := openMarker(raw, key); ok {
			t.Errorf("a marker without a code was believed: %q", raw)
		}
		forged, err := json.Marshal(sealedMarker{body, code([]byte("another archive"), body)})
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := openMarker(forged, key); ok {
			t.Errorf("a marker with another archive's code was believed: %q", body)
		}
		own, err := json.Marshal(sealedMarker{body, code(key, body)})
		if err != nil {
			t.Fatal(err)
		}
		m, ok := openMarker(own, key)
		if ok && !json.Valid(body) {
			t.Errorf("%q is no JSON and was read", body)
		}
		if !ok {
			return
		}
		if found, err := m.manifest(); err == nil && archive.Unplaced(found) {
			t.Errorf("%q: a manifest that names no members was taken", body)
		}
	})
}
