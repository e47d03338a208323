package install

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
)

const (
	pollEvery = time.Second
	quiet     = 5 * time.Second // every pod is not ready at first; that is no news
	// patience with a trouble that waiting alone does not cure: a Secret may
	// be mounted a moment later, a registry may answer the second time.
	patience = 15 * time.Second
	// refresh is patience with a pod that runs and says no, as after a wrong
	// HSM password: kubelet brings a corrected Secret within a minute and a half.
	refresh = 2 * time.Minute
)

// watched runs a change of the release, tells how its pods come up, and ends
// it early when one of them never will.
func (j Job) watched(ctx context.Context, o Options, change func(context.Context) (cluster.Release, error)) (cluster.Release, error) {
	if !o.Wait {
		return change(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		j.follow(ctx, o, stop, cancel)
	}()
	r, err := change(ctx)
	close(stop)
	<-stopped
	if err != nil {
		return r, j.explain(ctx, o, err)
	}
	return r, nil
}

// follow prints a line for each pod that becomes ready, and for each trouble
// that lasts.
func (j Job) follow(ctx context.Context, o Options, stop <-chan struct{}, give func(error)) {
	told := map[string]string{}
	since, final := map[string]time.Time{}, map[string]time.Time{}
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ctx.Done():
			return
		case <-t.C:
		}
		pods, err := j.Cluster.Pods(ctx, o.Namespace, o.Release)
		if err != nil {
			continue // the change itself meets the same fault and reports it
		}
		for _, p := range pods {
			state := "ready"
			if !p.Ready {
				state = ""
				if p.Trouble != nil {
					state = "waiting " + p.Trouble.Container + p.Trouble.Reason
				}
			}
			if _, known := since[p.Name+state]; !known {
				since[p.Name+state] = j.Now()
			}
			lasts := j.Now().Sub(since[p.Name+state])
			if told[p.Name] != state && (state == "ready" || (state != "" && lasts >= quiet)) {
				told[p.Name] = state
				did, _, _ := strings.Cut(state, " ")
				j.Line(did, "pod "+p.Name, troubleText(p.Trouble))
			}
			if p.Trouble == nil || !p.Trouble.Final {
				continue
			}
			// Counted apart: a pod that was on its way out may have left its
			// name to one that stays.
			if _, known := final[p.Name+state]; !known {
				final[p.Name+state] = j.Now()
			}
			limit := patience
			if p.Trouble.Reason == cluster.NotReady {
				limit = refresh
			}
			if j.Now().Sub(final[p.Name+state]) >= limit {
				give(troubleFault(o.Release, *p.Trouble))
				return
			}
		}
	}
}

func troubleText(t *cluster.Trouble) string {
	if t == nil {
		return ""
	}
	s := t.Reason
	if t.Container != "" {
		s = "container " + t.Container + ": " + s
	}
	if t.Message != "" {
		s += ": " + t.Message
	}
	if t.Log != "" {
		s += "; log: " + t.Log
	}
	return s
}

func troubleFault(release string, t cluster.Trouble) error {
	f := fault.Newf(fault.NotReady, "bring up release", release, "pod %s, %s", t.Pod, troubleText(&t))
	if t.Cure != "" {
		f.Hint = t.Cure
	}
	return f
}

// explain adds to a failed change what is wrong with the pods.
func (j Job) explain(ctx context.Context, o Options, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		return cause // follow gave up, and said why
	}
	if errors.Is(context.Cause(ctx), context.Canceled) {
		return err // the person stopped it
	}
	look, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if f := j.firstTrouble(look, o); f != nil {
		return f
	}
	return err
}

// firstTrouble is a fault about the first pod that is not ready, or nil.
func (j Job) firstTrouble(ctx context.Context, o Options) error {
	pods, err := j.Cluster.Pods(ctx, o.Namespace, o.Release)
	if err != nil {
		return err
	}
	for _, p := range pods {
		if p.Trouble != nil {
			return troubleFault(o.Release, *p.Trouble)
		}
	}
	return nil
}

// waitFor waits until every workload of the release is whole.
func (j Job) waitFor(ctx context.Context, o Options) error {
	if !o.Wait {
		return nil
	}
	_, err := j.watched(ctx, o, func(ctx context.Context) (cluster.Release, error) {
		for {
			ws, err := j.Cluster.Workloads(ctx, o.Namespace, o.Release)
			if err == nil {
				if err = whole(ws); err == nil || (o.Foreign && len(ws) == 0) {
					return cluster.Release{}, nil
				}
			}
			select {
			case <-ctx.Done():
				return cluster.Release{}, fault.New(fault.NotReady, "wait for release", o.Release, err).WithHint("see `kmsctl status`")
			case <-time.After(pollEvery):
			}
		}
	})
	return err
}

func whole(ws []cluster.Workload) error {
	if len(ws) == 0 {
		return errors.New("it has no workloads")
	}
	var missing []string
	for _, w := range ws {
		if !w.Whole() {
			missing = append(missing, fmt.Sprintf("%s (%d of %d ready)", w.Name, w.Ready, w.Want))
		}
	}
	if len(missing) > 0 {
		return errors.New("not ready: " + strings.Join(missing, ", "))
	}
	return nil
}

// Status is how a release stands.
type Status struct {
	Release   cluster.Release    `json:"release"`
	Healthy   bool               `json:"healthy"`
	Workloads []cluster.Workload `json:"workloads"`
	Pods      []cluster.Pod      `json:"pods"`
}

// Look tells how a release stands. An unhealthy one is no error here.
func (j Job) Look(ctx context.Context, o Options) (Status, error) {
	r, err := j.Releases.Get(o.Release)
	if err != nil {
		return Status{}, err
	}
	s := Status{Release: r}
	if s.Workloads, err = j.Cluster.Workloads(ctx, o.Namespace, o.Release); err != nil {
		return s, err
	}
	if s.Pods, err = j.Cluster.Pods(ctx, o.Namespace, o.Release); err != nil {
		return s, err
	}
	s.Healthy = r.Status == cluster.Deployed && whole(s.Workloads) == nil
	return s, nil
}
