package release

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// Difference is one object that a change adds, removes or changes.
type Difference struct {
	Object string `json:"object"` // KIND/NAME
	Change string `json:"change"` // added, removed or changed
	Text   string `json:"text"`   // lines with their sign
}

// Diff tells what differs between two manifests, object by object. The content
// of a Secret is masked.
func Diff(before, after string) []Difference {
	a, b := documents(before), documents(after)
	names := maps.Clone(a)
	maps.Copy(names, b)
	var out []Difference
	for _, n := range slices.Sorted(maps.Keys(names)) {
		old, was := a[n]
		fresh, is := b[n]
		switch {
		case old == fresh && was == is:
		case !was:
			out = append(out, Difference{n, "added", lines("", fresh)})
		case !is:
			out = append(out, Difference{n, "removed", lines(old, "")})
		default:
			out = append(out, Difference{n, "changed", lines(old, fresh)})
		}
	}
	return out
}

// documents splits a manifest by KIND/NAME. Each is brought into one form, so
// that comments and order do not count.
func documents(manifest string) map[string]string {
	out := map[string]string{}
	for _, doc := range strings.Split("\n"+manifest, "\n---") {
		var o map[string]any
		if yaml.Unmarshal([]byte(doc), &o) != nil || len(o) == 0 {
			continue
		}
		meta, _ := o["metadata"].(map[string]any)
		name := fmt.Sprintf("%v/%v", o["kind"], meta["name"])
		if ns, _ := meta["namespace"].(string); ns != "" {
			name += " in " + ns
		}
		if o["kind"] == "Secret" {
			for _, field := range []string{"data", "stringData"} {
				if data, ok := o[field].(map[string]any); ok {
					for k := range data {
						data[k] = "MASKED"
					}
				}
			}
		}
		if b, err := yaml.Marshal(o); err == nil {
			out[name] = string(b)
		}
	}
	return out
}

// around is how many lines of the same are shown beside a change.
const around = 2

// lines is a line diff by the longest common subsequence; an object has a few
// hundred lines at most.
func lines(before, after string) string {
	a, b := split(before), split(after)
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var all []string
	for i, j := 0, 0; i < len(a) || j < len(b); {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			all = append(all, "  "+a[i])
			i, j = i+1, j+1
		case j == len(b) || (i < len(a) && common[i+1][j] >= common[i][j+1]):
			all = append(all, "- "+a[i])
			i++
		default:
			all = append(all, "+ "+b[j])
			j++
		}
	}
	return nearby(all)
}

// nearby leaves out what is far from any change.
func nearby(all []string) string {
	var out strings.Builder
	skipped := false
	for i, l := range all {
		lo, hi := max(0, i-around), min(len(all), i+around+1)
		if !slices.ContainsFunc(all[lo:hi], func(s string) bool { return !strings.HasPrefix(s, "  ") }) {
			skipped = true
			continue
		}
		if skipped && out.Len() > 0 {
			out.WriteString("  ...\n")
		}
		skipped = false
		out.WriteString(l + "\n")
	}
	return out.String()
}

func split(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(strings.TrimRight(s, "\n"), "\n")
}
