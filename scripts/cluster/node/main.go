// Command node brings a real one-node Kubernetes cluster up inside its own
// mount, network, PID, UTS, IPC and cgroup namespaces, and takes it down again
// without leaving anything behind.
//
//	node up -dir D -bin B              run a cluster until SIGTERM; ready when D/kubeconfig is there
//	node down -dir D                   stop it, or clear what a killed one left
//	node exec -dir D -- CMD [ARG...]   run a command on the node
//	node expose -dir D PORT...         let the node reach these ports of the host's loopback, as its own
//	node publish -dir D TARGET [ADDR]  let the host reach TARGET of the cluster at ADDR; prints the address
//
// D is the work folder: everything that the cluster writes is below it. B
// holds the programs that cluster.sh built.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(log.Ltime)
	log.SetPrefix("node: ")
	if len(os.Args) < 2 {
		log.Fatal("usage: node up|down|exec|expose|publish -dir D …")
	}
	verb := os.Args[1]
	switch verb { // the stages of up, in the new namespaces
	case "__init":
		enterSpace(os.Getenv("NODE_DIR"))
		return
	case "__pid1":
		reap()
	case "__components":
		runComponents(os.Getenv("NODE_DIR"), os.Getenv("NODE_BIN"))
	}
	fs := flag.NewFlagSet(verb, flag.ExitOnError)
	dir := fs.String("dir", "", "work folder")
	bin := fs.String("bin", "", "folder with the built programs and images")
	timeout := fs.Duration("timeout", 5*time.Minute, "time allowed until ready")
	_ = fs.Parse(os.Args[2:]) // exits on an error
	d := absolute(*dir)
	args := fs.Args()
	switch {
	case verb == "up" && *bin != "":
		os.Exit(up(d, absolute(*bin), *timeout))
	case verb == "down":
		os.Exit(down(d))
	case verb == "exec" && len(args) > 0:
		os.Exit(execOnNode(d, args))
	case verb == "expose" && len(args) > 0:
		for _, p := range args {
			_, err := ask(d, hostSocket, "expose", p)
			check(err, "expose port %s", p)
		}
	case verb == "publish" && (len(args) == 1 || len(args) == 2):
		addr := append(args, "127.0.0.1:0")[1]
		got, err := ask(d, hostSocket, "publish", addr, args[0])
		check(err, "publish %s", args[0])
		fmt.Println(got)
	default:
		log.Fatalf("%s: wrong use; see the comment at the top of main.go", verb)
	}
}

func absolute(p string) string {
	if p == "" {
		log.Fatal("-dir: missing")
	}
	a, err := filepath.Abs(p)
	check(err, "find %s", p)
	return a
}

// check ends the program when err is one; what says what was tried.
func check(err error, what string, a ...any) {
	if err != nil {
		log.Fatalf("%s: %v", fmt.Sprintf(what, a...), err)
	}
}

// lock takes the work folder for this process; the kernel gives it back when
// the process ends, however it ends.
func lock(dir string) (held *os.File, free bool) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	check(err, "open the lock of %s", dir)
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, false
	}
	return f, true
}

func up(dir, bin string, timeout time.Duration) int {
	check(os.MkdirAll(dir, 0o700), "make the work folder")
	held, free := lock(dir)
	if !free {
		log.Printf("a cluster runs in %s already", dir)
		return 1
	}
	defer held.Close()
	check(clearLeft(dir), "clear what an earlier cluster left in %s", dir)
	cgroups, err := makeCgroups("kmsctl-cluster-" + strconv.Itoa(os.Getpid()))
	writeFile(dir, "cgroups", strings.Join(cgroups, "\n")) // before the check: down must find them
	check(err, "make cgroups")
	defer func() { check(removeCgroups(cgroups), "remove cgroups") }()
	writeFile(dir, "host.pid", strconv.Itoa(os.Getpid()))

	sig := make(chan os.Signal, 4)
	signal.Notify(sig, syscall.SIGTERM, syscall.SIGINT)
	start := time.Now()
	check(serveHost(dir), "open the relay")
	cmd, done := startSpace(dir, bin)
	code := 0
	select {
	case err = <-done:
		log.Printf("the cluster ended before it was ready (%v); see %s/log", err, dir)
		return 1
	case <-sig:
		code = 130
	case <-time.After(timeout):
		log.Printf("the cluster is not ready after %s; see %s/log", timeout, dir)
		code = 1
	case <-readiness(dir):
		check(writeHostKubeconfig(dir), "write the host's kubeconfig")
		log.Printf("ready after %.1f s", time.Since(start).Seconds())
		select {
		case <-sig:
		case err = <-done:
			log.Printf("the cluster ended by itself (%v); see %s/log", err, dir)
			return 1
		}
	}
	_ = cmd.Process.Signal(syscall.SIGTERM) // an error means that it has ended
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		_ = cmd.Process.Kill()
		<-done
	}
	if code == 0 {
		check(clearLeft(dir), "clear %s", dir)
	}
	return code
}

