package cluster

import "strings"

// Right is something that an account may do, or not.
type Right struct {
	Verb, Group, Resource, Subresource string
	Name, Namespace                    string
}

// Object is what the right is about, as kubectl writes it: pods/log,
// deployments.apps.
func (r Right) Object() string {
	s := r.Resource
	if r.Group != "" {
		s += "." + r.Group
	}
	if r.Subresource != "" {
		s += "/" + r.Subresource
	}
	return s
}

// StorageClass is a way to get volumes.
type StorageClass struct {
	Name, Provisioner string
	Default           bool
}

// Node is one machine of the cluster.
type Node struct {
	Name, IP, Arch string
	Ready          bool
	Unschedulable  bool
	Labels         map[string]string
}

// Matches says whether the node has a label, given as key or key=value; every
// node matches "".
func (n Node) Matches(label string) bool {
	if label == "" {
		return true
	}
	key, value, given := strings.Cut(label, "=")
	have, ok := n.Labels[key]
	return ok && (!given || have == value)
}

// Labelled is an object by name and labels.
type Labelled struct {
	Name   string
	Labels map[string]string
}

// Container is one container of a pod.
type Container struct{ Pod, Name string }

// Job is one Job, and whether it came to its end.
type Job struct {
	Name     string
	Complete bool
	Images   []string
}
