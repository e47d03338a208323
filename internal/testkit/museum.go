package testkit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"sigs.k8s.io/yaml"
)

// Museum is a chart repository over HTTP: ChartMuseum's API under /, ICP's
// under /mgmt-repo/charts, with one store. A Token is asked for, when set.
type Museum struct {
	Token string
	mu    sync.Mutex
	pkgs  map[string][]byte
	Syncs int
	Puts  int
}

func (m *Museum) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Token != "" && r.Header.Get("Authorization") != "Bearer "+m.Token {
		http.Error(w, `{"error":"unauthorized"}`, http.StatusUnauthorized)
		return
	}
	switch p := r.URL.Path; {
	case r.Method == http.MethodGet && (p == "/index.yaml" || p == "/mgmt-repo/charts/index.yaml"):
		m.index(w)
	case r.Method == http.MethodGet && (strings.HasPrefix(p, "/charts/") || strings.HasPrefix(p, "/mgmt-repo/requiredAssets/")):
		_, _ = w.Write(m.pkgs[p[strings.LastIndex(p, "/")+1:]])
	case r.Method == http.MethodPost && p == "/api/charts", r.Method == http.MethodPut && strings.HasPrefix(p, "/mgmt-repo/charts/"):
		m.put(w, r)
	case r.Method == http.MethodGet && p == "/helm-api/api/v2/synch":
		m.Syncs++
		fmt.Fprint(w, `{"message":"synch started"}`)
	default:
		http.Error(w, `{"error":"no such path"}`, http.StatusNotFound)
	}
}

func (m *Museum) put(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if strings.HasPrefix(r.URL.Path, "/mgmt-repo/charts/form/") { // another server's way: a form, at another path
		r.Body = io.NopCloser(bytes.NewReader(b))
		f, _, ferr := r.FormFile("chart")
		if ferr != nil {
			http.Error(w, `{"error":"it is no form with a chart"}`, http.StatusBadRequest)
			return
		}
		b, err = io.ReadAll(f)
	}
	name, version, ok := chartOf(b)
	if err != nil || !ok {
		http.Error(w, `{"error":"it is improperly formatted"}`, http.StatusBadRequest)
		return
	}
	file := name + "-" + version + ".tgz"
	if r.Method == http.MethodPut && !strings.HasSuffix(r.URL.Path, "/"+file) {
		http.Error(w, `{"error":"no such path"}`, http.StatusNotFound)
		return
	}
	if _, there := m.pkgs[file]; there && r.Method == http.MethodPost {
		http.Error(w, `{"error":"file already exists"}`, http.StatusConflict)
		return
	}
	if m.pkgs == nil {
		m.pkgs = map[string][]byte{}
	}
	m.pkgs[file] = b
	m.Puts++
	w.WriteHeader(http.StatusCreated)
	fmt.Fprint(w, `{"saved":true}`)
}

func (m *Museum) index(w io.Writer) {
	entries := map[string][]any{}
	for file, b := range m.pkgs {
		name, version, _ := chartOf(b)
		entries[name] = append(entries[name], map[string]any{"apiVersion": "v2", "name": name, "version": version, "digest": Hex(b), "urls": []string{"charts/" + file}})
	}
	b, err := json.Marshal(map[string]any{"apiVersion": "v1", "entries": entries, "generated": "2020-01-01T00:00:00Z"})
	must(err)
	out, err := yaml.JSONToYAML(b)
	must(err)
	_, _ = w.Write(out)
}
