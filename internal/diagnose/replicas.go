package diagnose

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Replica is what a pod of the API says of itself. Each has the clock of its
// node.
type Replica struct {
	Pod, Node string
	Health    kmsapi.Health
	Err       error // why it was not asked
}

func (r Replica) where() string {
	if r.Node == "" {
		return r.Pod
	}
	return r.Pod + " on node " + r.Node
}

// ReplicaChecks look at what the replicas of an API say. They are asked once.
func ReplicaChecks(ask func(context.Context) ([]Replica, error)) []Check {
	var once sync.Once
	var all []Replica
	var err error
	of := func(look func([]Replica) []Finding) func(context.Context) []Finding {
		return func(ctx context.Context) []Finding {
			if ask == nil {
				return skip("the API was not asked")
			}
			once.Do(func() { all, err = ask(ctx) })
			if err != nil {
				return skip("the API was not asked: %v", err)
			}
			return look(all)
		}
	}
	return []Check{{"api", of(answers)}, {"key clock", of(clocks)}, {"key use", of(use)}}
}

func answers(all []Replica) []Finding {
	var out []Finding
	for _, r := range all {
		switch {
		case r.Err != nil:
			out = append(out, bad(Warn, "see the check \"pods\"", "%s was not asked: %v", r.where(), r.Err))
		case !r.Health.Ready:
			out = append(out, bad(Fail, "what it names must come first; it goes on by itself", "%s is not ready: %s", r.where(), strings.Join(r.Health.Reasons, "; ")))
		}
	}
	return orElse(out, "all %d replicas are ready", len(all))
}

// clocks says where the life of keys does not follow the machine's clock.
func clocks(all []Replica) []Finding {
	const confirm = "or, when it is right, accept it: kmsctl clock confirm --in-cluster-service"
	var out []Finding
	for _, r := range all {
		c := r.Health.Clock
		if c == nil {
			continue
		}
		off := (time.Duration(c.AheadSeconds) * time.Second).Abs()
		switch c.State {
		case kmsapi.ClockIsAhead:
			out = append(out, bad(Fail, "set the node's clock right; "+confirm,
				"%s: the clock is %s ahead of the time that passed, so the life of keys does not follow it: nothing is purged by it, and what is not due yet is refused", r.where(), off))
		case kmsapi.ClockBehind:
			out = append(out, bad(Warn, "set the node's clock right; "+confirm, "%s: the clock is %s behind what was seen before; the life of keys goes on from there", r.where(), off))
		case kmsapi.ClockStarting:
			out = append(out, bad(Warn, "look again in three minutes", "%s: the clock is %s ahead, by what may have been a stop: the KMS looks whether another process runs", r.where(), off))
		}
	}
	return orElse(out, "the life of keys goes by clocks that agree with the time that passed")
}

// use says whether keys come near the number of texts that they may encrypt.
// Each replica knows of what all of them encrypted.
func use(all []Replica) []Finding {
	var most kmsapi.KeyUse
	for _, r := range all {
		if u := r.Health.KeyUse; u != nil && u.Furthest >= most.Furthest {
			most = *u
		}
	}
	const rotate = "rotate them: `kmsctl keys rotate`; the API's log names them, and `kmsctl keys versions` shows the counts"
	const percent = 100
	switch {
	case most.Near == 0:
		return ok("no key is near the number of texts that it may encrypt by AES-GCM")
	case most.Furthest >= 1:
		return fail(rotate, "of %d keys that are near the number of texts that they may encrypt by AES-GCM, at least one has reached it and encrypts no more", most.Near)
	}
	return warn(rotate, "%d keys have encrypted half as many texts by AES-GCM as they may, or more; the furthest has come to %.0f %% (oss.gcmLimit in the values)", most.Near, percent*most.Furthest)
}
