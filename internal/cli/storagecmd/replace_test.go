package storagecmd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/ask"
	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cli/storagecmd"
	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pki"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/testkit"
)

func TestMain(m *testing.M) {
	code := m.Run()
	testkit.Cleanup()
	os.Exit(code)
}

// trio is three members in processes of their own, as the chart's pods run them.
type trio struct {
	t       *testing.T
	program string
	dir     string
	flags   []string // of every member, and of who asks them
	ports   map[string][3]string
	run     map[string]*exec.Cmd
}

func start(t *testing.T) *trio {
	t.Helper()
	s := &trio{t: t, program: testkit.Server(t), dir: t.TempDir(), ports: map[string][3]string{}, run: map[string]*exec.Cmd{}}
	ca, err := pki.NewCA("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	p, err := pki.Issue(ca, pki.StorageName, pki.Peer, []string{"127.0.0.1"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"ca": ca.Cert, "cert": p.Cert, "key": p.Key} {
		path := filepath.Join(s.dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s.flags = append(s.flags, "--"+name+"-file", path)
	}
	for _, name := range []string{"s0", "s1", "s2"} {
		var ports [3]string
		for i := range ports {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			ports[i] = l.Addr().String()
		}
		s.ports[name] = ports
		s.flags = append(s.flags, "--member", name+"=https://"+ports[1])
	}
	return s
}

func (s *trio) up(name string) {
	s.t.Helper()
	p := s.ports[name]
	log, err := os.OpenFile(s.log(name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(s.program, append([]string{"run", "storage", "--name", name, "--data-dir", filepath.Join(s.dir, name), "--advertise-host", "127.0.0.1",
		"--listen-client", "https://" + p[0], "--listen-peer", "https://" + p[1], "--listen-health", p[2]}, s.flags...)...)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.run[name] = cmd
	s.t.Cleanup(func() { s.kill(name) })
}

func (s *trio) log(name string) string { return filepath.Join(s.dir, name+".log") }

func (s *trio) kill(name string) {
	if cmd := s.run[name]; cmd != nil {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		delete(s.run, name)
	}
}

// probe waits until a member answers so to kubelet.
func (s *trio) probe(name string, status int, says ...string) {
	s.t.Helper()
	for got := ""; ; {
		res, err := http.Get("http://" + s.ports[name][2] + "/readyz")
		if err == nil {
			b, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if got = fmt.Sprint(res.StatusCode, " ", string(b)); res.StatusCode == status && !slices.ContainsFunc(says, func(w string) bool { return !strings.Contains(got, w) }) {
				return
			}
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-s.t.Context().Done():
			s.t.Fatalf("%s says %s", name, got)
		}
	}
}

// ask is what a pod says.
func (s *trio) ask(ctx context.Context, flags ...string) (st cluster.Store, err error) {
	cmd := exec.CommandContext(ctx, s.program, append(append([]string{"run", "members", "-o", "json"}, s.flags...), flags...)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		var said struct{ Kind, Message, Hint string }
		if jerr := json.Unmarshal(errs.Bytes(), &said); jerr != nil {
			return st, errors.Join(err, jerr)
		}
		return st, fault.New(fault.KindNamed(said.Kind), "", "", errors.New(said.Message)).WithHint("%s", said.Hint)
	}
	return st, json.Unmarshal(out, &st)
}

// until waits until the members stand so.
func (s *trio) until(want string) {
	s.t.Helper()
	for {
		st, err := s.ask(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		var got []string
		for _, m := range st.Members {
			got = append(got, m.Role+"-"+m.State)
		}
		if !st.Quorum {
			got = append(got, "no-quorum")
		}
		if strings.Join(got, " ") == want {
			return
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-s.t.Context().Done():
			s.t.Fatalf("the members stand as %v, want %s", got, want)
		}
	}
}

// asker types one answer.
type asker string

func (a asker) Ask(ask.Question) (string, error)            { return string(a), nil }
func (a asker) Password(ask.Question) (secret.Value, error) { return secret.Value{}, nil }
func (a asker) Close() error                                { return nil }

// replace runs the command, and gives its exit code and what it wrote.
func replace(ctx context.Context, asks func(context.Context, ...string) (cluster.Store, error), types app.Asker, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	a := app.New("test")
	a.Out, a.Err, a.Asker = &out, &errs, types
	a.Getenv = func(name string) string { return map[string]string{"KMSCTL_NO_INPUT": "1"}[name] } // where there is no asker
	code = cli.Main(ctx, cli.Program{Name: "kmsctl", Verbs: cli.Verbs{storagecmd.NewReplace(asks)}}, a, append([]string{"replace"}, args...))
	return code, out.String(), errs.String()
}

// TestReplace: a member whose folder is gone says what happened and what to
// type; the command refuses what would cost data, asks, does it, and goes on
// when it was stopped in the middle.
func TestReplace(t *testing.T) {
	s := start(t)
	for _, name := range []string{"s0", "s1", "s2"} {
		s.up(name)
	}
	for _, name := range []string{"s0", "s1", "s2"} {
		s.probe(name, http.StatusOK)
	}
	wants := func(types app.Asker, code int, text string, args ...string) {
		t.Helper()
		got, out, errs := replace(t.Context(), s.ask, types, args...)
		if got != code || !strings.Contains(out+errs, text) {
			t.Errorf("%v: exit %d, want %d and %q\n%s%s", args, got, code, text, out, errs)
		}
	}
	wants(nil, 5, "the members are s0, s1, s2", "s9")
	wants(nil, 0, "nothing to do", "s1")
	s.kill("s1")
	wants(nil, 7, "nobody knows whether it has its data", "s1", "--yes")

	if err := os.RemoveAll(filepath.Join(s.dir, "s1")); err != nil {
		t.Fatal(err)
	}
	s.up("s1")
	s.probe("s1", http.StatusServiceUnavailable, "its folder is empty", "`kmsctl storage replace s1`")
	log, err := os.ReadFile(s.log("s1"))
	if err != nil || strings.Count(string(log), `"msg":"waiting"`) != 1 || !strings.Contains(string(log), `"kind":"not-ready","hint":"bring back the volume of s1`) {
		t.Errorf("%v\n%s", err, log)
	}
	const lost = "voter-healthy voter-empty voter-healthy"
	s.until(lost)
	wants(nil, 2, "--yes", "s1")
	wants(asker("s2"), 130, `"s2" was typed`, "s1")
	wants(nil, 0, "would take out", "s1", "--dry-run")
	s.until(lost)

	s.kill("s2")
	s.until("voter-healthy voter-empty voter-away no-quorum")
	wants(asker("s1"), 7, "kmsctl: hint: bring the others back first; when the volumes of most members are lost, so is the store", "s1")
	s.up("s2")
	s.until(lost)

	// Stopped when it has taken the member out, and then when it waits.
	for _, last := range []string{"--forget", ""} {
		ctx, cancel := context.WithCancel(t.Context())
		code, out, errs := replace(ctx, func(ctx context.Context, flags ...string) (cluster.Store, error) {
			st, err := s.ask(ctx, flags...)
			if last == "" || slices.Contains(flags, last) && !slices.Contains(flags, "--dry-run") {
				cancel()
			}
			return st, err
		}, asker("s1"), "s1")
		cancel()
		if code != 130 {
			t.Fatalf("stopped: exit %d\n%s%s", code, out, errs)
		}
	}
	code, out, errs := replace(t.Context(), s.ask, nil, "s1", "-o", "json")
	if code != 0 || !strings.Contains(out, `"member": "s1"`) {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	s.until("voter-healthy voter-healthy voter-healthy")
	s.probe("s1", http.StatusOK)
	wants(nil, 0, "nothing to do", "s1", "--yes")
}
