package server_test

import (
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// seen counts the answers of every endpoint in all tests of this package, by
// the first digit of their status.
var seen = calls{count: map[string][6]int{}, codes: map[string]int{}}

// denied is where refusals for want of a right are counted, of what is counted
// by the first digit otherwise.
const denied = 0

type calls struct {
	mu    sync.Mutex
	count map[string][6]int // by pattern
	codes map[string]int    // of refusals
}

// watch counts what h answers.
func (c *calls) watch(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := &status{ResponseWriter: w, code: http.StatusOK}
		defer func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			n := c.count[r.Pattern]
			if s.code == http.StatusUnauthorized || s.code == http.StatusForbidden {
				n[denied]++
			} else {
				n[s.code/100]++
			}
			c.count[r.Pattern] = n
			c.codes[reply{status: s.code, body: s.body}.code()]++
			if s.code == http.StatusUnauthorized {
				c.codes[kmsapi.Unauthorized]++ // which has no reasons
			}
		}()
		h.ServeHTTP(s, r)
	})
}

type status struct {
	http.ResponseWriter
	code int
	body string // of a refusal
}

func (s *status) Write(b []byte) (int, error) {
	if s.code >= http.StatusBadRequest {
		s.body += string(b)
	}
	return s.ResponseWriter.Write(b)
}

func (s *status) WriteHeader(code int) {
	s.code = code
	s.ResponseWriter.WriteHeader(code)
}

// Unwrap is for http.ResponseController.
func (s *status) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// TestMain ends a run of all tests with the table of endpoints × answers: each
// endpoint must have done something, have refused what is wrong and whom it is
// not for, and each code of the API's errors must have been an answer.
func TestMain(m *testing.M) {
	code := m.Run()
	testkit.Cleanup()
	if code == 0 && flag.Lookup("test.run").Value.String() == "" && flag.Lookup("test.list").Value.String() == "" {
		if untested := seen.table(testing.Verbose()); len(untested) > 0 {
			fmt.Printf("endpoints without a test that they do, one that they refuse what is wrong, and one whom:\n  %s\n", strings.Join(untested, "\n  "))
			code = 1
		}
		if unmet := seen.unmet(); len(unmet) > 0 {
			fmt.Printf("codes that no test met, or that are met and have no occasion:\n  %s\n", strings.Join(unmet, "\n  "))
			code = 1
		}
	}
	os.Exit(code)
}

// noOccasion are IBM's codes for which this service has no occasion, and why.
// Clients know them, so they are kept with their status and text.
var noOccasion = map[string]string{
	kmsapi.BearerSubject:     "every token that we sign has its subject; another, and one in another form, is a 401, which names no code",
	kmsapi.ImportRequired:    "any deleted key may be restored, as IBM allows it today",
	kmsapi.ResourceOwner:     "rights come from policies alone: a service whose role deletes keys may",
	kmsapi.FeatureRestricted: "no feature is kept back: allowedIP takes IPv6 networks, which is where IBM answers so",
	kmsapi.VersionInvalid:    "a registration is made of the version that is current, and is never replaced by one of an older",
	kmsapi.SignatureInvalid:  "no call is signed besides its token, and what a rewrap cannot open is UNPROCESSABLE_CIPHERTEXT_ERR",
}

var codeForm = regexp.MustCompile(`= "([A-Z]+(?:_[A-Z]+)+)"`)

// unmet are the codes of kmsapi that no answer had, less those without an
// occasion, and those of the latter that an answer had.
func (c *calls) unmet() (out []string) {
	source, err := os.ReadFile("../../pkg/kmsapi/errors.go")
	if err != nil {
		return []string{err.Error()}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range codeForm.FindAllStringSubmatch(string(source), -1) {
		if (c.codes[m[1]] > 0) == (noOccasion[m[1]] != "") {
			out = append(out, m[1])
		}
	}
	return out
}

// takesNothing are endpoints to which nothing can be said that is wrong.
var takesNothing = []string{"GET /livez", "GET /readyz", "GET /metrics", "GET /openapi.json",
	"GET /kmsctl/v1/audit/heads", "GET /kmsctl/v1/backup", "GET /kmsctl/v1/clear", "POST /kmsctl/v1/clear/settle", "GET /kmsctl/v1/clock",
	"GET /kmsctl/v1/iam/service-ids", "GET /kmsctl/v1/iam/signing-keys", "GET /kmsctl/v1/master", "POST /kmsctl/v1/master/stop", "GET /serviceids"}

// refusesHere do nothing else: a form that is not spoken, and a move where there
// is no second token (internal/kms has the tests that move).
var refusesHere = []string{"POST /idprovider/v1/auth/identitytoken", "POST /kmsctl/v1/master/migrate"}

// tested says whether an endpoint did what it is for, refused what is wrong,
// and, unless it is open to all, whom it is not for.
func tested(endpoint string, n [6]int) bool {
	_, path, _ := strings.Cut(endpoint, " ")
	return (n[2] > 0 || slices.Contains(refusesHere, endpoint)) &&
		(n[4] > 0 || slices.Contains(takesNothing, endpoint)) &&
		(n[denied] > 0 || slices.Contains(server.OpenForTest(), path))
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
	fmt.Fprintln(out, "ENDPOINT\tDONE\tWRONG\tDENIED\tNOT NOW")
	var all [6]int
	for _, e := range slices.SortedFunc(maps.Keys(byEndpoint), byPath) {
		n := byEndpoint[e]
		fmt.Fprintf(out, "%s\t%d\t%d\t%d\t%d\n", e, n[2], n[4], n[denied], n[5])
		if !tested(e, n) {
			untested = append(untested, e)
		}
		for i := range all {
			all[i] += n[i]
		}
	}
	fmt.Fprintf(out, "%d endpoints, %d tested\t%d\t%d\t%d\t%d\n", len(byEndpoint), len(byEndpoint)-len(untested), all[2], all[4], all[denied], all[5])
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
