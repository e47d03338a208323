package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// servers are the `kmsctl serve` processes of one script, by name.
type servers map[string]server

type server struct {
	*exec.Cmd
	ended <-chan error // Wait's word
}

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
		ts.Check(<-all[name].ended)
		delete(all, name)
	case "kill":
		ts.Check(all[name].Process.Kill())
		<-all[name].ended // it was killed
		delete(all, name)
	default:
		ts.Fatalf("unknown verb %q", args[0])
	}
}

func startKMS(ts *testscript.TestScript, name string, flags []string) server {
	logName := ts.MkAbs(name + ".log")
	log, err := os.Create(logName)
	ts.Check(err)
	defer log.Close()
	cmd := exec.Command(filepath.Join(filepath.SplitList(ts.Getenv("PATH"))[0], "kmsctl"), append([]string{"serve"}, flags...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = ts.MkAbs("."), log, log
	for _, v := range []string{"PATH", "HOME", "TMPDIR", "KMSCTL_PASSPHRASE", "XDG_DATA_HOME"} {
		cmd.Env = append(cmd.Env, v+"="+ts.Getenv(v))
	}
	ts.Check(cmd.Start())
	ts.Defer(func() { _ = cmd.Process.Kill() }) // it has ended already, if the script stopped it
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for { // it gets ready or ends; go test's own limit is the last resort
		b, err := os.ReadFile(logName)
		ts.Check(err)
		if m := readyLine.FindSubmatch(b); m != nil {
			ts.Setenv(name, string(m[1]))
			return server{cmd, ended}
		}
		select {
		case err := <-ended:
			ts.Fatalf("kmsctl serve ended (%v) before it was ready:\n%s", err, b)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
