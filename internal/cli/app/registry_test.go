package app

import "testing"

// TestPlaces holds where images go, and what a chart's values get, to one rule,
// also where a registry allows other levels.
func TestPlaces(t *testing.T) {
	for _, c := range []struct{ registry, namespace, rule, image, repository, value string }{
		{"r:5000", "", defaultMap, "org/app", "org/app", "r:5000"},
		{"mycluster.icp:8500", "kube-system", defaultMap, "org/app", "kube-system/org/app", "mycluster.icp:8500/kube-system"},
		{"mycluster.icp:8500/ibmcom", "", defaultMap, "ibmcom/kms-oss", "ibmcom/kms-oss", "mycluster.icp:8500/ibmcom"},
		{"docker-registry.default.svc:5000/ibmcom", "", defaultMap, "kms-oss", "ibmcom/kms-oss", "docker-registry.default.svc:5000/ibmcom"},
		{"r:5000", "kms", defaultMap, "other.example:5000/org/app", "kms/org/app", "r:5000/kms"},
		// OpenShift's: a project and a name, whatever path --registry has.
		{"r:5000/x", "kms", "{namespace}/{name}", "org/app", "kms/app", "r:5000/kms"},
		{"r:5000", "kms", "{namespace}/{flat}", "org/app", "kms/org-app", "r:5000/kms"},
		{"r:5000/x", "kms", "{prefix}/{namespace}-{name}", "org/app", "x/kms-app", "r:5000/x"},
		{"r:5000", "kms", "{name}", "org/app", "app", "r:5000"},
		{"r:5000", "kms", "fixed/{path}", "org/app", "fixed/org/app", "r:5000/fixed"},
	} {
		f := &DeliveryFlags{Registry: c.registry, Namespace: c.namespace, Map: c.rule}
		if got := f.Repository(c.image); got != c.repository {
			t.Errorf("%s, %s, %s: %s goes to %s, want %s", c.registry, c.namespace, c.rule, c.image, got, c.repository)
		}
		if got := f.RegistryValue(); got != c.value {
			t.Errorf("%s, %s, %s: values get %s, want %s", c.registry, c.namespace, c.rule, got, c.value)
		}
	}
}
