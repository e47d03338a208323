package iam

import (
	"context"
	"sync"
)

// rights keeps the policies of the services that call, each list until one of
// it changes: every call asks for them.
type rights struct {
	mu  sync.RWMutex
	all map[string]grants // by service ID
}

type grants struct {
	version  int64
	policies []Policy // never changed
}

// maxRights bounds the memory. When it is reached, all are read anew.
const maxRights = 4096

func (r *rights) of(ctx context.Context, s Store, service string) ([]Policy, error) {
	version := s.Version(policies + service + "/") // before the list: what comes meanwhile is read again
	r.mu.RLock()
	g, ok := r.all[service]
	r.mu.RUnlock()
	if ok && g.version == version {
		return g.policies, nil
	}
	all, err := listPolicies(ctx, s, service)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil || len(r.all) >= maxRights {
		r.all = map[string]grants{}
	}
	r.all[service] = grants{version, all}
	return all, nil
}
