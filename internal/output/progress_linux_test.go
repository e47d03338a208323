package output_test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/kmsctl/kmsctl/internal/output"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

// TestMain is also the program that the terminal test runs: it begins a bar,
// prints a line beside it, and waits to be told to end it.
func TestMain(m *testing.M) {
	if os.Getenv("OUTPUT_TEST_BAR") == "" {
		os.Exit(m.Run())
	}
	p := output.NewProgress(os.Stderr, os.Getenv("OUTPUT_TEST_BAR") == "quiet")
	b := p.Begin("org/a-rather-long-name/of-an-image/that-does-not-fit:1.0", 4<<20)
	b.Add(1 << 20)
	p.Line("pushed", "org/other:1.0")
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the test has seen it
	b.End()
	p.Line("pushed", "org/last:1.0")
	p.Close()
	p.Line("pushed", "org/image:1.0")
	os.Exit(0)
}

// TestProgressOnATerminal shows a bar below the lines, and takes it away.
func TestProgressOnATerminal(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "OUTPUT_TEST_BAR=yes", "TERM=xterm")
	p := testkit.StartPty(t, cmd)
	p.Expect("pushed     org/other:1.0")
	p.Expect("…")
	p.Expect("1.0 MiB / 4.0 MiB")
	p.Expect("25 %")
	p.Type("\r")
	p.Expect("pushed     org/last:1.0")
	p.Expect("pushed     org/image:1.0")
	if code := p.Wait(); code != 0 {
		t.Errorf("exit %d\n%s", code, p.Screen())
	}
}

// TestProgressElsewhere writes lines alone into what is no terminal, and
// nothing at all when quiet or on a terminal that cannot move.
func TestProgressElsewhere(t *testing.T) {
	const lines = "pushed     org/other:1.0\npushed     org/last:1.0\npushed     org/image:1.0\n"
	for how, want := range map[string]string{"yes": lines, "quiet": ""} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "OUTPUT_TEST_BAR="+how)
		out, err := cmd.CombinedOutput()
		if err != nil || string(out) != want {
			t.Errorf("%s: %q, %v", how, out, err)
		}
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "OUTPUT_TEST_BAR=yes", "TERM=dumb")
	p := testkit.StartPty(t, cmd)
	p.Expect("pushed     org/other:1.0")
	p.Type("\r")
	p.Expect("pushed     org/image:1.0")
	if p.Wait(); strings.Contains(p.Screen(), "MiB") {
		t.Errorf("%q", p.Screen())
	}
}

// TestProgressSideBySide is for the race detector.
func TestProgressSideBySide(t *testing.T) {
	var none *output.Progress
	none.Close()
	none.Begin("x", 1).Add(1)
	var b bytes.Buffer
	p := output.NewProgress(&b, false)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			bar := p.Begin("x", 3)
			defer bar.End()
			if _, err := io.Copy(io.Discard, bar.Reader(strings.NewReader("abc"))); err != nil {
				t.Error(err)
			}
			p.Line("pushed", "x")
		})
	}
	wg.Wait()
	p.Close()
	if b.String() != strings.Repeat("pushed     x\n", 20) {
		t.Errorf("%q", b.String())
	}
}
