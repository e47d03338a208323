package keyscmd

import (
	"context"
	"crypto/aes"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// keyOptions serve the verbs that work on one key: each uses what it needs.
type keyOptions struct {
	*app.App
	client     app.ClientFlags
	args       []string
	force, yes bool
	unset      bool
	material   materialFlags
	ciphertext string
	aad        []string
	limit      int
	offset     int
	ring       string
	months     int
	rotation   string
	dualAuth   bool
	check      func() error
}

// Check holds the rules of the flags.
func (o *keyOptions) Check() error {
	errs := []error{o.client.Check(true)}
	if o.check != nil {
		errs = append(errs, o.check())
	}
	return errors.Join(errs...)
}

func (o *keyOptions) key() string { return o.args[0] }

// path is the API's path of the key, with more after it.
func (o *keyOptions) path(more ...string) string { return keyPath(o.key(), more...) }

func keyPath(key string, more ...string) string {
	p := "/api/v2/keys/" + url.PathEscape(key)
	for _, m := range more {
		p += "/" + url.PathEscape(m)
	}
	return p
}

// verb describes one command on a key.
type verb struct {
	use, short, long, example string
	args                      cobra.PositionalArgs
	flags                     func(*cobra.Command, *keyOptions)
	// run does it, and gives what is printed; nil prints nothing.
	run func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error)
}

func (v verb) command(a *app.App) *cobra.Command {
	o := &keyOptions{App: a}
	if v.args == nil {
		v.args = cobra.ExactArgs(1)
	}
	cmd := &cobra.Command{Use: v.use, Short: v.short, Long: v.long, Example: v.example, Args: v.args,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.args = args
			return app.Run(cmd.Context(), o, v.do(cmd))
		}}
	o.client.Add(cmd.Flags(), a)
	o.client.AddInstance(cmd.Flags())
	if v.flags != nil {
		v.flags(cmd, o)
	}
	return cmd
}

// do opens the client, runs the verb and prints what it gives.
func (v verb) do(cmd *cobra.Command) func(context.Context, *keyOptions) error {
	return func(ctx context.Context, o *keyOptions) error {
		c, err := o.Client(ctx, &o.client)
		if err != nil {
			return err
		}
		c.SetKeyRing(o.ring)
		out, err := v.run(ctx, o, c)
		if err != nil {
			object := o.client.Instance
			if len(o.args) > 0 {
				object = o.args[0]
			}
			op, _, _ := strings.Cut(cmd.Use, " ")
			return o.ClientError(op+" "+strings.TrimSuffix(cmd.Parent().Name(), "s"), object, err)
		}
		if out == nil {
			return nil
		}
		return o.Print(out)
	}
}

// action is a verb that posts one action and has nothing to print.
func action(name, short, example string) verb {
	return verb{use: name + " KEY", short: short, example: example, run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
		return nil, c.Do(ctx, http.MethodPost, o.path("actions", name), nil, nil)
	}}
}

func one(ctx context.Context, c *kmsclient.Client, method, path string, in any) (any, error) {
	var out kmsapi.Keys
	if err := c.Do(ctx, method, path, in, &out); err != nil || len(out.Resources) == 0 {
		return nil, err
	}
	return keyResult(out.Resources[0]), nil
}

