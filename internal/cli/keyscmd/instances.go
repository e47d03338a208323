package keyscmd

import (
	"context"
	"net/http"
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
		rows = append(rows, []string{i.ID, i.Name, i.Dialect, i.CreatedAt.UTC().Format(time.RFC3339)})
	}
	return []string{"ID", "NAME", "DIALECT", "CREATED"}, rows
}

func newInstancesCmd(a *app.App) *cobra.Command {
	cmd := &cobra.Command{Use: "instances", Short: "Create, list and delete instances (tenants)",
		Long: "An instance is a tenant of the KMS: keys and policies live in one. Only administrators manage instances."}
	cmd.AddCommand(newInstanceCreateCmd(a), newInstanceListCmd(a), newInstanceDeleteCmd(a))
	return cmd
}

type instanceOptions struct {
	*app.App
	client  app.ClientFlags
	name    string
	dialect string
}

// Check holds the rules of the flags.
func (o *instanceOptions) Check() error { return o.client.Check(false) }

func newInstanceCreateCmd(a *app.App) *cobra.Command {
	o := &instanceOptions{App: a}
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Create an instance", Args: cobra.ExactArgs(1), Example: "  kmsctl instances create shop -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return app.Run(cmd.Context(), o, runInstanceCreate)
		},
	}
	o.client.Add(cmd.Flags(), a)
	cmd.Flags().StringVar(&o.dialect, "dialect", "key-protect", "which API generation the instance speaks: key-protect or icp")
	_ = cmd.RegisterFlagCompletionFunc("dialect", cobra.FixedCompletions([]string{"key-protect", "icp"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func runInstanceCreate(ctx context.Context, o *instanceOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	var out kmsapi.Instance
	if err := c.Do(ctx, http.MethodPost, "/kmsctl/v1/instances", kmsapi.CreateInstance{Name: o.name, Dialect: o.dialect}, &out); err != nil {
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
		Use: "delete INSTANCE", Short: "Delete an instance that holds no key", Args: cobra.ExactArgs(1), Example: "  kmsctl instances delete shop",
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

// onboardResult shows what onboarding made; the API key is shown this once.
type onboardResult kmsapi.Onboarded

// Table is one line a field.
func (r onboardResult) Table() ([]string, [][]string) {
	return nil, [][]string{{"instance", r.InstanceID}, {"service id", r.ServiceID}, {"key", r.KeyID}, {"policy", r.PolicyID},
		{"api key", r.APIKey}, {"", "preserve the API key: it cannot be shown again"}}
}

type onboardOptions struct {
	*app.App
	client app.ClientFlags
	name   string
	key    string
	role   string
}

func newOnboardCmd(a *app.App, run func(context.Context, *onboardOptions) error) *cobra.Command {
	o := &onboardOptions{App: a}
	if run == nil {
		run = runOnboard
	}
	cmd := &cobra.Command{
		Use: "onboard NAME", Short: "Give a service an instance, a key, and an API key that may use that key alone", Args: cobra.ExactArgs(1),
		Long: `Onboard a service in one go: an instance and a root key (unless --instance and --key name
existing ones), a service ID, an API key, and an access policy that lets the service use that key and no other.`,
		Example: "  kmsctl onboard orders -o json\n  kmsctl onboard orders --instance shop --key 02fd6835-6001-4482-a892-13bd2085f75d --role Viewer",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.client.Add(cmd.Flags(), a)
	o.client.AddInstance(cmd.Flags())
	cmd.Flags().StringVar(&o.key, "key", "", "id of an existing key of the instance")
	cmd.Flags().StringVar(&o.role, "role", "Viewer", "role on the key: Viewer wraps and unwraps")
	return cmd
}

// Check holds the rules of the flags.
func (o *onboardOptions) Check() error {
	if o.key != "" && o.client.Instance == "" {
		return fault.Usagef("--key: needs --instance").WithHint("a key belongs to an instance")
	}
	return o.client.Check(false)
}

func runOnboard(ctx context.Context, o *onboardOptions) error {
	name := o.client.Instance
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	in := kmsapi.OnboardRequest{Name: o.name, Key: o.key, Role: o.role}
	if name != "" {
		in.Instance = c.Instance()
	}
	var out kmsapi.Onboarded
	if err := c.Do(ctx, http.MethodPost, "/kmsctl/v1/onboard", in, &out); err != nil {
		return o.ClientError("onboard", o.name, err)
	}
	return o.Print(onboardResult(out))
}
