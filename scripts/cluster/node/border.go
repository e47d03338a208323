package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// The cluster's network has no way out or in. What shall cross its border
// goes over two unix sockets in the work folder, which both sides see: each
// takes one line, a verb with words, answers "ok …" or "error …", and carries
// the bytes of a connection after "dial".
const (
	hostSocket = "host.sock" // served by up: expose PORT, publish ADDR TARGET, dial PORT
	nodeSocket = "node.sock" // served on the node: listen PORT, dial TARGET
)

// verb handles one request. A connection that it returns is joined with the
// caller's.
type verb func(words []string) (answer string, far net.Conn, err error)

// serveHost answers on the host's side. The node may dial only the ports of
// the host's loopback that were exposed to it.
func serveHost(dir string) error {
	var mu sync.Mutex
	exposed := map[string]bool{}
	return serve(dir, hostSocket, map[string]verb{
		"expose": func(w []string) (string, net.Conn, error) {
			answer, err := ask(dir, nodeSocket, "listen", w[0])
			mu.Lock()
			exposed[w[0]] = exposed[w[0]] || err == nil
			mu.Unlock()
			return answer, nil, err
		},
		"dial": func(w []string) (string, net.Conn, error) {
			mu.Lock()
			ok := exposed[w[0]]
			mu.Unlock()
			if !ok {
				return "", nil, fmt.Errorf("port %s is not exposed", w[0])
			}
			far, err := net.Dial("tcp", "127.0.0.1:"+w[0])
			return "", far, err
		},
		"publish": func(w []string) (string, net.Conn, error) {
			answer, err := listen(w[0], func() (net.Conn, error) {
				far, _, err := cross(dir, nodeSocket, "dial", w[1])
				return far, err
			})
			return answer, nil, err
		},
	})
}

// serveNode answers on the node's side.
func serveNode(dir string) error {
	listening := map[string]bool{}
	var mu sync.Mutex
	return serve(dir, nodeSocket, map[string]verb{
		"listen": func(w []string) (string, net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			if listening[w[0]] {
				return "", nil, nil
			}
			addr, err := listen("127.0.0.1:"+w[0], func() (net.Conn, error) {
				far, _, err := cross(dir, hostSocket, "dial", w[0])
				return far, err
			})
			listening[w[0]] = err == nil
			return addr, nil, err
		},
		"dial": func(w []string) (string, net.Conn, error) {
			far, err := net.DialTimeout("tcp", w[0], 10*time.Second)
			return "", far, err
		},
	})
}

func serve(dir, socket string, verbs map[string]verb) error {
	path, done, err := shortPath(dir, socket)
	if err != nil {
		return err
	}
	defer done()
	ln, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	go accept(ln, func(near net.Conn) error {
		line, err := readLine(near)
		if err != nil {
			return err
		}
		words := strings.Fields(line)
		want := map[string]int{"publish": 3, "expose": 2, "listen": 2, "dial": 2}
		var answer string
		var far net.Conn
		if len(words) == 0 || verbs[words[0]] == nil || len(words) != want[words[0]] {
			err = fmt.Errorf("not understood: %q", line)
		} else {
			answer, far, err = verbs[words[0]](words[1:])
		}
		if err != nil {
			_, werr := fmt.Fprintf(near, "error %v\n", err)
			return errors.Join(err, werr)
		}
		if _, err := fmt.Fprintf(near, "ok %s\n", answer); err != nil || far == nil {
			return err
		}
		join(near, far)
		return nil
	})
	return nil
}

// listen opens a loopback address whose connections go where dial leads.
func listen(addr string, dial func() (net.Conn, error)) (string, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return "", err
	}
	go accept(ln, func(near net.Conn) error {
		far, err := dial()
		if err != nil {
			return err
		}
		join(near, far)
		return nil
	})
	return ln.Addr().String(), nil
}

func accept(ln net.Listener, handle func(net.Conn) error) {
	for {
		c, err := ln.Accept()
		if err != nil {
			log.Printf("relay: %v", err)
			return
		}
		go func() {
			defer c.Close()
			if err := handle(c); err != nil {
				log.Printf("relay %s: %v", ln.Addr(), err)
			}
		}()
	}
}

// ask sends a request over a socket of the work folder and returns the answer.
func ask(dir, socket string, words ...string) (string, error) {
	c, answer, err := cross(dir, socket, words...)
	if err != nil {
		return "", err
	}
	return answer, c.Close()
}

func cross(dir, socket string, words ...string) (net.Conn, string, error) {
	path, done, err := shortPath(dir, socket)
	if err != nil {
		return nil, "", err
	}
	defer done()
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, "", err
	}
	_, err = fmt.Fprintln(c, strings.Join(words, " "))
	var line string
	if err == nil {
		line, err = readLine(c)
	}
	if err == nil && !strings.HasPrefix(line, "ok") {
		err = errors.New(strings.TrimPrefix(line, "error "))
	}
	if err != nil {
		c.Close()
		return nil, "", err
	}
	return c, strings.TrimPrefix(strings.TrimPrefix(line, "ok"), " "), nil
}

// shortPath names a file of the work folder by way of an open folder: a unix
// socket's path has room for 107 letters only.
func shortPath(dir, name string) (path string, done func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return "", nil, err
	}
	return filepath.Join("/proc/self/fd", fmt.Sprint(f.Fd()), name), func() { f.Close() }, nil
}

// readLine reads byte by byte, since what follows the line is not its own.
func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); len(line) < 1000; {
		if _, err := io.ReadFull(r, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
	return "", errors.New("line too long")
}

// join carries bytes both ways until both sides have ended.
func join(a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	done := make(chan struct{})
	go func() {
		carry(a, b)
		close(done)
	}()
	carry(b, a)
	<-done
}

// carry copies and passes the end on; a broken connection ends the other one.
func carry(dst, src net.Conn) {
	_, err := io.Copy(dst, src)
	if half, ok := dst.(interface{ CloseWrite() error }); ok && err == nil {
		err = half.CloseWrite()
	}
	if err != nil {
		dst.Close()
		src.Close()
	}
}
