package keyscmd

import (
	"cmp"
	"context"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func trim(b []byte) string { return strings.TrimSpace(string(b)) }

// instanceResult shows one instance.
type instanceResult kmsapi.Instance

// Table is one line.
func (r instanceResult) Table() ([]string, [][]string) {
	return instanceList{[]kmsapi.Instance{kmsapi.Instance(r)}}.Table()
}

// instanceList shows instances.
type instanceList struct {
	Instances []kmsapi.Instance `json:"instances"`
}

// Table is one line an instance.
func (l instanceList) Table() ([]string, [][]string) {
	rows := make([][]string, 0, len(l.Instances))
	for _, i := range l.Instances {
		name := i.Name
		if i.Deleting {
			name += " (being deleted: delete it again)"
		}
		rows = append(rows, []string{i.ID, name, i.Dialect, cmp.Or(i.Placement, "wrapped"), i.CreatedAt.UTC().Format(time.RFC3339)})
	}
	return []string{"ID", "NAME", "DIALECT", "PLACEMENT", "CREATED"}, rows
}

func newInstancesCmd(a *app.App) *cobra.Command {
	cmd := &cobra.Command{Use: "instances", Short: "Create, list and delete instances (tenants)",
		Long: "An instance is a tenant of the KMS: keys and policies live in one. Only administrators manage instances."}
	cmd.AddCommand(newInstanceCreateCmd(a), newInstanceListCmd(a), newInstanceDeleteCmd(a), newInstancePolicyCmd(a), newInstancePortCmd(a))
	return cmd
}

type instanceOptions struct {
	*app.App
	client    app.ClientFlags
	name      string
	dialect   string
	placement string
}

// Check holds the rules of the flags.
func (o *instanceOptions) Check() error { return o.client.Check(false) }

func newInstanceCreateCmd(a *app.App) *cobra.Command {
	o := &instanceOptions{App: a}
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Create an instance", Args: cobra.ExactArgs(1), Example: "  kmsctl instances create shop -o json\n  kmsctl instances create vault --placement token",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return app.Run(cmd.Context(), o, runInstanceCreate)
		},
	}
	o.client.Add(cmd.Flags(), a)
	cmd.Flags().StringVar(&o.dialect, "dialect", "key-protect", "which API generation the instance speaks: key-protect or icp")
	cmd.Flags().StringVar(&o.placement, "placement", "wrapped", "where its root keys live: wrapped by the master key, in any number; or token: objects that never leave the HSM, as many as it has room for, in no backup")
	_ = cmd.RegisterFlagCompletionFunc("placement", cobra.FixedCompletions([]string{"wrapped", "token"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("dialect", cobra.FixedCompletions([]string{"key-protect", "icp"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func runInstanceCreate(ctx context.Context, o *instanceOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	var out kmsapi.Instance
	if err := c.Do(ctx, http.MethodPost, "/kmsctl/v1/instances", kmsapi.CreateInstance{Name: o.name, Dialect: o.dialect, Placement: o.placement}, &out); err != nil {
		return o.ClientError("create instance", o.name, err)
	}
	return o.Print(instanceResult(out))
}

func newInstanceListCmd(a *app.App) *cobra.Command {
	o := &instanceOptions{App: a}
	cmd := &cobra.Command{
		Use: "list", Short: "List the instances", Args: cobra.NoArgs, Example: "  kmsctl instances list",
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, runInstanceList) },
	}
	o.client.Add(cmd.Flags(), a)
	return cmd
}

func runInstanceList(ctx context.Context, o *instanceOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	var out kmsapi.Instances
	if err := c.Do(ctx, http.MethodGet, "/kmsctl/v1/instances", nil, &out); err != nil {
		return o.ClientError("list instances", "", err)
	}
	return o.Print(instanceList{out.Instances})
}

func newInstanceDeleteCmd(a *app.App) *cobra.Command {
	o := &instanceOptions{App: a}
	cmd := &cobra.Command{
		Use: "delete INSTANCE", Short: "Delete an instance that holds no key, with its rings, policies and service IDs", Args: cobra.ExactArgs(1), Example: "  kmsctl instances delete shop",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.client.Instance = args[0]
			return app.Run(cmd.Context(), o, runInstanceDelete)
		},
	}
	o.client.Add(cmd.Flags(), a)
	return cmd
}

func runInstanceDelete(ctx context.Context, o *instanceOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	if err := c.Do(ctx, http.MethodDelete, "/kmsctl/v1/instance", nil, nil); err != nil {
		return o.ClientError("delete instance", o.client.Instance, err)
	}
	return nil
}

// portResult shows where the endpoint is that an allowed-IP policy is about.
type portResult struct {
	Port int `json:"privateEndpointPort"`
}

// Table is one line.
func (r portResult) Table() ([]string, [][]string) {
	port := "none (asked without a port: by the socket, or by the scheme's own)"
	if r.Port != 0 {
		port = strconv.Itoa(r.Port)
	}
	return []string{"PORT"}, [][]string{{port}}
}

func newInstancePortCmd(a *app.App) *cobra.Command {
	o := &instanceOptions{App: a}
	cmd := &cobra.Command{
		Use: "allowed-ip-port INSTANCE", Short: "Show the port that calls under an allowed-IP policy come to", Args: cobra.ExactArgs(1),
		Long:    "Show the port of the private endpoint, which an allowed-IP policy is about. There is one endpoint:\nthe port is that of --server.",
		Example: "  kmsctl instances allowed-ip-port shop --server https://kms-api:28674",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.client.Instance = args[0]
			return app.Run(cmd.Context(), o, runInstancePort)
		},
	}
	o.client.Add(cmd.Flags(), a)
	return cmd
}

func runInstancePort(ctx context.Context, o *instanceOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	var out kmsapi.Collection[kmsapi.AllowedPort]
	if err := c.Do(ctx, http.MethodGet, "/api/v2/instance/allowed_ip_port", nil, &out); err != nil {
		return o.ClientError("show the port of", o.client.Instance, err)
	}
	if len(out.Resources) != 1 {
		return fault.Newf(fault.Other, "show the port of", o.client.Instance, "the answer holds %d ports, want 1", len(out.Resources))
	}
	return o.Print(portResult{out.Resources[0].PrivateEndpointPort})
}
