package main

import (
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// The addresses inside; they are the same in every cluster, since no network
// is shared.
const (
	nodeName    = "node1"
	nodeIP      = "10.99.0.1"
	podCIDR     = "10.244.0.0/24"
	serviceCIDR = "10.96.0.0/16"
	apiIP       = "10.96.0.1"
	dnsIP       = "10.96.0.10"
	apiServer   = "127.0.0.1:6443"
)

const cloneNewCgroup = 0x02000000 // not in package syscall

// enterSpace is the first process in the new namespaces: it moves itself into
// the cgroups made for it, lays mounts and network, and becomes process 1.
func enterSpace(dir string) {
	runtime.LockOSThread()
	syscall.Umask(0o022) // containers' root folders must be readable whatever the caller's is
	b, err := os.ReadFile(filepath.Join(dir, "cgroups"))
	check(err, "read the cgroups' names")
	for _, c := range strings.Fields(string(b)) {
		check(os.WriteFile(filepath.Join(c, "cgroup.procs"), []byte("0"), 0o644), "enter %s", c)
	}
	check(syscall.Unshare(cloneNewCgroup), "make a cgroup namespace")
	layMounts(dir)
	check(syscall.Sethostname([]byte(nodeName)), "set the host name")
	layNetwork()
	check(syscall.Exec("/proc/self/exe", []string{"node", "__pid1"}, os.Environ()), "become process 1")
}

func mount(src, dst, kind string, flags uintptr, options string) {
	check(syscall.Mount(src, dst, kind, flags, options), "mount %s on %s", src, dst)
}

func layMounts(dir string) {
	mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
	mount("proc", "/proc", "proc", 0, "")
	layCgroups()
	shieldSysctls(dir)
	mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
	check(os.MkdirAll("/run/lock", 0o1777), "make /run/lock")
	// What the node writes below /var lands in the work folder.
	for _, d := range []string{"var.upper", "var.work"} {
		check(os.MkdirAll(filepath.Join(dir, d), 0o755), "make %s", d)
	}
	mount("overlay", "/var", "overlay", 0, fmt.Sprintf("lowerdir=/var,upperdir=%s/var.upper,workdir=%s/var.work", dir, dir))
	// Names resolve through the cluster's DNS and nowhere else.
	for f, text := range map[string]string{
		"resolv.conf": "nameserver " + dnsIP + "\nsearch svc.cluster.local cluster.local\noptions timeout:2 attempts:2\n",
		"hosts":       "127.0.0.1 localhost\n" + nodeIP + " " + nodeName + "\n",
	} {
		mount(writeFile(dir, "etc/"+f, text), "/etc/"+f, "", syscall.MS_BIND, "")
		check(os.Chmod(filepath.Join(dir, "etc", f), 0o644), "open %s for all", f)
	}
	mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED, "") // the kubelet needs it
}

// layCgroups mounts /sys afresh, so that it shows this network namespace's
// devices and the cgroup namespace's root as root. The old tree must go, not
// just be covered: libraries take a hierarchy's first mount in mountinfo,
// whose root would read "/..".
func layCgroups() {
	mounts, err := cgroupMounts()
	check(err, "list cgroup mounts")
	check(syscall.Unmount("/sys", syscall.MNT_DETACH), "detach /sys")
	mount("sysfs", "/sys", "sysfs", 0, "")
	for _, m := range mounts {
		var options []string
		if m.kind == "cgroup" {
			for _, o := range strings.Split(m.options, ",") {
				switch {
				case o == "rw" || o == "ro":
				case strings.HasPrefix(o, "name="):
					options = append(options, "none", o)
				default:
					options = append(options, o)
				}
			}
		}
		if m.kind != "tmpfs" {
			check(os.MkdirAll(m.dir, 0o755), "make %s", m.dir)
		}
		mount(m.kind, m.dir, m.kind, 0, strings.Join(options, ","))
	}
	if root, ok := unified(mounts); ok {
		// Only a cgroup without processes may have children with controllers.
		leaf := filepath.Join(root, "node")
		check(os.Mkdir(leaf, 0o755), "make %s", leaf)
		check(os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0o644), "enter %s", leaf)
		check(enableControllers(root), "enable cgroup controllers")
	}
}

// shieldSysctls lets the kubelet write plain files instead of settings of the
// whole machine.
func shieldSysctls(dir string) {
	for _, s := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	} {
		b, err := os.ReadFile("/proc/sys/" + s)
		if err != nil {
			continue // not in this kernel
		}
		mount(writeFile(dir, "sysctl/"+s, string(b)), "/proc/sys/"+s, "", syscall.MS_BIND, "")
	}
}

func layNetwork() {
	for _, c := range []string{
		"ip link set lo up",
		"ip link add node0 type bridge",
		"ip addr add " + nodeIP + "/32 dev node0",
		"ip link set node0 up",
		// Without a route, a process on the node cannot send to a service at all, so that no rule can rewrite it.
		"ip route add " + serviceCIDR + " dev node0 src " + nodeIP,
	} {
		a := strings.Fields(c)
		out, err := exec.Command(a[0], a[1:]...).CombinedOutput()
		check(err, "%s: %s", c, out)
	}
	for k, v := range map[string]string{
		"net/ipv4/ip_forward":                 "1",
		"net/bridge/bridge-nf-call-iptables":  "1",
		"net/bridge/bridge-nf-call-ip6tables": "1",
		"net/ipv6/conf/all/disable_ipv6":      "1",
	} {
		if err := os.WriteFile("/proc/sys/"+k, []byte(v), 0o644); err != nil {
			log.Printf("sysctl %s: %v", k, err) // another kernel may do without
		}
	}
}

// reap is process 1: it collects whatever is left to it while the components'
// supervisor, its only own child, runs. When it ends, the kernel kills all
// that is left in the namespaces.
func reap() {
	cmd := exec.Command("/proc/self/exe", "__components")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, syscall.SIGTERM, syscall.SIGINT)
	check(cmd.Start(), "start the supervisor")
	go func() {
		for range sig {
			_ = cmd.Process.Signal(syscall.SIGTERM) // an error means that it has ended
		}
	}()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		check(err, "wait for children")
		if pid == cmd.Process.Pid {
			os.Exit(status.ExitStatus())
		}
	}
}
