package servecmd

import (
	"context"
	"errors"
	"strings"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// instances makes instances through the API.
type instances struct {
	*app.App
	client *kmsclient.Client
}

// Ensure finds the instance of this name, or makes it.
func (i instances) Ensure(ctx context.Context, name string) (string, error) {
	var all kmsapi.Instances
	if err := i.client.Do(ctx, "GET", "/kmsctl/v1/instances", nil, &all); err != nil {
		return "", i.ClientError("list instances", "", err)
	}
	for _, in := range all.Instances {
		if in.Name == name && !in.Deleting { // one that is being deleted holds its name to the end
			return in.ID, nil
		}
	}
	var made kmsapi.Instance
	// The annotation is ICP's, and so are the clients that read the id.
	if err := i.client.Do(ctx, "POST", "/kmsctl/v1/instances", kmsapi.CreateInstance{Name: name, Dialect: "icp"}, &made); err != nil {
		return "", i.ClientError("create instance", name, err)
	}
	return made.ID, nil
}

// readyCheck asks whether the API is ready; the error has its reasons.
func readyCheck(client *kmsclient.Client) func(context.Context) error {
	return func(ctx context.Context) error {
		h, err := client.Health(ctx)
		if err == nil && !h.Ready {
			err = errors.New(strings.Join(h.Reasons, "; "))
		}
		return err
	}
}
