package connector

import "github.com/kmsctl/kmsctl/internal/secret"

// SetTestPIN changes what the next connectors are given.
func SetTestPIN(c *Client, pin secret.Value) { c.start.pin = pin }
