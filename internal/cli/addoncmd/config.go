package addoncmd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	yaml3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/render"
	"github.com/kmsctl/kmsctl/templates"
)

// addon is one entry of archive_addons.
type addon struct {
	Name      string  `yaml:"-"`
	Namespace string  `yaml:"namespace"` // of the images in the registry, and of the releases
	Repo      string  `yaml:"repo"`      // where the charts go
	Path      string  `yaml:"path"`      // of the archive, below the cluster folder
	SCC       string  `yaml:"scc,omitempty"`
	Charts    []chart `yaml:"charts,omitempty"` // what is installed
}

// chart is one chart to install, as the release of its own name.
type chart struct {
	Name   string         `yaml:"name"`
	Values map[string]any `yaml:"values,omitempty"`
}

const addonsKey = "archive_addons"

// parseConfig reads archive_addons of ICP's config.yaml, in its order, and
// says what in it is probably not meant. It is strict with an addon's own
// keys; the file's other keys and the charts' values are not looked at.
func parseConfig(text []byte) ([]addon, []string, error) {
	entries, err := entriesOf(text)
	if err != nil {
		return nil, nil, err
	}
	// The values as Helm reads them, whose YAML is not quite that of the nodes.
	var doc struct {
		Addons map[string]struct {
			Charts []struct {
				Values json.RawMessage `json:"values"`
			} `json:"charts"`
		} `json:"archive_addons"`
	}
	var all []addon
	var warnings []string
	var errs []error
	for _, e := range entries {
		a, warns, err := e.addon()
		all, warnings, errs = append(all, a), append(warnings, warns...), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, nil, err
	}
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, nil, fault.Usagef("%s cannot be read", addonsKey) // the cause may show a password of another key
	}
	for n := range all {
		read := doc.Addons[all[n].Name].Charts
		if len(read) != len(all[n].Charts) {
			return nil, nil, fault.Usagef("%s.%s: the name means something else to other readers of YAML", addonsKey, all[n].Name).WithHint("put it in quotes, or give the addon another name")
		}
		for i := range all[n].Charts {
			if all[n].Charts[i].Values, err = values(read[i].Values); err != nil {
				return nil, nil, fault.Usagef("%s.%s.charts[%d].values: %w", addonsKey, all[n].Name, i, err)
			}
		}
	}
	return all, warnings, together(all)
}

// together holds the rules between addons.
func together(all []addon) error {
	var errs []error
	of := map[string]string{}
	for _, a := range all {
		for _, c := range a.Charts {
			release := a.Namespace + "/" + c.Name
			if was, twice := of[release]; twice {
				errs = append(errs, fault.Usagef("%s.%s: chart %q is installed into namespace %q twice, also by %q", addonsKey, a.Name, c.Name, a.Namespace, was))
			}
			of[release] = a.Name
		}
	}
	return errors.Join(errs...)
}

// values are a chart's values; whole numbers stay whole.
func values(raw json.RawMessage) (map[string]any, error) {
	out := map[string]any{}
	if len(raw) == 0 || string(raw) == "null" {
		return out, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&out); err != nil {
		return nil, errors.New("it is not a mapping")
	}
	return whole(out).(map[string]any), nil //nolint:forcetypeassert // a mapping stays one
}

func whole(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			v[k] = whole(x)
		}
	case []any:
		for i, x := range v {
			v[i] = whole(x)
		}
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		if f, err := v.Float64(); err == nil {
			return f
		}
	}
	return v
}

// entry is an addon as it stands in the file.
type entry struct {
	name string
	node *yaml3.Node
}

// entriesOf finds archive_addons; none is no fault.
func entriesOf(text []byte) ([]entry, error) {
	_, addons, err := addonsNode(text)
	if err != nil || addons == nil || isNull(addons) {
		return nil, err
	}
	if addons.Kind != yaml3.MappingNode {
		return nil, fault.Usagef("line %d: %s is not a mapping of addons by their names", addons.Line, addonsKey)
	}
	var probe any
	if err := addons.Decode(&probe); err != nil { // a key that is there twice
		return nil, fault.Usagef("%s: %w", addonsKey, err)
	}
	var out []entry
	for key, value := range pairs(addons) {
		out = append(out, entry{key.Value, value})
	}
	return out, nil
}

// addonsNode gives key and value of archive_addons, nil when it is not there.
func addonsNode(text []byte) (key, value *yaml3.Node, err error) {
	var doc yaml3.Node
	if err := yaml3.Unmarshal(text, &doc); err != nil {
		return nil, nil, fault.Usagef("it is not YAML: %w", err)
	}
	if len(doc.Content) == 0 {
		return nil, nil, nil
	}
	if doc.Content[0].Kind != yaml3.MappingNode {
		return nil, nil, fault.Usagef("it is not a YAML mapping")
	}
	for k, v := range pairs(doc.Content[0]) {
		if k.Value == addonsKey {
			return k, v, nil
		}
	}
	return nil, nil, nil
}

// pairs goes through a mapping's keys and values.
func pairs(n *yaml3.Node) func(yield func(key, value *yaml3.Node) bool) {
	return func(yield func(key, value *yaml3.Node) bool) {
		for i := 0; i+1 < len(n.Content); i += 2 {
			v := n.Content[i+1]
			if v.Kind == yaml3.AliasNode {
				v = v.Alias
			}
			if !yield(n.Content[i], v) {
				return
			}
		}
	}
}

