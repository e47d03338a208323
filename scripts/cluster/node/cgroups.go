package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// cgroupMount is a mounted cgroup hierarchy of this machine: v1's, or v2's.
type cgroupMount struct{ dir, kind, options string }

func cgroupMounts() ([]cgroupMount, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []cgroupMount
	for line := range strings.Lines(string(b)) {
		pre, post, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(pre), strings.Fields(post)
		if ok && strings.HasPrefix(f[4], "/sys/fs/cgroup") {
			out = append(out, cgroupMount{f[4], g[0], g[2]})
		}
	}
	return out, nil
}

// unified gives the mount of the version 2 hierarchy where there is no other.
func unified(mounts []cgroupMount) (dir string, ok bool) {
	for _, m := range mounts {
		switch m.kind {
		case "cgroup":
			return "", false
		case "cgroup2":
			dir = m.dir
		}
	}
	return dir, dir != ""
}

// parentCgroups gives the folder of each hierarchy below which a cluster has
// its cgroup: where this process is, since the root of a version 1 hierarchy
// may be another supervisor's. A version 2 cgroup that has processes cannot
// have children with controllers, unless it is the root.
func parentCgroups() ([]string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	paths := map[string]string{} // by v1 controllers; "" is v2
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		paths[f[1]] = f[2]
	}
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	if root, ok := unified(mounts); ok {
		return []string{root}, enableControllers(root)
	}
	var out []string
	for _, m := range mounts {
		for controllers, p := range paths {
			v2 := m.kind == "cgroup2" && controllers == ""
			v1 := m.kind == "cgroup" && controllers != "" && strings.Contains(","+m.options+",", ","+controllers+",")
			if v1 || v2 {
				out = append(out, filepath.Join(m.dir, p))
			}
		}
	}
	return out, nil
}

// enableControllers gives the children of a version 2 cgroup what the kubelet
// wants.
func enableControllers(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu +cpuset +io +memory +pids"), 0o644)
}

// makeCgroups makes the cluster's cgroup in each hierarchy. It returns what it
// made, also when it fails.
func makeCgroups(name string) (made []string, err error) {
	parents, err := parentCgroups()
	if err != nil {
		return nil, err
	}
	for _, parent := range parents {
		d := filepath.Join(parent, name)
		if err := os.Mkdir(d, 0o755); err != nil {
			return made, err
		}
		made = append(made, d)
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} { // v1 cpusets start empty
			v, err := os.ReadFile(filepath.Join(parent, f))
			if err != nil || strings.TrimSpace(string(v)) == "" {
				continue // no cpuset here
			}
			if err := os.WriteFile(filepath.Join(d, f), v, 0o644); err != nil {
				return made, err
			}
		}
	}
	return made, nil
}

// removeCgroups removes the folders with all below. The processes there are
// dead, but the kernel may need a moment to see it.
func removeCgroups(dirs []string) error {
	var last error
	for range 100 {
		last = nil
		for _, d := range dirs {
			var all []string
			_ = filepath.WalkDir(d, func(p string, e fs.DirEntry, err error) error { // what cannot be read shows when it is removed
				if err == nil && e.IsDir() {
					all = append(all, p)
				}
				return nil
			})
			for i := len(all) - 1; i >= 0; i-- {
				if err := syscall.Rmdir(all[i]); err != nil && !errors.Is(err, syscall.ENOENT) {
					last = &fs.PathError{Op: "rmdir", Path: all[i], Err: err}
				}
			}
		}
		if last == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return last
}
