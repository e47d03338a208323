package keyscmd

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// instancePolicyOptions are the policies of an instance as flags.
type instancePolicyOptions struct {
	*app.App
	client   app.ClientFlags
	months   int
	dualAuth string
	metrics  string
	rotation string
	network  string
	ips      []string
	forbid   []string
	changed  func(flag string) bool
}

const (
	switchOn  = "on"
	switchOff = "off"
	none      = "none"
)

// What can be forbidden, in the order of the API's attributes.
var forbidden = []string{"create-root", "create-standard", "import-root", "import-standard", "import-in-clear"}

func newInstancePolicyCmd(a *app.App) *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Show and set an instance's policies"}
	cmd.AddCommand(newInstancePolicyGetCmd(a), newInstancePolicySetCmd(a))
	return cmd
}

func newInstancePolicyGetCmd(a *app.App) *cobra.Command {
	o := &instancePolicyOptions{App: a}
	cmd := &cobra.Command{
		Use: "get INSTANCE", Short: "Show an instance's policies", Args: cobra.ExactArgs(1), Example: "  kmsctl instances policy get shop",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.client.Instance = args[0]
			return app.Run(cmd.Context(), o, runInstancePolicyGet)
		},
	}
	o.client.Add(cmd.Flags(), a)
	return cmd
}

func newInstancePolicySetCmd(a *app.App) *cobra.Command {
	o := &instancePolicyOptions{App: a}
	cmd := &cobra.Command{
		Use: "set INSTANCE", Short: "Set an instance's policies, all that are given or none", Args: cobra.ExactArgs(1),
		Long: `Set policies of an instance. Rotation and the two people for a deletion go for keys that are made
later; what may be made and from where calls may come, from now on.`,
		Example: "  kmsctl instances policy set shop --rotation-months 3 --dual-auth on\n  kmsctl instances policy set shop --allowed-ip 10.0.0.0/8 --forbid import-in-clear,create-standard\n" +
			"  kmsctl instances policy set shop --allowed-ip none --forbid none",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.client.Instance = args[0]
			return app.Run(cmd.Context(), o, runInstancePolicySet)
		},
	}
	fs := cmd.Flags()
	o.client.Add(fs, a)
	fs.IntVar(&o.months, "rotation-months", 0, "rotate new root keys every so many months (30 days each), 1 to 12")
	fs.StringVar(&o.rotation, "rotation", "", "off: new root keys get no rotation policy")
	fs.StringVar(&o.dualAuth, "dual-auth", "", "on: two people must agree to the deletion of a new key; or off")
	fs.StringVar(&o.metrics, "metrics", "", "on or off, kept for clients: /metrics shows every instance either way")
	fs.StringVar(&o.network, "allowed-network", "", "private-only: no calls from public addresses; public-and-private; or off")
	fs.StringSliceVar(&o.ips, "allowed-ip", nil, "networks (CIDR) from which calls may come, repeatable; or none, which lifts it")
	fs.StringSliceVar(&o.forbid, "forbid", nil, "what may not be made, repeatable: "+strings.Join(forbidden, ", ")+"; or none, which lifts it")
	for flag, values := range o.enumerated() {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	o.changed = func(flag string) bool { return fs.Changed(flag) }
	return cmd
}

func (o *instancePolicyOptions) enumerated() map[string][]string {
	return map[string][]string{"rotation": {switchOff}, "dual-auth": {switchOn, switchOff}, "metrics": {switchOn, switchOff},
		"allowed-network": {"private-only", "public-and-private", switchOff}, "forbid": append(slices.Clone(forbidden), none)}
}

// Check holds the rules of the flags.
func (o *instancePolicyOptions) Check() error {
	errs := []error{o.client.Check(false)}
	if o.changed == nil { // get
		return errors.Join(errs...)
	}
	given := map[string][]string{"rotation": {o.rotation}, "dual-auth": {o.dualAuth}, "metrics": {o.metrics}, "allowed-network": {o.network}, "forbid": o.forbid}
	for flag, may := range o.enumerated() {
		for _, v := range given[flag] {
			if o.changed(flag) && !slices.Contains(may, v) {
				errs = append(errs, fault.Usagef("--%s: %q is none of %s", flag, v, strings.Join(may, ", ")))
			}
		}
	}
	if o.changed("rotation") && o.changed("rotation-months") {
		errs = append(errs, fault.Usagef("--rotation off, --rotation-months: only one of them"))
	}
	for flag, list := range map[string][]string{"allowed-ip": o.ips, "forbid": o.forbid} {
		if len(list) > 1 && slices.Contains(list, none) {
			errs = append(errs, fault.Usagef("--%s: none stands alone", flag))
		}
	}
	if len(o.wanted()) == 0 {
		errs = append(errs, fault.Usagef("no policy is given").WithHint("see kmsctl instances policy set --help"))
	}
	return errors.Join(errs...)
}

