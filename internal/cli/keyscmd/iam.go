package keyscmd

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

type serviceIDResult kmsapi.ServiceID

// Table is one line.
func (r serviceIDResult) Table() ([]string, [][]string) {
	return serviceIDList{[]kmsapi.ServiceID{kmsapi.ServiceID(r)}}.Table()
}

type serviceIDList struct {
	ServiceIDs []kmsapi.ServiceID `json:"serviceIds"`
}

// Table is one line a service ID.
func (l serviceIDList) Table() ([]string, [][]string) {
	rows := make([][]string, 0, len(l.ServiceIDs))
	for _, s := range l.ServiceIDs {
		rows = append(rows, []string{s.ID, s.Name, s.Instance, s.CreatedAt.UTC().Format(time.RFC3339)})
	}
	return []string{"ID", "NAME", "INSTANCE", "CREATED"}, rows
}

type apiKeyResult kmsapi.APIKey

// Table is one line a field.
func (r apiKeyResult) Table() ([]string, [][]string) {
	return nil, [][]string{{"id", r.ID}, {"name", r.Name}, {"service id", r.ServiceID}, {"api key", r.Key},
		{"", "preserve the API key: it cannot be shown again"}}
}

type policyResult kmsapi.PolicyID

// Table is one line.
func (r policyResult) Table() ([]string, [][]string) { return []string{"ID"}, [][]string{{r.ID}} }

// iamOptions serves all verbs of iam: each sets what it needs.
type iamOptions struct {
	*app.App
	client                     app.ClientFlags
	name, description          string
	serviceID, role, key, ring string
	boundTo                    string
	certs, accounts            []string
	needInstance, needService  bool
	now                        bool
}

// Check holds the rules of the flags.
func (o *iamOptions) Check() error {
	errs := []error{o.client.Check(o.needInstance)}
	if o.needService && o.serviceID == "" {
		errs = append(errs, fault.Usagef("--service-id: missing").WithHint("see: kmsctl iam service-ids list"))
	}
	if o.needInstance && o.role == "" {
		errs = append(errs, fault.Usagef("--role: missing").WithHint("as in Viewer, Editor, Administrator, Reader, Writer, Manager"))
	}
	if o.key != "" && o.ring != "" {
		errs = append(errs, fault.Usagef("--key, --key-ring: only one of them"))
	}
	return errors.Join(errs...)
}

// verb makes one command of iam.
func iamVerb(a *app.App, use, short, example string, args cobra.PositionalArgs, run func(context.Context, *iamOptions) error, flags func(*cobra.Command, *iamOptions)) *cobra.Command {
	o := &iamOptions{App: a}
	cmd := &cobra.Command{Use: use, Short: short, Example: example, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 {
			o.name = args[0]
		}
		return app.Run(cmd.Context(), o, run)
	}}
	o.client.Add(cmd.Flags(), a)
	if use != "token" {
		o.client.AddInstance(cmd.Flags())
	}
	if flags != nil {
		flags(cmd, o)
	}
	return cmd
}

