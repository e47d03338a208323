package diagnose

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/pattern"
)

// Cluster is what the checks ask Kubernetes.
type Cluster interface {
	Server() string
	Version(ctx context.Context) (string, error)
	// Clock is the API server's time.
	Clock(ctx context.Context) (time.Time, error)
	// Denied gives those of the rights that the account does not have.
	Denied(ctx context.Context, rights []cluster.Right) ([]cluster.Right, error)
	NamespacePhase(ctx context.Context, name string) (phase string, err error)
	StorageClasses(ctx context.Context) ([]cluster.StorageClass, error)
	Nodes(ctx context.Context) ([]cluster.Node, error)
	Secret(ctx context.Context, namespace, name string) (cluster.Secret, error)
	// Helm2 lists releases of Helm 2 by name, from Tiller's records.
	Helm2(ctx context.Context) ([]string, error)
	Deployments(ctx context.Context, namespace string) ([]cluster.Labelled, error)
	Groups(ctx context.Context) ([]string, error)
	// RegistryRoute is the host name of OpenShift's own registry, "" without
	// a route.
	RegistryRoute(ctx context.Context) (string, error)
}

// Image is one image of the release, as the site's registry has it.
type Image struct {
	Ref           string
	Architectures []string
}

// Preflight says what the checks are about. A nil function means that nothing
// was given to check.
type Preflight struct {
	Cluster            Cluster
	ClusterErr         error // why there is none
	Release, Namespace string
	StorageClass       string // "" means the default
	NoVolumes          bool   // host path or nothing kept
	NodeLabel          string // management nodes, as key=value or key
	PullSecrets        []string
	Registry           string // HOST[:PORT] that the nodes pull from
	Model              hsm.Model
	Settings           hsm.Settings
	SettingsErr        error    // what is wrong with the settings
	HSMSecret          *Secret  // nil: only what is in the cluster
	SecretErr          error    // what is wrong with the given one
	HSMPort            string   // "": the model's
	Repair             bool     // the installation ends a pending change
	Replicated         bool     // something has several replicas
	AccountTokens      bool     // the API reviews tokens of ServiceAccounts
	Watched            []string // namespaces where the watcher fills Secrets
	WatchAll           bool     // it does so everywhere
	SCCs               []string // of the pods, on OpenShift

	// Answers says whether the registry lets us in, where the images come only
	// with the installation; Images is nil then.
	Answers func(ctx context.Context) error
	Images  func(ctx context.Context) ([]Image, error)
	Chart   func(ctx context.Context) (name, version string, err error)
	Current func(ctx context.Context) (cluster.Release, error)
	Now     func() time.Time
}

// Secret is what the checks want of hsm-secret.
type Secret struct {
	Password    []byte
	ServerCA    []byte
	Cert, Key   map[string][]byte // by node
	FromCluster bool
}

// Checks lists the checks of a preflight.
func (p Preflight) Checks() []Check {
	checks := []Check{
		{"cluster", p.cluster},
		{"clock", p.withCluster(p.clock)},
		{"rights", p.withCluster(p.rights)},
		{"namespace", p.withCluster(p.namespace)},
		{"storage", p.withCluster(p.storage)},
		{"registry", p.images},
		{"pull secret", p.withCluster(p.pullSecrets)},
		{"architectures", p.withCluster(p.architectures)},
		{"chart", p.chart},
		{"hsm settings", p.settings},
		{"hsm secret", p.secret},
		{"hsm certificates", p.certificates},
		{"hsm reachable", p.reachable},
		{"release", p.withCluster(p.release)},
		{"helm 2", p.withCluster(p.helm2)},
		{"old product", p.withCluster(p.leftovers)},
		{"openshift", p.withCluster(p.openshift)},
	}
	return checks
}

func (p Preflight) withCluster(f func(context.Context) []Finding) func(context.Context) []Finding {
	return func(ctx context.Context) []Finding {
		if p.Cluster == nil {
			return skip("needs a cluster")
		}
		return f(ctx)
	}
}

// The oldest Kubernetes that the chart's objects are known to: policy/v1 and
// networking.k8s.io/v1 are there from 1.21 on. Server-side apply is there from
// 1.16 on in some form; without it kmsctl updates by compare-and-set.
const oldestMinor = 21

