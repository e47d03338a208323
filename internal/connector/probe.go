package connector

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

// Probe tries what a token can do. It logs in once, makes session objects
// only and leaves nothing behind.
func Probe(ctx context.Context, o Options) (hsm.Report, error) {
	s := newStarter(o)
	defer s.pin.Zero()
	pins, theirs, err := socketPair()
	if err != nil {
		return hsm.Report{}, fault.New(fault.Other, "start HSM connector", o.Path, err)
	}
	defer theirs.Close()
	cmd := exec.CommandContext(ctx, o.Path, append([]string{"probe", "--pin-fd", "3"}, s.args...)...)
	cmd.Env = environ(o.Env)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = ownGroup()
	var out bytes.Buffer
	cmd.Stdout = &out
	go s.givePIN(pins)
	err = cmd.Run()
	_ = pins.Close() // givePIN ends by it
	var r hsm.ProbeReply
	switch {
	case json.Unmarshal(out.Bytes(), &r) != nil, r.Report == nil && r.Fault == nil:
		if err == nil {
			err = context.Cause(ctx)
		}
		return hsm.Report{}, fault.New(fault.Unreachable, "probe the token of", o.Module, err).WithHint("the PKCS#11 library ended the connector, or did not return: look at its own log")
	case r.Fault != nil:
		return hsm.Report{}, rebuild(r.Fault.Kind, r.Fault.Op, r.Fault.Object, r.Fault.Cause, r.Fault.Hint)
	}
	return *r.Report, nil
}
