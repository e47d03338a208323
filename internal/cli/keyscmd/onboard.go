package keyscmd

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// onboardResult shows what onboarding made; the API key is shown this once.
type onboardResult kmsapi.Onboarded

// Table is one line a field.
func (r onboardResult) Table() ([]string, [][]string) {
	rows := [][]string{{"instance", r.InstanceID}, {"service id", r.ServiceID}, {"key", r.KeyID}, {"policy", r.PolicyID}}
	if r.APIKey == "" {
		return nil, append(rows, []string{"", "the service was onboarded before; --new-api-key makes a further API key"})
	}
	return nil, append(rows, []string{"api key", r.APIKey}, []string{"", "preserve the API key: it cannot be shown again"})
}

// secretResult shows the same as a Kubernetes Secret, with the names that the
// manual's product gives its own.
type secretResult struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Type       string            `json:"type"`
	Metadata   map[string]string `json:"metadata"`
	StringData map[string]string `json:"stringData"`
}

type onboardOptions struct {
	*app.App
	client    app.ClientFlags
	name      string
	key       string
	role      string
	newAPIKey bool
	remove    bool
	deleteKey bool
	asSecret  string
	namespace string
}

func newOnboardCmd(a *app.App, run func(context.Context, *onboardOptions) error) *cobra.Command {
	o := &onboardOptions{App: a}
	if run == nil {
		run = runOnboard
	}
	cmd := &cobra.Command{
		Use: "onboard NAME", Short: "Give a service an instance, a key, and an API key that may use that key alone", Args: cobra.ExactArgs(1),
		Long: `Onboard a service in one go: an instance and a root key (unless --instance and --key name
existing ones), a service ID, an API key, and an access policy that lets the service use that key and no other.

A second run changes nothing and shows the same, but the API key, which is shown once;
--new-api-key makes a further one. --remove takes the service ID, its API keys and its policy
back; the key stays, since data may be wrapped by it, unless --delete-key deletes it too.`,
		Example: "  kmsctl onboard orders -o json\n  kmsctl onboard orders --instance shop --key 02fd6835-6001-4482-a892-13bd2085f75d --role Viewer\n" +
			"  kmsctl onboard orders --as-secret orders-kms --namespace shop | kubectl apply -f -\n  kmsctl onboard orders --remove",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	fs := cmd.Flags()
	o.client.Add(fs, a)
	o.client.AddInstance(fs)
	fs.StringVar(&o.key, "key", "", "id or alias of an existing key of the instance")
	fs.StringVar(&o.role, "role", "Viewer", "role on the key: Viewer wraps and unwraps")
	fs.BoolVar(&o.newAPIKey, "new-api-key", false, "make a further API key for a service that was onboarded before")
	fs.BoolVar(&o.remove, "remove", false, "take the onboarding back")
	fs.BoolVar(&o.deleteKey, "delete-key", false, "with --remove: delete the key too; it can be restored for 30 days")
	fs.StringVar(&o.asSecret, "as-secret", "", "print a Kubernetes Secret of this name instead")
	fs.StringVar(&o.namespace, "namespace", "default", "namespace of the Secret")
	_ = cmd.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"Viewer", "Editor", "Administrator", "Reader", "ReaderPlus", "Writer", "Manager"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// Check holds the rules of the flags.
func (o *onboardOptions) Check() error {
	errs := []error{o.client.Check(false)}
	if o.key != "" && o.client.Instance == "" {
		errs = append(errs, fault.Usagef("--key: needs --instance").WithHint("a key belongs to an instance"))
	}
	if o.deleteKey && !o.remove {
		errs = append(errs, fault.Usagef("--delete-key: needs --remove"))
	}
	if o.remove && (o.newAPIKey || o.asSecret != "") {
		errs = append(errs, fault.Usagef("--remove: not together with --new-api-key or --as-secret"))
	}
	return errors.Join(errs...)
}

func runOnboard(ctx context.Context, o *onboardOptions) error {
	name := o.client.Instance
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	if o.remove {
		return o.ClientError("take back the onboarding of", o.name, removeOnboarding(ctx, o, c.Do, c.SetInstance))
	}
	in := kmsapi.OnboardRequest{Name: o.name, Key: o.key, Role: o.role, NewAPIKey: o.newAPIKey}
	if name != "" {
		in.Instance = c.Instance()
	}
	var out kmsapi.Onboarded
	if err := c.Do(ctx, http.MethodPost, "/kmsctl/v1/onboard", in, &out); err != nil {
		return o.ClientError("onboard", o.name, err)
	}
	if o.asSecret != "" {
		return o.printSecret(out)
	}
	return o.Print(onboardResult(out))
}

func (o *onboardOptions) printSecret(out kmsapi.Onboarded) error {
	if out.APIKey == "" {
		return fault.Newf(fault.Conflict, "onboard", o.name, "it was onboarded before, and its API key cannot be shown again").WithHint("add --new-api-key")
	}
	s := secretResult{APIVersion: "v1", Kind: "Secret", Type: "Opaque", Metadata: map[string]string{"name": o.asSecret, "namespace": o.namespace},
		StringData: map[string]string{"kms-instance": out.InstanceID, "kms-api-key": out.APIKey, "kms-key": out.KeyID}}
	if o.Format != "table" {
		return o.Print(s)
	}
	b, err := yaml.Marshal(s) // a manifest is YAML whatever the format for people
	if err != nil {
		return err
	}
	_, err = o.Out.Write(b)
	return err
}

// removeOnboarding does nothing when there is nothing to take back.
func removeOnboarding(ctx context.Context, o *onboardOptions, do func(context.Context, string, string, any, any) error, in func(string)) error {
	var ps kmsapi.Policies
	err := do(ctx, http.MethodGet, "/kmsctl/v1/iam/policies/"+url.PathEscape(o.name), nil, &ps)
	if kmsclient.IsStatus(err, http.StatusNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := do(ctx, http.MethodDelete, "/kmsctl/v1/iam/service-ids/"+url.PathEscape(o.name), nil, nil); err != nil || !o.deleteKey {
		return err
	}
	for _, p := range ps.Policies {
		if p.Key == "" {
			continue
		}
		in(p.Instance)
		err := do(ctx, http.MethodDelete, keyPath(p.Key), nil, nil)
		if err != nil && !kmsclient.IsStatus(err, http.StatusGone) && !kmsclient.IsStatus(err, http.StatusNotFound) {
			return err
		}
	}
	return nil
}