var versionForm = pattern.Lazy(`^v?(\d+)\.(\d+)`)

func (p Preflight) cluster(ctx context.Context) []Finding {
	if p.Cluster == nil {
		return failErr(p.ClusterErr, "set KUBECONFIG or --kubeconfig")
	}
	v, err := p.Cluster.Version(ctx)
	if err != nil {
		return failErr(err, "is the cluster of the kubeconfig running, and reachable from here?")
	}
	m := versionForm().FindStringSubmatch(v)
	if m == nil {
		return warn("look at kubectl version", "%s answers, and its version %q is of no known form", p.Cluster.Server(), v)
	}
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	if err := errors.Join(err1, err2); err != nil {
		return failErr(err, "look at kubectl version")
	}
	if major == 1 && minor < oldestMinor {
		return fail(fmt.Sprintf("upgrade the cluster to 1.%d or newer; below, hsm-secret and the certificates can still be applied, before 1.16 by a compare-and-set update, and the chart's objects cannot", oldestMinor),
			"%s runs Kubernetes %s; the chart needs 1.%d", p.Cluster.Server(), v, oldestMinor)
	}
	return ok("%s runs Kubernetes %s", p.Cluster.Server(), v)
}

// maxSkew is what tokens and certificates bear.
const maxSkew = 30 * time.Second

func (p Preflight) clock(ctx context.Context) []Finding {
	before := p.Now()
	t, err := p.Cluster.Clock(ctx)
	if err != nil {
		return failErr(err, "is the cluster reachable?")
	}
	// The header has whole seconds, and the answer took a moment.
	skew := t.Sub(before.Add(p.Now().Sub(before) / 2)).Round(time.Second)
	if skew.Abs() > maxSkew {
		return warn("set both clocks by NTP: tokens and certificates of the one side are not valid yet, or no longer, at the other",
			"the API server's clock is %s off this machine's", skew)
	}
	return ok("within %s of this machine's", maxSkew)
}

func (p Preflight) namespace(ctx context.Context) []Finding {
	phase, err := p.Cluster.NamespacePhase(ctx, p.Namespace)
	switch {
	case err != nil && fault.KindOf(err) == fault.NotFound:
		denied, derr := p.Cluster.Denied(ctx, []cluster.Right{{Verb: "create", Resource: "namespaces"}})
		if derr == nil && len(denied) > 0 {
			return fail("have it made: kubectl create namespace "+p.Namespace, "%s is not there, and you may not make it", p.Namespace)
		}
		return ok("%s is not there; it will be made", p.Namespace)
	case err != nil && fault.KindOf(err) == fault.Denied:
		return skip("may not look at namespaces; %s is taken to be there", p.Namespace)
	case err != nil:
		return failErr(err, "")
	case phase != "Active":
		return fail("wait until it is gone; see: kubectl get namespace "+p.Namespace+" -o yaml", "%s is %s: nothing can be made in it", p.Namespace, phase)
	}
	return ok("%s is there", p.Namespace)
}

func (p Preflight) storage(ctx context.Context) []Finding {
	if p.NoVolumes {
		return skip("no volumes are claimed")
	}
	classes, err := p.Cluster.StorageClasses(ctx)
	if err != nil {
		if fault.KindOf(err) == fault.Denied {
			return skip("may not look at storage classes")
		}
		return failErr(err, "")
	}
	var names []string
	for _, c := range classes {
		names = append(names, c.Name)
		if (p.StorageClass == "" && c.Default) || (p.StorageClass != "" && c.Name == p.StorageClass) {
			return ok("class %s, by %s", c.Name, c.Provisioner)
		}
	}
	have := "the cluster has none"
	if len(names) > 0 {
		have = "the cluster has " + strings.Join(names, ", ")
	}
	cure := "name one with --storage-class, or on a one-node site a folder of the node with --host-path"
	if p.StorageClass != "" {
		return fail(cure, "there is no class %s; %s", p.StorageClass, have)
	}
	return fail(cure, "there is no default class; %s", have)
}

