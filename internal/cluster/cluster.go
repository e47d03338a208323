// Package cluster has the words that the jobs and their tools share about a
// Kubernetes cluster and a Helm release, so that the jobs need no heavy
// library. Plain data, standard library only.
package cluster

import "time"

// Secret is a Secret to apply.
type Secret struct {
	Namespace, Name string
	Type            string // Opaque when empty
	Labels          map[string]string
	Data            map[string][]byte
}

// Pod is one pod of a release.
type Pod struct {
	Name  string `json:"name"`
	Node  string `json:"node,omitempty"`
	Ready bool   `json:"ready"`
	Phase string `json:"phase"`
	// Restarts of all containers together.
	Restarts int32 `json:"restarts"`
	// Trouble is empty while nothing is wrong.
	Trouble *Trouble `json:"trouble,omitempty"`
}

// Trouble says what is wrong with a pod. Final means that waiting alone will
// not cure it.
type Trouble struct {
	Pod       string `json:"pod"`
	Container string `json:"container,omitempty"`
	Reason    string `json:"reason"`            // as Kubernetes calls it: ImagePullBackOff, Unschedulable
	Message   string `json:"message,omitempty"` // the event's or the container's own words
	Log       string `json:"log,omitempty"`     // the container's last line
	Cure      string `json:"cure,omitempty"`
	Final     bool   `json:"-"`
}

// TakeOver is the cure for a release of Helm 2 that is in the way.
func TakeOver(release string) string {
	return "take it over with Helm's own plugin (helm 2to3 convert " + release + "), or delete it with Helm 2; export hsm-secret first"
}

// NotReady is the reason of a pod that runs and says itself that it is not
// ready.
const NotReady = "NotReady"

// Statuses of a release, as Helm calls them.
const (
	Deployed        = "deployed"
	Superseded      = "superseded"
	Failed          = "failed"
	PendingInstall  = "pending-install"
	PendingUpgrade  = "pending-upgrade"
	PendingRollback = "pending-rollback"
	Uninstalling    = "uninstalling"
)

// Pending says whether a status means that a change is under way, or that its
// maker died.
func Pending(status string) bool {
	switch status {
	case PendingInstall, PendingUpgrade, PendingRollback, Uninstalling:
		return true
	}
	return false
}

// Release is one revision of a Helm release.
type Release struct {
	Name       string         `json:"name"`
	Namespace  string         `json:"namespace"`
	Revision   int            `json:"revision"`
	Status     string         `json:"status"`
	Chart      string         `json:"chart"`
	Version    string         `json:"version"`
	AppVersion string         `json:"appVersion"`
	Updated    time.Time      `json:"updated"`
	Note       string         `json:"note,omitempty"` // Helm's description of what happened
	Values     map[string]any `json:"-"`              // what the user set
	Manifest   string         `json:"-"`
}

// HSMModel is the model of the HSM by the values of a release; the chart's own
// is SoftHSM.
func HSMModel(values map[string]any) string {
	hsm, _ := values["hsm"].(map[string]any)
	if m, _ := hsm["hsm_model"].(string); m != "" {
		return m
	}
	return "softhsm"
}

// Workload is one Deployment or StatefulSet of a release.
type Workload struct {
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Want    int32  `json:"want"`
	Ready   int32  `json:"ready"`
	Updated int32  `json:"updated"`
	Seen    bool   `json:"-"` // its controller has seen the newest version
}

// Whole says whether every replica runs the newest version and is ready.
func (w Workload) Whole() bool { return w.Seen && w.Ready == w.Want && w.Updated == w.Want }

// Annotated is a Secret with an annotation that somebody looks for.
type Annotated struct {
	Namespace, Name string
	Value           string // the annotation's
	Has             bool   // the Secret has a data entry of that name, not empty
}

// Event tells people about an object of the cluster.
type Event struct {
	Namespace, Kind, Name string
	Warning               bool
	Reason, Message       string
}

// Store is how the members of a release's store stand.
type Store struct {
	// Quorum says whether most voters are there and agree: without, nothing is
	// written, and nothing read that must be new.
	Quorum  bool          `json:"quorum"`
	Members []StoreMember `json:"members"`
}

// States of a member of a store.
const (
	MemberHealthy = "healthy" // it answers
	MemberEmpty   = "empty"   // the store knows it, and its folder has lost its data
	MemberJoining = "joining" // it has no data, and the store does not know it (any more)
	MemberAway    = "away"    // it does not answer
)

// Roles of a member of a store. One that is joining has none.
const (
	Voter   = "voter"
	Learner = "learner" // until it has everything
)

// StoreMember is one member of a store.
type StoreMember struct {
	Name     string   `json:"name"`
	ID       string   `json:"id,omitempty"` // as etcd's own tools write it
	Role     string   `json:"role,omitempty"`
	State    string   `json:"state"`
	Leader   bool     `json:"leader"`
	Bytes    int64    `json:"dbBytes"`
	InUse    int64    `json:"dbBytesInUse"`
	Quota    int64    `json:"dbBytesQuota"`
	Revision int64    `json:"revision"`
	Lag      int64    `json:"lag"` // changes that are agreed on and it has not made
	Alarms   []string `json:"alarms,omitempty"`
	Why      string   `json:"why,omitempty"` // it is away
}

// NoSpace is the alarm of a member whose file has reached its quota.
const NoSpace = "NOSPACE"

// Member finds a member by its name.
func (s Store) Member(name string) (StoreMember, bool) {
	for _, m := range s.Members {
		if m.Name == name {
			return m, true
		}
	}
	return StoreMember{}, false
}

// Votes says that a member is there and votes.
func (m StoreMember) Votes() bool { return m.State == MemberHealthy && m.Role == Voter }

// Well says that a member is as it should be.
func (m StoreMember) Well() bool { return m.Votes() && len(m.Alarms) == 0 }

// Whole says whether every member is as it should be.
func (s Store) Whole() bool {
	for _, m := range s.Members {
		if !m.Well() {
			return false
		}
	}
	return s.Quorum
}
