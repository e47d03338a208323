package servecmd

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/kmsctl/kmsctl/internal/cli/app"
)

// TestEnsureTakesNoInstanceThatIsBeingDeleted: the watcher gives out the id of
// an instance that stays, not of one that keeps its name to its end.
func TestEnsureTakesNoInstanceThatIsBeingDeleted(t *testing.T) {
	made := 0
	mux := http.NewServeMux()
	mux.HandleFunc("POST /identity/token", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"access_token":"t","expires_in":3600}`))
	})
	mux.HandleFunc("GET /kmsctl/v1/instances", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"instances":[{"id":"dying","name":"shop","deleting":true},{"id":"alive","name":"bank"}]}`))
	})
	mux.HandleFunc("POST /kmsctl/v1/instances", func(w http.ResponseWriter, _ *http.Request) {
		made++
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte(`{"id":"fresh","name":"shop"}`))
	})
	s := httptest.NewServer(mux)
	defer s.Close()
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte("kms_x"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := app.New("test")
	c, err := a.Client(t.Context(), &app.ClientFlags{Server: s.URL, APIKeyFile: key})
	if err != nil {
		t.Fatal(err)
	}
	i := instances{a, c}
	for name, want := range map[string]string{"shop": "fresh", "bank": "alive"} {
		if got, err := i.Ensure(t.Context(), name); err != nil || got != want {
			t.Errorf("%s: %q %v, want %q", name, got, err, want)
		}
	}
	if made != 1 {
		t.Errorf("%d instances were made", made)
	}
}
