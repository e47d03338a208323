// Package keyscmd has the verbs for those who use a KMS: keys, instances,
// onboarding, and who may do what. They talk to the HTTP API.
package keyscmd

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	keys := &cobra.Command{Use: "keys", Short: "Create, list and use keys", Long: `Create, list and use keys of an instance.

A root key never leaves the HSM: it wraps and unwraps data encryption keys (DEKs).
A standard key holds material that its owner can read.`}
	keys.AddCommand(newCreateCmd(a, nil), newImportCmd(a, nil), newListCmd(a, nil), newGetCmd(a, nil), newWrapCmd(a, nil), newUnwrapCmd(a, nil))
	for _, v := range lifeVerbs() {
		keys.AddCommand(v.command(a))
	}
	keys.AddCommand(group(a, "alias", "Add and remove further names of a key", aliasVerbs()), group(a, "policy", "Show and set a key's policies", policyVerbs()),
		group(a, "rings", "Make, list and delete key rings", ringVerbs()), newRegistrationsCmd(a), newImportTokenCmd(a))
	return []*cobra.Command{keys, newInstancesCmd(a), newOnboardCmd(a, nil), newIAMCmd(a)}
}

// keyResult shows one key.
type keyResult kmsapi.Key

// Table is the key's most used fields.
func (k keyResult) Table() ([]string, [][]string) {
	return keyList{[]kmsapi.Key{kmsapi.Key(k)}}.Table()
}

// keyList shows keys.
type keyList struct {
	Keys []kmsapi.Key `json:"keys"`
}

var states = map[int]string{0: "pre-active", 1: "active", 2: "suspended", 3: "deactivated", 5: "destroyed"}

// Table is one line a key.
func (l keyList) Table() ([]string, [][]string) {
	rows := make([][]string, 0, len(l.Keys))
	for _, k := range l.Keys {
		kind := "root"
		if k.Extractable {
			kind = "standard"
		}
		created := ""
		if k.CreationDate != nil {
			created = k.CreationDate.UTC().Format(time.RFC3339)
		}
		rows = append(rows, []string{k.ID, k.Name, kind, states[k.State], strconv.FormatBool(k.Imported), created})
	}
	return []string{"ID", "NAME", "TYPE", "STATE", "IMPORTED", "CREATED"}, rows
}

type createOptions struct {
	*app.App
	client      app.ClientFlags
	name        string
	standard    bool
	description string
	expires     string
	material    materialFlags
	imports     bool
	aliases     []string
	tags        []string
	ring        string
	months      int
	dualAuth    bool
}

func (o *createOptions) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	o.client.Add(fs, o.App)
	o.client.AddInstance(fs)
	fs.BoolVar(&o.standard, "standard", false, "make a standard key, whose material can be read")
	fs.StringVar(&o.description, "description", "", "what the key is for")
	fs.StringVar(&o.expires, "expires", "", "end of the key's use for wrapping, RFC 3339, as in 2030-01-02T15:04:05Z")
	fs.StringSliceVar(&o.aliases, "alias", nil, "further names of the key, up to 5")
	fs.StringSliceVar(&o.tags, "tag", nil, "tags, up to 30")
	fs.StringVar(&o.ring, "key-ring", "", "key ring that it is made in; without it, the default one")
	fs.IntVar(&o.months, "rotation-months", 0, "rotate every so many months (30 days each), 1 to 12")
	fs.BoolVar(&o.dualAuth, "dual-auth", false, "two people must agree to a deletion")
	o.material.add(cmd)
}

func newCreateCmd(a *app.App, run func(context.Context, *createOptions) error) *cobra.Command {
	o := &createOptions{App: a}
	if run == nil {
		run = runCreate
	}
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Create a root key in the HSM, or a standard key", Args: cobra.ExactArgs(1),
		Long: `Create a key. A root key is born in the HSM and never leaves it in the clear.
With --standard, a standard key is made: 32 random bytes of the HSM that its owner can read.
With --payload-file, the material is imported instead.`,
		Example: "  kmsctl keys create orders --instance shop\n  kmsctl keys create password --standard --payload-file - --instance shop < secret.bin",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.add(cmd)
	return cmd
}

