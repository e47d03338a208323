package release_test

import (
	"net/http"
	"testing"
)

func httpDir(dir string) http.Handler { return http.FileServer(http.Dir(dir)) }

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}