func (p Preflight) images(ctx context.Context) []Finding {
	switch {
	case p.Answers != nil:
		if err := p.Answers(ctx); err != nil {
			return failErr(err, "is the registry running, and is the login right?")
		}
		return ok("%s answers; the images are loaded into it", p.Registry)
	case p.Images == nil:
		return skip("no registry was given")
	}
	imgs, err := p.Images(ctx)
	if err != nil {
		return failErr(err, "load the archive with `kmsctl load`")
	}
	return ok("reachable from here, with all %d images", len(imgs))
}

func (p Preflight) pullSecrets(ctx context.Context) []Finding {
	if len(p.PullSecrets) == 0 {
		return skip("none is named; the nodes pull without one, or have their own")
	}
	var out []Finding
	for _, name := range p.PullSecrets {
		s, err := p.Cluster.Secret(ctx, p.Namespace, name)
		cure := fmt.Sprintf("kubectl create secret docker-registry %s -n %s --docker-server=%s", name, p.Namespace, firstOf(p.Registry, "REGISTRY"))
		switch {
		case err != nil:
			out = append(out, failErr(err, cure)...)
		case s.Type != "kubernetes.io/dockerconfigjson" && s.Type != "kubernetes.io/dockercfg":
			out = append(out, bad(Fail, cure, "Secret %s/%s is of type %s, by which no node can pull", p.Namespace, name, s.Type))
		case p.Registry != "" && !strings.Contains(string(s.Data[".dockerconfigjson"])+string(s.Data[".dockercfg"]), `"`+p.Registry):
			out = append(out, bad(Fail, cure, "Secret %s/%s has no entry for %s", p.Namespace, name, p.Registry))
		}
	}
	return orElse(out, "%s", strings.Join(p.PullSecrets, ", "))
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func (p Preflight) architectures(ctx context.Context) []Finding {
	nodes, err := p.Cluster.Nodes(ctx)
	if err != nil {
		if fault.KindOf(err) == fault.Denied {
			return skip("may not look at nodes")
		}
		return failErr(err, "")
	}
	archs := map[string]int{}
	ready := 0
	for _, n := range nodes {
		archs[n.Arch]++
		if n.Ready && !n.Unschedulable {
			ready++
		}
	}
	if ready == 0 {
		return fail("see: kubectl get nodes", "none of the %d nodes is ready and takes pods", len(nodes))
	}
	if p.Images == nil {
		return ok("%d nodes are ready: %s; no images to compare with", ready, counted(archs))
	}
	imgs, err := p.Images(ctx)
	if err != nil {
		return skip("the images are not known")
	}
	var out []Finding
	for _, i := range imgs {
		runs := 0
		for a, n := range archs {
			if slices.Contains(i.Architectures, a) {
				runs += n
			}
		}
		switch {
		case runs == 0:
			out = append(out, bad(Fail, "load the archive of the nodes' architecture", "%s is for %s, the nodes are %s", i.Ref, strings.Join(i.Architectures, ", "), counted(archs)))
		case runs < len(nodes):
			out = append(out, bad(Warn, "set nodeSelector kubernetes.io/arch in the values", "%s is for %s and runs on %d of %d nodes", i.Ref, strings.Join(i.Architectures, ", "), runs, len(nodes)))
		}
	}
	return orElse(out, "%s, and the images are for them", counted(archs))
}

func counted(m map[string]int) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%d %s", m[k], k))
	}
	return strings.Join(out, ", ")
}

func (p Preflight) chart(ctx context.Context) []Finding {
	if p.Chart == nil {
		return skip("no chart repository was given")
	}
	name, version, err := p.Chart(ctx)
	if err != nil {
		return failErr(err, "load the archive with `kmsctl load --repo`")
	}
	return ok("%s %s", name, version)
}

func (p Preflight) settings(context.Context) []Finding {
	if p.SettingsErr != nil {
		return failErr(p.SettingsErr, "see `kmsctl render overrides --help`")
	}
	if p.Model.Name == "" {
		return skip("no HSM model was given")
	}
	var out []Finding
	for _, a := range []struct{ what, value string }{{"hsm_ip", p.Settings.HSMIP}, {"rfs_ip", p.Settings.RFSIP}} {
		if ip := net.ParseIP(a.value); ip != nil && ip.To4() == nil {
			out = append(out, bad(Warn, "give the IPv4 address if the appliance has one", "%s is the IPv6 address %s: pods reach it only where the cluster has IPv6 as well", a.what, a.value))
		}
	}
	if p.Model.Name == "thales" && (p.Settings.ESN == "" || p.Settings.KeyHash == "") {
		out = append(out, bad(Warn, "read both at the Connect's front panel, or with `anonkneti "+firstOf(p.Settings.HSMIP, "IP")+"` on a machine that you trust, and give --esn and --key-hash",
			"without serial number and key hash the Connect is trusted on first use"))
	}
	if p.Model.Name == "softhsm" {
		out = append(out, bad(Warn, "use gemalto or thales where secrets matter", "SoftHSM is a token in software: for trials"))
	}
	return orElse(out, "%s", p.Model.Title)
}

