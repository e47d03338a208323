package server

import (
	"context"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func readMaster(ctx context.Context, c *call) (any, error) {
	if err := c.mustBeAdmin(); err != nil {
		return nil, err
	}
	return c.Rotation.Status(ctx)
}

func rotateMaster(ctx context.Context, c *call) (any, error) {
	var in kmsapi.MasterRotationRequest
	if err := c.mustBeAdmin(); err != nil {
		return nil, err
	}
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	began, err := c.Rotation.Start(ctx, c.who.String(), in)
	return c.masterStatus(ctx, began, err)
}

func migrateMaster(ctx context.Context, c *call) (any, error) {
	var in kmsapi.MigrationRequest
	if err := c.mustBeAdmin(); err != nil {
		return nil, err
	}
	if err := c.decode(&in); err != nil {
		return nil, err
	}
	began, err := c.Rotation.Migrate(ctx, c.who.String(), in)
	return c.masterStatus(ctx, began, err)
}

func stopMaster(ctx context.Context, c *call) (any, error) {
	if err := c.mustBeAdmin(); err != nil {
		return nil, err
	}
	stopped, err := c.Rotation.Stop(ctx)
	return c.masterStatus(ctx, stopped, err)
}

func (c *call) masterStatus(ctx context.Context, changed bool, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	s, err := c.Rotation.Status(ctx)
	s.Changed = changed
	return s, err
}
