// Package install brings a release up, changes it and takes it down, as a list
// of steps that can be run again: namespace, hsm-secret, certificates, API
// keys, release, wait. It needs a cluster and a releaser and no library of
// either.
package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/render"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Cluster is what the steps need of Kubernetes.
type Cluster interface {
	EnsureNamespace(ctx context.Context, name string) (made bool, err error)
	Secret(ctx context.Context, namespace, name string) (cluster.Secret, error)
	ApplySecret(ctx context.Context, s cluster.Secret) (changed bool, err error)
	Pods(ctx context.Context, namespace, release string) ([]cluster.Pod, error)
	Workloads(ctx context.Context, namespace, release string) ([]cluster.Workload, error)
	// Helm2 lists the releases of Helm 2.
	Helm2(ctx context.Context) ([]string, error)
	// Lock keeps others from changing the same release; the context that it
	// gives ends when the lock is lost.
	Lock(ctx context.Context, namespace, name string) (locked context.Context, unlock func(), err error)
}

// Releases reads what Helm knows of a release.
type Releases interface {
	Get(name string) (cluster.Release, error)
	History(name string) ([]cluster.Release, error)
	MarkFailed(name, why string) error
}

// Changer changes the release to the chart and values that it holds.
type Changer interface {
	// Target is the chart's version and the values that it sets.
	Target() (version string, values map[string]any)
	Install(ctx context.Context, name string) (cluster.Release, error)
	Upgrade(ctx context.Context, name string) (cluster.Release, error)
	Rollback(ctx context.Context, name string, revision int) error
	Uninstall(ctx context.Context, name string) error
}

// Options of an installation.
type Options struct {
	Release, Namespace string
	Domain             string          // of the cluster's DNS
	Service            string          // of the API
	HSMSecret          *cluster.Secret // nil: it is in the cluster already
	HSMSecretPart      bool            // what it has not stays as it is in the cluster
	HSMSecretName      string
	SANs               []string // further names of the API, beside those that its certificate has
	DropSANs           []string // names that it has and is to lose
	AdminKeyFile       string
	Repair             bool // end a pending change that nobody works on
	Atomic             bool // undo a change that fails
	Wait               bool
	Timeout            time.Duration
	// Foreign is a chart that is not ours: no Secret is made beside its
	// release, and its workloads need not carry our labels.
	Foreign bool
}

// DefaultDomain is the cluster's by the chart's own values.
const DefaultDomain = "cluster.local"

// Named gives the options the names that the chart's values say.
func (o Options) Named(values map[string]any) Options {
	o.Domain, o.Service = DefaultDomain, "kms-api"
	if d, _ := values["clusterDomain"].(string); d != "" {
		o.Domain = d
	}
	service, _ := values["service"].(map[string]any)
	if n, _ := service["name"].(string); n != "" {
		o.Service = n
	}
	return o
}

// Job has what the steps work with.
type Job struct {
	Cluster  Cluster
	Releases Releases
	Changer  Changer
	Now      func() time.Time
	// NewKey makes an API key: its text, its id and its hash.
	NewKey func() (key secret.Value, id, hash string, err error)
	// WriteFile writes a file that only its owner may read.
	WriteFile func(path string, b []byte) error
	// Line prints one line of progress.
	Line func(did string, details ...string)
}

// Result of an installation or a change.
type Result struct {
	Release      cluster.Release `json:"release"`
	Changed      bool            `json:"changed"`
	Pods         []cluster.Pod   `json:"pods"`
	AdminKeyFile string          `json:"adminKeyFile,omitempty"`
}

