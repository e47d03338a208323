package fault_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
)

func TestErrorText(t *testing.T) {
	cause := errors.New("401 unauthorized")
	for _, c := range []struct {
		err  error
		want string
	}{
		{fault.New(fault.Denied, "push image", "reg.example/kms:1", cause), `push image "reg.example/kms:1": 401 unauthorized`},
		{fault.New(fault.Denied, "log in", "", cause), `log in: 401 unauthorized`},
		{fault.Usagef("--model: unknown model %q", "x"), `--model: unknown model "x"`},
		{fault.New(fault.NotFound, "", "a", nil), `"a"`},
	} {
		if got := c.err.Error(); got != c.want {
			t.Errorf("got %s, want %s", got, c.want)
		}
	}
}

func TestKindHintObjectAreFoundThroughWraps(t *testing.T) {
	inner := fault.Newf(fault.Unreachable, "dial", "h:1", "refused").WithHint("start %s", "it")
	for _, err := range []error{inner, fmt.Errorf("load: %w", inner), errors.Join(fmt.Errorf("load: %w", inner), errors.New("other"))} {
		if fault.KindOf(err) != fault.Unreachable || fault.HintOf(err) != "start it" || fault.ObjectOf(err) != "h:1" {
			t.Errorf("%v: kind %v hint %q object %q", err, fault.KindOf(err), fault.HintOf(err), fault.ObjectOf(err))
		}
	}
	outer := fault.New(fault.NotReady, "install", "rel", inner)
	if fault.KindOf(outer) != fault.NotReady || fault.HintOf(outer) != "start it" || fault.ObjectOf(outer) != "rel" {
		t.Errorf("outer fault: kind %v hint %q object %q", fault.KindOf(outer), fault.HintOf(outer), fault.ObjectOf(outer))
	}
	if fault.KindOf(errors.New("x")) != fault.Other || fault.HintOf(errors.New("x")) != "" {
		t.Error("a plain error is Other and has no hint")
	}
}

// TestSaidAndHeard: who is told an error prints what it was, and tells it on as
// it was.
func TestSaidAndHeard(t *testing.T) {
	cause := errors.New(`an "a": inside`)
	for _, err := range []error{
		fault.New(fault.Denied, "push image", "a", cause).WithHint("log in"), fault.New(fault.Denied, "", "a", cause), fault.New(fault.NotReady, "open", "", cause),
		fault.New(fault.NotFound, "find", "a", nil), fmt.Errorf("load: %w", fault.New(fault.Conflict, "lock", `b"c`, cause)), cause,
	} {
		heard := fault.Say(err).Err()
		if heard.Error() != err.Error() || fault.KindOf(heard) != fault.KindOf(err) || fault.HintOf(heard) != fault.HintOf(err) {
			t.Errorf("%v: heard %v, %v, %q", err, heard, fault.KindOf(heard), fault.HintOf(heard))
		}
	}
	heard := fault.Say(fmt.Errorf("load: %w", fault.New(fault.Conflict, "lock", `b"c`, cause))).Err()
	if fault.ObjectOf(heard) != `b"c` {
		t.Errorf("object %q of %v", fault.ObjectOf(heard), heard)
	}
}

func TestKindNamesAreDistinct(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range fault.Kinds() {
		if seen[k.String()] {
			t.Errorf("name %q twice", k)
		}
		seen[k.String()] = true
	}
	if fault.Kind(99).String() != "other" {
		t.Error("an unknown kind must read as other")
	}
}
