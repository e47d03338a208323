// Package output prints results. House rules: stdout has the result and
// nothing else; progress, warnings and errors go to stderr; JSON is one object
// with fixed field names, times in RFC 3339 UTC; no colour, so that a pipe and
// a terminal see the same.
package output

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"sigs.k8s.io/yaml"
)

// Formats are the values of -o/--output; the first is the default.
var Formats = []string{"table", "json", "yaml"}

// Tabler is a result that can show itself to a person. Rows are cells of
// plain text; a nil header prints none.
type Tabler interface {
	Table() (header []string, rows [][]string)
}

// Write prints v in the format. A v without Table prints as YAML in table
// format, since that is the most readable form left.
func Write(w io.Writer, format string, v any) error {
	switch format {
	case "json":
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "table":
		if t, ok := v.(Tabler); ok {
			return table(w, t)
		}
		fallthrough
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}
	return fmt.Errorf("unknown output format %q", format)
}

func table(w io.Writer, t Tabler) error {
	head, rows := t.Table()
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if head != nil {
		fmt.Fprintln(tw, strings.Join(head, "\t"))
	}
	for _, r := range rows {
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	return tw.Flush()
}
