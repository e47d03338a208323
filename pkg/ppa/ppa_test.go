package ppa

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// After the public sample of bluecompute: a revision, keys into the values, an
// organisation in the name, the same image twice.
const jsonSample = `{
  "manifest-revision": "1.0",
  "charts": [{"archive": "charts/bluecompute-0.0.1.tgz", "images": ["auth.image.repository"]}],
  "images": [
    {"image": "ibmcase/bluecompute-auth", "tag": "latest", "archive": "images/bluecompute-auth.tar.gz"},
    {"image": "ibmcase/bluecompute-mysql", "tag": "5.7", "archive": "images/mysql.tar.gz"},
    {"image": "ibmcase/bluecompute-mysql", "tag": "5.7", "archive": "images/mysql.tar.gz"}
  ]
}`

func TestParseJSON(t *testing.T) {
	m, err := ParseJSON([]byte(jsonSample))
	if err != nil {
		t.Fatal(err)
	}
	want := Manifest{Revision: "1.0",
		Charts: []Chart{{Archive: "charts/bluecompute-0.0.1.tgz", RepositoryKeys: []string{"auth.image.repository"}}},
		Images: []Image{{Name: "ibmcase/bluecompute-auth", Tag: "latest", Archive: "images/bluecompute-auth.tar.gz"},
			{Name: "ibmcase/bluecompute-mysql", Tag: "5.7", Archive: "images/mysql.tar.gz"}},
	}
	if d := cmp.Diff(want, m); d != "" {
		t.Error(d)
	}
	again, err := ParseJSON(m.JSON())
	if d := cmp.Diff(m, again); err != nil || d != "" {
		t.Error(err, d)
	}
}

// Every variation that the specs in the field show, in one.
const yamlSample = `revision: 1.0
output-filename: ""
charts:
- archive: file:../repo/stable/search-chart-3.2.0.tgz
  repository-keys:
  - console.searchapi.image.repository
  registry-keys: [global.registry]
images:
- image: search-api:3.2.0
  references:
  - repository: search-api-amd64:3.2.0
    pull_repository: ${DOCKER_REGISTRY}/search-api-amd64:3.2.0
    pull-authorization:
      username: {{ ARTIFACTORY_USERNAME }}
      password: {env: ARTIFACTORY_PASSWORD}
    platform: {os: linux, architecture: amd64}
  - repository : search-api-ppc64le:3.2.0
    platform: {arch: ppc64le}
- image: single:1
- image: bench/x
  tag: "3"
  archive: ./images/x.tar
`

func TestParseYAML(t *testing.T) {
	m, err := ParseYAML([]byte(strings.Replace(yamlSample, "file:../repo/stable/", "file:", 1)))
	if err != nil {
		t.Fatal(err)
	}
	want := Manifest{Revision: "1",
		Charts: []Chart{{Archive: "search-chart-3.2.0.tgz", RepositoryKeys: []string{"console.searchapi.image.repository"}, RegistryKeys: []string{"global.registry"}}},
		Images: []Image{
			{Name: "search-api", Tag: "3.2.0", References: []Reference{
				{Name: "search-api-amd64", Tag: "3.2.0", PullRepository: "${DOCKER_REGISTRY}/search-api-amd64:3.2.0", Platform: Platform{"linux", "amd64"}},
				{Name: "search-api-ppc64le", Tag: "3.2.0", Platform: Platform{"linux", "ppc64le"}}}},
			{Name: "single", Tag: "1"},
			{Name: "bench/x", Tag: "3", Archive: "images/x.tar"}},
	}
	if d := cmp.Diff(want, m); d != "" {
		t.Error(d)
	}
	again, err := ParseYAML(m.YAML())
	if d := cmp.Diff(m, again); err != nil || d != "" {
		t.Error(err, d)
	}
}

func TestSpecAloneNamesChartsInTheArchive(t *testing.T) {
	y, err := ParseYAML([]byte(yamlSample))
	if err != nil {
		t.Fatal(err)
	}
	if y.Charts[0].Archive != "../repo/stable/search-chart-3.2.0.tgz" {
		t.Errorf("the spec's own path became %q", y.Charts[0].Archive)
	}
	m, err := Merge(nil, &y)
	if err != nil || m.Charts[0].Archive != "charts/search-chart-3.2.0.tgz" {
		t.Errorf("merged into %+v, %v", m.Charts, err)
	}
}

func TestRefused(t *testing.T) {
	for name, in := range map[string]string{
		"path above the root": `{"images":[{"image":"a","tag":"1","archive":"../../etc/passwd"}]}`,
		"absolute path":       `{"charts":[{"archive":"/etc/x.tgz"}]}`,
		"bad name":            `{"images":[{"image":"A B","tag":"1","archive":"images/a.tar"}]}`,
		"bad tag":             `{"images":[{"image":"a","tag":"../1","archive":"images/a.tar"}]}`,
		"two members":         `{"images":[{"image":"a","tag":"1","archive":"images/a.tar"},{"image":"a","tag":"1","archive":"images/b.tar"}]}`,
		"cut":                 `{"images":[`,
	} {
		t.Run(name, func(t *testing.T) {
			if m, err := ParseJSON([]byte(in)); err == nil {
				t.Errorf("accepted as %+v", m)
			}
		})
	}
}

func TestMerge(t *testing.T) {
	j, err := ParseJSON([]byte(`{"charts":[{"archive":"charts/search-chart-3.2.0.tgz"}],"images":[{"image":"search-api-amd64","tag":"3.2.0","archive":"images/1.tar.gz"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	y, err := ParseYAML([]byte("charts: [{archive: 'file:search-chart-3.2.0.tgz', repository-keys: [a.repository]}]\nimages: [{image: 'search-api:3.2.0', references: [{repository: 'search-api-amd64:3.2.0', platform: {architecture: amd64}}]}]"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := Merge(&j, &y)
	if err != nil {
		t.Fatal(err)
	}
	if m.Charts[0].Archive != "charts/search-chart-3.2.0.tgz" || m.Charts[0].RepositoryKeys[0] != "a.repository" || len(m.Images) != 2 {
		t.Errorf("merged into %+v", m)
	}
	y.Images[0].References = nil
	if _, err := Merge(&j, &y); err == nil {
		t.Error("manifests that disagree were accepted")
	}
	if _, err := Merge(nil, nil); err == nil {
		t.Error("no manifest at all was accepted")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(jsonSample))
	f.Add([]byte(yamlSample))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := ParseJSON(b); err == nil {
			again, err := ParseJSON(m.JSON())
			if d := cmp.Diff(m, again); err != nil || d != "" {
				t.Errorf("json does not read back: %v %s", err, d)
			}
		}
		if m, err := ParseYAML(b); err == nil {
			again, err := ParseYAML(m.YAML())
			if d := cmp.Diff(m, again); err != nil || d != "" {
				t.Errorf("yaml does not read back: %v %s", err, d)
			}
		}
	})
}
