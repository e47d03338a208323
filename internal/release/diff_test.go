package release_test

import (
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/release"
)

func TestDiff(t *testing.T) {
	const before = "---\n# comment\nkind: A\nmetadata: {name: same}\nx: [1, 2]\n---\nkind: B\nmetadata: {name: gone}\n---\nkind: C\nmetadata: {name: c}\na: 1\nb: 2\nc: 3\nd: 4\ne: 5\nf: 6\n" +
		"---\nkind: Secret\nmetadata: {name: s, namespace: shop}\ndata: {p: Y2FuYXJ5, q: x}\n"
	const after = "kind: A\nx: [1, 2]\nmetadata: {name: same}\n---\nkind: C\nmetadata: {name: c}\na: 1\nb: 2\nc: 3\nd: 4\ne: 5\nf: 7\n---\nkind: D\nmetadata: {name: fresh}\n" +
		"---\nkind: Secret\nmetadata: {name: s, namespace: shop}\ndata: {p: Y2FuYXJ6}\n"
	got := map[string]string{}
	for _, d := range release.Diff(before, after) {
		got[d.Change+" "+d.Object] = d.Text
		if strings.Contains(d.Text, "Y2Fu") {
			t.Errorf("a Secret is shown: %s", d.Text)
		}
	}
	for _, want := range []string{"removed B/gone", "changed C/c", "added D/fresh", "changed Secret/s in shop"} {
		if _, ok := got[want]; !ok {
			t.Errorf("no %q in %q", want, got)
		}
	}
	if len(got) != 4 {
		t.Errorf("%d differences: %q", len(got), got)
	}
	if c := got["changed C/c"]; !strings.Contains(c, "- f: 6\n+ f: 7\n") || strings.Contains(c, "a: 1") {
		t.Errorf("%q", c)
	}
	if d := release.Diff(before, before); len(d) != 0 {
		t.Errorf("%+v", d)
	}
}
