//go:build linux

package ask_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/kmsctl/kmsctl/internal/ask"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// TestMain is also the program that the tests drive on a pseudo-terminal.
func TestMain(m *testing.M) {
	if os.Getenv("ASK_CHILD") == "" {
		os.Exit(m.Run())
	}
	t, err := ask.Open()
	if err != nil {
		fmt.Println("open:", err)
		os.Exit(1)
	}
	print := func(s string, err error) { fmt.Printf("%s|%v\n", s, err) }
	print(t.Ask(ask.Question{Title: "Model", Help: "the kind of HSM", Options: []string{"gemalto", "thales", "softhsm"}, Default: "thales"}))
	print(t.Ask(ask.Question{Title: "Address", Help: "an IP address", Back: true, Check: func(s string) error {
		if s != "10.0.0.1" {
			return errors.New("that is not it")
		}
		return nil
	}}))
	print(t.Ask(ask.Question{Title: "Namespace", Default: "kube-system"}))
	v, err := t.Password(ask.Question{Title: "Password", Help: "of the HSM", Back: true})
	print(string(v.Reveal()), err)
	print(t.Ask(ask.Question{Title: "Last", Options: []string{"yes", "no"}, Back: true}))
	if err := t.Close(); err != nil {
		fmt.Println(err)
	}
	os.Exit(0)
}

func start(t *testing.T, term string) (*testkit.Pty, *bytes.Buffer) {
	t.Helper()
	cmd, out := child(term)
	return testkit.StartPty(t, cmd), out
}

func child(term string) (*exec.Cmd, *bytes.Buffer) {
	var out bytes.Buffer
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "ASK_CHILD=1", "TERM="+term)
	cmd.Stdin, cmd.Stdout = strings.NewReader("not for the questions\n"), &out
	return cmd, &out
}

func TestQuestions(t *testing.T) {
	for _, term := range []string{"xterm", "dumb"} {
		t.Run(term, func(t *testing.T) {
			p, out := start(t, term)
			down := "\x1b[B"
			if term == "dumb" {
				down = "3" // the third by its number
				p.Answer("Model (thales): ", "?")
				p.Expect("the kind of HSM")
				p.Answer("Model (thales): ", "luna")
				p.Expect("answer with one of")
				p.Answer("Model (thales): ", down)
			} else {
				p.Expect("thales")
				p.Type("?")
				p.Expect("the kind of HSM")
				p.Expect("softhsm")
				p.Type(down)
				p.Expect("softhsm")
				p.Type("\r")
			}
			p.Answer("Address", "10.0.0.x")
			p.Expect("that is not it")
			p.Answer("Address", "?")
			p.Expect("an IP address (< goes back)")
			p.Answer("Address", "10.0.0.1")
			p.Answer("Namespace", "")
			p.Answer("Password: ", "?")
			p.Expect("of the HSM")
			p.Answer("Password: ", "wrong\x15canaryx\x7f")
			if term == "dumb" {
				p.Answer("Last: ", "<")
			} else {
				p.Expect("no")
				p.Type("\x1b[A\r") // up from the first is the last: back
			}
			if code := p.Wait(); code != 0 {
				t.Fatalf("exit %d\n%s", code, p.Screen())
			}
			want := "softhsm|<nil>\n10.0.0.1|<nil>\nkube-system|<nil>\ncanary|<nil>\n|back to the question before\n"
			if out.String() != want {
				t.Errorf("got %q, want %q", out, want)
			}
			if strings.Contains(p.Screen(), "canary") || strings.Contains(p.Screen(), "wrong") {
				t.Error("the password was shown")
			}
		})
	}
}

// TestCtrlC stops at every kind of question.
func TestCtrlC(t *testing.T) {
	p, out := start(t, "xterm")
	p.Expect("softhsm")
	p.Type("\x03")
	p.Expect("Address")
	p.Type("\x03")
	p.Expect("Namespace")
	p.Type("\x03")
	p.Expect("Password: ")
	p.Type("cana\x03")
	p.Expect("Last")
	p.Expect("no")
	p.Type("\x03")
	if code := p.Wait(); code != 0 {
		t.Fatalf("exit %d\n%s", code, p.Screen())
	}
	if want := strings.Repeat("|stopped at a question\n", 5); out.String() != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

// TestSignal ends the question that is asked, and all that come after it:
// main catches the signal, and a read of the terminal would go on for ever.
func TestSignal(t *testing.T) {
	for _, term := range []string{"xterm", "dumb"} {
		cmd, out := child(term)
		p := testkit.StartPty(t, cmd)
		p.Expect("softhsm")
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if code := p.Wait(); code != 0 {
			t.Fatalf("exit %d\n%s", code, p.Screen())
		}
		if want := strings.Repeat("|stopped at a question\n", 5); out.String() != want {
			t.Errorf("%s: got %q, want %q", term, out, want)
		}
	}
}

func TestNoTerminal(t *testing.T) {
	cmd := exec.Command("setsid", "-w", os.Args[0])
	cmd.Env = append(os.Environ(), "ASK_CHILD=1")
	out, err := cmd.CombinedOutput()
	if err == nil || string(out) != "open: there is no terminal to ask on\n" {
		t.Errorf("%v, %q", err, out)
	}
}
