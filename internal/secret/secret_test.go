package secret_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/secret"
)

func TestNothingPrintsTheValue(t *testing.T) {
	v := secret.New([]byte("hunter2"))
	var out bytes.Buffer
	for _, f := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, f+"\n", v)
		fmt.Fprintf(&out, f+"\n", struct{ P secret.Value }{v})
		fmt.Fprintf(&out, f+"\n", &v)
	}
	j, err := json.Marshal(map[string]any{"p": v})
	if err != nil {
		t.Fatal(err)
	}
	out.Write(j)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "p", v)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "p", v)
	for _, leak := range []string{"hunter2", "68756e746572", "104 117"} {
		if strings.Contains(out.String(), leak) {
			t.Errorf("leaked %q in %s", leak, out.String())
		}
	}
}

func TestZeroClearsEveryCopy(t *testing.T) {
	v := secret.New([]byte("hunter2"))
	w := v
	if !v.Equal(secret.New([]byte("hunter2"))) || v.Equal(secret.New([]byte("hunter3"))) {
		t.Error("Equal is wrong")
	}
	v.Zero()
	if !bytes.Equal(w.Reveal(), make([]byte, 7)) {
		t.Errorf("copy still holds %q", w.Reveal())
	}
}