// Plan lists the steps in words.
func Plan(o Options, version string) []string {
	hsm := fmt.Sprintf("check that Secret %s/%s is there", o.Namespace, o.HSMSecretName)
	if o.HSMSecret != nil {
		hsm = fmt.Sprintf("apply Secret %s/%s by server-side apply, and read it back", o.Namespace, o.HSMSecretName)
	}
	key := "make an administrator's API key unless there is one; only its hash goes to the cluster"
	if o.AdminKeyFile != "" {
		key += ", the key to " + o.AdminKeyFile
	}
	plan := []string{
		"make namespace " + o.Namespace + " unless it is there",
		hsm,
		fmt.Sprintf("make a CA and the certificates of the API and etcd as Secrets %s-*, or reuse them", o.Release),
		key,
		"make the watcher's API key unless there is one",
		fmt.Sprintf("install release %s from chart %s", o.Release, version),
	}
	if o.Wait {
		plan = append(plan, fmt.Sprintf("wait until all pods are ready, %s at most", o.Timeout))
	}
	return plan
}

// Run installs, and does nothing that is done already.
func (j Job) Run(ctx context.Context, o Options) (Result, error) {
	version, values := j.Changer.Target()
	check := func(have cluster.Release) error {
		good, err := j.lastGood(o.Release)
		if err != nil {
			return err
		}
		if good.Revision == 0 {
			return j.checkHelm2(ctx, o.Release)
		}
		if err := checkChange(o, good.Values, values); err != nil {
			return err
		}
		if have.Status != cluster.Deployed {
			return fault.Newf(fault.Conflict, "install release", o.Release, "revision %d of it is %s, and revision %d was good", have.Revision, have.Status, good.Revision).
				WithHint("change it with `kmsctl upgrade`, or go back with `kmsctl rollback`")
		}
		if have.Version != version || !same(have.Values, values) {
			return fault.Newf(fault.Conflict, "install release", o.Release, "it is there: chart %s, with other values or another version than asked", have.Version).
				WithHint("change it with `kmsctl upgrade`, with the same flags")
		}
		return nil
	}
	return j.change(ctx, o, check, func(ctx context.Context, have cluster.Release) (Result, error) {
		if have.Status == cluster.Deployed {
			j.Line("unchanged", fmt.Sprintf("release %s, revision %d, chart %s", have.Name, have.Revision, have.Version))
			return Result{Release: have}, j.waitFor(ctx, o)
		}
		r, err := j.watched(ctx, o, func(ctx context.Context) (cluster.Release, error) { return j.Changer.Install(ctx, o.Release) })
		if err != nil {
			return Result{Release: r, Changed: true}, j.undo(ctx, o, 0, err)
		}
		j.Line("installed", fmt.Sprintf("release %s, revision %d, chart %s", o.Release, r.Revision, r.Version))
		return Result{Release: r, Changed: true}, nil
	})
}

// checkHelm2 stops before a release of Helm 2 is installed over, which Helm 3
// does not see. Who may not look goes on: Helm itself refuses objects that are
// another's.
func (j Job) checkHelm2(ctx context.Context, name string) error {
	names, err := j.Cluster.Helm2(ctx)
	if err != nil && fault.KindOf(err) != fault.Denied {
		return err
	}
	if !slices.Contains(names, name) {
		return nil
	}
	return fault.Newf(fault.Conflict, "install release", name, "Helm 2 has a release of this name").WithHint("%s", cluster.TakeOver(name))
}

// Upgrade changes the release that is there.
func (j Job) Upgrade(ctx context.Context, o Options) (Result, error) {
	version, values := j.Changer.Target()
	var good cluster.Release
	check := func(cluster.Release) (err error) {
		if good, err = j.lastGood(o.Release); err != nil {
			return err
		}
		if good.Revision == 0 {
			return fault.Newf(fault.NotFound, "upgrade release", o.Release, "no revision of it was ever whole").WithHint("install it with `kmsctl install`, with the same flags")
		}
		return checkChange(o, good.Values, values)
	}
	return j.change(ctx, o, check, func(ctx context.Context, have cluster.Release) (Result, error) {
		if have.Status == cluster.Deployed && have.Version == version && same(have.Values, values) {
			j.Line("unchanged", fmt.Sprintf("release %s, revision %d, chart %s", have.Name, have.Revision, have.Version))
			return Result{Release: have}, j.waitFor(ctx, o)
		}
		r, err := j.watched(ctx, o, func(ctx context.Context) (cluster.Release, error) { return j.Changer.Upgrade(ctx, o.Release) })
		if err != nil {
			return Result{Release: r, Changed: true}, j.undo(ctx, o, good.Revision, err)
		}
		j.Line("upgraded", fmt.Sprintf("release %s, revision %d, chart %s", o.Release, r.Revision, r.Version))
		return Result{Release: r, Changed: true}, nil
	})
}

