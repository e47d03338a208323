package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"testing"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// installation is a plain store that holds an installation and takes nothing.
type installation struct{}

func (installation) Get(_ context.Context, _ string, v any) (int64, error) {
	return 1, json.Unmarshal([]byte(`{"id":"11111111","ids":{},"master":{}}`), v)
}

func (installation) Put(context.Context, string, any, int64) (int64, error) {
	return 0, errors.New("read only")
}

// TestMaster: a change of the master keys is begun once, stopped once, and
// goes on; that the old ones are to go can be said later.
func TestMaster(t *testing.T) {
	w := newWorld(t)
	c := w.root(t, "shop")
	for _, step := range []struct {
		method, path, body string
		status             int
		changed            bool
		state              string
		destroy            bool
	}{
		{"GET", "", "", 200, false, "", false},
		{"POST", "/stop", "", 200, false, "", false},
		{"POST", "/rotate", `{"destroyold":`, 400, false, "", false},
		{"POST", "/migrate", `{"leavePlaced":`, 400, false, "", false},
		{"POST", "/migrate", "{}", 409, false, "", false},
		{"POST", "/rotate", "{}", 202, true, kmsapi.RotationRunning, false},
		{"POST", "/rotate", "{}", 202, false, kmsapi.RotationRunning, false},
		{"POST", "/rotate", `{"destroyOld":true}`, 202, false, kmsapi.RotationRunning, true},
		{"POST", "/stop", "", 200, true, kmsapi.RotationStopped, true},
		{"POST", "/stop", "", 200, false, kmsapi.RotationStopped, true},
		{"POST", "/rotate", "{}", 202, false, kmsapi.RotationRunning, true},
		{"GET", "", "", 200, false, kmsapi.RotationRunning, true},
	} {
		r := c.do(t, step.method, "/kmsctl/v1/master"+step.path, step.body)
		if r.status != step.status {
			t.Fatalf("%+v: %d %s", step, r.status, r.body)
		}
		if r.status >= 300 {
			continue
		}
		var s kmsapi.MasterStatus
		r.into(t, &s)
		if s.Version != 1 || s.Changed != step.changed || (s.Rotation == nil) != (step.state == "") {
			t.Fatalf("%+v: %s", step, r.body)
		}
		if s.Rotation != nil && (s.Rotation.Version != 2 || s.Rotation.State != step.state || s.Rotation.DestroyOld != step.destroy) {
			t.Errorf("%+v: %s", step, r.body)
		}
	}
}
