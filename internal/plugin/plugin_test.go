package plugin

import (
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// TestCodes: every kind of fault and every status of the API has a code, and
// none but a bug is an internal error.
func TestCodes(t *testing.T) {
	for _, k := range fault.Kinds() {
		got := code(fmt.Errorf("wrapped: %w", fault.Newf(k, "do", "it", "cause")))
		if got == codes.OK || got == codes.Unknown || (got == codes.Internal) != (k == fault.Other || k == fault.Partial) {
			t.Errorf("%s: %s", k, got)
		}
	}
	for status, want := range map[int]codes.Code{400: codes.InvalidArgument, 401: codes.Unauthenticated, 403: codes.PermissionDenied, 404: codes.NotFound, 409: codes.FailedPrecondition,
		410: codes.FailedPrecondition, 413: codes.InvalidArgument, 422: codes.DataLoss, 429: codes.Unavailable, 500: codes.Internal, 503: codes.Unavailable} {
		if got := code(&kmsclient.Error{Status: status}); got != want {
			t.Errorf("status %d: %s, want %s", status, got, want)
		}
	}
	if got := code(errors.New("connection refused")); got != codes.Unavailable {
		t.Errorf("no answer: %s", got)
	}
}
