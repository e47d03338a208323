package server

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// ServeImpatiently is Serve with little patience.
func ServeImpatiently(ctx context.Context, h http.Handler, l net.Listener, header, read, finish time.Duration) error {
	return serve(ctx, h, slog.New(slog.DiscardHandler), l, false, patience{header: header, read: read, write: time.Minute, finish: finish})
}

// UndocumentedForTest are routes without a description, and the reverse.
var UndocumentedForTest = undocumented
