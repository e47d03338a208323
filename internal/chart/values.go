package chart

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	yaml3 "go.yaml.in/yaml/v3"

	"github.com/kmsctl/kmsctl/internal/pattern"
)

// Edit replaces the values under dotted keys of a values.yaml and leaves every
// other byte, comments above all, as it is. missing lists keys that are not
// there or hold no plain value.
func Edit(values []byte, keys []string, replace func(key, old string) string) (out []byte, missing []string, err error) {
	var doc yaml3.Node
	if err := yaml3.Unmarshal(values, &doc); err != nil {
		return nil, nil, fmt.Errorf("read values.yaml: %w", err)
	}
	lines := strings.SplitAfter(string(values), "\n")
	type change struct {
		node *yaml3.Node
		to   string
	}
	var changes []change
	for _, k := range keys {
		n := lookUp(&doc, strings.Split(k, "."))
		if n == nil || n.Kind != yaml3.ScalarNode {
			missing = append(missing, k)
			continue
		}
		if to := replace(k, n.Value); to != n.Value {
			changes = append(changes, change{n, to})
		}
	}
	// From the end on, so that places in front stay right.
	slices.SortFunc(changes, func(a, b change) int {
		if a.node.Line != b.node.Line {
			return b.node.Line - a.node.Line
		}
		return b.node.Column - a.node.Column
	})
	changes = slices.CompactFunc(changes, func(a, b change) bool { return a.node == b.node }) // two keys may name one value
	for _, c := range changes {
		if !editLine(lines, c.node, c.to) {
			return rewriteAll(&doc, func() {
				for _, c := range changes {
					c.node.SetString(c.to)
				}
			}, missing)
		}
	}
	return []byte(strings.Join(lines, "")), missing, nil
}

func rewriteAll(doc *yaml3.Node, set func(), missing []string) ([]byte, []string, error) {
	set()
	b, err := yaml3.Marshal(doc)
	return b, missing, err
}

func lookUp(n *yaml3.Node, keys []string) *yaml3.Node {
	for n != nil && (n.Kind == yaml3.DocumentNode || n.Kind == yaml3.AliasNode) {
		if n.Kind == yaml3.AliasNode {
			n = n.Alias
		} else if len(n.Content) == 0 {
			return nil
		} else {
			n = n.Content[0]
		}
	}
	if n == nil || len(keys) == 0 {
		return n
	}
	if n.Kind != yaml3.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == keys[0] {
			return lookUp(n.Content[i+1], keys[1:])
		}
	}
	return nil
}

// plain is a scalar that needs no quotes: image names and the like.
var plain = pattern.Lazy(`^[A-Za-z][A-Za-z0-9._/:-]*[A-Za-z0-9]$`)

// editLine replaces a scalar in its line; false when it does not stand there
// in one piece.
func editLine(lines []string, n *yaml3.Node, to string) bool {
	if n.Line < 1 || n.Line > len(lines) {
		return false
	}
	line := []rune(lines[n.Line-1])
	at := n.Column - 1
	if at < 0 || at > len(line) {
		return false
	}
	rest := string(line[at:])
	var old string
	switch n.Style {
	case 0:
		old = n.Value
		if old == "" {
			return false // null
		}
	case yaml3.DoubleQuotedStyle:
		b, err := json.Marshal(n.Value)
		if err != nil {
			return false
		}
		old = string(b)
	case yaml3.SingleQuotedStyle:
		old = "'" + strings.ReplaceAll(n.Value, "'", "''") + "'"
	default:
		return false
	}
	if !strings.HasPrefix(rest, old) {
		return false
	}
	quoted, err := json.Marshal(to)
	if err != nil {
		return false
	}
	text := string(quoted)
	if n.Style == 0 && plain().MatchString(to) && !strings.Contains(to, ": ") {
		text = to
	}
	lines[n.Line-1] = string(line[:at]) + text + rest[len(old):]
	return true
}

// RepositoryKeys finds the dotted keys of a values.yaml that hold the
// repository of one of the images.
func RepositoryKeys(values []byte, images []string) ([]string, error) {
	var doc yaml3.Node
	if err := yaml3.Unmarshal(values, &doc); err != nil {
		return nil, fmt.Errorf("read values.yaml: %w", err)
	}
	var keys []string
	var walk func(n *yaml3.Node, at []string)
	walk = func(n *yaml3.Node, at []string) {
		switch n.Kind {
		case yaml3.DocumentNode:
			for _, c := range n.Content {
				walk(c, at)
			}
		case yaml3.MappingNode:
			for i := 0; i+1 < len(n.Content); i += 2 {
				walk(n.Content[i+1], append(slices.Clone(at), n.Content[i].Value))
			}
		case yaml3.ScalarNode:
			if len(at) > 0 && at[len(at)-1] == "repository" && slices.Contains(images, n.Value) {
				keys = append(keys, strings.Join(at, "."))
			}
		case yaml3.SequenceNode, yaml3.AliasNode:
		}
	}
	walk(&doc, nil)
	return keys, nil
}
