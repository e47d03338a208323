package output_test

import (
	"bytes"
	"testing"

	"github.com/kmsctl/kmsctl/internal/output"
)

type fruit struct {
	Name string `json:"name"`
}

func (f fruit) Table() ([]string, [][]string) {
	return []string{"NAME", "N"}, [][]string{{f.Name, "1"}}
}

func TestWriteFormats(t *testing.T) {
	for format, want := range map[string]string{
		"json":  "{\n  \"name\": \"a<b\"\n}\n",
		"yaml":  "name: a<b\n",
		"table": "NAME  N\na<b   1\n",
	} {
		var b bytes.Buffer
		if err := output.Write(&b, format, fruit{"a<b"}); err != nil || b.String() != want {
			t.Errorf("%s: %q, %v", format, b.String(), err)
		}
	}
	if output.Write(&bytes.Buffer{}, "xml", 1) == nil {
		t.Error("an unknown format must fail")
	}
}

func TestProgressIsSilentWhenQuiet(t *testing.T) {
	var b bytes.Buffer
	output.NewProgress(&b, true).Line("pushed", "x")
	output.NewProgress(&b, false).Line("pushed", "x", "sha256:1")
	if b.String() != "pushed     x  sha256:1\n" {
		t.Errorf("%q", b.String())
	}
}
