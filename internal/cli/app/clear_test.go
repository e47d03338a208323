package app_test

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// clearable is the part of the API that clears, and what was asked of it.
type clearable struct {
	plan  kmsapi.ClearPlan
	asked []string
}

func (c *clearable) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.asked = append(c.asked, r.Method+" "+r.URL.Path)
	var out any
	switch {
	case strings.HasSuffix(r.URL.Path, "/settle") && c.plan.Cleared == nil:
		w.WriteHeader(http.StatusConflict)
	case strings.HasSuffix(r.URL.Path, "/settle"):
		out = c.plan.Cleared
	case strings.HasSuffix(r.URL.Path, "/plan"):
		p := c.plan
		p.Confirmation = "once"
		out = p
	default:
		out = c.plan
	}
	_ = json.NewEncoder(w).Encode(out)
}

func (c *clearable) job(t *testing.T, yes bool) app.ClearJob {
	t.Helper()
	srv := httptest.NewServer(c)
	t.Cleanup(srv.Close)
	client, err := kmsclient.New(kmsclient.Config{Server: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	a := app.New("test")
	a.Err, a.Getenv = &bytes.Buffer{}, func(string) string { return "1" } // KMSCTL_NO_INPUT: nobody to ask
	return app.ClearJob{App: a, Client: client, Release: "r", Confirm: app.ConfirmFlags{Yes: yes}, Timeout: time.Minute}
}

// TestClearOnce: what was cleared, or looked at, is left alone, and nobody is
// asked; what has data is cleared when that was confirmed, and only then.
func TestClearOnce(t *testing.T) {
	const begin = "POST /kmsctl/v1/clear"
	full := kmsapi.ClearPlan{Installation: "i", RootKeys: 1}
	settled := full
	settled.Cleared = &kmsapi.Cleared{By: "me"}

	c := &clearable{plan: settled}
	job := c.job(t, false)
	if would, err := job.Would(t.Context()); err != nil || would.Goes() != nil || would.Before == nil {
		t.Errorf("%+v %v", would, err)
	}
	if res, err := job.Once(t.Context()); err != nil || res.Cleared != nil || res.Before == nil || res.Before.By != "me" || slices.Contains(c.asked, begin) {
		t.Errorf("%+v %v, asked %q", res, err, c.asked)
	} else if rows := res.Rows(app.KubeFlags{Release: "r"}); !strings.Contains(rows[0][1], "hsm clear") {
		t.Errorf("%q", rows)
	}

	c = &clearable{plan: full}
	job = c.job(t, false)
	would, err := job.Would(t.Context())
	if err != nil || len(would.Goes()) != 2 || would.Goes()[1] != "1 root keys, and whatever they wrapped" || slices.Contains(c.asked, begin) {
		t.Errorf("%+v %v, asked %q", would, err, c.asked)
	} else if rows := would.Rows(app.KubeFlags{}); rows[1][0] != "would go" || rows[1][1] != would.Goes()[1] {
		t.Errorf("%q", rows)
	}
	if _, err := job.Once(t.Context()); fault.KindOf(err) != fault.Usage || slices.Contains(c.asked, begin) {
		t.Errorf("not confirmed: %v, asked %q", err, c.asked)
	}
	if res, err := c.job(t, true).Once(t.Context()); err != nil || res.Cleared == nil || res.Cleared.RootKeys != 1 || !slices.Contains(c.asked, begin) {
		t.Errorf("%+v %v, asked %q", res, err, c.asked)
	}

	c = &clearable{plan: kmsapi.ClearPlan{Installation: "i"}}
	if would, err := c.job(t, false).Would(t.Context()); err != nil || would.Goes() != nil {
		t.Errorf("would ask about nothing: %+v %v", would, err)
	}
}