// wanted are the policies that the flags ask for.
func (o *instancePolicyOptions) wanted() (out []kmsapi.InstancePolicy) {
	add := func(kind string, on bool, a *kmsapi.PolicyAttributes) {
		out = append(out, kmsapi.InstancePolicy{Type: kind, Data: kmsapi.PolicyData{Enabled: &on, Attributes: a}})
	}
	if o.changed("rotation-months") {
		add(kmsapi.PolicyRotation, true, &kmsapi.PolicyAttributes{IntervalMonth: &o.months})
	}
	if o.changed("rotation") {
		add(kmsapi.PolicyRotation, false, nil)
	}
	if o.changed("dual-auth") {
		add(kmsapi.PolicyDualAuthDelete, o.dualAuth == switchOn, nil)
	}
	if o.changed("metrics") {
		add(kmsapi.PolicyMetrics, o.metrics == switchOn, nil)
	}
	if o.changed("allowed-network") {
		var a *kmsapi.PolicyAttributes
		if o.network != switchOff {
			a = &kmsapi.PolicyAttributes{AllowedNetwork: &o.network}
		}
		add(kmsapi.PolicyAllowedNetwork, a != nil, a)
	}
	if o.changed("allowed-ip") {
		var a *kmsapi.PolicyAttributes
		if !slices.Equal(o.ips, []string{none}) {
			a = &kmsapi.PolicyAttributes{AllowedIP: &o.ips}
		}
		add(kmsapi.PolicyAllowedIP, a != nil, a)
	}
	if o.changed("forbid") {
		lifted := slices.Equal(o.forbid, []string{none})
		var a kmsapi.PolicyAttributes
		for i, may := range []**bool{&a.CreateRootKey, &a.CreateStandardKey, &a.ImportRootKey, &a.ImportStandardKey} {
			v := !slices.Contains(o.forbid, forbidden[i])
			*may = &v
		}
		enforce := slices.Contains(o.forbid, forbidden[4])
		a.EnforceToken = &enforce
		add(kmsapi.PolicyCreateImport, !lifted, &a)
	}
	return out
}

// instancePolicyList shows policies of an instance.
type instancePolicyList struct {
	Policies []kmsapi.InstancePolicy `json:"policies"`
}

// Table is one line a policy.
func (l instancePolicyList) Table() ([]string, [][]string) {
	rows := make([][]string, 0, len(l.Policies))
	for _, p := range l.Policies {
		on := p.Data.Enabled != nil && *p.Data.Enabled
		rows = append(rows, []string{p.Type, strconv.FormatBool(on), policyDetail(p.Data.Attributes), when(p.LastUpdated)})
	}
	return []string{"POLICY", "ENABLED", "DETAIL", "UPDATED"}, rows
}

func policyDetail(a *kmsapi.PolicyAttributes) string {
	switch {
	case a == nil:
		return ""
	case a.IntervalMonth != nil:
		return "every " + strconv.Itoa(*a.IntervalMonth) + " months"
	case a.AllowedNetwork != nil:
		return *a.AllowedNetwork
	case a.AllowedIP != nil:
		return strings.Join(*a.AllowedIP, ", ")
	}
	var out []string
	for i, may := range []*bool{a.CreateRootKey, a.CreateStandardKey, a.ImportRootKey, a.ImportStandardKey} {
		if may != nil && !*may {
			out = append(out, forbidden[i])
		}
	}
	if a.EnforceToken != nil && *a.EnforceToken {
		out = append(out, forbidden[4])
	}
	if len(out) == 0 {
		return ""
	}
	return "no " + strings.Join(out, ", ")
}

const instancePolicies = "/api/v2/instance/policies"

func runInstancePolicyGet(ctx context.Context, o *instancePolicyOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	return o.show(ctx, c)
}

func (o *instancePolicyOptions) show(ctx context.Context, c *kmsclient.Client) error {
	var out kmsapi.Collection[kmsapi.InstancePolicy]
	if err := c.Do(ctx, http.MethodGet, instancePolicies, nil, &out); err != nil {
		return o.ClientError("show the policies of", o.client.Instance, err)
	}
	return o.Print(instancePolicyList{out.Resources})
}

func runInstancePolicySet(ctx context.Context, o *instancePolicyOptions) error {
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	set := o.wanted()
	in := kmsapi.Collection[kmsapi.InstancePolicy]{Metadata: kmsapi.Metadata{CollectionType: kmsapi.TypePolicy, CollectionTotal: len(set)}, Resources: set}
	if err := c.Do(ctx, http.MethodPut, instancePolicies, in, nil); err != nil {
		return o.ClientError("set the policies of", o.client.Instance, err)
	}
	return o.show(ctx, c)
}