func (p Preflight) secret(ctx context.Context) []Finding {
	if p.SecretErr != nil {
		return failErr(p.SecretErr, "make it with `kmsctl render secret`")
	}
	s, err := p.theSecret(ctx)
	switch {
	case err != nil:
		return failErr(err, "make it with `kmsctl render secret`")
	case s == nil:
		return skip("no hsm-secret was given, and there is none in the cluster; install wants one")
	}
	if err := hsm.CheckPIN(s.Password); err != nil {
		return fail("write it without a line break, and not by `echo | base64`: every wrong login brings the HSM nearer to locking", "hsm-pass: %v", err)
	}
	if s.FromCluster {
		return ok("in the cluster, %s/hsm-secret", p.Namespace)
	}
	if have, err := p.inCluster(ctx); err == nil && have != nil && string(have.Password) != string(s.Password) {
		return warn("the password changes with the installation; the pods start again by it", "hsm-secret is in the cluster already, with another password")
	}
	return ok("given, well-formed")
}

// theSecret is the given one, or the cluster's; nil when there is none.
func (p Preflight) theSecret(ctx context.Context) (*Secret, error) {
	if p.HSMSecret == nil && p.SecretErr == nil {
		return p.inCluster(ctx)
	}
	return p.HSMSecret, nil
}

func (p Preflight) inCluster(ctx context.Context) (*Secret, error) {
	if p.Cluster == nil {
		return nil, nil
	}
	s, err := p.Cluster.Secret(ctx, p.Namespace, "hsm-secret")
	if err != nil {
		if k := fault.KindOf(err); k == fault.NotFound || k == fault.Unreachable {
			return nil, nil // the latter is the check cluster's
		}
		return nil, err
	}
	out := &Secret{Password: s.Data["hsm-pass"], ServerCA: s.Data["ServerCAFile"], Cert: map[string][]byte{}, Key: map[string][]byte{}, FromCluster: true}
	for k, v := range s.Data {
		ip, isKey := strings.CutSuffix(k, "-key")
		switch {
		case net.ParseIP(ip) == nil:
		case isKey:
			out.Key[ip] = v
		default:
			out.Cert[ip] = v
		}
	}
	return out, nil
}

func (p Preflight) certificates(ctx context.Context) []Finding {
	if !p.Model.NeedsCerts {
		return skip("the model has none")
	}
	s, err := p.theSecret(ctx)
	if err != nil || s == nil {
		return skip("there is no hsm-secret to look at")
	}
	var out []Finding
	const make = "make pairs with `kmsctl hsm luna-cert create --node IP`, register them at the appliance, and render the secret again"
	if err := hsm.CheckServerCA(s.ServerCA, p.Now()); err != nil {
		out = append(out, bad(Fail, "fetch it with `kmsctl hsm luna-cert fetch-server`", "%v", err))
	}
	for _, ip := range slices.Sorted(maps.Keys(s.Cert)) {
		warns, err := hsm.CheckClient(ip, s.Cert[ip], s.Key[ip], p.Now())
		if err != nil {
			out = append(out, bad(Fail, make, "%v", err))
		}
		for _, w := range warns {
			out = append(out, bad(Warn, make, "%s", w))
		}
	}
	for _, ip := range slices.Sorted(maps.Keys(s.Key)) {
		if len(s.Cert[ip]) == 0 {
			out = append(out, bad(Fail, make, "node %s has a key and no certificate", ip))
		}
	}
	out = append(out, p.everyNode(ctx, s)...)
	return orElse(out, "%d pairs, all good", len(s.Cert))
}

