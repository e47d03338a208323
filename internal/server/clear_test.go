package server_test

import (
	"testing"

	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// TestClear: it is planned, confirmed and begun by an administrator, each
// step in the audit log, and a confirmation counts once.
func TestClear(t *testing.T) {
	w := newWorld(t)
	w.token.Installed = []hsm.Installation{{ID: "11111111", Objects: []string{"mkek:v1"}}, {ID: "22222222", Objects: []string{"mkek:v1"}}}
	c := client{w: w, token: w.login(t, w.admin)}
	var settled kmsapi.Cleared
	if r := c.do(t, "POST", "/kmsctl/v1/clear/settle", ""); r.status != 200 {
		t.Errorf("%d %s", r.status, r.body)
	} else if r.into(t, &settled); !settled.Nothing {
		t.Errorf("%+v", settled)
	}
	c = w.root(t, "shop")
	var p kmsapi.ClearPlan
	c.do(t, "GET", "/kmsctl/v1/clear", "").into(t, &p)
	if p.Instances != 1 || p.Installation != "11111111" || len(p.Others) != 1 || p.Confirmation != "" || p.Cleared == nil {
		t.Errorf("%+v", p)
	}
	if r := c.do(t, "POST", "/kmsctl/v1/clear/plan", "{}"); r.status != 400 {
		t.Errorf("without a name: %d %s", r.status, r.body)
	}
	c.do(t, "POST", "/kmsctl/v1/clear/plan", `{"name":"r","installation":"22222222"}`).into(t, &p)
	if r := c.do(t, "POST", "/kmsctl/v1/clear", `{"name":"r","installation":"22222222","confirmation":"no"}`); r.status != 409 || len(w.token.Installed) != 2 {
		t.Errorf("another confirmation: %d %s", r.status, r.body)
	}
	body := `{"name":"r","installation":"22222222","confirmation":"` + p.Confirmation + `"}`
	before := w.audit.count()
	if r := c.do(t, "POST", "/kmsctl/v1/clear", body); r.status != 202 || len(w.token.Installed) != 1 {
		t.Errorf("%d %s", r.status, r.body)
	}
	w.audit.mu.Lock()
	begun := w.audit.events[before]
	w.audit.mu.Unlock()
	if begun.Action != "kmsctl.clear.begin" || begun.Detail != "installation 22222222, token s1" || begun.Principal == "" || begun.CorrelationID == "" {
		t.Errorf("%+v", begun)
	}
	if r := c.do(t, "POST", "/kmsctl/v1/clear", body); r.status != 409 {
		t.Errorf("a second time: %d %s", r.status, r.body)
	}
}
