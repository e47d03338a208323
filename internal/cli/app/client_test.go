package app

import (
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// TestRefusalByTheClock: who is refused because a clock is wrong is told the
// command that looks, and the one that confirms.
func TestRefusalByTheClock(t *testing.T) {
	err := (&App{}).ClientError("purge key", "k", &kmsclient.Error{Status: kmsapi.StatusOf(kmsapi.ClockAhead), Code: kmsapi.ClockAhead})
	if h := fault.HintOf(err); fault.KindOf(err) != fault.Conflict || !strings.Contains(h, "`kmsctl clock`") || !strings.Contains(h, "`kmsctl clock confirm`") {
		t.Errorf("%v: %q", err, h)
	}
}