// everyNode finds nodes without a pair: a pod there cannot reach the HSM.
func (p Preflight) everyNode(ctx context.Context, s *Secret) []Finding {
	if p.Cluster == nil {
		return nil
	}
	nodes, err := p.Cluster.Nodes(ctx)
	if err != nil {
		return skip("may not look at nodes: whether each has a pair is not known")
	}
	var out []Finding
	for _, n := range nodes {
		if !n.Matches(p.NodeLabel) || len(s.Cert[n.IP]) > 0 {
			continue
		}
		if ip := net.ParseIP(n.IP); ip != nil && ip.To4() == nil {
			out = append(out, bad(Fail, "give the node an IPv4 address: a key of a Secret may hold no colon", "node %s has only the IPv6 address %s", n.Name, n.IP))
			continue
		}
		out = append(out, bad(Fail, fmt.Sprintf("make one with `kmsctl hsm luna-cert create --node %s`, or keep the pods off the node; --node-label says which nodes count", n.IP),
			"node %s (%s) has no certificate pair: a pod there cannot reach the HSM", n.Name, n.IP))
	}
	return out
}

// connectPort is where a Connect and its remote file system answer.
const connectPort = "9004"

func (p Preflight) reachable(ctx context.Context) []Finding {
	switch {
	case p.Model.Name == "":
		return skip("no HSM model was given")
	case p.Model.NeedsCerts:
		return p.luna(ctx)
	case p.Model.NeedsHSMIP:
		var out []Finding
		for _, a := range []struct{ what, ip string }{{"the Connect", p.Settings.HSMIP}, {"the remote file system", p.Settings.RFSIP}} {
			if a.ip == "" {
				continue
			}
			addr := net.JoinHostPort(a.ip, firstOf(p.HSMPort, connectPort))
			if err := dial(ctx, addr); err != nil {
				out = append(out, bad(Fail, "is the address right, and does a firewall let TCP through to it, from here and from the nodes?", "%s does not answer at %s: %v", a.what, addr, err))
			}
		}
		return orElse(out, "the Connect and its remote file system answer here")
	}
	return skip("the model is in software")
}

func dial(ctx context.Context, addr string) error {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return c.Close()
}

func (p Preflight) luna(ctx context.Context) []Finding {
	if p.Settings.HSMIP == "" {
		return skip("no address of the HSM was given")
	}
	addr := net.JoinHostPort(p.Settings.HSMIP, firstOf(p.HSMPort, hsm.LunaPort))
	s, err := p.theSecret(ctx)
	if err != nil || s == nil || len(s.Cert) == 0 {
		if err := dial(ctx, addr); err != nil {
			return fail("is the address right, and does a firewall let TCP through to it?", "no answer from %s: %v", addr, err)
		}
		return ok("TCP to %s; the certificates are not known, so TLS was not tried", addr)
	}
	ip := slices.Sorted(maps.Keys(s.Cert))[0]
	err = hsm.CheckNTLS(ctx, addr, s.ServerCA, s.Cert[ip], s.Key[ip])
	var e *hsm.NTLSError
	if !errors.As(err, &e) {
		return ok("TLS to %s as node %s", addr, ip)
	}
	switch e.Stage {
	case hsm.StageServer:
		return fail("fetch the appliance's certificate with `kmsctl hsm luna-cert fetch-server`, and compare its fingerprint", "%v", err)
	case hsm.StageClient:
		// An appliance may know a client by its address as well, and this
		// machine is none of the nodes.
		return warn(fmt.Sprintf("at the appliance: client register -client %s -ip %s; then client assignPartition", ip, ip), "%v (tried as node %s from this machine)", err, ip)
	}
	return fail("is the address right, is NTLS running, and does a firewall let TCP through to it, from here and from the nodes?", "%v", err)
}