func newIAMCmd(a *app.App) *cobra.Command {
	iam := &cobra.Command{Use: "iam", Short: "Say who may do what: service IDs, API keys, policies",
		Long: `A service ID is somebody who is not a person. It proves itself by an API key, and may do
what its policies allow.

Administrators do this everywhere. Whoever is Manager (or Administrator) of an instance does it
with --instance for that instance: the service IDs that they make are bound to it, and nobody
gives more than they have.`}
	ids := &cobra.Command{Use: "service-ids", Short: "Create, list and delete service IDs"}
	ids.AddCommand(
		iamVerb(a, "create NAME", "Create a service ID", "  kmsctl iam service-ids create orders", cobra.ExactArgs(1), runServiceIDCreate,
			func(c *cobra.Command, o *iamOptions) {
				c.Flags().StringVar(&o.description, "description", "", "what it is for")
				c.Flags().StringVar(&o.boundTo, "bound-to", "", "id of the one instance that it can ever have rights in; a manager's are always bound")
				c.Flags().StringSliceVar(&o.certs, "client-cert", nil, "common name of a client certificate that proves it too")
				c.Flags().StringSliceVar(&o.accounts, "service-account", nil, "NAMESPACE/NAME of a Kubernetes ServiceAccount whose token proves it too")
			}),
		iamVerb(a, "list", "List the service IDs", "  kmsctl iam service-ids list", cobra.NoArgs, runServiceIDList, nil),
		iamVerb(a, "delete NAME", "Delete a service ID with its API keys and policies, at once", "  kmsctl iam service-ids delete orders", cobra.ExactArgs(1), runServiceIDDelete, nil),
	)
	keys := &cobra.Command{Use: "api-keys", Short: "Create, list and delete API keys"}
	keys.AddCommand(
		iamVerb(a, "list", "List the API keys, of one service ID when it is named", "  kmsctl iam api-keys list --service-id orders", cobra.NoArgs, runAPIKeyList,
			func(c *cobra.Command, o *iamOptions) {
				c.Flags().StringVar(&o.serviceID, "service-id", "", "name or id of the service ID")
			}),
		iamVerb(a, "create NAME", "Create an API key for a service ID; it is shown this once", "  kmsctl iam api-keys create laptop --service-id orders -o json",
			cobra.ExactArgs(1), runAPIKeyCreate, serviceFlag),
		iamVerb(a, "delete ID", "Delete an API key: it stops working at once", "  kmsctl iam api-keys delete 5f0c…", cobra.ExactArgs(1), runAPIKeyDelete, nil),
	)
	policies := &cobra.Command{Use: "policies", Short: "Create, list and delete access policies"}
	policies.AddCommand(
		iamVerb(a, "list", "List the policies of a service ID", "  kmsctl iam policies list --service-id orders", cobra.NoArgs, runPolicyList, serviceFlag),
		iamVerb(a, "create", "Let a service ID act in an instance, or on one key or key ring of it",
			"  kmsctl iam policies create --service-id orders --instance shop --role Viewer --key 02fd6835-6001-4482-a892-13bd2085f75d",
			cobra.NoArgs, runPolicyCreate, func(c *cobra.Command, o *iamOptions) {
				serviceFlag(c, o)
				o.needInstance = true
				c.Flags().StringVar(&o.role, "role", "", "Viewer, Editor, Administrator, ClusterAdministrator, Reader, ReaderPlus, Writer, Manager or KeyPurge")
				c.Flags().StringVar(&o.key, "key", "", "only this key")
				c.Flags().StringVar(&o.ring, "key-ring", "", "only keys of this ring")
			}),
		iamVerb(a, "delete ID", "Delete a policy of a service ID", "  kmsctl iam policies delete 1f… --service-id orders", cobra.ExactArgs(1), runPolicyDelete, serviceFlag),
	)
	signing := &cobra.Command{Use: "signing-key", Short: "Look at, and rotate, the key that signs access tokens"}
	signing.AddCommand(
		iamVerb(a, "list", "List the keys that sign access tokens, and until when what they signed is good", "  kmsctl iam signing-key list", cobra.NoArgs, runSigningKeyList, nil),
		iamVerb(a, "rotate", "Make a new key that signs access tokens, for all replicas",
			"  kmsctl iam signing-key rotate         # tokens that are out stay good until they end\n  kmsctl iam signing-key rotate --now   # they are worth nothing from now on; clients fetch new ones",
			cobra.NoArgs, runSigningKeyRotate, func(c *cobra.Command, o *iamOptions) {
				c.Flags().BoolVar(&o.now, "now", false, "withdraw the old key: every token that it signed is refused (a backup from before brings it back: rotate again after a restore)")
			}),
	)
	iam.AddCommand(ids, keys, policies, signing, iamVerb(a, "token", "Exchange an API key for an access token", "  KMSCTL_API_KEY=… kmsctl iam token --server https://kms-api:28674 -o json", cobra.NoArgs, runToken, nil))
	return iam
}

