// Package floors holds the house together: a package may import packages of a
// lower floor only, pkg never imports internal, and each heavy library has one
// home. It reads imports alone, so that it is quick and needs no build.
package floors

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/kmsctl/kmsctl/"

// floor of each package, by its folder. A folder that is not listed here is an
// error: a new room needs a floor.
var floor = map[string]int{
	"internal/fault": 0, "internal/secret": 0, "internal/key": 0, "internal/hsm": 0, "internal/cluster": 0, "internal/record": 0, "internal/pki": 0, "internal/file": 0, "internal/gc": 0, "internal/pattern": 0,
	"internal/connector/wire": 0, "templates": 0, "pkg/ppa": 0, "pkg/kmsapi": 0,

	"internal/archive": 1, "internal/image": 1, "internal/chart": 1, "internal/render": 1, "internal/kube": 1, "internal/release": 1,
	"internal/connector": 1, "internal/token": 1, "internal/store": 1, "internal/ask": 1, "internal/seal": 1, "internal/output": 1, "internal/trace": 1,
	"pkg/kmsclient": 1,

	"internal/kms": 2, "internal/iam": 2, "internal/pack": 2, "internal/push": 2, "internal/install": 2, "internal/audit": 2,
	"internal/backup": 2, "internal/diagnose": 2, "internal/connector/server": 2,

	"internal/server": 3, "internal/plugin": 3, "internal/watcher": 3,
	"internal/cli/app":      4,
	"internal/cli/setupcmd": 5, "internal/cli/archivecmd": 5, "internal/cli/loadcmd": 5, "internal/cli/rendercmd": 5,
	"internal/cli/addoncmd": 5, "internal/cli/releasecmd": 5, "internal/cli/hsmcmd": 5, "internal/cli/servecmd": 5, "internal/cli/keyscmd": 5, "internal/cli/auditcmd": 5, "internal/cli/backupcmd": 5, "internal/cli/clockcmd": 5, "internal/cli/storagecmd": 5,
	"internal/cli": 6,
	"cmd/kmsctl":   7, "cmd/kms-server": 7, "cmd/kms-connector": 7,

	"internal/testkit": testsOnly, "internal/floors": testsOnly,
}

// testsOnly packages may import anything, and only tests may import them.
const testsOnly = -1

// home of each heavy library: the folders that may import it, by prefix of the
// import path. Tests and testkit may import anything.
var home = map[string][]string{
	"github.com/google/go-containerregistry": {"internal/image"},
	"helm.sh/helm/v3/pkg/action":             {"internal/release"},
	"helm.sh/helm/v3/pkg/registry":           {"internal/release", "internal/chart"},
	"k8s.io/client-go":                       {"internal/kube"},
	"k8s.io/kms":                             {"internal/plugin"},
	"go.etcd.io":                             {"internal/store"},
	"github.com/AlecAivazis/survey":          {"internal/ask"},
	"filippo.io/age":                         {"internal/seal"},
	"github.com/miekg/pkcs11":                {"internal/token"},
	"github.com/spf13/cobra":                 {"internal/cli", "cmd/kmsctl"},
	"google.golang.org/grpc":                 {"internal/connector", "internal/plugin", "internal/store"}, // etcd answers its clients by it
	"github.com/golang-jwt/jwt":              {"internal/iam"},
	"github.com/prometheus":                  {"internal/server"},
	"go.opentelemetry.io":                    {"internal/trace"},
	"github.com/CycloneDX":                   {"internal/pack"},
	"github.com/vbauerster/mpb":              {"internal/output"},
	"github.com/spf13/viper":                 {},
	"github.com/pkg/errors":                  {},
	"github.com/sirupsen/logrus":             {},
}

func TestFloors(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	faults, files, err := check(root)
	if err != nil {
		t.Fatal(err)
	}
	if files < 20 {
		t.Errorf("read only %d files: is %s the root of the module?", files, root)
	}
	for _, f := range faults {
		t.Error(f)
	}
}

