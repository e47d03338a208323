package server_test

import (
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// BenchmarkWrap is everything that a wrap costs besides the connection, the
// HSM and the disk. scripts/bench-kms.sh measures the whole.
func BenchmarkWrap(b *testing.B) {
	w := newWorld(b)
	c := client{w: w, token: w.login(b, w.admin)}
	var o kmsapi.Onboarded
	c.do(b, "POST", "/kmsctl/v1/onboard", `{"name":"orders"}`).into(b, &o)
	token := w.login(b, o.APIKey)
	b.ReportAllocs()
	for b.Loop() {
		r := httptest.NewRequestWithContext(b.Context(), "POST", "/api/v2/keys/"+o.KeyID+"/actions/wrap",
			strings.NewReader(`{"plaintext":"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=","aad":["table=orders"]}`))
		r.Header.Set("Authorization", "Bearer "+token)
		r.Header.Set(kmsapi.HeaderInstance, o.InstanceID)
		rec := httptest.NewRecorder()
		w.server.ServeHTTP(rec, r)
		if rec.Code != 200 {
			b.Fatal(rec.Code, rec.Body)
		}
	}
}

// BenchmarkTwice is the part of BenchmarkWrap that looks for fields that stand
// twice.
func BenchmarkTwice(b *testing.B) {
	body := []byte(`{"plaintext":"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=","aad":["table=orders"]}`)
	b.ReportAllocs()
	for b.Loop() {
		if server.TwiceForTest(body) != nil {
			b.Fatal("it has none")
		}
	}
}