func serviceFlag(c *cobra.Command, o *iamOptions) {
	o.needService = true
	c.Flags().StringVar(&o.serviceID, "service-id", "", "name or id of the service ID")
}

// call does one request and gives the error its words.
func (o *iamOptions) call(ctx context.Context, op, object, method, path string, in, out any) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	return o.ClientError(op, object, c.Do(ctx, method, path, in, out))
}

func runServiceIDCreate(ctx context.Context, o *iamOptions) error {
	var out kmsapi.ServiceID
	in := kmsapi.CreateServiceID{Name: o.name, Description: o.description, Instance: o.boundTo}
	for _, cn := range o.certs {
		in.Subjects = append(in.Subjects, "cert:"+cn)
	}
	for _, a := range o.accounts {
		in.Subjects = append(in.Subjects, "serviceaccount:"+strings.Replace(a, "/", ":", 1))
	}
	if err := o.call(ctx, "create service ID", o.name, http.MethodPost, "/kmsctl/v1/iam/service-ids", in, &out); err != nil {
		return err
	}
	return o.Print(serviceIDResult(out))
}

func runServiceIDList(ctx context.Context, o *iamOptions) error {
	var out kmsapi.ServiceIDs
	if err := o.call(ctx, "list service IDs", "", http.MethodGet, "/kmsctl/v1/iam/service-ids", nil, &out); err != nil {
		return err
	}
	return o.Print(serviceIDList{out.ServiceIDs})
}

func runServiceIDDelete(ctx context.Context, o *iamOptions) error {
	return o.call(ctx, "delete service ID", o.name, http.MethodDelete, "/kmsctl/v1/iam/service-ids/"+url.PathEscape(o.name), nil, nil)
}

func runAPIKeyCreate(ctx context.Context, o *iamOptions) error {
	var out kmsapi.APIKey
	in := kmsapi.CreateAPIKey{Name: o.name, ServiceID: o.serviceID}
	if err := o.call(ctx, "create API key", o.name, http.MethodPost, "/kmsctl/v1/iam/api-keys", in, &out); err != nil {
		return err
	}
	return o.Print(apiKeyResult(out))
}

// apiKeyList shows API keys.
type apiKeyList struct {
	APIKeys []kmsapi.APIKey `json:"apiKeys"`
}

// Table is one line an API key.
func (l apiKeyList) Table() ([]string, [][]string) {
	var rows [][]string
	for _, k := range l.APIKeys {
		rows = append(rows, []string{k.ID, k.Name, k.ServiceID, k.CreatedAt.UTC().Format(time.RFC3339)})
	}
	return []string{"ID", "NAME", "SERVICE ID", "CREATED"}, rows
}

func runAPIKeyList(ctx context.Context, o *iamOptions) error {
	var out kmsapi.APIKeys
	if err := o.call(ctx, "list API keys", o.serviceID, http.MethodGet, "/kmsctl/v1/iam/api-keys?serviceId="+url.QueryEscape(o.serviceID), nil, &out); err != nil {
		return err
	}
	return o.Print(apiKeyList{out.APIKeys})
}

// policyTable shows policies of a service ID.
type policyTable struct {
	Policies []kmsapi.Policy `json:"policies"`
}

// Table is one line a resource of a policy.
func (l policyTable) Table() ([]string, [][]string) {
	var rows [][]string
	for _, p := range l.Policies {
		on := "the instance"
		if p.Key != "" {
			on = "key " + p.Key
		} else if p.KeyRing != "" {
			on = "key ring " + p.KeyRing
		}
		rows = append(rows, []string{p.ID, strings.Join(p.Roles, ","), p.Instance, on})
	}
	return []string{"ID", "ROLES", "INSTANCE", "ON"}, rows
}

