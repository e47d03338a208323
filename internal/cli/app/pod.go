package app

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
)

// PodRun is `kms-server run VERB` in a pod of a release.
type PodRun struct {
	Service, Container string
	Pod                string // one of the service's; empty: any that runs
	Verb               string
	Keep               []string // beginnings of those flags of the container that the verb has as well
	Flags              []string // beside those
	Stdin              io.Reader
}

// command is what runs in a container with args.
func (r PodRun) command(args []string) []string {
	cmd := []string{"/kms-server", "run", r.Verb, "-o", "json"}
	for _, a := range args {
		if slices.ContainsFunc(r.Keep, func(k string) bool { return strings.HasPrefix(a, k) }) {
			cmd = append(cmd, a)
		}
	}
	return append(cmd, r.Flags...)
}

// versionHint is for who meets a release that does not know what is asked.
const versionHint = "kmsctl and the release must be of one version"

// RunInPod gives what the command says in the pod, or its error, as one of op
// on the release; cutOff is the hint for who does not know how far it got.
func (a *App) RunInPod(ctx context.Context, f *KubeFlags, op, cutOff string, r PodRun, result any) error {
	c, err := a.Cluster(f)
	if err != nil {
		return err
	}
	var out, errs bytes.Buffer
	code, err := c.Run(ctx, kube.Exec{Namespace: f.Namespace, Service: r.Service, Pod: r.Pod, Container: r.Container, Stdin: r.Stdin, Stdout: &out, Stderr: &errs, Command: r.command})
	said := a.passOn(errs.String())
	if err != nil {
		return fault.New(fault.KindOf(err), op, f.Release, err).WithHint("%s", cmp.Or(fault.HintOf(err), cutOff))
	}
	if code != 0 {
		if fault.KindNamed(said.Kind) == fault.Usage && said.Hint == "" {
			said.Hint = versionHint
		}
		return fault.New(fault.KindNamed(said.Kind), op, f.Release, said.Err())
	}
	if err := json.Unmarshal(out.Bytes(), result); err != nil {
		return fault.New(fault.Other, op, f.Release, fmt.Errorf("its answer is not understood: %w", err)).WithHint(versionHint)
	}
	return nil
}

// passOn prints what the pod warned of, and gives its error.
func (a *App) passOn(stderr string) fault.Said {
	last := fault.Said{Message: "it said nothing"}
	for line := range strings.Lines(stderr) {
		var s fault.Said
		if json.Unmarshal([]byte(line), &s) == nil && s.Message != "" {
			last = s
			continue
		}
		last.Message = strings.TrimSpace(line)
		fmt.Fprint(a.Err, line)
	}
	return last
}
