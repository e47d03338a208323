package servecmd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
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

// ReadyCheck asks a server's /readyz; the error has its reasons.
func ReadyCheck(server, caFile string) (func(context.Context) error, error) {
	t := &http.Transport{TLSHandshakeTimeout: 5 * time.Second}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fault.New(fault.NotFound, "read", caFile, err).WithHint("check --ca-file")
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fault.Newf(fault.Usage, "read", caFile, "there is no certificate in it").WithHint("check --ca-file")
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	c := &http.Client{Transport: t, Timeout: 10 * time.Second}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(server, "/")+"/readyz", nil)
		if err != nil {
			return err
		}
		res, err := c.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode == http.StatusOK {
			return nil
		}
		var h kmsapi.Health
		b, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		if err == nil && json.Unmarshal(b, &h) == nil && len(h.Reasons) > 0 {
			return fmt.Errorf("%s", strings.Join(h.Reasons, "; "))
		}
		return fmt.Errorf("it answered %s", res.Status)
	}, nil
}
