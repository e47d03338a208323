package connector

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
)

// toFault brings an error of a call back into our own type. What carries no
// wire.Fault comes from the way to the connector, not from the connector.
func toFault(op string, err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	for _, d := range s.Details() {
		if f, ok := d.(*wire.Fault); ok {
			return rebuild(f.Kind, f.Op, f.Object, f.Cause, f.Hint)
		}
	}
	switch s.Code() {
	case codes.DeadlineExceeded:
		return fault.New(fault.Unreachable, op, "", errors.New("the HSM connector did not answer in time")).
			WithHint("look at the HSM and at the connector's log; a hung connector is replaced by itself")
	case codes.Canceled:
		return fault.New(fault.Stopped, op, "", context.Canceled)
	}
	return fault.New(fault.Unreachable, op, "", errors.New("the HSM connector cannot be reached: "+s.Message())).
		WithHint("is kms-connector running? its own log says why it ended")
}

func rebuild(kindName, op, object, cause, hint string) *fault.Error {
	e := &fault.Error{Kind: fault.KindNamed(kindName), Op: op, Object: object, Hint: hint}
	if cause != "" {
		e.Err = errors.New(cause)
	}
	return e
}

// notOpen says that the connector answered, and has no login or no master keys.
func notOpen(err error) bool { return status.Code(err) == codes.FailedPrecondition }

// broken says that the way to the connector ended during the call; Canceled
// without the caller's doing is our own Close of that way.
func broken(ctx context.Context, err error) bool {
	s := status.Convert(err)
	return len(s.Details()) == 0 && (s.Code() == codes.Unavailable || s.Code() == codes.Canceled && ctx.Err() == nil)
}
