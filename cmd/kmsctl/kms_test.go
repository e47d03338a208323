package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// servers are the `kmsctl serve` processes of one script, by name.
type servers map[string]*exec.Cmd

var readyLine = regexp.MustCompile(`(?m)^ready +(\S+)`)

// kms runs `kmsctl serve` beside a script:
//
//	kms start NAME [FLAG...]   waits until it is ready, sets $NAME to its URL; its output goes to NAME.log
//	kms stop NAME              SIGTERM; it must exit 0
//	kms kill NAME              kill -9
func kms(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: kms start|stop|kill NAME [FLAG...]")
	}
	all, ok := ts.Value("servers").(servers)
	if !ok {
		ts.Fatalf("no servers in this script")
	}
	name := args[1]
	switch args[0] {
	case "start":
		all[name] = startKMS(ts, name, args[2:])
	case "stop":
		ts.Check(all[name].Process.Signal(syscall.SIGTERM))
		ts.Check(all[name].Wait())
		delete(all, name)
	case "kill":
		ts.Check(all[name].Process.Kill())
		_ = all[name].Wait() // it was killed
		delete(all, name)
	default:
		ts.Fatalf("unknown verb %q", args[0])
	}
}

func startKMS(ts *testscript.TestScript, name string, flags []string) *exec.Cmd {
	var program string
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if p := filepath.Join(dir, "kmsctl"); program == "" {
			if _, err := os.Stat(p); err == nil {
				program = p
			}
		}
	}
	logName := ts.MkAbs(name + ".log")
	log, err := os.Create(logName)
	ts.Check(err)
	defer log.Close()
	cmd := exec.Command(program, append([]string{"serve"}, flags...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = ts.MkAbs("."), log, log
	for _, v := range []string{"PATH", "HOME", "TMPDIR", "KMSCTL_CONNECTOR", "KMSCTL_PASSPHRASE", "XDG_DATA_HOME"} {
		cmd.Env = append(cmd.Env, v+"="+ts.Getenv(v))
	}
	ts.Check(cmd.Start())
	ts.Defer(func() { _ = cmd.Process.Kill() }) // it has ended already, if the script stopped it
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		b, err := os.ReadFile(logName)
		ts.Check(err)
		if m := readyLine.FindSubmatch(b); m != nil {
			ts.Setenv(name, string(m[1]))
			return cmd
		}
		if time.Now().After(until) || strings.Contains(string(b), "kmsctl: error:") {
			ts.Fatalf("kmsctl serve is not ready:\n%s", b)
		}
	}
}
