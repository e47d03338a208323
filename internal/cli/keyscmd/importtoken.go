package keyscmd

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

type importTokenResult kmsapi.ImportToken

// Table is one line a field.
func (t importTokenResult) Table() ([]string, [][]string) {
	rows := [][]string{{"id", t.ID}, {"expires", when(t.ExpirationDate)}, {"reads left", strconv.Itoa(t.RemainingRetrievals) + " of " + strconv.Itoa(t.MaxAllowedRetrievals)}}
	if t.Payload != "" {
		rows = append(rows, []string{"nonce", t.Nonce}, []string{"public key", t.Payload})
	}
	return nil, rows
}

const importTokenPath = "/api/v2/import_token"

func newImportTokenCmd(a *app.App) *cobra.Command {
	cmd := group(a, "import-token", "Make and read the key pair under which material is encrypted elsewhere, for import", []verb{createImportTokenVerb(), getImportTokenVerb()})
	cmd.Long = `Material that must not leave another machine in the clear is encrypted there: under the public
key of an import token by RSA-OAEP, and the token's nonce under the material by AES-GCM, which
proves that both belong together. keys import and keys rotate take the three parts.

An instance has one import token; a new one replaces it. Where the material lies on this
machine, keys import --import-token does all of it.`
	cmd.Example = `  kmsctl keys import-token create --expires-in 1h --reads 1 --instance shop
  kmsctl keys import-token get --instance shop -o json > token.json
  kmsctl keys import orders --payload-file sealed.bin --encrypted-nonce "$NONCE" --iv "$IV" --instance shop`
	return cmd
}

func createImportTokenVerb() verb {
	var life time.Duration
	var reads int
	return verb{use: "create", short: "Make an import token; the one before is worth nothing any more", args: cobra.NoArgs,
		example: "  kmsctl keys import-token create --instance shop\n  kmsctl keys import-token create --expires-in 1h --reads 3 --instance shop -o json",
		flags: func(c *cobra.Command, o *keyOptions) {
			c.Flags().DurationVar(&life, "expires-in", 10*time.Minute, "how long it is good, from 5m to 24h, whole seconds")
			c.Flags().IntVar(&reads, "reads", 1, "how often it can be read, up to 500")
			o.check = func() error {
				if life%time.Second != 0 {
					return fault.Usagef("--expires-in: %s is not a number of whole seconds", life)
				}
				return nil
			}
		},
		run: func(ctx context.Context, _ *keyOptions, c *kmsclient.Client) (any, error) {
			seconds := int(life / time.Second)
			var out kmsapi.ImportToken
			err := c.Do(ctx, http.MethodPost, importTokenPath, kmsapi.ImportTokenRequest{Expiration: &seconds, MaxAllowedRetrievals: &reads}, &out)
			return importTokenResult(out), err
		}}
}

func getImportTokenVerb() verb {
	return verb{use: "get", short: "Read the import token's public key (base64 of PEM) and nonce; each read counts", args: cobra.NoArgs,
		example: "  kmsctl keys import-token get --instance shop -o json > token.json\n  jq -r .payload token.json | base64 -d > public.pem",
		run: func(ctx context.Context, _ *keyOptions, c *kmsclient.Client) (any, error) {
			var out kmsapi.ImportToken
			err := c.Do(ctx, http.MethodGet, importTokenPath, nil, &out)
			return importTokenResult(out), err
		}}
}
