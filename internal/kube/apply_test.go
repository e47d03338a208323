package kube_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
)

// apiServer is as much of an API server as an apply needs: discovery, get and
// patch. Its version of an object changes when its content does.
type apiServer struct {
	t       *testing.T
	objects map[string]map[string]any // by path
	asked   []string
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	reply := func(code int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(v) // the client sees what is missing
	}
	resource := func(name, kind string, namespaced bool) map[string]any {
		return map[string]any{"name": name, "kind": kind, "namespaced": namespaced, "verbs": []string{"get", "patch"}}
	}
	switch r.URL.Path {
	case "/api":
		reply(200, map[string]any{"kind": "APIVersions", "versions": []string{"v1"}})
		return
	case "/apis":
		reply(200, map[string]any{"kind": "APIGroupList", "apiVersion": "v1", "groups": []any{}})
		return
	case "/api/v1":
		reply(200, map[string]any{"kind": "APIResourceList", "groupVersion": "v1", "resources": []any{
			resource("configmaps", "ConfigMap", true), resource("namespaces", "Namespace", false)}})
		return
	}
	have := s.objects[r.URL.Path]
	if r.Method == http.MethodGet {
		if have == nil {
			reply(404, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404})
			return
		}
		reply(200, have)
		return
	}
	s.asked = append(s.asked, r.Method+" "+r.URL.Path+" "+r.URL.Query().Get("fieldManager")+" "+r.Header.Get("Content-Type"))
	body, err := io.ReadAll(r.Body)
	if err != nil {
		s.t.Error(err)
	}
	if strings.Contains(string(body), "refuse-me") {
		reply(422, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422, "message": "it is invalid"})
		return
	}
	var o map[string]any
	if err := json.Unmarshal(body, &o); err != nil {
		s.t.Error(err)
	}
	meta, _ := o["metadata"].(map[string]any)
	meta["resourceVersion"] = string(body)
	s.objects[r.URL.Path] = o
	reply(200, o)
}

func apiCluster(t *testing.T) (*kube.Cluster, *apiServer) {
	t.Helper()
	s := &apiServer{t: t, objects: map[string]map[string]any{}}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	t.Setenv("HOME", t.TempDir()) // of the discovery's cache
	file := filepath.Join(t.TempDir(), "config")
	text := `{"apiVersion": "v1", "kind": "Config", "current-context": "c", "clusters": [{"name": "c", "cluster": {"server": "` + srv.URL + `"}}],
"contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}], "users": [{"name": "u", "user": {}}]}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := kube.Open(kube.Config{Kubeconfig: file})
	if err != nil {
		t.Fatal(err)
	}
	return c, s
}

const manifest = `# a comment
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: ConfigMap, metadata: {name: a}, data: {k: "1"}}
- {apiVersion: v1, kind: ConfigMap, metadata: {name: b, namespace: shop}}
---
{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
`

func readObjects(t *testing.T, text string) []kube.Object {
	t.Helper()
	all, err := kube.ReadObjects([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestApply applies by server-side apply in the right namespaces, says what
// changed, and changes nothing the second time.
func TestApply(t *testing.T) {
	c, s := apiCluster(t)
	for _, want := range []bool{true, false} {
		all := readObjects(t, manifest)
		kube.SortObjects(all)
		if all[0].String() != "Namespace shop" || all[2].String() != "ConfigMap shop/b" {
			t.Fatalf("order: %v", all)
		}
		for _, o := range all {
			changed, err := c.Apply(t.Context(), o, "default")
			if err != nil || changed != want {
				t.Errorf("%s: changed %v, want %v; %v", o, changed, want, err)
			}
		}
	}
	const apply = " kmsctl application/apply-patch+yaml"
	want := []string{"PATCH /api/v1/namespaces/shop" + apply, "PATCH /api/v1/namespaces/default/configmaps/a" + apply, "PATCH /api/v1/namespaces/shop/configmaps/b" + apply}
	for n, w := range append(want, want...) {
		if s.asked[n] != w {
			t.Errorf("call %d: %s, want %s", n, s.asked[n], w)
		}
	}
}

// TestApplyFaults gives each fault its kind and names the object.
func TestApplyFaults(t *testing.T) {
	c, _ := apiCluster(t)
	for text, want := range map[string]struct {
		kind fault.Kind
		text string
	}{
		`{apiVersion: example/v1, kind: Unheard, metadata: {name: x}}`:                 {fault.Usage, `apply "Unheard x": the cluster knows no Unheard of example/v1`},
		`{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, data: {a: refuse-me}}`: {fault.Usage, `apply "ConfigMap`},
	} {
		_, err := c.Apply(t.Context(), readObjects(t, text)[0], "default")
		if fault.KindOf(err) != want.kind || !strings.Contains(err.Error(), want.text) || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestReadObjectsShowsNoContent refuses what is no object and keeps its text
// to itself.
func TestReadObjectsShowsNoContent(t *testing.T) {
	for _, text := range []string{"password: canary", "canary", "- canary", "{apiVersion: v1, kind: Secret, data: {a: canary}}", "a: b: canary",
		"apiVersion: v1\nkind: List\nitems: [canary]"} {
		all, err := kube.ReadObjects([]byte(text))
		if err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%q: %v, %v", text, all, err)
		}
	}
}

// TestNotEstablishedYet: the API server makes a definition with conditions
// that are null, and fills them in later.
func TestNotEstablishedYet(t *testing.T) {
	for text, want := range map[string]bool{
		`{}`:                             false,
		`{"status":{"conditions":null}}`: false,
		`{"status":{"conditions":[{"type":"NamesAccepted","status":"True"}]}}`:                                        false,
		`{"status":{"conditions":[{"type":"Established","status":"False"}]}}`:                                         false,
		`{"status":{"conditions":[{"type":"NamesAccepted","status":"True"},{"type":"Established","status":"True"}]}}`: true,
	} {
		var crd map[string]any
		if err := json.Unmarshal([]byte(text), &crd); err != nil {
			t.Fatal(err)
		}
		if got := kube.IsEstablished(crd); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}