// startSpace starts this program again in new namespaces. Its death signal
// follows the thread that forks, so that thread is kept.
func startSpace(dir, bin string) (*exec.Cmd, <-chan error) {
	runtime.LockOSThread()
	check(os.MkdirAll(filepath.Join(dir, "log"), 0o700), "make the log folder")
	out, err := os.Create(filepath.Join(dir, "log", "node.log"))
	check(err, "make a log")
	cmd := exec.Command("/proc/self/exe", "__init")
	cmd.Env = append(os.Environ(), "NODE_DIR="+dir, "NODE_BIN="+bin)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true,
	}
	check(cmd.Start(), "start in new namespaces (root is needed)")
	writeFile(dir, "pid", strconv.Itoa(cmd.Process.Pid))
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	return cmd, done
}

func readiness(dir string) <-chan struct{} {
	ready := make(chan struct{})
	go func() {
		for {
			if _, err := os.Stat(filepath.Join(dir, "ready")); err == nil {
				close(ready)
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	return ready
}

// writeHostKubeconfig publishes the API server on the host's loopback. The
// file is there only when the cluster can be used.
func writeHostKubeconfig(dir string) error {
	addr, err := ask(dir, hostSocket, "publish", "127.0.0.1:0", apiServer)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, "admin.conf"))
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, ".kubeconfig")
	if err := os.WriteFile(tmp, []byte(strings.ReplaceAll(string(b), apiServer, addr)), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, "kubeconfig"))
}

func down(dir string) int {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return 0
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		held, free := lock(dir)
		if free {
			defer held.Close()
			break
		}
		if b, err := os.ReadFile(filepath.Join(dir, "host.pid")); err == nil {
			if pid, err := strconv.Atoi(string(b)); err == nil {
				_ = syscall.Kill(pid, syscall.SIGTERM)
			}
		}
		if time.Now().After(deadline) {
			log.Printf("the cluster in %s does not stop", dir)
			return 1
		}
	}
	check(clearLeft(dir), "clear %s", dir)
	check(os.RemoveAll(dir), "remove %s", dir)
	return 0
}

// clearLeft removes what a cluster that is gone left: its cgroups and all of
// the work folder but the lock.
func clearLeft(dir string) error {
	if b, err := os.ReadFile(filepath.Join(dir, "cgroups")); err == nil {
		if err := removeCgroups(strings.Fields(string(b))); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "lock" {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func execOnNode(dir string, args []string) int {
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	check(err, "find the cluster in %s", dir)
	wd, err := os.Getwd()
	check(err, "find the current folder")
	cmd := exec.Command("nsenter", append([]string{"-t", string(pid), "-m", "-n", "-p", "-u", "-i", "-C", "--wd=" + wd, "--"}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "KUBECONFIG="+filepath.Join(dir, "admin.conf"))
	err = cmd.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return ee.ExitCode()
	}
	check(err, "run %s", args[0])
	return 0
}

func writeFile(dir, name, text string) string {
	f := filepath.Join(dir, name)
	check(os.MkdirAll(filepath.Dir(f), 0o700), "make the folder of %s", f)
	check(os.WriteFile(f, []byte(text), 0o600), "write %s", f)
	return f
}
