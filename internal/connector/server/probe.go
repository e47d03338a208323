package server

import (
	"encoding/json"
	"errors"
	"io"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/token"
)

// probe prints a report, or the fault that kept it from one, as JSON.
func probe(args []string, stdout, stderr io.Writer) error {
	o, err := parse(args, false, stderr)
	if err != nil {
		return err
	}
	Harden()
	r, err := o.report()
	out := hsm.ProbeReply{Report: &r}
	if err != nil {
		w := faultOf(err)
		out = hsm.ProbeReply{Fault: &hsm.ProbeFault{Kind: w.Kind, Op: w.Op, Object: w.Object, Cause: w.Cause, Hint: w.Hint}}
	}
	return errors.Join(err, json.NewEncoder(stdout).Encode(out))
}

func (o options) report() (hsm.Report, error) {
	source, err := o.pin()
	if err != nil {
		return hsm.Report{}, err
	}
	pin, err := checked(source)()
	if err != nil {
		return hsm.Report{}, err
	}
	defer pin.Zero()
	t, err := token.Open(o.token())
	if err != nil {
		return hsm.Report{}, err
	}
	defer t.Close()
	if err := t.Login(pin); err != nil {
		return hsm.Report{}, err
	}
	r, err := t.Probe()
	if errors.Is(err, token.ErrNotOpen) {
		err = fault.New(fault.Other, "probe", o.module, err)
	}
	return r, err
}