// lifeVerbs are the verbs of the key life cycle.
func lifeVerbs() []verb {
	const example = "02fd6835-6001-4482-a892-13bd2085f75d --instance shop"
	return []verb{
		{use: "rotate KEY", short: "Give a root key new material; the old goes on unwrapping",
			long:    "Rotate a root key. One that was made in the HSM gets new material there; one that was imported needs\n--payload-file, and with --import-token (or encrypted elsewhere, with --encrypted-nonce and --iv) the\nmaterial travels encrypted. Once an hour at most.",
			example: "  kmsctl keys rotate " + example, flags: func(c *cobra.Command, o *keyOptions) { o.material.add(c); o.check = o.material.check(o) },
			run: runRotate},
		{use: "rewrap KEY", short: "Wrap a DEK anew by the newest version, without showing it", example: "  kmsctl keys rewrap KEY --ciphertext-file wrapped.txt --instance shop",
			flags: func(c *cobra.Command, o *keyOptions) {
				c.Flags().StringVar(&o.ciphertext, "ciphertext-file", "", "file with the ciphertext as wrap printed it, - for standard input")
				c.Flags().StringArrayVar(&o.aad, "aad", nil, "additional data, exactly as given to wrap; repeatable")
				o.check = func() error {
					if o.ciphertext == "" {
						return fault.Usagef("--ciphertext-file: missing").WithHint("give the file with the ciphertext, or - for standard input")
					}
					return nil
				}
			}, run: runRewrap},
		action("disable", "Suspend a root key", "  kmsctl keys disable "+example),
		action("enable", "Take a suspension back", "  kmsctl keys enable "+example),
		action("sync", "Have the services that use a key look at it again", "  kmsctl keys sync "+example),
		{use: "delete KEY", short: "Destroy a key; it can be restored for 30 days", example: "  kmsctl keys delete " + example,
			flags: func(c *cobra.Command, o *keyOptions) {
				c.Flags().BoolVar(&o.force, "force", false, "although it protects registered resources")
			}, run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				return nil, c.Do(ctx, http.MethodDelete, o.path()+"?force="+strconv.FormatBool(o.force), nil, nil)
			}},
		{use: "restore KEY", short: "Bring a deleted key back", example: "  kmsctl keys restore " + example,
			run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				return one(ctx, c, http.MethodPost, o.path("restore"), nil)
			}},
		{use: "purge KEY", short: "Remove a deleted key for good, from 4 hours after its deletion on",
			long: "Remove a deleted key with its versions and aliases. What it had wrapped can never be unwrapped again.", example: "  kmsctl keys purge " + example + " --yes",
			flags: func(c *cobra.Command, o *keyOptions) {
				c.Flags().BoolVar(&o.yes, "yes", false, "yes, for good")
				o.check = func() error {
					if !o.yes {
						return fault.Usagef("--yes: missing").WithHint("a purged key cannot be brought back; give --yes if that is what you want")
					}
					return nil
				}
			}, run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				return nil, c.Do(ctx, http.MethodDelete, o.path("purge"), nil, nil)
			}},
		{use: "authorize-deletion KEY", short: "Be the first of the two who must agree to a deletion", example: "  kmsctl keys authorize-deletion " + example,
			flags: func(c *cobra.Command, o *keyOptions) {
				c.Flags().BoolVar(&o.unset, "unset", false, "take the authorization back")
			}, run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				name := map[bool]string{false: "setKeyForDeletion", true: "unsetKeyForDeletion"}[o.unset]
				return nil, c.Do(ctx, http.MethodPost, o.path("actions", name), nil, nil)
			}},
		{use: "versions KEY", short: "List a root key's versions, newest first", example: "  kmsctl keys versions " + example, flags: pageFlags,
			run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				var out kmsapi.Collection[kmsapi.KeyVersion]
				q := url.Values{"limit": {strconv.Itoa(o.limit)}, "offset": {strconv.Itoa(o.offset)}, "allKeyStates": {"true"}}
				err := c.Do(ctx, http.MethodGet, o.path("versions")+"?"+q.Encode(), nil, &out)
				return versionList{out.Resources}, err
			}},
		{use: "move KEY", short: "Move a key to another key ring", example: "  kmsctl keys move KEY --to-ring blue --instance shop",
			flags: func(c *cobra.Command, o *keyOptions) {
				to := c.Flags().String("to-ring", "", "the key ring that it goes to")
				o.check = func() error {
					if *to == "" {
						return fault.Usagef("--to-ring: missing").WithHint("see: kmsctl keys rings list")
					}
					o.args = append(o.args, *to)
					return nil
				}
			}, run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				return one(ctx, c, http.MethodPatch, o.path(), kmsapi.PatchKey{KeyRingID: o.args[1]})
			}},
	}
}

func pageFlags(c *cobra.Command, o *keyOptions) {
	c.Flags().IntVar(&o.limit, "limit", kmsapi.DefaultLimit, "at most so many, up to 5000")
	c.Flags().IntVar(&o.offset, "offset", 0, "leave out so many at the start")
}

func runRotate(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
	in := kmsapi.CreateKey{}
	if o.material.file != "" {
		if err := o.material.fill(ctx, o.App, c, &in); err != nil {
			return nil, err
		}
	}
	r := kmsapi.RotateRequest{Payload: in.Payload, EncryptedNonce: in.EncryptedNonce, IV: in.IV, EncryptionAlgorithm: in.EncryptionAlgorithm}
	return nil, c.Do(ctx, http.MethodPost, o.path("actions", "rotate"), r, nil)
}

func runRewrap(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
	b, err := o.ReadInput("--ciphertext-file", o.ciphertext, 64<<10)
	if err != nil {
		return nil, err
	}
	out, err := c.Rewrap(ctx, o.key(), kmsapi.UnwrapRequest{Ciphertext: trim(b), AAD: o.aad})
	return actionResult(out), err
}

// aliasVerbs, policyVerbs and ringVerbs are the groups below keys.
func aliasVerbs() []verb {
	return []verb{
		{use: "add KEY ALIAS", short: "Give a key one more name", args: cobra.ExactArgs(2), example: "  kmsctl keys alias add KEY payments --instance shop",
			run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				return nil, c.Do(ctx, http.MethodPost, o.path("aliases", o.args[1]), nil, nil)
			}},
		{use: "remove KEY ALIAS", short: "Take a name from a key", args: cobra.ExactArgs(2), example: "  kmsctl keys alias remove KEY payments --instance shop",
			run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				return nil, c.Do(ctx, http.MethodDelete, o.path("aliases", o.args[1]), nil, nil)
			}},
	}
}