func (p Preflight) release(ctx context.Context) []Finding {
	if p.Current == nil {
		return skip("Helm's records are not known")
	}
	r, err := p.Current(ctx)
	switch {
	case err != nil && fault.KindOf(err) == fault.NotFound:
		return ok("%s is not installed yet", p.Release)
	case err != nil:
		return failErr(err, "")
	case cluster.Pending(r.Status) && p.Repair:
		return warn("make sure that no other kmsctl or helm works on it", "revision %d is %s since %s; --repair ends that", r.Revision, r.Status, r.Updated.UTC().Format(time.RFC3339))
	case cluster.Pending(r.Status):
		return fail("another kmsctl or helm works on it, or died; when nobody does, install or upgrade with --repair",
			"revision %d is %s since %s", r.Revision, r.Status, r.Updated.UTC().Format(time.RFC3339))
	case r.Status == cluster.Failed:
		return warn("see `kmsctl doctor`; installing again goes on from there", "revision %d failed: %s", r.Revision, r.Note)
	}
	if has := cluster.HSMModel(r.Values); p.Model.Name != "" && has != p.Model.Name {
		return fail("go on with "+has+", or give up every key with `kmsctl uninstall --delete-secrets --delete-data` first", "%s is installed for %s: its data open with the master keys in that HSM alone, and %s has none of them", p.Release, has, p.Model.Name)
	}
	return warn("`kmsctl install` leaves it alone when nothing differs; `kmsctl upgrade` changes it", "%s is installed: revision %d, chart %s, %s", p.Release, r.Revision, r.Version, r.Status)
}

func (p Preflight) helm2(ctx context.Context) []Finding {
	names, err := p.Cluster.Helm2(ctx)
	if err != nil {
		if fault.KindOf(err) == fault.Denied {
			return skip("may not look at Tiller's records in kube-system")
		}
		return failErr(err, "")
	}
	if slices.Contains(names, p.Release) {
		return fail(cluster.TakeOver(p.Release),
			"Helm 2 has a release %s: Helm 3 would not see it and collide with its objects", p.Release)
	}
	return ok("it has no release %s", p.Release)
}

// oldProduct is the prefix of the workloads of IBM's own key-management.
const oldProduct = "key-management-"

func (p Preflight) leftovers(ctx context.Context) []Finding {
	all, err := p.Cluster.Deployments(ctx, p.Namespace)
	if err != nil {
		return failErr(err, "")
	}
	var old []string
	for _, d := range all {
		if strings.HasPrefix(d.Name, oldProduct) && d.Labels["app.kubernetes.io/instance"] != p.Release {
			old = append(old, d.Name)
		}
	}
	if len(old) == 0 {
		return ok("nothing of it in %s", p.Namespace)
	}
	slices.Sort(old)
	return warn("its keys cannot be read here: unwrap their data there first. Then delete its release, but export hsm-secret before: its upgrade and removal drop it",
		"workloads of the old product are in %s: %s", p.Namespace, strings.Join(old, ", "))
}

func (p Preflight) openshift(ctx context.Context) []Finding {
	groups, err := p.Cluster.Groups(ctx)
	if err != nil {
		return failErr(err, "")
	}
	if !slices.Contains(groups, "project.openshift.io") && !slices.Contains(groups, "security.openshift.io") {
		return skip("this is no OpenShift")
	}
	var out []Finding
	var use []cluster.Right
	for _, name := range p.SCCs {
		use = append(use, cluster.Right{Verb: "use", Group: "security.openshift.io", Resource: "securitycontextconstraints", Name: name, Namespace: p.Namespace})
	}
	denied, err := p.Cluster.Denied(ctx, use)
	if err != nil {
		return failErr(err, "the account must be allowed to create selfsubjectaccessreviews")
	}
	for _, r := range denied {
		out = append(out, bad(Fail, "install as a cluster administrator, or get the right: oc adm policy add-scc-to-user "+r.Name+" YOU -n "+p.Namespace,
			"the chart lets its pods use the SCC %s, and you may not use it: Kubernetes refuses to give away what one does not have", r.Name))
	}
	if strings.HasPrefix(p.Registry, "docker-registry.default.svc") || strings.HasPrefix(p.Registry, "image-registry.openshift-image-registry.svc") {
		route, err := p.Cluster.RegistryRoute(ctx)
		if err == nil && route == "" {
			out = append(out, bad(Warn, `oc patch configs.imageregistry.operator.openshift.io/cluster --type merge -p '{"spec":{"defaultRoute":true}}'`,
				"the internal registry %s has no route: images cannot be loaded from outside the cluster", p.Registry))
		}
	}
	return orElse(out, "the pods run under the SCC %s; set openshift: true in the values if the API group is hidden from Helm", strings.Join(p.SCCs, " and "))
}
