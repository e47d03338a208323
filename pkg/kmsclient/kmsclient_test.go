package kmsclient_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// TestHealth: it needs no token, a server that is not ready is an answer, and
// whatever is no answer of a KMS is an error.
func TestHealth(t *testing.T) {
	for _, c := range []struct {
		status int
		body   string
		want   string // its reason; "": ready
		fails  bool
	}{
		{200, `{"ready":true,"clock":{"state":"ahead","aheadSeconds":7200}}`, "", false},
		{503, `{"ready":false,"reasons":["hsm: away"]}`, "hsm: away", false},
		{503, `{"ready":true}`, "", true},
		{502, `bad gateway`, "", true},
		{200, `hello`, "", true},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/readyz" || r.Header.Get("Authorization") != "" {
				t.Errorf("%s, authorization %q", r.URL.Path, r.Header.Get("Authorization"))
			}
			w.WriteHeader(c.status)
			_, _ = w.Write([]byte(c.body))
		}))
		defer srv.Close()
		client, err := kmsclient.New(kmsclient.Config{Server: srv.URL, APIKey: []byte("never sent")})
		if err != nil {
			t.Fatal(err)
		}
		h, err := client.Health(t.Context())
		if (err != nil) != c.fails || err == nil && (h.Ready != (c.want == "") || c.want != "" && h.Reasons[0] != c.want) {
			t.Errorf("%d %s: %+v %v", c.status, c.body, h, err)
		}
	}
}
