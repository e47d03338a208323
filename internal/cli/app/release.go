package app

import (
	"errors"
	"maps"
	"path"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/render"
)

// VolumeFlags say on what the release keeps its data.
type VolumeFlags struct {
	StorageClass string
	HostPath     string
	Ephemeral    bool
}

// Add puts the flags into fs.
func (f *VolumeFlags) Add(fs *pflag.FlagSet) {
	fs.StringVar(&f.StorageClass, "storage-class", "", "storage class of the volumes; without it, the cluster's default")
	fs.StringVar(&f.HostPath, "host-path", "", "folder of the node for the volumes, for a one-node site without a provisioner")
	fs.BoolVar(&f.Ephemeral, "ephemeral", false, "keep nothing: all data and SoftHSM's keys die with the pods (trials)")
}

// Check holds the rules of the flags.
func (f *VolumeFlags) Check() error {
	var given []string
	if f.StorageClass != "" {
		given = append(given, "--storage-class")
	}
	if f.HostPath != "" {
		given = append(given, "--host-path")
	}
	if f.Ephemeral {
		given = append(given, "--ephemeral")
	}
	var errs []error
	if len(given) > 1 {
		errs = append(errs, fault.Usagef("%s: only one of them", strings.Join(given, ", ")).WithHint("each says on what the release keeps its data"))
	}
	if f.HostPath != "" && !path.IsAbs(f.HostPath) { // of the node, which is no Windows
		errs = append(errs, fault.Usagef("--host-path: %q is not an absolute path", f.HostPath))
	}
	return errors.Join(errs...)
}

// NoClaims says that no volume is claimed of the cluster.
func (f *VolumeFlags) NoClaims() bool { return f.HostPath != "" || f.Ephemeral }

// beat lets the flags take the place of what the values say of the volumes.
func (f *VolumeFlags) beat(values map[string]any) {
	var kind string
	var v any
	switch {
	case f.Ephemeral:
		kind, v = "emptyDir", true
	case f.HostPath != "":
		kind, v = "hostPath", f.HostPath
	case f.StorageClass != "":
		kind, v = "storageClass", f.StorageClass
	default:
		return
	}
	values["persistence"] = map[string]any{kind: v}
}

// ReleaseFlags are what install, upgrade and setup ask of a release beside
// its chart and its HSM.
type ReleaseFlags struct {
	VolumeFlags
	StorageMembers int
	APIReplicas    int
	AccountTokens  bool
	Audiences      []string
	PullSecrets    []string
	SCC            string
	SANs           []string
	DropSANs       []string
	Domain         string
	AdminKeyFile   string
	Repair         bool
	Timeout        time.Duration
}

// TokenAudience is for whom a ServiceAccount's token is made that is for the
// KMS and nobody else.
const TokenAudience = "kms-api"

// Add puts the flags into fs.
func (f *ReleaseFlags) Add(fs *pflag.FlagSet) {
	f.VolumeFlags.Add(fs)
	fs.IntVar(&f.StorageMembers, "storage-members", 0, "members of the store, 1 or 3; one grows to three by an upgrade, three stay three; without it, what the settings say, or 1")
	fs.IntVar(&f.APIReplicas, "api-replicas", 0, "replicas of the API, each with its HSM connector; without it, what the settings say, or 1")
	fs.BoolVar(&f.AccountTokens, "service-account-tokens", false, "let tokens of the cluster's ServiceAccounts prove service IDs; makes a ClusterRole for TokenReviews")
	fs.StringSliceVar(&f.Audiences, "token-audience", nil, "audience for which such a token must be made; repeatable; without it, "+TokenAudience+" or the cluster's own API server")
	fs.StringSliceVar(&f.PullSecrets, "image-pull-secret", nil, "Secret for the registry; repeatable")
	fs.StringVar(&f.SCC, "scc", "", "OpenShift's security context constraint for the pods; without it, what the settings say, or restricted-v2 (hostnetwork-v2 where the pods use the node's network)")
	fs.StringSliceVar(&f.SANs, "san", nil, "further DNS names or addresses of the API, for its certificate, which keeps those that it has; repeatable")
	fs.StringSliceVar(&f.DropSANs, "drop-san", nil, "names that --san gave once, and that the API's certificate is to lose; repeatable")
	fs.StringVar(&f.Domain, "cluster-domain", "", "domain of the cluster's DNS; without it, what the settings say, or "+install.DefaultDomain)
	fs.StringVar(&f.AdminKeyFile, "admin-key-file", "", "where the first administrator's API key is written (mode 0600)")
	fs.BoolVar(&f.Repair, "repair", false, "end a change that is pending although nobody works on it")
	fs.DurationVar(&f.Timeout, "timeout", DefaultTimeout, "how long the change may take at most")
}

