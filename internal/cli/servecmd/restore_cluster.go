package servecmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/kube"
)

// runInCluster runs `run restore` in a pod of the release's API, and decrypts
// the backup into it.
func (o *restoreOptions) runInCluster(ctx context.Context) error {
	if o.undo {
		var res undoResult
		if err := o.inPod(ctx, nil, &res, "--undo"); err != nil {
			return err
		}
		res.Release = o.kube.Release
		return o.Print(res)
	}
	c, err := o.open()
	if err != nil {
		return err
	}
	defer c.close()
	in, err := c.clear()
	if err != nil {
		return err
	}
	var flags []string
	if o.removals.revive {
		flags = append(flags, "--revive")
	}
	if o.removals.leaveOut {
		flags = append(flags, "--leave-out")
	}
	var res restoreResult
	if err := o.inPod(ctx, in, &res, flags...); err != nil {
		return err
	}
	res.Release = o.kube.Release
	return o.Print(res)
}

// apiContainer is the API in its pods.
const apiContainer = "oss"

// inPod gives what `run restore` says in the pod, or its error.
func (o *restoreOptions) inPod(ctx context.Context, in io.Reader, result any, flags ...string) error {
	cluster, err := o.Cluster(&o.kube)
	if err != nil {
		return err
	}
	var out, errs bytes.Buffer
	code, err := cluster.Run(ctx, kube.Exec{Namespace: o.kube.Namespace, Service: install.API(o.kube.Release), Container: apiContainer, Stdin: in, Stdout: &out, Stderr: &errs,
		Command: func(args []string) []string { return inPodCommand(args, flags) }})
	said := o.passOn(errs.String())
	if err != nil {
		return fault.New(fault.KindOf(err), "restore into release", o.kube.Release, err).WithHint("%s", cutOffHint(err))
	}
	if code != 0 {
		return fault.New(fault.KindNamed(said.Kind), "restore into release", o.kube.Release, errors.New(said.Message)).WithHint("%s", said.Hint)
	}
	if err := json.Unmarshal(out.Bytes(), result); err != nil {
		return fault.New(fault.Other, "restore into release", o.kube.Release, fmt.Errorf("its answer is not understood: %w", err)).WithHint("kmsctl and the release must be of one version")
	}
	return nil
}

// cutOffHint is for who does not know how far it got.
func cutOffHint(err error) string {
	if h := fault.HintOf(err); h != "" {
		return h
	}
	return "the same command again goes on where it was; --undo takes back what it did"
}

// inPodCommand is `run restore` with what the API was told about what stands
// behind it.
func inPodCommand(args, flags []string) []string {
	cmd := []string{"/kms-server", "run", "restore", "-o", "json"}
	for _, a := range args {
		name, _, _ := strings.Cut(a, "=")
		if name == "--connector-socket" || name == "--audit-dir" || strings.HasPrefix(name, "--etcd-") {
			cmd = append(cmd, a)
		}
	}
	return append(cmd, flags...)
}

// said is an error as a command prints it for machines.
type said struct{ Kind, Message, Hint string }

// passOn prints what the pod warned of, and gives its error.
func (o *restoreOptions) passOn(stderr string) said {
	last := said{Message: "it said nothing"}
	for line := range strings.Lines(stderr) {
		var s said
		if json.Unmarshal([]byte(line), &s) == nil && s.Message != "" {
			last = s
			continue
		}
		last.Message = strings.TrimSpace(line)
		fmt.Fprint(o.Err, line)
	}
	return last
}
