package diagnose

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pattern"
)

// Running is what the checks of a running release ask beside those of a
// preflight.
type Running interface {
	Cluster
	Pods(ctx context.Context, namespace, release string) ([]cluster.Pod, error)
	PodsNamed(ctx context.Context, namespace, prefix string) ([]cluster.Pod, error)
	Jobs(ctx context.Context, namespace, prefix string) ([]cluster.Job, error)
}

// Doctor says what is looked at after an installation. Its Preflight has the
// settings of the release itself.
type Doctor struct {
	Preflight
	Running Running
	// Store asks the release's store how its members stand.
	Store func(ctx context.Context) (cluster.Store, error)
	// Old finds the release of IBM's own product, key-management.
	Old func(ctx context.Context) (cluster.Release, error)
	// Replicas asks the pods of the API.
	Replicas func(ctx context.Context) ([]Replica, error)
}

// Checks lists the checks of a doctor.
func (d Doctor) Checks() []Check {
	api := ReplicaChecks(d.Replicas)
	return append([]Check{
		{"cluster", d.cluster},
		{"clock", d.withCluster(d.clock)},
		{"release", d.withCluster(d.installed)},
		{"hsm secret", d.withCluster(d.mounted)},
		{"hsm certificates", d.certificates},
		{"hsm reachable", d.reachable},
		{"pods", d.withCluster(d.pods)},
		{"namespace", d.withCluster(d.namespace)},
		{"store", d.withCluster(d.store)},
		{"import of keys", d.imports},
		{"old product", d.withCluster(d.old)},
		{"old api key", d.withCluster(d.oldKey)},
		{"old cleanup job", d.withCluster(d.oldJob)},
		{"old pods", d.withCluster(d.oldPods)},
	}, api...)
}

func (d Doctor) installed(ctx context.Context) []Finding {
	r, err := d.Current(ctx)
	switch {
	case err != nil && fault.KindOf(err) == fault.NotFound:
		return fail("install it with `kmsctl install`, or look in another --namespace", "there is no release %s in %s", d.Release, d.Namespace)
	case err != nil:
		return failErr(err, "")
	case cluster.Pending(r.Status):
		return fail("when nobody works on it: `kmsctl upgrade --repair`", "revision %d is %s since %s: a kmsctl or helm works on it, or died", r.Revision, r.Status, r.Updated.UTC().Format(time.RFC3339))
	case r.Status != cluster.Deployed:
		// The old product's upgrade failed when it was given no overrides.
		return fail("give the overrides file again (--values), or go back with `kmsctl rollback`", "revision %d is %s: %s", r.Revision, r.Status, r.Note)
	}
	return ok("revision %d, chart %s, deployed", r.Revision, r.Version)
}

func (d Doctor) mounted(ctx context.Context) []Finding {
	s, err := d.Cluster.Secret(ctx, d.Namespace, "hsm-secret")
	if err != nil {
		if fault.KindOf(err) == fault.NotFound {
			return fail("make it with `kmsctl render secret`, then `kmsctl install --secret`; the old product's upgrade removes it: export it before",
				"Secret %s/hsm-secret is not there: pods that mount it stay in ContainerCreating", d.Namespace)
		}
		return failErr(err, "")
	}
	if len(s.Data["hsm-pass"]) == 0 {
		return fail("make it with `kmsctl render secret`", "Secret %s/hsm-secret has no hsm-pass", d.Namespace)
	}
	return d.secret(ctx)
}

// symptom maps what a pod shows to its cause.
type symptom struct {
	pod, text   func() *regexp.Regexp
	cause, cure string
}

var symptoms = []symptom{
	{pattern.Lazy(`middleware|-oss-`), pattern.Lazy(`(?i)hsm-secret.*not found|FailedMount.*hsm-secret`), "hsm-secret is not there", "make it with `kmsctl render secret`, then `kmsctl install --secret`"},
	{pattern.Lazy(`-pep`), pattern.Lazy(`CreateContainerConfigError`), "the value of kms-api-key is not valid", "put a real API key into key-management-secret, and start the secret watcher again"},
	{pattern.Lazy(``), pattern.Lazy(`(?i)no reachable servers`), "the node cannot look up services", "see that the cluster's DNS pods are ready and reached from that node"},
	{pattern.Lazy(``), pattern.Lazy(`CKR_PIN_INCORRECT|CKR_PIN_LOCKED|refused before`), "the HSM refused the password", "put the right one into hsm-secret; it is tried once, not again, until it changes"},
	{pattern.Lazy(`middleware|-oss-`), pattern.Lazy(`CKR_DEVICE|CKR_TOKEN_NOT_PRESENT|CKR_GENERAL_ERROR|connection refused|i/o timeout`), "the HSM does not answer: calls end with 503", "see the check \"hsm reachable\", and the appliance's own state"},
}

