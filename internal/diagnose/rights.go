package diagnose

import (
	"context"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/cluster"
)

// need is what must be allowed of some kinds of object, in a namespace or,
// with none, in the whole cluster.
type need struct {
	namespace, verbs, group string
	resources               []string
}

// needs are what an installation does itself, and what its chart lets the pods
// do: Kubernetes refuses to give away a right that one does not have.
func (p Preflight) needs() []need {
	const (
		all    = "get list create patch delete"
		filled = "get list watch update" // Secrets, by the watcher
		rbac   = "rbac.authorization.k8s.io"
	)
	own := p.Namespace
	out := []need{
		{own, "get list watch create update patch delete", "", []string{"secrets"}},
		{own, all, "", []string{"configmaps", "services", "serviceaccounts", "persistentvolumeclaims"}},
		{own, all, "apps", []string{"deployments", "statefulsets"}},
		{own, all, rbac, []string{"roles", "rolebindings"}},
		{own, "get create update delete", "coordination.k8s.io", []string{"leases"}},
		{own, "get list create patch", "", []string{"events"}},
		{own, "get list", "", []string{"pods"}},
		{own, "get", "", []string{"pods/log"}},
		{own, "list", "apps", []string{"replicasets"}},
	}
	if p.Replicated {
		out = append(out, need{own, all, "policy", []string{"poddisruptionbudgets"}})
	}
	for _, other := range p.Watched {
		if other != own {
			out = append(out, need{other, "get create patch delete", rbac, []string{"roles", "rolebindings"}}, need{other, filled, "", []string{"secrets"}})
		}
	}
	if p.WatchAll {
		out = append(out, need{"", filled, "", []string{"secrets"}})
	}
	if p.AccountTokens {
		out = append(out, need{"", "create", "authentication.k8s.io", []string{"tokenreviews"}})
	}
	if p.WatchAll || p.AccountTokens {
		out = append(out, need{"", "get create patch delete", rbac, []string{"clusterroles", "clusterrolebindings"}})
	}
	return out
}

func (n need) rights() (out []cluster.Right) {
	for _, r := range n.resources {
		resource, sub, _ := strings.Cut(r, "/")
		for _, verb := range strings.Fields(n.verbs) {
			out = append(out, cluster.Right{Verb: verb, Group: n.group, Resource: resource, Subresource: sub, Namespace: n.namespace})
		}
	}
	return out
}

func (p Preflight) rights(ctx context.Context) []Finding {
	var need []cluster.Right
	for _, n := range p.needs() {
		need = append(need, n.rights()...)
	}
	denied, err := p.Cluster.Denied(ctx, need)
	if err != nil {
		return failErr(err, "the account must be allowed to create selfsubjectaccessreviews")
	}
	verbs := map[string][]string{}
	var objects []string
	for _, r := range denied {
		o := r.Object() + " in the whole cluster"
		if r.Namespace != "" {
			o = r.Object() + " in namespace " + r.Namespace
		}
		if verbs[o] == nil {
			objects = append(objects, o)
		}
		verbs[o] = append(verbs[o], r.Verb)
	}
	slices.Sort(objects)
	var out []Finding
	for _, o := range objects {
		out = append(out, bad(Fail, "have the cluster's administrator bind a Role with these verbs to your account, or use another --context", "may not %s %s", strings.Join(verbs[o], ", "), o))
	}
	return orElse(out, "all %d that an installation in %s needs", len(need), p.Namespace)
}