// Apply installs, or upgrades what was whole once.
func (j Job) Apply(ctx context.Context, o Options) (Result, error) {
	good, err := j.lastGood(o.Release)
	if err != nil {
		return Result{}, err
	}
	if good.Revision > 0 {
		return j.Upgrade(ctx, o)
	}
	return j.Run(ctx, o)
}

// Rollback goes back to a revision, 0 for the last good one before the newest.
// The Secrets beside the release stay as they are.
func (j Job) Rollback(ctx context.Context, o Options, revision int) (Result, error) {
	o.HSMSecret = nil
	return j.locked(ctx, o, func(ctx context.Context, have cluster.Release) (Result, error) {
		to, err := j.rollbackTarget(o.Release, have, revision)
		if err != nil {
			return Result{}, err
		}
		if err := SameModel(o.Release, have.Values, to.Values); err != nil && !o.Foreign {
			return Result{}, err
		}
		if was, is := members(to.Values), members(have.Values); !o.Foreign && was != is {
			return Result{}, fault.Newf(fault.Conflict, "roll back release", o.Release, "revision %d has %s member(s) of the store, the release has %s, and no member leaves a store", to.Revision, was, is).
				WithHint("change the rest with `kmsctl upgrade`, which keeps the members")
		}
		if to.Revision == have.Revision {
			j.Line("unchanged", fmt.Sprintf("release %s is at revision %d", o.Release, to.Revision))
			return Result{Release: have}, j.waitFor(ctx, o)
		}
		_, err = j.watched(ctx, o, func(ctx context.Context) (cluster.Release, error) {
			return cluster.Release{}, j.Changer.Rollback(ctx, o.Release, to.Revision)
		})
		if err != nil {
			return Result{Changed: true}, err
		}
		j.Line("back", fmt.Sprintf("release %s at what revision %d was, chart %s", o.Release, to.Revision, to.Version))
		now, err := j.Releases.Get(o.Release)
		return Result{Release: now, Changed: true}, err
	})
}

func (j Job) rollbackTarget(name string, have cluster.Release, revision int) (cluster.Release, error) {
	all, err := j.Releases.History(name)
	if err != nil {
		return cluster.Release{}, err
	}
	var known []string
	for _, r := range slices.Backward(all) {
		if r.Revision == revision || (revision == 0 && r.Revision < have.Revision && (r.Status == cluster.Deployed || r.Status == cluster.Superseded)) {
			return r, nil
		}
		known = append(known, fmt.Sprintf("%d (%s)", r.Revision, r.Status))
	}
	if revision == 0 {
		return cluster.Release{}, fault.Newf(fault.NotFound, "roll back release", name, "there is no good revision before %d", have.Revision).WithHint("revisions: %s", strings.Join(known, ", "))
	}
	return cluster.Release{}, fault.Newf(fault.NotFound, "roll back release", name, "there is no revision %d", revision).WithHint("revisions: %s", strings.Join(known, ", "))
}

// checkChange stops what would leave the data behind or could not be undone.
func checkChange(o Options, was, will map[string]any) error {
	if o.Foreign {
		return nil
	}
	if err := SameModel(o.Release, was, will); err != nil {
		return err
	}
	if a, b := members(was), members(will); a != b && o.Atomic {
		return fault.Usagef("--atomic: the store is to have %s members and has %s, and no member leaves a store again", b, a).
			WithHint("grow the store by an upgrade of its own, without --atomic; when it stops half-way, the same upgrade goes on")
	}
	return nil
}