func runPolicyList(ctx context.Context, o *iamOptions) error {
	var out kmsapi.Policies
	if err := o.call(ctx, "list policies of", o.serviceID, http.MethodGet, "/kmsctl/v1/iam/policies/"+url.PathEscape(o.serviceID), nil, &out); err != nil {
		return err
	}
	return o.Print(policyTable{out.Policies})
}

// tokenResult shows an access token.
type tokenResult kmsapi.Token

// Table is the token alone, for scripts.
func (r tokenResult) Table() ([]string, [][]string) { return nil, [][]string{{r.AccessToken}} }

func runToken(ctx context.Context, o *iamOptions) error {
	if o.client.Server == "" {
		return fault.Usagef("--server: missing").WithHint("the local administrator needs no token; name a server")
	}
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	t, err := c.Token(ctx)
	if err != nil {
		return o.ClientError("get a token from", o.client.Server, err)
	}
	return o.Print(tokenResult(t))
}

func runAPIKeyDelete(ctx context.Context, o *iamOptions) error {
	return o.call(ctx, "delete API key", o.name, http.MethodDelete, "/kmsctl/v1/iam/api-keys/"+url.PathEscape(o.name), nil, nil)
}

func runPolicyCreate(ctx context.Context, o *iamOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	var out kmsapi.PolicyID
	in := kmsapi.CreatePolicy{ServiceID: o.serviceID, Role: o.role, Instance: c.Instance(), Key: o.key, KeyRing: o.ring}
	if err := c.Do(ctx, http.MethodPost, "/kmsctl/v1/iam/policies", in, &out); err != nil {
		return o.ClientError("create policy for", o.serviceID, err)
	}
	return o.Print(policyResult(out))
}

func runPolicyDelete(ctx context.Context, o *iamOptions) error {
	path := "/kmsctl/v1/iam/policies/" + url.PathEscape(o.serviceID) + "/" + url.PathEscape(o.name)
	return o.call(ctx, "delete policy", o.name, http.MethodDelete, path, nil, nil)
}

type signingKeyList struct {
	SigningKeys []kmsapi.SigningKey `json:"signingKeys"`
}

// Table is one line a key.
func (l signingKeyList) Table() ([]string, [][]string) {
	var rows [][]string
	for _, k := range l.SigningKeys {
		until, age := "it signs", "-"
		if k.GoodUntil != nil {
			until = k.GoodUntil.UTC().Format(time.RFC3339)
		}
		if k.RotatesOn != nil {
			until += ", until " + k.RotatesOn.UTC().Format(time.RFC3339)
		}
		if k.CreatedAt != nil {
			age = (time.Duration(k.AgeSeconds) * time.Second).String()
		}
		rows = append(rows, []string{k.ID, age, until, k.CreatedBy})
	}
	return []string{"ID", "AGE", "GOOD UNTIL", "CREATED BY"}, rows
}

type signingKeyResult kmsapi.SigningKey

// Table is one line.
func (r signingKeyResult) Table() ([]string, [][]string) {
	return signingKeyList{[]kmsapi.SigningKey{kmsapi.SigningKey(r)}}.Table()
}

func runSigningKeyList(ctx context.Context, o *iamOptions) error {
	var out kmsapi.SigningKeys
	if err := o.call(ctx, "list signing keys", "", http.MethodGet, "/kmsctl/v1/iam/signing-keys", nil, &out); err != nil {
		return err
	}
	return o.Print(signingKeyList{out.SigningKeys})
}

func runSigningKeyRotate(ctx context.Context, o *iamOptions) error {
	var out kmsapi.SigningKey
	if err := o.call(ctx, "rotate the signing key", "", http.MethodPost, "/kmsctl/v1/iam/signing-keys/rotate", kmsapi.RotateSigningKey{Now: o.now}, &out); err != nil {
		return err
	}
	return o.Print(signingKeyResult(out))
}
