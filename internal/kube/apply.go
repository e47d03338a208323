package kube

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Object is an object of any kind, as a manifest has it.
type Object struct {
	inner unstructured.Unstructured
	Text  []byte // the manifest's own text
}

// Kind is the object's kind.
func (o Object) Kind() string { return o.inner.GetKind() }

// Name is the object's name.
func (o Object) Name() string { return o.inner.GetName() }

// Namespace is the object's own, or "".
func (o Object) Namespace() string { return o.inner.GetNamespace() }

// String is kind and name, for people.
func (o Object) String() string {
	if ns := o.Namespace(); ns != "" {
		return o.Kind() + " " + ns + "/" + o.Name()
	}
	return o.Kind() + " " + o.Name()
}

// ReadObjects reads the documents of a manifest, YAML or JSON; a List gives
// its items. Errors name the document and show none of its text, which may be
// a Secret's.
func ReadObjects(text []byte) ([]Object, error) {
	var out []Object
	docs := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for n := 1; ; n++ {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		var m map[string]any
		if err := yaml.Unmarshal(doc, &m); err != nil {
			return nil, fmt.Errorf("document %d is not a YAML mapping", n)
		}
		if len(m) == 0 {
			continue // comments alone
		}
		found, err := objects(m, doc)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		out = append(out, found...)
	}
}

func objects(m map[string]any, text []byte) ([]Object, error) {
	u := unstructured.Unstructured{Object: m}
	if u.GetAPIVersion() == "" || u.GetKind() == "" {
		return nil, errors.New("it has no apiVersion and kind")
	}
	if !u.IsList() {
		if u.GetName() == "" {
			return nil, fmt.Errorf("the %s has no metadata.name", u.GetKind())
		}
		return []Object{{u, text}}, nil
	}
	var out []Object
	err := u.EachListItem(func(item runtime.Object) error {
		in, ok := item.(*unstructured.Unstructured)
		if !ok {
			return errors.New("an item of the list is no object")
		}
		text, err := yaml.Marshal(in.Object)
		if err != nil {
			return errors.New("an item of the list is no object")
		}
		found, err := objects(in.Object, text)
		out = append(out, found...)
		return err
	})
	return out, err
}

// SortObjects puts first what others need: namespaces and the definitions of
// new kinds. All else keeps its order.
func SortObjects(all []Object) {
	rank := func(o Object) int {
		switch o.Kind() {
		case "Namespace":
			return 0
		case crd:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(all, func(a, b Object) int { return rank(a) - rank(b) })
}

const crd = "CustomResourceDefinition"

// Apply applies an object by server-side apply and takes every field of it
// over. namespace is that of an object that is in one and names none.
func (c *Cluster) Apply(ctx context.Context, o Object, namespace string) (changed bool, err error) {
	fail := func(err error) (bool, error) { return false, c.fault("apply", o.String(), err) }
	r, err := c.resource(&o, namespace)
	if err != nil {
		return fail(err)
	}
	before, err := r.Get(ctx, o.Name(), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fail(err)
	}
	body, err := o.inner.MarshalJSON()
	if err != nil {
		return fail(err)
	}
	force := true
	after, err := r.Patch(ctx, o.Name(), types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: manager, Force: &force})
	if err != nil {
		return fail(err)
	}
	if o.Kind() == crd {
		err = c.established(ctx, r, o)
	}
	// An apply that changes nothing leaves the version alone.
	return before == nil || before.GetResourceVersion() != after.GetResourceVersion(), err
}

// resource finds where an object is kept, and puts it into the namespace when
// its kind has one.
func (c *Cluster) resource(o *Object, namespace string) (dynamic.ResourceInterface, error) {
	config, err := c.flags.ToRESTConfig()
	if err != nil {
		return nil, err
	}
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	mapper, err := c.flags.ToRESTMapper()
	if err != nil {
		return nil, err
	}
	gvk := o.inner.GroupVersionKind()
	m, err := mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		return nil, fault.Newf(fault.Usage, "", "", "the cluster knows no %s of %s", gvk.Kind, gvk.GroupVersion()).WithHint("correct apiVersion and kind, or apply what defines the kind first")
	}
	if err != nil {
		return nil, err
	}
	if m.Scope.Name() != meta.RESTScopeNameNamespace {
		return client.Resource(m.Resource), nil
	}
	if o.Namespace() == "" {
		o.inner.SetNamespace(namespace)
	}
	return client.Resource(m.Resource).Namespace(o.Namespace()), nil
}

// established waits until the cluster serves the kind that o defines.
func (c *Cluster) established(ctx context.Context, r dynamic.ResourceInterface, o Object) error {
	const most = 30 * time.Second
	err := wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, most, true, func(ctx context.Context) (bool, error) {
		u, err := r.Get(ctx, o.Name(), metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		return isEstablished(u.Object), nil
	})
	if err == nil {
		mapper, merr := c.flags.ToRESTMapper()
		if merr == nil {
			meta.MaybeResetRESTMapper(mapper) // it knows the new kind afterwards
		}
		return merr
	}
	return c.fault("wait for", o.String(), err)
}

func isEstablished(crd map[string]any) bool {
	all, _, err := unstructured.NestedSlice(crd, "status", "conditions")
	return err == nil && slices.ContainsFunc(all, func(v any) bool { // null at first, which is an error
		m, ok := v.(map[string]any)
		return ok && m["type"] == "Established" && m["status"] == "True"
	})
}
