package keyscmd

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

type registrationList struct {
	Registrations []kmsapi.Registration `json:"registrations"`
}

// Table is one line a registration.
func (l registrationList) Table() ([]string, [][]string) {
	var rows [][]string
	for _, r := range l.Registrations {
		rows = append(rows, []string{r.KeyID, r.ResourceCRN, strconv.FormatBool(r.PreventKeyDeletion), r.Description})
	}
	return []string{"KEY", "RESOURCE", "PREVENTS DELETION", "DESCRIPTION"}, rows
}

type registrationResult kmsapi.Registration

// Table is one line.
func (r registrationResult) Table() ([]string, [][]string) {
	return registrationList{[]kmsapi.Registration{kmsapi.Registration(r)}}.Table()
}

func newRegistrationsCmd(a *app.App) *cobra.Command {
	cmd := group(a, "registrations", "Say, and list, which resources a root key protects", []verb{
		listRegistrationsVerb(), createRegistrationVerb(), deleteRegistrationVerb()})
	cmd.Long = `A service registers what it has encrypted by a root key, such as a bucket or a volume, by the
resource's name (CRN). A key with a registration is deleted by --force alone, and not even so
when the registration prevents it.

Everybody who may list keys sees registrations. Only services make and remove them: give the
API key of a service ID whose role is Writer or Manager.`
	return cmd
}

func listRegistrationsVerb() verb {
	var resource string
	var prevents bool
	var given func(flag string) bool
	return verb{use: "list [KEY]", short: "List the resources that a key, or that all keys of an instance protect", args: cobra.MaximumNArgs(1),
		example: "  kmsctl keys registrations list --instance shop\n  kmsctl keys registrations list KEY --resource 'crn:v1:site:storage:*' --instance shop",
		flags: func(c *cobra.Command, o *keyOptions) {
			pageFlags(c, o)
			c.Flags().StringVar(&resource, "resource", "", "only this CRN; with * at its end, all that begin so")
			c.Flags().BoolVar(&prevents, "prevents-deletion", false, "only those that prevent the key's deletion; =false: only the others")
			o.check = func() error {
				if o.limit < 1 || o.limit > kmsapi.MaxLimit {
					return fault.Usagef("--limit: %d is not between 1 and %d", o.limit, kmsapi.MaxLimit)
				}
				return nil
			}
			given = c.Flags().Changed
		},
		run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
			path := "/api/v2/keys/registrations"
			if len(o.args) == 1 {
				path = o.path("registrations")
			}
			q := url.Values{"limit": {strconv.Itoa(o.limit)}, "offset": {strconv.Itoa(o.offset)}}
			if resource != "" {
				q.Set("urlEncodedResourceCRNQuery", resource)
			}
			if given("prevents-deletion") {
				q.Set("preventKeyDeletion", strconv.FormatBool(prevents))
			}
			var out kmsapi.Collection[kmsapi.Registration]
			err := c.Do(ctx, http.MethodGet, path+"?"+q.Encode(), nil, &out)
			return registrationList{out.Resources}, err
		}}
}

func createRegistrationVerb() verb {
	var in kmsapi.CreateRegistration
	return verb{use: "create KEY CRN", short: "Register a resource that a root key protects (services only)", args: cobra.ExactArgs(2),
		example: "  kmsctl keys registrations create KEY crn:v1:site:storage:::bucket:orders --server https://kms-api:28674 --api-key-file service.key --instance shop\n" +
			"  kmsctl keys registrations create KEY crn:v1:site:storage:::bucket:orders --description 'the orders' --prevents-deletion --instance shop",
		flags: func(c *cobra.Command, _ *keyOptions) {
			c.Flags().StringVar(&in.Description, "description", "", "what the resource is")
			c.Flags().BoolVar(&in.PreventKeyDeletion, "prevents-deletion", false, "the key cannot be deleted, not even by --force, while this stands")
		},
		run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
			var out kmsapi.Collection[kmsapi.Registration]
			if err := c.Do(ctx, http.MethodPost, o.path("registrations", o.args[1]), in, &out); err != nil || len(out.Resources) == 0 {
				return nil, err
			}
			return registrationResult(out.Resources[0]), nil
		}}
}

func deleteRegistrationVerb() verb {
	return verb{use: "delete KEY CRN", short: "Forget that a root key protects a resource (services only)", args: cobra.ExactArgs(2),
		example: "  kmsctl keys registrations delete KEY crn:v1:site:storage:::bucket:orders --server https://kms-api:28674 --api-key-file service.key --instance shop",
		run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
			return nil, c.Do(ctx, http.MethodDelete, o.path("registrations", o.args[1]), nil, nil)
		}}
}