func isNull(n *yaml3.Node) bool { return n.Kind == yaml3.ScalarNode && n.Tag == "!!null" }

// addon reads and checks an entry, all but its charts' values.
func (e entry) addon() (addon, []string, error) {
	a, at := addon{Name: e.name}, addonsKey+"."+e.name
	if e.node.Kind != yaml3.MappingNode {
		return a, nil, fault.Usagef("line %d: %s is not a mapping", e.node.Line, at)
	}
	var warnings []string
	var errs []error
	texts := map[string]*string{"namespace": &a.Namespace, "repo": &a.Repo, "path": &a.Path, "scc": &a.SCC}
	for k, v := range pairs(e.node) {
		switch to := texts[k.Value]; {
		case to != nil:
			if v.Kind != yaml3.ScalarNode {
				errs = append(errs, fault.Usagef("line %d: %s.%s is not a word", v.Line, at, k.Value))
			}
			*to = v.Value
		case k.Value == "charts":
			var warns []string
			var err error
			a.Charts, warns, err = readCharts(v, at+".charts")
			warnings, errs = append(warnings, warns...), append(errs, err)
		default:
			errs = append(errs, unknown(k, at, []string{"namespace", "repo", "path", "charts", "scc"}))
		}
	}
	errs = append(errs, a.check(e.node.Line))
	return a, append(warnings, a.warnings()...), errors.Join(errs...)
}

func unknown(key *yaml3.Node, at string, known []string) error {
	hint := "known here: " + strings.Join(known, ", ")
	if n := render.Nearest(key.Value, known); n != "" {
		hint = fmt.Sprintf("did you mean %s?", n)
	}
	return fault.Usagef("line %d: unknown key %s.%s", key.Line, at, key.Value).WithHint("%s", hint)
}

func readCharts(n *yaml3.Node, at string) (all []chart, warnings []string, err error) {
	if isNull(n) {
		return nil, nil, nil
	}
	if n.Kind != yaml3.SequenceNode {
		return nil, nil, fault.Usagef("line %d: %s is not a list", n.Line, at)
	}
	var errs []error
	for i, item := range n.Content {
		at := fmt.Sprintf("%s[%d]", at, i)
		if item.Kind != yaml3.MappingNode {
			errs = append(errs, fault.Usagef("line %d: %s is not a mapping with name and values", item.Line, at))
			continue
		}
		var c chart
		for k, v := range pairs(item) {
			switch k.Value {
			case "name":
				c.Name = v.Value
			case "values":
				warnings = append(warnings, nulls(v, at+".values")...)
			default:
				errs = append(errs, unknown(k, at, []string{"name", "values"}))
			}
		}
		if c.Name == "" {
			errs = append(errs, fault.Usagef("line %d: %s.name is missing", item.Line, at))
		}
		all = append(all, c)
	}
	return all, warnings, errors.Join(errs...)
}

// nulls warns of keys without a value, as the manual's own sample has one: the
// key that was to stand below it stands beside it.
func nulls(n *yaml3.Node, at string) (out []string) {
	if n.Kind != yaml3.MappingNode {
		return nil
	}
	for k, v := range pairs(n) {
		if isNull(v) {
			out = append(out, fmt.Sprintf("line %d: %s.%s is empty (null), which takes the chart's own value away; what belongs below it must be indented deeper", k.Line, at, k.Value))
		}
		out = append(out, nulls(v, at+"."+k.Value)...)
	}
	return out
}

func (a addon) check(line int) error {
	at := addonsKey + "." + a.Name
	var errs []error
	for _, f := range []struct{ key, value string }{{"namespace", a.Namespace}, {"repo", a.Repo}, {"path", a.Path}} {
		if f.value == "" {
			errs = append(errs, fault.Usagef("line %d: %s.%s is missing", line, at, f.key))
		}
	}
	if a.Repo != "" && !slices.Contains(app.ICPRepositories, a.Repo) {
		errs = append(errs, fault.Usagef("line %d: %s.repo: unknown %q", line, at, a.Repo).WithHint("one of: %s; --repo says where it is at a site without ICP", strings.Join(app.ICPRepositories, ", ")))
	}
	if a.Path != "" && !filepath.IsLocal(filepath.FromSlash(a.Path)) {
		errs = append(errs, fault.Usagef("line %d: %s.path: %q does not stay in the cluster folder", line, at, a.Path).WithHint("put the archive into the folder addon, and name it addon/FILE"))
	}
	return errors.Join(errs...)
}

// ours says whether an addon brings this product.
func (a addon) ours() bool {
	return strings.HasPrefix(filepath.Base(a.Path), templates.ChartName) || slices.ContainsFunc(a.Charts, chart.ours)
}

func (c chart) ours() bool { return c.Name == templates.ChartName }

// warnings tell where the manual's sample is at odds with its later steps.
func (a addon) warnings() (out []string) {
	at := addonsKey + "." + a.Name
	if !a.ours() {
		return out
	}
	if a.Repo == "local-charts" {
		out = append(out, at+".repo: the chart goes to local-charts, and the manual's later steps look for it in mgmt-charts")
	}
	if a.Namespace == "default" {
		out = append(out, at+".namespace: it is default, and the manual's hsm-secret and release are in kube-system")
	}
	return out
}