// SameModel refuses another model of HSM for a release that was whole: whatever
// its store holds opens with the master keys in the HSM that it began with.
func SameModel(release string, was, will map[string]any) error {
	a, b := cluster.HSMModel(was), cluster.HSMModel(will)
	if a == b {
		return nil
	}
	return fault.Newf(fault.Conflict, "switch release", release, "its data open with the master keys in its %s HSM alone, and %s has none of them", a, b).
		WithHint("go on with %s; or give up every key: `kmsctl hsm clear --in-cluster-service`, `kmsctl uninstall`, then `kmsctl install --model %s`; where the old HSM does not answer any more, `kmsctl uninstall --delete-store` without a clearing", a, b)
}

// members is how many members a store has by these values.
func members(values map[string]any) string {
	storage, _ := values["storage"].(map[string]any)
	if n := storage["replicas"]; n != nil {
		return fmt.Sprint(n)
	}
	return "1"
}

// lastGood is the newest revision that was whole once; revision 0 when none was.
func (j Job) lastGood(name string) (cluster.Release, error) {
	all, err := j.Releases.History(name)
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return cluster.Release{}, err
	}
	for _, r := range slices.Backward(all) {
		if r.Status == cluster.Deployed || r.Status == cluster.Superseded {
			return r, nil
		}
	}
	return cluster.Release{}, nil
}

// undo goes back to the last good revision after a change that failed, if
// asked; without one it takes the release away.
func (j Job) undo(ctx context.Context, o Options, good int, failed error) error {
	if !o.Atomic {
		return failed
	}
	// The time of the change is up; going back has its own.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.Timeout)
	defer cancel()
	var err error
	did := "the release was taken away again"
	if good > 0 {
		did = fmt.Sprintf("rolled back to revision %d", good)
		err = j.Changer.Rollback(ctx, o.Release, good)
	} else {
		err = j.Changer.Uninstall(ctx, o.Release)
	}
	if err != nil {
		return errors.Join(failed, fmt.Errorf("and going back failed: %w", err))
	}
	j.Line("undone", did)
	var f *fault.Error
	if errors.As(failed, &f) {
		return fault.New(f.Kind, f.Op, f.Object, fmt.Errorf("%w (%s)", f.Err, did)).WithHint("%s", f.Hint)
	}
	return fmt.Errorf("%w (%s)", failed, did)
}

// change locks the release, stops what check refuses before anything is done,
// sees to the Secrets, and changes the release.
func (j Job) change(ctx context.Context, o Options, check func(have cluster.Release) error, do func(context.Context, cluster.Release) (Result, error)) (Result, error) {
	if err := checkSANs(o); err != nil {
		return Result{}, err
	}
	if err := j.checkAdminKey(ctx, o); err != nil {
		return Result{}, err
	}
	return j.locked(ctx, o, func(ctx context.Context, have cluster.Release) (Result, error) {
		if err := check(have); err != nil {
			return Result{}, err
		}
		if err := j.prepare(ctx, o); err != nil {
			return Result{}, err
		}
		return do(ctx, have)
	})
}

