package diagnose_test

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/kmsctl/kmsctl/internal/diagnose"
)

// seen has what the checks found in all tests of this package.
var seen struct {
	sync.Mutex
	findings []diagnose.Finding
}

func note(r diagnose.Report) diagnose.Report {
	seen.Lock()
	defer seen.Unlock()
	seen.findings = append(seen.findings, r.Findings...)
	return r
}

// TestMain runs all tests, and then wants each check to have failed, and each
// message in the source to have been said. With -v it prints the list.
func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if code == 0 && flag.Lookup("test.run").Value.String() == "" {
		if missing := unseen(); len(missing) > 0 {
			fmt.Println("FAIL: no test made a check say:\n  " + strings.Join(missing, "\n  "))
			code = 1
		}
	}
	os.Exit(code)
}

// unseen lists the checks that never failed, and the messages that nobody saw.
func unseen() (missing []string) {
	checks := append(diagnose.Preflight{}.Checks(), diagnose.Doctor{}.Checks()...)
	said := map[string][]string{}
	for _, f := range seen.findings {
		if f.Verdict == diagnose.Fail || f.Verdict == diagnose.Warn {
			said[f.Check] = append(said[f.Check], fmt.Sprintf("%s: %s", f.Verdict, f.Reason))
		}
	}
	for _, c := range checks {
		if len(said[c.Name]) == 0 {
			missing = append(missing, "anything wrong with "+c.Name)
		}
	}
	for _, m := range messages() {
		form := regexp.MustCompile(`(?s)^` + regexp.MustCompile(`%[\\.0-9]*[a-z%]`).ReplaceAllString(regexp.QuoteMeta(m), `.*`) + `$`)
		if !slices.ContainsFunc(seen.findings, func(f diagnose.Finding) bool { return form.MatchString(f.Reason) }) {
			missing = append(missing, m)
		}
	}
	if testing.Verbose() {
		for _, c := range checks {
			slices.Sort(said[c.Name])
			for _, s := range slices.Compact(said[c.Name]) {
				fmt.Printf("%-16s  %s\n", c.Name, s)
			}
			said[c.Name] = nil // both lists have some
		}
	}
	return missing
}

// messages are the formats of all that the checks may find wrong, or why they
// are skipped.
func messages() (out []string) {
	at := map[string]int{"fail": 1, "warn": 1, "bad": 2, "skip": 0}
	for _, file := range []string{"preflight.go", "rights.go", "doctor.go", "replicas.go", "store.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			panic(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			name, ok := call.Fun.(*ast.Ident)
			if !ok {
				return true
			}
			arg, ok := at[name.Name]
			if !ok || len(call.Args) <= arg {
				return true
			}
			if lit, ok := call.Args[arg].(*ast.BasicLit); ok {
				s, err := strconv.Unquote(lit.Value)
				if err != nil {
					panic(err)
				}
				out = append(out, s)
			}
			return true
		})
	}
	return out
}
