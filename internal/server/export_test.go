package server

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"
)

// ServeImpatiently is Serve with little patience.
func ServeImpatiently(ctx context.Context, h http.Handler, l net.Listener, header, read, finish time.Duration) error {
	return serve(ctx, h, slog.New(slog.DiscardHandler), l, false, patience{header: header, read: read, write: time.Minute, finish: finish})
}

// UndocumentedForTest are routes without a description, and the reverse.
var UndocumentedForTest = undocumented

// RoutesForTest gives for each pattern of the API the endpoint that it is a
// form of: method and first path.
func RoutesForTest() map[string]string {
	out := map[string]string{}
	for _, r := range routes() {
		for _, p := range r.patterns() {
			method, _, _ := strings.Cut(p, " ")
			out[p] = method + " " + r.paths[0]
		}
	}
	return out
}
