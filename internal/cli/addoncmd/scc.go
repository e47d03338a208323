package addoncmd

import (
	"context"
	"fmt"
	"slices"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
)

// sccGroup is the API group of security context constraints.
const sccGroup = "security.openshift.io"

// bindings are the objects that let all pods of an addon's namespace be
// admitted by its SCC, as ICP's installer did on OpenShift: a Role, since a
// constraint of the site's own has no ClusterRole, and its binding to the
// namespace's service accounts.
func (a addon) bindings(file string) ([]resource, error) {
	if a.SCC == "" {
		return nil, nil
	}
	meta := map[string]any{"name": "scc-" + a.SCC, "namespace": a.Namespace, "labels": map[string]string{"app.kubernetes.io/managed-by": "kmsctl"}}
	const group = "rbac.authorization.k8s.io"
	var out []resource
	for _, o := range []map[string]any{
		{"apiVersion": group + "/v1", "kind": "Role", "metadata": meta, "rules": []any{
			map[string]any{"apiGroups": []string{sccGroup}, "resources": []string{"securitycontextconstraints"}, "resourceNames": []string{a.SCC}, "verbs": []string{"use"}}}},
		{"apiVersion": group + "/v1", "kind": "RoleBinding", "metadata": meta,
			"roleRef":  map[string]string{"apiGroup": group, "kind": "Role", "name": "scc-" + a.SCC},
			"subjects": []any{map[string]string{"apiGroup": group, "kind": "Group", "name": "system:serviceaccounts:" + a.Namespace}}},
	} {
		text, err := yaml.Marshal(o)
		if err != nil {
			return nil, err
		}
		objects, err := kube.ReadObjects(text)
		if err != nil {
			return nil, fault.New(fault.Usage, "read", fmt.Sprintf("%s: %s.%s.scc", file, addonsKey, a.Name), err)
		}
		out = append(out, resource{Object: objects[0], file: file, scc: a.SCC})
	}
	return out, nil
}

// hasSCC says whether the cluster knows security context constraints. One that
// does not needs none.
func (j *job) hasSCC(ctx context.Context, c *kube.Cluster) (bool, error) {
	if !slices.ContainsFunc(j.resources, func(r resource) bool { return r.scc != "" }) {
		return false, nil
	}
	groups, err := c.Groups(ctx)
	if err != nil || slices.Contains(groups, sccGroup) {
		return err == nil, err
	}
	j.warn("scc is for OpenShift, and this cluster has no API group %s: nothing is bound", sccGroup)
	return false, nil
}