// locked holds the lock of the release while do changes it, and then looks at
// its pods.
func (j Job) locked(ctx context.Context, o Options, do func(context.Context, cluster.Release) (Result, error)) (Result, error) {
	made, err := j.Cluster.EnsureNamespace(ctx, o.Namespace)
	if err != nil {
		return Result{}, err
	}
	if made {
		j.Line("made", "namespace "+o.Namespace)
	}
	ctx, unlock, err := j.Cluster.Lock(ctx, o.Namespace, o.Release+"-kmsctl")
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	have, err := j.current(o)
	if err != nil {
		return Result{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	res, err := do(ctx, have)
	res.AdminKeyFile = o.AdminKeyFile
	if err != nil {
		return res, err
	}
	res.Pods, err = j.Cluster.Pods(context.WithoutCancel(ctx), o.Namespace, o.Release)
	return res, err
}

// current finds the release, and stops at one that somebody works on.
func (j Job) current(o Options) (cluster.Release, error) {
	have, err := j.Releases.Get(o.Release)
	if fault.KindOf(err) == fault.NotFound {
		return cluster.Release{}, nil
	}
	if err != nil || !cluster.Pending(have.Status) {
		return have, err
	}
	age := j.Now().Sub(have.Updated).Round(time.Second)
	if !o.Repair {
		return have, fault.Newf(fault.Conflict, "change release", o.Release, "revision %d is %s since %s (%s ago)", have.Revision, have.Status, have.Updated.Format(time.RFC3339), age).
			WithHint("helm works on it, or a kmsctl or helm that did so died; when nobody does, run the same command with --repair")
	}
	if err := j.Releases.MarkFailed(o.Release, fmt.Sprintf("was %s; ended by kmsctl --repair", have.Status)); err != nil {
		return have, err
	}
	j.Line("repaired", fmt.Sprintf("release %s, revision %d, was %s", o.Release, have.Revision, have.Status))
	have.Status = cluster.Failed
	return have, nil
}

// prepare does all that comes before the release itself.
func (j Job) prepare(ctx context.Context, o Options) error {
	if o.Foreign {
		return nil
	}
	if err := j.hsmSecret(ctx, o); err != nil {
		return err
	}
	if err := j.certificates(ctx, o); err != nil {
		return err
	}
	return errors.Join(j.adminKey(ctx, o), j.watcherKey(ctx, o))
}

func (j Job) hsmSecret(ctx context.Context, o Options) error {
	object := o.Namespace + "/" + o.HSMSecretName
	if o.HSMSecret == nil {
		if _, err := j.Cluster.Secret(ctx, o.Namespace, o.HSMSecretName); err != nil {
			var f *fault.Error
			if errors.As(err, &f) && f.Kind == fault.NotFound {
				return f.WithHint("give it with --secret FILE, or the HSM password with --hsm-password-file")
			}
			return err
		}
		j.Line("found", "Secret "+object)
		return nil
	}
	want, err := j.wanted(ctx, o)
	if err != nil {
		return err
	}
	changed, err := j.Cluster.ApplySecret(ctx, want)
	if err != nil {
		return err
	}
	j.report(changed, "Secret "+object+", verified")
	if _, err := j.Releases.Get(o.Release); changed && err == nil {
		// A pod that is logged in goes on with what it has.
		j.Line("note", "running pods read the new hsm-secret at their next login; to have them do so now: kubectl rollout restart statefulset/"+o.Release+"-oss -n "+o.Namespace)
	}
	return nil
}

// wanted is hsm-secret as it is to be: a values file may have no more than its
// password, and what the HSM's model needs beside that is in the cluster.
func (j Job) wanted(ctx context.Context, o Options) (cluster.Secret, error) {
	want := *o.HSMSecret
	if !o.HSMSecretPart {
		return want, nil
	}
	have, err := j.Cluster.Secret(ctx, o.Namespace, o.HSMSecretName)
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return want, err
	}
	all := maps.Clone(have.Data)
	if all == nil {
		all = map[string][]byte{}
	}
	maps.Copy(all, want.Data)
	want.Data = all
	_, values := j.Changer.Target()
	m, _ := hsm.Lookup(cluster.HSMModel(values)) // the values were checked
	s, err := render.SecretFromData(o.Namespace, want.Data)
	if err == nil && m.NeedsCerts && (len(s.ServerCA) == 0 || len(s.Clients) == 0) {
		err = fmt.Errorf("the model %s needs certificates, and neither the settings nor the cluster have them", m.Name)
	}
	if err != nil {
		return want, fault.New(fault.Usage, "apply Secret", o.Namespace+"/"+o.HSMSecretName, err).WithHint("give the whole of it with --secret FILE, made by `kmsctl render secret`")
	}
	return want, nil
}

func (j Job) report(changed bool, what string) {
	if changed {
		j.Line("applied", what)
		return
	}
	j.Line("unchanged", what)
}

// AdminSecret holds the hash of the first administrator's key. It and the other
// Secrets stand beside the release.
func AdminSecret(release string) string   { return release + "-admin-key-hash" }
func watcherSecret(release string) string { return release + "-watcher-key" }

// SecretNames lists all Secrets that stand beside a release.
func SecretNames(release, hsmSecret string) []string {
	out := []string{hsmSecret, CASecret(release), AdminSecret(release), watcherSecret(release)}
	for _, l := range Leaves(release, "", "", "") {
		out = append(out, l.Secret)
	}
	return out
}

// checkAdminKey stops before anything is done when the first administrator's
// key would be lost.
func (j Job) checkAdminKey(ctx context.Context, o Options) error {
	if o.Foreign {
		return nil
	}
	_, err := j.Cluster.Secret(ctx, o.Namespace, AdminSecret(o.Release))
	switch {
	case err == nil:
		return nil
	case fault.KindOf(err) != fault.NotFound:
		return err
	case o.AdminKeyFile == "":
		return fault.Usagef("--admin-key-file: missing: the first installation makes an administrator's API key, and only its hash is kept").
			WithHint("name a file that does not exist yet; it is written with mode 0600")
	}
	if _, err := os.Stat(o.AdminKeyFile); err == nil {
		return fault.Newf(fault.Conflict, "write the administrator's API key to", o.AdminKeyFile, "the file is there already").
			WithHint("name another file, or move this one away if its key is of no use any more")
	}
	return nil
}

func (j Job) adminKey(ctx context.Context, o Options) error {
	name := AdminSecret(o.Release)
	if _, err := j.Cluster.Secret(ctx, o.Namespace, name); fault.KindOf(err) != fault.NotFound {
		return err // there already, or a fault
	}
	key, hash, err := j.newKey()
	if err != nil {
		return err
	}
	defer key.Zero()
	// The file first: a key whose hash is registered and whose text is lost
	// would lock everybody out.
	if err := j.WriteFile(o.AdminKeyFile, key.Reveal()); err != nil {
		return err
	}
	if _, err := j.Cluster.ApplySecret(ctx, cluster.Secret{Namespace: o.Namespace, Name: name, Labels: labels(o), Data: map[string][]byte{"admin.json": hash}}); err != nil {
		return errors.Join(err, os.Remove(o.AdminKeyFile))
	}
	j.Line("written", "the administrator's API key to "+o.AdminKeyFile)
	return nil
}

func (j Job) watcherKey(ctx context.Context, o Options) error {
	name := watcherSecret(o.Release)
	if _, err := j.Cluster.Secret(ctx, o.Namespace, name); fault.KindOf(err) != fault.NotFound {
		return err // there already, or a fault
	}
	key, hash, err := j.newKey()
	if err != nil {
		return err
	}
	defer key.Zero()
	_, err = j.Cluster.ApplySecret(ctx, cluster.Secret{Namespace: o.Namespace, Name: name, Labels: labels(o),
		Data: map[string][]byte{"api-key": key.Reveal(), "hash.json": hash}})
	return err
}

// newKey makes an API key and what the API is told of it.
func (j Job) newKey() (secret.Value, []byte, error) {
	key, id, hash, err := j.NewKey()
	if err != nil {
		return key, nil, err
	}
	b, err := json.Marshal(struct{ ID, Hash string }{id, hash})
	return key, b, err
}

func labels(o Options) map[string]string {
	return map[string]string{"app.kubernetes.io/name": "key-management-hsm", "app.kubernetes.io/instance": o.Release, "app.kubernetes.io/managed-by": "kmsctl"}
}

// same compares values as Helm keeps them, in JSON.
func same(a, b map[string]any) bool {
	x, err1 := normal(a)
	y, err2 := normal(b)
	return err1 == nil && err2 == nil && reflect.DeepEqual(x, y)
}

func normal(v map[string]any) (any, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var out map[string]any
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, err
	}
	if out == nil {
		out = map[string]any{}
	}
	return out, nil
}