func explain(p cluster.Pod) Finding {
	t := p.Trouble
	if t == nil {
		return bad(Warn, "wait a little; see: kubectl describe pod "+p.Name, "%s is not ready yet (%s)", p.Name, p.Phase)
	}
	text := strings.Join([]string{t.Reason, t.Message, t.Log}, " ")
	where := p.Name
	if p.Node != "" {
		where += " on node " + p.Node
	}
	if t.Container != "" {
		where += ", container " + t.Container
	}
	said := t.Reason
	for _, s := range []string{t.Message, t.Log} {
		if s != "" {
			said += ": " + s
		}
	}
	for _, s := range symptoms {
		if s.pod().MatchString(p.Name) && s.text().MatchString(text) {
			return bad(Fail, s.cure, "%s: %s (%s)", where, s.cause, said)
		}
	}
	return bad(Fail, firstOf(t.Cure, "see: kubectl describe pod "+p.Name), "%s: %s", where, said)
}

func (d Doctor) pods(ctx context.Context) []Finding {
	pods, err := d.Running.Pods(ctx, d.Namespace, d.Release)
	if err != nil {
		return failErr(err, "")
	}
	if len(pods) == 0 {
		return fail("see the check \"release\"", "the release has no pods")
	}
	var out []Finding
	const many = 5
	for _, p := range pods {
		switch {
		case !p.Ready:
			out = append(out, explain(p))
		case p.Restarts >= many:
			out = append(out, bad(Warn, "see its log: kubectl logs --previous "+p.Name+" -n "+d.Namespace, "%s is ready, but started again %d times", p.Name, p.Restarts))
		}
	}
	return orElse(out, "all %d are ready", len(pods))
}

func (d Doctor) imports(context.Context) []Finding {
	switch d.Model.Name {
	case "":
		return skip("the HSM model is not known")
	case "softhsm":
		return warn("see `kmsctl hsm probe`: it tells whether this token takes root keys from outside", "with SoftHSM the manual's product cannot import root keys")
	}
	return ok("the model takes root keys from outside")
}

// rotateSince is the version of the old chart that can rotate keys.
var rotateSince = [2]int{4, 1}

func (d Doctor) old(ctx context.Context) []Finding {
	if d.Old == nil {
		return skip("Helm's records are not known")
	}
	r, err := d.Old(ctx)
	if err != nil {
		if fault.KindOf(err) == fault.NotFound {
			return d.leftovers(ctx)
		}
		return failErr(err, "")
	}
	m := versionForm().FindStringSubmatch(r.Version)
	if m == nil {
		return warn("", "key-management %s is beside this release", r.Version)
	}
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	if err1 == nil && err2 == nil && (major < rotateSince[0] || major == rotateSince[0] && minor < rotateSince[1]) {
		return fail("upgrade the chart key-management to 4.1.0 or newer", "key-management %s answers 501 to rotate", r.Version)
	}
	return ok("key-management %s, beside this release", r.Version)
}

// placeholder is what the old product's upgrade writes over its API key.
const placeholder = "default_kms_api_key"

func (d Doctor) oldKey(ctx context.Context) []Finding {
	s, err := d.Cluster.Secret(ctx, d.Namespace, "key-management-secret")
	switch {
	case err != nil && fault.KindOf(err) == fault.NotFound:
		return skip("there is no key-management-secret")
	case err != nil:
		return failErr(err, "")
	case strings.TrimSpace(string(s.Data["kms-api-key"])) == placeholder:
		return fail("put a real API key there and delete the pep pod", "kms-api-key in key-management-secret is the placeholder that an upgrade writes: calls end with 400, API key could not be found")
	}
	return ok("key-management-secret has a key of its own")
}

func (d Doctor) oldJob(ctx context.Context) []Finding {
	jobs, err := d.Running.Jobs(ctx, d.Namespace, "key-management-hsm-cleanup")
	if err != nil {
		if fault.KindOf(err) == fault.Denied {
			return skip("may not look at Jobs")
		}
		return failErr(err, "")
	}
	if len(jobs) == 0 {
		return skip("there is no key-management-hsm-cleanup")
	}
	for _, j := range jobs {
		if !j.Complete {
			return fail(fmt.Sprintf("correct the repository of the storage image in the values, delete the Job (kubectl delete job %s -n %s) and install again", j.Name, d.Namespace),
				"Job %s has not come to its end, with image %s: every key operation ends with 500", j.Name, strings.Join(j.Images, ", "))
		}
	}
	return ok("it is complete")
}

func (d Doctor) oldPods(ctx context.Context) []Finding {
	pods, err := d.Running.PodsNamed(ctx, d.Namespace, oldProduct)
	if err != nil {
		return failErr(err, "")
	}
	own, err := d.Running.Pods(ctx, d.Namespace, d.Release)
	if err != nil {
		return failErr(err, "")
	}
	ours := map[string]bool{}
	for _, p := range own {
		ours[p.Name] = true
	}
	n := 0
	var out []Finding
	for _, p := range pods {
		if ours[p.Name] {
			continue
		}
		n++
		if !p.Ready {
			out = append(out, explain(p))
		}
	}
	if n == 0 {
		return skip("there are none of the old product")
	}
	return orElse(out, "all %d are ready", n)
}
