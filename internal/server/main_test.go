package server_test

import (
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/kmsctl/kmsctl/internal/server"
)

// seen counts the answers of every endpoint in all tests of this package, by
// the first digit of their status.
var seen = calls{count: map[string][6]int{}}

type calls struct {
	mu    sync.Mutex
	count map[string][6]int // by pattern
}

// watch counts what h answers.
func (c *calls) watch(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := &status{ResponseWriter: w, code: http.StatusOK}
		defer func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			n := c.count[r.Pattern]
			n[s.code/100]++
			c.count[r.Pattern] = n
		}()
		h.ServeHTTP(s, r)
	})
}

type status struct {
	http.ResponseWriter
	code int
}

func (s *status) WriteHeader(code int) {
	s.code = code
	s.ResponseWriter.WriteHeader(code)
}

// Unwrap is for http.ResponseController.
func (s *status) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// TestMain ends a run of all tests with the table of endpoints × answers: each
// endpoint must have done something, and have refused something.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 && flag.Lookup("test.run").Value.String() == "" && flag.Lookup("test.list").Value.String() == "" {
		if untested := seen.table(testing.Verbose()); len(untested) > 0 {
			fmt.Printf("endpoints without a test that they do, and one that they refuse:\n  %s\n", strings.Join(untested, "\n  "))
			code = 1
		}
	}
	os.Exit(code)
}

// table prints the endpoints when asked, and gives those that were not tested.
func (c *calls) table(print bool) (untested []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	byEndpoint := map[string][6]int{}
	for pattern, endpoint := range server.RoutesForTest() {
		n := byEndpoint[endpoint]
		for i, k := range c.count[pattern] {
			n[i] += k
		}
		byEndpoint[endpoint] = n
	}
	out := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(out, "ENDPOINT\tDONE\tREFUSED\tNOT NOW")
	var all [6]int
	for _, e := range slices.SortedFunc(maps.Keys(byEndpoint), byPath) {
		n := byEndpoint[e]
		fmt.Fprintf(out, "%s\t%d\t%d\t%d\n", e, n[2], n[4], n[5])
		if n[2] == 0 || n[4] == 0 {
			untested = append(untested, e)
		}
		for i := range all {
			all[i] += n[i]
		}
	}
	fmt.Fprintf(out, "%d endpoints, %d tested\t%d\t%d\t%d\n", len(byEndpoint), len(byEndpoint)-len(untested), all[2], all[4], all[5])
	if print {
		_ = out.Flush() // standard output of a test
	}
	return untested
}

func byPath(a, b string) int {
	ma, pa, _ := strings.Cut(a, " ")
	mb, pb, _ := strings.Cut(b, " ")
	if pa != pb {
		return strings.Compare(pa, pb)
	}
	return strings.Compare(ma, mb)
}
