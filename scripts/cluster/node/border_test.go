package main

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// echo answers each connection with what it sent, once it has sent all.
func echo(t *testing.T) (addr, port string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				_, _ = c.Write(b)
			}()
		}
	}()
	_, port, _ = net.SplitHostPort(ln.Addr().String())
	return ln.Addr().String(), port
}

// border opens both sides in one folder, whose path is longer than a unix
// socket's may be.
func border(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 40))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := serveHost(dir); err != nil {
		t.Fatal(err)
	}
	if err := serveNode(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestPublishCarriesBothWays(t *testing.T) {
	dir := border(t)
	target, _ := echo(t)
	addr, err := ask(dir, hostSocket, "publish", "127.0.0.1:0", target)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 1<<20)
	_, _ = rand.Read(want)
	for range 3 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("got %d bytes, %v; want the %d that were sent", len(got), err, len(want))
		}
		c.Close()
	}
}

func TestPublishedButAbsentTargetEndsTheConnection(t *testing.T) {
	dir := border(t)
	addr, err := ask(dir, hostSocket, "publish", "127.0.0.1:0", "127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); len(b) > 0 {
		t.Fatalf("got %q, %v; want an end", b, err)
	}
}

func TestNodeReachesOnlyExposedPorts(t *testing.T) {
	dir := border(t)
	_, port := echo(t)
	if _, _, err := cross(dir, hostSocket, "dial", port); err == nil || !strings.Contains(err.Error(), "not exposed") {
		t.Fatalf("dial of a port that is not exposed: %v", err)
	}
	// Both sides share one loopback here, so the node cannot listen on the port
	// too; that must come back, and the port stays closed.
	if _, err := ask(dir, hostSocket, "expose", port); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Fatalf("expose: %v", err)
	}
	if _, _, err := cross(dir, hostSocket, "dial", port); err == nil {
		t.Fatal("a port that could not be exposed can be dialled")
	}
}

func TestRequestsNotUnderstoodAreRefused(t *testing.T) {
	dir := border(t)
	for _, words := range [][]string{{"expose"}, {"listen", "80"}, {"dial", "1", "2"}, {"?"}} {
		if _, err := ask(dir, hostSocket, words...); err == nil || !strings.Contains(err.Error(), "not understood") {
			t.Errorf("%v: %v", words, err)
		}
	}
}
