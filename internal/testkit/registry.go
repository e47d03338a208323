package testkit

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)

// Registry starts Debian's docker-registry on a port of the kernel's choice,
// with its blobs in dir, and gives HOST:PORT.
func Registry(tb testing.TB, dir string) string {
	tb.Helper()
	host, stop, err := StartRegistry(dir)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(stop)
	return host
}

// StartRegistry is Registry for those who stop it themselves.
func StartRegistry(dir string) (host string, stop func(), err error) {
	conf := filepath.Join(dir, "registry.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: '127.0.0.1:0'}\n", filepath.Join(dir, "blobs"))
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := exec.CommandContext(ctx, "docker-registry", "serve", conf)
	out, err := c.StderrPipe()
	if err != nil {
		cancel()
		return "", nil, err
	}
	c.Stdout = io.Discard
	if err := c.Start(); err != nil {
		cancel()
		return "", nil, fmt.Errorf("start docker-registry: %w", err)
	}
	stop = func() {
		cancel()
		_ = c.Wait() // it was killed
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if m := listening.FindStringSubmatch(lines.Text()); m != nil {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return m[1], stop, nil
		}
	}
	stop()
	return "", nil, fmt.Errorf("docker-registry ended before it listened")
}
