package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// target is a server under load, as one service sees it.
type target struct {
	name string
	*server
	path   string
	header http.Header
	client *http.Client
}

const wrapBody = `{"plaintext":"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=","aad":["table=orders"]}`

func newTarget(ctx context.Context, name string, s *server, svc service) (*target, error) {
	t := &target{name: name, server: s, path: "/api/v2/keys/" + svc.KeyID + "/actions/wrap", header: http.Header{}}
	t.open()
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {svc.APIKey}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	res, err := t.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var tok kmsapi.Token
	if err := json.NewDecoder(res.Body).Decode(&tok); err != nil {
		return nil, err
	}
	t.header.Set("Authorization", "Bearer "+tok.AccessToken)
	t.header.Set(kmsapi.HeaderInstance, svc.InstanceID)
	return t, nil
}

// open makes the client: as many connections as callers, by HTTP/1.1.
func (t *target) open() {
	t.client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} //nolint:gosec // speed is measured, on loopback
}

// call sends one request and reads the whole answer.
func (t *target) call(ctx context.Context, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = t.header.Clone()
	res, err := t.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", res.StatusCode, b)
	}
	return b, err
}

// load keeps c callers busy for a while.
func (t *target) load(ctx context.Context, op string, c int, d time.Duration) (figures, error) {
	if t.client == nil {
		t.header = http.Header{}
		t.open()
	}
	path, body := strings.Replace(t.path, "wrap", op, 1), []byte(wrapBody)
	if op == "unwrap" {
		b, err := t.call(ctx, t.path, body)
		if err != nil {
			return figures{}, err
		}
		var a kmsapi.ActionAnswer
		if err := json.Unmarshal(b, &a); err != nil {
			return figures{}, err
		}
		if body, err = json.Marshal(kmsapi.UnwrapRequest{Ciphertext: a.Ciphertext, AAD: []string{"table=orders"}}); err != nil {
			return figures{}, err
		}
	}
	for range 2 * c { // connections and caches
		if _, err := t.call(ctx, path, body); err != nil {
			return figures{}, err
		}
	}
	var mu sync.Mutex
	var took []time.Duration
	var failed error
	var wg sync.WaitGroup
	before, ownBefore, began := cpuTime(t.pids), cpuTime(t.pids[:1]), time.Now()
	for range c {
		wg.Go(func() {
			var mine []time.Duration
			var err error
			for time.Since(began) < d && err == nil {
				at := time.Now()
				_, err = t.call(ctx, path, body)
				mine = append(mine, time.Since(at))
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
			if err != nil {
				failed = err
			}
		})
	}
	wg.Wait()
	wall, cpu, own := time.Since(began), cpuTime(t.pids)-before, cpuTime(t.pids[:1])-ownBefore
	if failed != nil {
		return figures{}, failed
	}
	slices.Sort(took)
	us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
	n := len(took)
	return figures{us(cpu) / float64(n), us(own) / float64(n), us(took[n/2]), us(took[n*99/100]), float64(n) / wall.Seconds()}, nil
}

// page measures one list page of 200 keys in the middle, in milliseconds, by
// the local socket.
func (b *bench) page(ctx context.Context, s *sized) (float64, error) {
	socket := filepath.Join(b.dir, s.name, "api.sock")
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	defer c.CloseIdleConnections()
	var all []float64
	for range 21 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://local/api/v2/keys?limit=200&offset=%d", s.n/2), nil)
		if err != nil {
			return 0, err
		}
		req.Header.Set(kmsapi.HeaderInstance, s.instance)
		began := time.Now()
		res, err := c.Do(req)
		if err != nil {
			return 0, err
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode != http.StatusOK {
			return 0, fmt.Errorf("list: %d %s %w", res.StatusCode, body, err)
		}
		all = append(all, float64(time.Since(began).Microseconds())/1000)
	}
	slices.Sort(all)
	return all[len(all)/2], nil
}

// children are the processes that pid started.
func children(pid int) []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	var out []int
	for _, s := range stats {
		if f := stat(s); len(f) > 1 && f[1] == strconv.Itoa(pid) {
			if id, err := strconv.Atoi(filepath.Base(filepath.Dir(s))); err == nil {
				out = append(out, id)
			}
		}
	}
	return out
}

// stat gives the fields of a stat file from the process's state on (proc(5)).
func stat(path string) []string {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	return strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
}

const tick = 10 * time.Millisecond // USER_HZ is 100 on Linux

// cpuTime is the CPU time of the processes so far.
func cpuTime(pids []int) time.Duration {
	var sum time.Duration
	for _, p := range pids {
		f := stat(fmt.Sprintf("/proc/%d/stat", p))
		if len(f) < 13 {
			continue
		}
		for _, i := range []int{11, 12} { // utime, stime
			n, _ := strconv.ParseInt(f[i], 10, 64)
			sum += time.Duration(n) * tick
		}
	}
	return sum
}

// memory is the resident memory of the processes, now and at most, in MiB.
func memory(pids []int) (now, peak float64) {
	for _, p := range pids {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p))
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 {
				continue
			}
			n, _ := strconv.ParseFloat(f[1], 64)
			switch f[0] {
			case "VmRSS:":
				now += n / 1024
			case "VmHWM:":
				peak += n / 1024
			}
		}
	}
	return now, peak
}