// TestFloorsSeesFaults shows that the check can fail.
func TestFloorsSeesFaults(t *testing.T) {
	root := t.TempDir()
	for name, src := range map[string]string{
		"internal/fault/a.go":    "package fault\nimport _ \"" + module + "internal/kms\"",
		"internal/kms/a.go":      "package kms\nimport _ \"" + module + "internal/iam\"",
		"internal/iam/a.go":      "package iam\nimport _ \"go.etcd.io/etcd/client/v3\"",
		"internal/unheard/a.go":  "package unheard",
		"pkg/ppa/a.go":           "package ppa\nimport _ \"" + module + "internal/fault\"",
		"internal/server/a.go":   "package server\nimport _ \"" + module + "internal/testkit\"",
		"internal/hsm/a.go":      "package hsm\nimport _ \"C\"",
		"internal/kms/a_test.go": "package kms\nimport _ \"go.etcd.io/etcd/client/v3\"",
	} {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(src), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	faults, _, err := check(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"internal/fault/a.go:2: floor 0 imports internal/kms of floor 2", "internal/kms/a.go:2: floor 2 imports internal/iam of floor 2",
		"internal/iam/a.go:2: go.etcd.io/etcd/client/v3 belongs into internal/store", "internal/unheard has no floor",
		"pkg/ppa/a.go:2: pkg imports internal/fault", "internal/server/a.go:2: only tests may import internal/testkit",
		"internal/hsm/a.go:2: cgo belongs into internal/token",
	} {
		if !slices.ContainsFunc(faults, func(f string) bool { return strings.Contains(f, want) }) {
			t.Errorf("not seen: %s\nfaults: %q", want, faults)
		}
	}
	if len(faults) != 7 {
		t.Errorf("%d faults, want 7: %q", len(faults), faults)
	}
}

func check(root string) (faults []string, files int, err error) {
	fset := token.NewFileSet()
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		rel = filepath.ToSlash(rel)
		if d.IsDir() && (rel == "scripts" || rel == "testdata" || (strings.HasPrefix(rel, ".") && rel != ".")) {
			return fs.SkipDir // scripts has modules of its own
		}
		if d.IsDir() || !strings.HasSuffix(rel, ".go") {
			return nil
		}
		files++
		f, err := parser.ParseFile(fset, path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, i := range f.Imports {
			p, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			if why := fault(rel, p); why != "" {
				faults = append(faults, fmt.Sprintf("%s:%d: %s", rel, fset.Position(i.Pos()).Line, why))
			}
		}
		if _, known := floor[filepath.ToSlash(filepath.Dir(rel))]; !known {
			faults = append(faults, filepath.ToSlash(filepath.Dir(rel))+" has no floor")
		}
		return nil
	})
	return faults, files, err
}

func fault(file, imported string) string {
	dir := filepath.ToSlash(filepath.Dir(file))
	mine, test := floor[dir], strings.HasSuffix(file, "_test.go") || floor[dir] == testsOnly
	if imported == "C" && dir != "internal/token" {
		return "cgo belongs into internal/token"
	}
	if rel, own := strings.CutPrefix(imported, module); own {
		theirs, known := floor[rel]
		switch {
		case !known:
			return rel + " has no floor"
		case test:
			return ""
		case theirs == testsOnly:
			return "only tests may import " + rel
		case strings.HasPrefix(dir, "pkg/") && strings.HasPrefix(rel, "internal/"):
			return "pkg imports " + rel
		case theirs >= mine:
			return fmt.Sprintf("floor %d imports %s of floor %d", mine, rel, theirs)
		}
		return ""
	}
	if test {
		return ""
	}
	for lib, homes := range home {
		if (imported == lib || strings.HasPrefix(imported, lib+"/")) &&
			!slices.ContainsFunc(homes, func(h string) bool { return dir == h || strings.HasPrefix(dir, h+"/") }) {
			return imported + " belongs into " + strings.Join(homes, ", ")
		}
	}
	return ""
}