func policyVerbs() []verb {
	show := func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
		var out kmsapi.Collection[kmsapi.KeyPolicy]
		err := c.Do(ctx, http.MethodGet, o.path("policies"), nil, &out)
		return policyList{out.Resources}, err
	}
	return []verb{
		{use: "get KEY", short: "Show a key's policies", example: "  kmsctl keys policy get KEY --instance shop", run: show},
		{use: "set KEY", short: "Set a key's rotation policy, or have two people agree to its deletion", example: "  kmsctl keys policy set KEY --rotation-months 3 --instance shop\n  kmsctl keys policy set KEY --dual-auth --instance shop",
			flags: func(c *cobra.Command, o *keyOptions) {
				c.Flags().IntVar(&o.months, "rotation-months", 0, "rotate every so many months (30 days each), 1 to 12")
				c.Flags().StringVar(&o.rotation, "rotation", "", "switch the rotation policy on or off")
				c.Flags().BoolVar(&o.dualAuth, "dual-auth", false, "two people must agree to a deletion; this cannot be switched off")
				_ = c.RegisterFlagCompletionFunc("rotation", cobra.FixedCompletions([]string{"on", "off"}, cobra.ShellCompDirectiveNoFileComp))
				o.check = func() error {
					if o.months == 0 && o.rotation == "" && !o.dualAuth {
						return fault.Usagef("--rotation-months, --rotation, --dual-auth: at least one of them")
					}
					if o.rotation != "" && o.rotation != "on" && o.rotation != "off" {
						return fault.Usagef("--rotation: %q is neither on nor off", o.rotation)
					}
					return nil
				}
			}, run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				var set []any
				if o.months != 0 || o.rotation != "" {
					r := kmsapi.Rotation{IntervalMonth: o.months}
					if o.rotation != "" {
						r.Enabled = new(bool)
						*r.Enabled = o.rotation == "on"
					}
					set = append(set, map[string]any{"rotation": r})
				}
				if o.dualAuth {
					set = append(set, map[string]any{"dualAuthDelete": kmsapi.DualAuthDelete{Enabled: true}})
				}
				in := map[string]any{"metadata": kmsapi.Metadata{CollectionType: kmsapi.TypePolicy, CollectionTotal: len(set)}, "resources": set}
				if err := c.Do(ctx, http.MethodPut, o.path("policies"), in, nil); err != nil {
					return nil, err
				}
				return show(ctx, o, c)
			}},
	}
}

func ringVerbs() []verb {
	ring := func(name string) string { return "/api/v2/key_rings/" + url.PathEscape(name) }
	return []verb{
		{use: "create RING", short: "Make a key ring", example: "  kmsctl keys rings create blue --instance shop",
			run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				return nil, c.Do(ctx, http.MethodPost, ring(o.args[0]), nil, nil)
			}},
		{use: "list", short: "List the key rings of an instance", args: cobra.NoArgs, example: "  kmsctl keys rings list --instance shop",
			run: func(ctx context.Context, _ *keyOptions, c *kmsclient.Client) (any, error) {
				var out kmsapi.Collection[kmsapi.KeyRing]
				err := c.Do(ctx, http.MethodGet, "/api/v2/key_rings", nil, &out)
				return ringList{out.Resources}, err
			}},
		{use: "delete RING", short: "Delete a key ring that holds no key", example: "  kmsctl keys rings delete blue --instance shop",
			flags: func(c *cobra.Command, o *keyOptions) {
				c.Flags().BoolVar(&o.force, "force", false, "move deleted keys to the default ring")
			}, run: func(ctx context.Context, o *keyOptions, c *kmsclient.Client) (any, error) {
				return nil, c.Do(ctx, http.MethodDelete, ring(o.args[0])+"?force="+strconv.FormatBool(o.force), nil, nil)
			}},
	}
}

func group(a *app.App, use, short string, vs []verb) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short}
	for _, v := range vs {
		cmd.AddCommand(v.command(a))
	}
	return cmd
}

