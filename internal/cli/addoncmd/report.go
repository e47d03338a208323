package addoncmd

import (
	"fmt"
	"strings"

	"github.com/kmsctl/kmsctl/internal/push"
)

// The words for what was done, beside those of a load.
const (
	applied    = "applied"
	unchanged  = "unchanged"
	done       = "done"
	notBegun   = "not begun"
	notNeeded  = "not needed"
	wouldApply = "would apply"
	wouldLoad  = "would load"
)

// report is what apply prints.
type report struct {
	DryRun    bool           `json:"dryRun"`
	Resources []resourceLine `json:"resources"`
	Addons    []addonLine    `json:"addons"`
	Warnings  []string       `json:"warnings"`
}

type resourceLine struct {
	File   string `json:"file"`
	Object string `json:"object"`
	Status string `json:"status"`
	Error  string `json:"error,omitempty"`
}

type addonLine struct {
	Name      string       `json:"name"`
	Namespace string       `json:"namespace"`
	Repo      string       `json:"repo"` // where the charts went
	Path      string       `json:"path"`
	Status    string       `json:"status"`
	Error     string       `json:"error,omitempty"`
	Load      *push.Report `json:"load,omitempty"`
	Charts    []chartLine  `json:"charts"`
}

type chartLine struct {
	Name     string `json:"name"`
	Release  string `json:"release,omitempty"`
	Version  string `json:"version,omitempty"`
	Revision int    `json:"revision,omitempty"`
	Status   string `json:"status"`
	Error    string `json:"error,omitempty"`
}

// did counts what is done.
func (r report) did() (n int) {
	for _, x := range r.Resources {
		if x.Status == applied || x.Status == unchanged {
			n++
		}
	}
	for _, a := range r.Addons {
		if a.Load != nil {
			for _, o := range a.Load.Objects {
				if o.Status != push.Failed {
					n++
				}
			}
		}
		for _, c := range a.Charts {
			if c.Status == done || c.Status == unchanged {
				n++
			}
		}
	}
	return n
}

// Table is one line a thing, in the order of the work.
func (r report) Table() ([]string, [][]string) {
	var rows [][]string
	for _, x := range r.Resources {
		rows = append(rows, []string{x.Status, "resource", x.Object, x.File})
	}
	for _, a := range r.Addons {
		rows = append(rows, []string{a.Status, "addon", a.Name, a.Path + a.loaded()})
		for _, c := range a.Charts {
			what := c.Name
			if c.Revision > 0 {
				what = fmt.Sprintf("%s, revision %d", c.Release, c.Revision)
			}
			rows = append(rows, []string{c.Status, "release", a.Namespace + "/" + what, strings.TrimSpace("chart " + c.Version)})
		}
	}
	return []string{"STATUS", "KIND", "OBJECT", "FROM"}, rows
}

func (a addonLine) loaded() string {
	if a.Load == nil {
		return ""
	}
	n := 0
	for _, o := range a.Load.Objects {
		if o.Status != push.Failed {
			n++
		}
	}
	return fmt.Sprintf(": %d of %d objects to %s, %.1f MiB", n, len(a.Load.Objects), a.Repo, float64(a.Load.BytesSent)/(1<<20))
}