func newImportCmd(a *app.App, run func(context.Context, *createOptions) error) *cobra.Command {
	o := &createOptions{App: a, imports: true}
	if run == nil {
		run = runCreate
	}
	cmd := &cobra.Command{
		Use: "import NAME", Short: "Import material of your own as a root or standard key", Args: cobra.ExactArgs(1),
		Long: `Import material as a key: 16, 24 or 32 bytes as a root key, up to 7500 as a standard key.
With --import-token, the material is encrypted on this machine and opened by the KMS alone. What was
encrypted on another machine (see kmsctl keys import-token) comes with --encrypted-nonce and --iv.`,
		Example: "  kmsctl keys import orders --payload-file key.bin --import-token --instance shop\n  head -c 32 /dev/urandom | kmsctl keys import orders --payload-file - --instance shop",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.add(cmd)
	return cmd
}

// Check holds the rules of the flags.
func (o *createOptions) Check() error {
	errs := []error{o.client.Check(true), o.material.check(&keyOptions{client: o.client})()}
	if o.expires != "" {
		if _, err := time.Parse(time.RFC3339, o.expires); err != nil {
			errs = append(errs, fault.Usagef("--expires: %q is not a time as in 2030-01-02T15:04:05Z", o.expires))
		}
	}
	if o.imports && o.material.file == "" {
		errs = append(errs, fault.Usagef("--payload-file: missing").WithHint("give the file with the raw material, or - for standard input"))
	}
	if o.standard && (o.material.token || o.material.isSealed()) {
		errs = append(errs, fault.Usagef("--import-token or --encrypted-nonce, --standard: only one of them").WithHint("an import token is for root keys; a standard key travels by TLS"))
	}
	return errors.Join(errs...)
}

func runCreate(ctx context.Context, o *createOptions) error {
	in := kmsapi.CreateKey{Name: o.name, Description: o.description, Extractable: o.standard, Aliases: o.aliases, Tags: o.tags}
	if o.expires != "" {
		t, err := time.Parse(time.RFC3339, o.expires)
		if err != nil {
			return err
		}
		in.ExpirationDate = &t
	}
	if o.months != 0 {
		in.Rotation = &kmsapi.Rotation{IntervalMonth: o.months}
	}
	if o.dualAuth {
		in.DualAuthDelete = &kmsapi.DualAuthDelete{Enabled: true}
	}
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	c.SetKeyRing(o.ring)
	if o.material.file != "" {
		if err := o.material.fill(ctx, o.App, c, &in); err != nil {
			return o.ClientError("import key", o.name, err)
		}
	}
	k, err := c.CreateKey(ctx, in)
	if err != nil {
		return o.ClientError("create key", o.name, err)
	}
	return o.Print(keyResult(k))
}

type listOptions struct {
	*app.App
	client               app.ClientFlags
	limit, offset        int
	search, sort, filter string
	states               []string
	ring                 string
}

func newListCmd(a *app.App, run func(context.Context, *listOptions) error) *cobra.Command {
	o := &listOptions{App: a}
	if run == nil {
		run = runList
	}
	cmd := &cobra.Command{
		Use: "list", Short: "List the keys of an instance", Args: cobra.NoArgs,
		Example: "  kmsctl keys list --instance shop -o json\n  kmsctl keys list --instance shop --search orders --sort -creationDate",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	o.client.Add(cmd.Flags(), a)
	o.client.AddInstance(cmd.Flags())
	cmd.Flags().IntVar(&o.limit, "limit", kmsapi.DefaultLimit, "keys at most, up to 5000")
	cmd.Flags().IntVar(&o.offset, "offset", 0, "keys to leave out at the start")
	cmd.Flags().StringVar(&o.search, "search", "", "part of the name or of an alias; prefixes not:, exact:, name:, alias:, escape:")
	cmd.Flags().StringVar(&o.sort, "sort", "", "comma separated fields, - before one for descending, as in -creationDate")
	cmd.Flags().StringVar(&o.filter, "filter", "", `terms with blanks between, as in creationDate=gt:"2026-01-02T03:04:05Z"`)
	cmd.Flags().StringSliceVar(&o.states, "state", nil, "states: pre-active, active, suspended, deactivated, destroyed; without it, all but the first and the last")
	cmd.Flags().StringVar(&o.ring, "key-ring", "", "only keys of this ring")
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(slices.Sorted(maps.Values(states)), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// Check holds the rules of the flags.
func (o *listOptions) Check() error {
	errs := []error{o.client.Check(true)}
	if o.limit < 1 || o.limit > kmsapi.MaxLimit {
		errs = append(errs, fault.Usagef("--limit: %d is not between 1 and %d", o.limit, kmsapi.MaxLimit))
	}
	if o.offset < 0 {
		errs = append(errs, fault.Usagef("--offset: %d is negative", o.offset))
	}
	if _, err := stateNumbers(o.states); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// stateNumbers are the API's numbers of states, comma separated.
func stateNumbers(names []string) (string, error) {
	var out []string
	for _, name := range names {
		found := false
		for n, s := range states {
			if s == name {
				out, found = append(out, strconv.Itoa(n)), true
			}
		}
		if !found {
			return "", fault.Usagef("--state: unknown state %q", name).WithHint("use: %s", strings.Join(slices.Sorted(maps.Values(states)), ", "))
		}
	}
	return strings.Join(out, ","), nil
}

func runList(ctx context.Context, o *listOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	numbers, err := stateNumbers(o.states)
	if err != nil {
		return err
	}
	q := url.Values{"limit": {strconv.Itoa(o.limit)}, "offset": {strconv.Itoa(o.offset)}}
	for name, v := range map[string]string{"search": o.search, "sort": o.sort, "filter": o.filter, "state": numbers} {
		if v != "" {
			q.Set(name, v)
		}
	}
	c.SetKeyRing(o.ring)
	keys, err := c.Keys(ctx, q)
	if err != nil {
		return o.ClientError("list keys of instance", o.client.Instance, err)
	}
	return o.Print(keyList{keys.Resources})
}

type getOptions struct {
	*app.App
	client   app.ClientFlags
	key      string
	material bool
}

func newGetCmd(a *app.App, run func(context.Context, *getOptions) error) *cobra.Command {
	o := &getOptions{App: a}
	if run == nil {
		run = runGet
	}
	cmd := &cobra.Command{
		Use: "get KEY", Short: "Show a key; a standard key's material with --material", Args: cobra.ExactArgs(1),
		Example: "  kmsctl keys get 02fd6835-6001-4482-a892-13bd2085f75d --instance shop",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.key = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.client.Add(cmd.Flags(), a)
	o.client.AddInstance(cmd.Flags())
	cmd.Flags().BoolVar(&o.material, "material", false, "show a standard key's material too (-o json or yaml)")
	return cmd
}

// Check holds the rules of the flags.
func (o *getOptions) Check() error {
	errs := []error{o.client.Check(true)}
	if o.material && o.Format == "table" {
		errs = append(errs, fault.Usagef("--material: needs -o json or -o yaml"))
	}
	return errors.Join(errs...)
}

func runGet(ctx context.Context, o *getOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	k, err := c.Key(ctx, o.key, !o.material)
	if err != nil {
		return o.ClientError("get key", o.key, err)
	}
	return o.Print(keyResult(k))
}

// actionResult is what wrap and unwrap print.
type actionResult kmsapi.ActionAnswer

// Table is one line a field.
func (r actionResult) Table() ([]string, [][]string) {
	var rows [][]string
	for _, f := range [][2]string{{"plaintext", r.Plaintext}, {"ciphertext", r.Ciphertext}} {
		if f[1] != "" {
			rows = append(rows, []string{f[0], f[1]})
		}
	}
	return nil, rows
}

type wrapOptions struct {
	*app.App
	client        app.ClientFlags
	key           string
	plaintextFile string
	aad           []string
}

func newWrapCmd(a *app.App, run func(context.Context, *wrapOptions) error) *cobra.Command {
	o := &wrapOptions{App: a}
	if run == nil {
		run = runWrap
	}
	cmd := &cobra.Command{
		Use: "wrap KEY", Short: "Wrap a data encryption key with a root key", Args: cobra.ExactArgs(1),
		Long: `Wrap a data encryption key (DEK) with a root key. Without --plaintext-file the HSM makes a
DEK of 32 bytes, and the answer has it beside the ciphertext. Both are printed in base64.`,
		Example: "  kmsctl keys wrap KEY --instance shop -o json\n  head -c 32 /dev/urandom | kmsctl keys wrap KEY --plaintext-file - --aad table=orders --instance shop",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.key = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.client.Add(cmd.Flags(), a)
	o.client.AddInstance(cmd.Flags())
	cmd.Flags().StringVar(&o.plaintextFile, "plaintext-file", "", "file with the raw DEK, - for standard input")
	cmd.Flags().StringArrayVar(&o.aad, "aad", nil, "additional data that unwrap must repeat; repeatable")
	return cmd
}

// Check holds the rules of the flags.
func (o *wrapOptions) Check() error {
	if o.plaintextFile == "-" && o.client.APIKeyStdin {
		return errors.Join(o.client.Check(true), fault.Usagef("--plaintext-file -, --api-key-stdin: standard input can be only one of them"))
	}
	return o.client.Check(true)
}

func runWrap(ctx context.Context, o *wrapOptions) error {
	in := kmsapi.WrapRequest{AAD: o.aad}
	if o.plaintextFile != "" {
		b, err := o.ReadInput("--plaintext-file", o.plaintextFile, kmsapi.MaxPlaintext)
		if err != nil {
			return err
		}
		if len(b) == 0 {
			return fault.Usagef("--plaintext-file: %q is empty", o.plaintextFile).WithHint("leave the flag out to have the HSM make a DEK")
		}
		in.Plaintext = base64.StdEncoding.EncodeToString(b)
		clear(b)
	}
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	out, err := c.Wrap(ctx, o.key, in)
	if err != nil {
		return o.ClientError("wrap with key", o.key, err)
	}
	return o.Print(actionResult(out))
}

type unwrapOptions struct {
	*app.App
	client         app.ClientFlags
	key            string
	ciphertextFile string
	outputFile     string
	aad            []string
}

func newUnwrapCmd(a *app.App, run func(context.Context, *unwrapOptions) error) *cobra.Command {
	o := &unwrapOptions{App: a}
	if run == nil {
		run = runUnwrap
	}
	cmd := &cobra.Command{
		Use: "unwrap KEY", Short: "Unwrap what wrap made", Args: cobra.ExactArgs(1),
		Long:    "Unwrap a ciphertext that wrap made. The DEK is printed in base64, or written raw into --output-file (mode 0600).",
		Example: "  kmsctl keys unwrap KEY --ciphertext-file wrapped.txt --output-file dek.bin --instance shop",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.key = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	o.client.Add(cmd.Flags(), a)
	o.client.AddInstance(cmd.Flags())
	cmd.Flags().StringVar(&o.ciphertextFile, "ciphertext-file", "", "file with the ciphertext as wrap printed it, - for standard input")
	cmd.Flags().StringVar(&o.outputFile, "output-file", "", "write the raw DEK here instead of printing it")
	cmd.Flags().StringArrayVar(&o.aad, "aad", nil, "additional data, exactly as given to wrap; repeatable")
	return cmd
}

// Check holds the rules of the flags.
func (o *unwrapOptions) Check() error {
	errs := []error{o.client.Check(true)}
	if o.ciphertextFile == "" {
		errs = append(errs, fault.Usagef("--ciphertext-file: missing").WithHint("give the file with the ciphertext, or - for standard input"))
	}
	if o.ciphertextFile == "-" && o.client.APIKeyStdin {
		errs = append(errs, fault.Usagef("--ciphertext-file -, --api-key-stdin: standard input can be only one of them"))
	}
	return errors.Join(errs...)
}

func runUnwrap(ctx context.Context, o *unwrapOptions) error {
	b, err := o.ReadInput("--ciphertext-file", o.ciphertextFile, 64<<10)
	if err != nil {
		return err
	}
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	out, err := c.Unwrap(ctx, o.key, kmsapi.UnwrapRequest{Ciphertext: trim(b), AAD: o.aad})
	if err != nil {
		return o.ClientError("unwrap with key", o.key, err)
	}
	if o.outputFile == "" {
		return o.Print(actionResult(out))
	}
	raw, err := base64.StdEncoding.DecodeString(out.Plaintext)
	if err != nil {
		return fmt.Errorf("read the server's answer: %w", err)
	}
	defer clear(raw)
	return app.WriteFile(o.outputFile, raw, 0o600)
}
