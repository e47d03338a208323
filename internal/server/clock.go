package server

import (
	"context"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func readClock(ctx context.Context, c *call) (any, error) {
	if err := c.mustBeAdmin(); err != nil {
		return nil, err
	}
	return c.KMS.ClockStatus(ctx)
}

func confirmClock(ctx context.Context, c *call) (any, error) {
	var in kmsapi.ConfirmClock
	if err := c.mustBeAdmin(); err != nil {
		return nil, err
	}
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	changed, err := c.KMS.ConfirmClock(ctx, c.who.String(), in.Machine)
	if err != nil {
		return nil, err
	}
	s, err := c.KMS.ClockStatus(ctx)
	s.Changed = changed
	return s, err
}
