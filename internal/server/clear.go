package server

import (
	"context"
	"net/http"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Only administrators may clear the data or change the master keys: a service
// ID that manages others is one of the things that go.
func (c *call) mustBeAdmin() error {
	if c.who.Kind == iam.KindLocal || c.who.Kind == iam.KindAdmin {
		return nil
	}
	return fault.Newf(fault.Denied, "", "", "only an administrator may do this").WithReason(kmsapi.Forbidden)
}

func readClear(ctx context.Context, c *call) (any, error) {
	if err := c.mustBeAdmin(); err != nil {
		return nil, err
	}
	return c.Clearing.Plan(ctx)
}

func planClear(ctx context.Context, c *call) (any, error) {
	in, err := c.clearRequest()
	if err != nil {
		return nil, err
	}
	return c.Clearing.Confirm(ctx, c.who.String(), in)
}

func settleClear(ctx context.Context, c *call) (any, error) {
	if err := c.mustBeAdmin(); err != nil {
		return nil, err
	}
	return c.Clearing.Settle(ctx, c.who.String())
}

// beginClear writes the audit line before anything goes: afterwards the key
// that signs it is not there.
func beginClear(ctx context.Context, c *call) (any, error) {
	in, err := c.clearRequest()
	if err != nil {
		return nil, err
	}
	return c.Clearing.Begin(ctx, c.who.String(), in, func(target, serial string) error {
		return c.Audit.Append(ctx, audit.Event{Action: "kmsctl.clear.begin", Outcome: "success", Status: http.StatusAccepted, Principal: c.who.String(),
			CorrelationID: c.resHeader.Get(kmsapi.HeaderCorrelation), Remote: remote(c.r), Detail: "installation " + target + ", token " + serial})
	})
}

func (c *call) clearRequest() (in kmsapi.ClearRequest, err error) {
	if err := c.mustBeAdmin(); err != nil {
		return in, err
	}
	return in, c.decode(&in)
}
