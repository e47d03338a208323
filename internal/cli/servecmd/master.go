package servecmd

import (
	"context"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/kms"
)

// rotationEvery is how often a process looks whether a change of the master
// keys was left by another.
const rotationEvery = 10 * time.Second

func (k *KMS) rotation() *kms.Rotation {
	r := kms.Rotation{Store: k.store, Uses: k.uses, Plain: k.plain, HSM: k.Token, Name: k.Name, Now: k.Now, Masters: kms.NewMasters(k.plain, k.Opened.Epoch, k.openMasters)}
	if next := k.Token.Next(); next != nil {
		r.Next = next
	}
	r.Tokens = func() (all []kms.MasterToken) {
		for _, m := range k.Token.Maker().Members() {
			all = append(all, m)
		}
		return all
	}
	r.Note = func(ctx context.Context, action, by, detail string) error {
		return k.audit.Append(ctx, audit.Event{Action: action, Outcome: "success", Status: http.StatusNoContent, Principal: by, Detail: detail})
	}
	return kms.NewRotation(r)
}

// openMasters opens on every member what the installation names by now. A
// member that is away opens it when it comes back. While keys can move to a
// second token, each call is sent to the one that it is for from then on.
func (k *KMS) openMasters(ctx context.Context) (epoch kms.Epoch, err error) {
	members, next := k.Token.Members(), k.Token.Next()
	if next != nil {
		members = slices.Concat(members, next.Members())
	}
	opened := false
	for _, m := range members {
		e, merr := k.again.open(ctx, m)
		if merr != nil {
			err = merr
			continue
		}
		epoch, opened = e, true
	}
	switch {
	case !opened:
		return epoch, err
	case next == nil:
		return epoch, nil
	}
	stands, err := kms.Stands(ctx, k.plain)
	if err != nil {
		return epoch, err
	}
	k.Token.Moved(stands.Serial, stands.Since, stands.Version)
	return epoch, k.audit.Resign(ctx, k.Token.Maker().Sign, stands.PublicKey)
}

// work begins to work on changes of the master keys, and to forget keys that
// any process takes out of use.
func (k *KMS) work(ctx context.Context) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	forgetting := kms.NewForgetting(k.store, k.Token)
	k.store.Tell(forgetting.Changed)
	var working sync.WaitGroup
	working.Go(func() { k.rotate(ctx) })
	working.Go(func() { forgetting.Work(ctx) })
	k.rest = func() { cancel(); working.Wait() }
}

func (k *KMS) rotate(ctx context.Context) {
	tick := time.NewTicker(rotationEvery)
	defer tick.Stop()
	for {
		if err := k.master.Work(ctx); err != nil && ctx.Err() == nil {
			k.Log.Error("rotate master keys", "error", err)
		}
		select {
		case <-k.master.Kicked():
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