func when(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

type versionList struct {
	Versions []kmsapi.KeyVersion `json:"versions"`
}

// Table is one line a version.
func (l versionList) Table() ([]string, [][]string) {
	var rows [][]string
	for _, v := range l.Versions {
		used := ""
		if v.Encryptions != nil {
			used = strconv.FormatUint(*v.Encryptions, 10)
		}
		rows = append(rows, []string{v.ID, when(v.CreationDate), used})
	}
	return []string{"ID", "CREATED", "ENCRYPTIONS"}, rows
}

type policyList struct {
	Policies []kmsapi.KeyPolicy `json:"policies"`
}

// Table is one line a policy.
func (l policyList) Table() ([]string, [][]string) {
	var rows [][]string
	for _, p := range l.Policies {
		switch {
		case p.Rotation != nil:
			on := p.Rotation.Enabled == nil || *p.Rotation.Enabled
			rows = append(rows, []string{"rotation", strconv.FormatBool(on), "every " + strconv.Itoa(p.Rotation.IntervalMonth) + " months", when(p.LastUpdateDate)})
		case p.DualAuthDelete != nil:
			rows = append(rows, []string{"dual authorization", strconv.FormatBool(p.DualAuthDelete.Enabled), "", when(p.LastUpdateDate)})
		}
	}
	return []string{"POLICY", "ENABLED", "DETAIL", "UPDATED"}, rows
}

type ringList struct {
	Rings []kmsapi.KeyRing `json:"keyRings"`
}

// Table is one line a key ring.
func (l ringList) Table() ([]string, [][]string) {
	var rows [][]string
	for _, r := range l.Rings {
		rows = append(rows, []string{r.ID, when(r.CreationDate), r.CreatedBy})
	}
	return []string{"ID", "CREATED", "BY"}, rows
}

// materialFlags bring key material in: in the clear, to be encrypted here, or
// encrypted elsewhere already.
type materialFlags struct {
	file   string
	token  bool
	sealed kmsapi.RotateRequest // what came with the material that was encrypted elsewhere
}

func (m *materialFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&m.file, "payload-file", "", "file with the raw material, - for standard input")
	c.Flags().BoolVar(&m.token, "import-token", false, "encrypt the material here, under an import token of the KMS (root keys only)")
	c.Flags().StringVar(&m.sealed.EncryptedNonce, "encrypted-nonce", "", "base64 of the import token's nonce, encrypted by the material: --payload-file is encrypted already, under the token")
	c.Flags().StringVar(&m.sealed.IV, "iv", "", "base64 of the IV that the nonce was encrypted with")
	c.Flags().StringVar(&m.sealed.EncryptionAlgorithm, "encryption-algorithm", kmsapi.OAEPSHA256, "how it was encrypted: "+strings.Join(algorithms, " or "))
	_ = c.RegisterFlagCompletionFunc("encryption-algorithm", cobra.FixedCompletions(algorithms, cobra.ShellCompDirectiveNoFileComp))
}

var algorithms = []string{kmsapi.OAEPSHA256, kmsapi.OAEPSHA1}

func (m *materialFlags) isSealed() bool { return m.sealed.EncryptedNonce != "" || m.sealed.IV != "" }

func (m *materialFlags) check(o *keyOptions) func() error {
	return func() error {
		var errs []error
		if (m.token || m.isSealed()) && m.file == "" {
			errs = append(errs, fault.Usagef("--import-token, --encrypted-nonce: need --payload-file"))
		}
		if m.isSealed() && (m.sealed.EncryptedNonce == "" || m.sealed.IV == "") {
			errs = append(errs, fault.Usagef("--encrypted-nonce, --iv: only both together"))
		}
		if m.token && m.isSealed() {
			errs = append(errs, fault.Usagef("--import-token, --encrypted-nonce: only one of them").WithHint("the first encrypts here, the second says that it was done elsewhere"))
		}
		if !slices.Contains(algorithms, m.sealed.EncryptionAlgorithm) {
			errs = append(errs, fault.Usagef("--encryption-algorithm: %q is none of %s", m.sealed.EncryptionAlgorithm, strings.Join(algorithms, ", ")))
		}
		if m.file == "-" && o.client.APIKeyStdin {
			errs = append(errs, fault.Usagef("--payload-file -, --api-key-stdin: standard input can be only one of them"))
		}
		return errors.Join(errs...)
	}
}

// fill puts the material into a request, encrypted when asked.
func (m *materialFlags) fill(ctx context.Context, a *app.App, c *kmsclient.Client, in *kmsapi.CreateKey) error {
	b, err := a.ReadInput("--payload-file", m.file, kmsapi.MaxStandard)
	if err != nil {
		return err
	}
	defer clear(b)
	if len(b) == 0 {
		return fault.Usagef("--payload-file: %q is empty", m.file)
	}
	if m.token {
		if _, err := aes.NewCipher(b); err != nil { // before a token is made for it
			return fault.Usagef("--payload-file: %q has %d bytes; a root key has 128, 192 or 256 bits", m.file, len(b)).WithHint("a line break at its end counts too")
		}
		return c.Seal(ctx, b, in)
	}
	in.Payload = base64.StdEncoding.EncodeToString(b)
	if m.isSealed() {
		in.EncryptedNonce, in.IV, in.EncryptionAlgorithm = m.sealed.EncryptedNonce, m.sealed.IV, m.sealed.EncryptionAlgorithm
	}
	return nil
}
