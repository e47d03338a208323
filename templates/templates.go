// Package templates holds the templates of the rendered files and the chart
// key-management-hsm, embedded. An embed line cannot climb to a parent folder,
// hence a package here.
package templates

import (
	"embed"
	"io/fs"
)

//go:embed *.tmpl all:key-management-hsm
var files embed.FS

// ChartName is the chart's name, and the release's in the manual.
const ChartName = "key-management-hsm"

// ChartVersion is the version in the embedded Chart.yaml; the images' tag
// follows it unless the values say otherwise.
const ChartVersion = "1.0.0"

// Chart is the chart key-management-hsm: Chart.yaml at its root.
func Chart() fs.FS {
	sub, err := fs.Sub(files, ChartName)
	if err != nil {
		panic(err) // the path is a constant, checked by the tests
	}
	return sub
}

// RepositoryKeys are the dotted paths in the chart's values.yaml whose value
// is an image repository, as a PPA manifest lists them.
func RepositoryKeys() []string {
	return []string{"oss.image.repository", "storage.image.repository", "gemalto.image.repository",
		"thales.image.repository", "softhsm.image.repository", "watcher.image.repository"}
}

// Text gives the template of a rendered file.
func Text(name string) string {
	b, err := files.ReadFile(name)
	if err != nil {
		panic(err) // names are constants, checked by the tests
	}
	return string(b)
}