// Check holds the rules of the flags.
func (f *ReleaseFlags) Check() error {
	errs := []error{f.VolumeFlags.Check()}
	if f.StorageMembers != 0 && f.StorageMembers != 1 && f.StorageMembers != 3 {
		errs = append(errs, fault.Usagef("--storage-members: %d is neither 1 nor 3", f.StorageMembers))
	}
	if f.APIReplicas < 0 {
		errs = append(errs, fault.Usagef("--api-replicas: %d is negative", f.APIReplicas))
	}
	if f.Timeout <= 0 {
		errs = append(errs, fault.Usagef("--timeout: %s is not positive", f.Timeout))
	}
	return errors.Join(errs...)
}

// Beat lets the flags beat the values.
func (f *ReleaseFlags) Beat(values map[string]any) {
	f.beat(values)
	if f.StorageMembers != 0 {
		put(values, "storage", "replicas", int64(f.StorageMembers))
	}
	if f.APIReplicas != 0 {
		put(values, "oss", "replicas", int64(f.APIReplicas))
	}
	if f.AccountTokens {
		put(values, "oss", "serviceAccountTokens", true)
	}
	if len(f.Audiences) > 0 {
		var list []any
		for _, a := range f.Audiences {
			list = append(list, a)
		}
		put(values, "oss", "tokenAudiences", list)
	}
	if len(f.PullSecrets) > 0 {
		var list []any
		for _, s := range f.PullSecrets {
			list = append(list, map[string]any{"name": s})
		}
		values["imagePullSecrets"] = list
	}
	if f.SCC != "" {
		values["scc"] = f.SCC
	}
	if f.Domain != "" {
		values["clusterDomain"] = f.Domain
	}
}

// sccs are the constraints that the chart binds on OpenShift with these values.
func (f *ReleaseFlags) sccs(values map[string]any) []string {
	if name, _ := values["scc"].(string); name != "" {
		return []string{name}
	}
	out := []string{"restricted-v2"}
	hsm, _ := values["hsm"].(map[string]any)
	if host, _ := hsm["hostNetwork"].(bool); host && cluster.HSMModel(values) != "softhsm" {
		out = append(out, "hostnetwork-v2")
	}
	return out
}

// put sets a key of a block.
func put(values map[string]any, block, key string, v any) {
	b, _ := values[block].(map[string]any)
	b = maps.Clone(b) // the values may be those of the release that is there
	if b == nil {
		b = map[string]any{}
	}
	b[key] = v
	values[block] = b
}

// Job is the job's options for a release with these values; a secret of nil is
// in the cluster.
func (f *ReleaseFlags) Job(k KubeFlags, values map[string]any, s *render.Secret) install.Options {
	o := install.Options{Release: k.Release, Namespace: k.Namespace, HSMSecretName: render.SecretName, SANs: f.SANs, DropSANs: f.DropSANs,
		AdminKeyFile: f.AdminKeyFile, Repair: f.Repair, Wait: true, Timeout: f.Timeout}
	if s != nil {
		o.HSMSecret = &cluster.Secret{Namespace: k.Namespace, Name: render.SecretName, Data: s.Data()}
		o.HSMSecretPart = s.Part
	}
	return o.Named(values)
}
