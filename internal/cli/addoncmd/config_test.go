package addoncmd

import (
	"errors"
	"slices"
	"testing"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// FuzzConfig reads any config.yaml without a crash and with faults of our own;
// what it can read, init can add to, and loses nothing by.
func FuzzConfig(f *testing.F) {
	for _, s := range []string{"", "a: 1\n", "archive_addons:\n", "archive_addons:\n  a: {namespace: n, repo: mgmt-charts, path: p, charts: [{name: c, values: {k: null}}]}\n",
		"archive_addons: {}\nb: &x [1]\n", "archive_addons:\n  a: &a\n    namespace: n\n    repo: local-charts\n    path: p\n    charts:\n    - name: c\n  b: *a\n"} {
		f.Add([]byte(s))
	}
	want := addon{Name: "new", Namespace: "kube-system", Repo: app.ICPRepositories[0], Path: "addon/x.tar.gz", Charts: []chart{{Name: "z", Values: map[string]any{"k": "v"}}}}
	f.Fuzz(func(t *testing.T, text []byte) {
		have, _, err := parseConfig(text)
		var own *fault.Error
		if err != nil {
			if !errors.As(err, &own) {
				t.Errorf("not our own error: %T %v", err, err)
			}
			return
		}
		more, err := insert(text, want)
		if err != nil {
			return // it is not written as a block
		}
		after, _, err := parseConfig(more)
		if err != nil {
			return // init reads it back, and refuses
		}
		for _, a := range have {
			if n := slices.IndexFunc(after, func(b addon) bool { return a.Name == b.Name }); len(after) == len(have)+1 && (n < 0 || !same(a, after[n])) {
				t.Errorf("%q became %q, which has %q otherwise", text, more, a.Name)
			}
		}
	})
}
