package server

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"slices"
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
	for _, p := range api("/keys/{id}") {
		out["POST "+p] = "POST /api/v2/keys/{id}"
	}
	for _, o := range openRoutes() {
		for _, p := range o.paths {
			out[o.method+" "+p] = o.method + " " + o.paths[0]
		}
	}
	return out
}

// BodiesForTest are the endpoints that take a body: method and first path.
func BodiesForTest() []string {
	out := []string{"POST /identity/token"}
	add := func(rs []route, docs map[string]doc) {
		for _, r := range rs {
			if docs[r.name].in != nil {
				out = append(out, r.methods+" "+r.paths[0])
			}
		}
	}
	add(slices.Concat(keyRoutes(), instanceRoutes(), ownRoutes()), docs)
	add(icpRoutes(), icpDocs)
	return slices.Sorted(slices.Values(out))
}

// OpenForTest are the paths that ask nobody who they are.
func OpenForTest() (out []string) {
	for _, o := range openRoutes() {
		out = append(out, o.paths...)
	}
	return out
}

// TwiceForTest finds a field that stands twice in JSON.
var TwiceForTest = twice
