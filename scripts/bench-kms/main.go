// Command bench-kms measures the KMS against a floor of the same run: the
// least that an answer over HTTP with JSON, a local call by gRPC and the
// SoftHSM operation cost together. It drives the real program over loopback,
// with its own load generator, and reads CPU time and memory of the server
// and its connector from /proc. See scripts/bench-kms.sh.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"
)

type options struct {
	bin      string
	seconds  float64
	rounds   int
	many     int
	floorDir string
	frames   bool
	only     string
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "folder with kmsctl and kms-connector")
	flag.Float64Var(&o.seconds, "seconds", 2, "length of one measurement")
	flag.IntVar(&o.rounds, "rounds", 3, "measurements of each kind; the median counts")
	flag.IntVar(&o.many, "many", 100_000, "number of keys of the large store; 0 leaves it out")
	flag.StringVar(&o.only, "only", "", "speed or sizes; without it, both")
	flag.StringVar(&o.floorDir, "floor", "", "be the floor's server, with its token in this folder")
	flag.BoolVar(&o.frames, "frames", false, "with -floor: reach the token by the connector's frames instead of gRPC")
	tokenDir := flag.String("floor-token", "", "be the floor's token, in this folder")
	flag.Parse()
	ctx := context.Background()
	var err error
	switch {
	case *tokenDir != "":
		err = serveToken(ctx, *tokenDir)
	case o.floorDir != "":
		err = serveFloor(ctx, o)
	default:
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-kms:", err)
		os.Exit(1)
	}
}

// pin of the SoftHSM tokens that are made for the measurement.
const pin = "a pass phrase of the benchmark"

func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "bench-kms-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }() // a temporary folder
	b := bench{options: o, dir: dir}
	if err := b.render(ctx); err != nil {
		return err
	}
	if o.only != "sizes" {
		if err := b.speed(ctx); err != nil {
			return err
		}
	}
	if o.only != "speed" {
		return b.sizes(ctx)
	}
	return nil
}

type bench struct {
	options
	dir string
}

func (b *bench) kmsctl(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "kmsctl"), args...)
	cmd.Env = append(os.Environ(), "KMSCTL_HSM_PASSWORD="+pin, "KMSCTL_NO_INPUT=1")
	cmd.Dir = b.dir
	return cmd
}

func (b *bench) render(ctx context.Context) error {
	var err error
	if b.bin, err = filepath.Abs(b.bin); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"render", "secret", "--model", "softhsm", "--plain", "--output-file", "secret.yaml"},
		{"render", "overrides", "--model", "softhsm", "--registry", "r.example", "--version", "1", "--plain", "--output-file", "values.yaml"},
	} {
		if out, err := b.kmsctl(ctx, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("kmsctl %s: %w\n%s", args[0], err, out)
		}
	}
	return nil
}

// server is a running kmsctl serve, or the floor.
type server struct {
	cmd   *exec.Cmd
	url   string
	ready time.Duration
	pids  []int // itself and its connector
}

var readyLine = regexp.MustCompile(`(?m)^ready\s+(https?://\S+)`)

// start runs cmd until it prints its ready line into log.
func start(cmd *exec.Cmd, log string) (*server, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	for time.Since(began) < time.Minute {
		b, err := os.ReadFile(log)
		if err != nil {
			return nil, err
		}
		if m := readyLine.FindSubmatch(b); m != nil {
			s := &server{cmd: cmd, url: string(m[1]), ready: time.Since(began)}
			s.pids = append([]int{cmd.Process.Pid}, children(cmd.Process.Pid)...)
			return s, nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	b, _ := os.ReadFile(log)
	return nil, errors.Join(fmt.Errorf("%s is not ready:\n%s", cmd.Path, b), cmd.Process.Kill())
}

func (s *server) stop() error {
	return errors.Join(s.cmd.Process.Signal(syscall.SIGTERM), s.cmd.Wait())
}

func (b *bench) serve(ctx context.Context, data string, flags ...string) (*server, error) {
	args := append([]string{"serve", "--data", data, "--listen", "127.0.0.1:0", "--secret", "secret.yaml", "--values", "values.yaml", "--rate-limit", "0"}, flags...)
	return start(b.kmsctl(ctx, args...), filepath.Join(b.dir, data+".log"))
}

// service is an onboarded service: what the load needs.
type service struct {
	InstanceID, KeyID, APIKey string
}

func (b *bench) onboard(ctx context.Context, data, name string) (service, error) {
	out, err := b.kmsctl(ctx, "onboard", name, "--data", data, "-o", "json").Output()
	if err != nil {
		return service{}, fmt.Errorf("onboard: %w", err)
	}
	var s service
	return s, json.Unmarshal(out, &s)
}

func (b *bench) floor(ctx context.Context, name string, flags ...string) (*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := append([]string{"-floor", filepath.Join(b.dir, name), "-bin", b.bin}, flags...)
	return start(exec.CommandContext(ctx, self, args...), filepath.Join(b.dir, name+".log"))
}

// speed prints CPU and wall time of wrap and unwrap beside the floor's, and
// beside the same with frames in place of gRPC.
func (b *bench) speed(ctx context.Context) error {
	floor, err := b.floor(ctx, "floor")
	if err != nil {
		return err
	}
	defer func() { _ = floor.stop() }() // it has nothing to lose
	frames, err := b.floor(ctx, "frames", "-frames")
	if err != nil {
		return err
	}
	defer func() { _ = frames.stop() }() // nor has this
	plain, err := b.serve(ctx, "plain", "--plain-http")
	if err != nil {
		return err
	}
	defer func() { _ = plain.stop() }()
	secured, err := b.serve(ctx, "tls")
	if err != nil {
		return err
	}
	defer func() { _ = secured.stop() }()
	targets := []*target{{name: "floor", server: floor, path: "/wrap"}, {name: "frames", server: frames, path: "/wrap"}}
	for _, s := range []struct {
		name string
		*server
	}{{"plain", plain}, {"tls", secured}} {
		svc, err := b.onboard(ctx, s.name, "bench")
		if err != nil {
			return err
		}
		t, err := newTarget(ctx, s.name, s.server, svc)
		if err != nil {
			return err
		}
		targets = append(targets, t)
	}
	fmt.Printf("%-24s %3s  %10s %10s %10s %10s %8s\n", "32-byte DEK with AAD", "c", "CPU µs", "of server", "p50 µs", "p99 µs", "1/s")
	for _, c := range []int{1, 8, 64} {
		for _, op := range []string{"wrap", "unwrap"} {
			if err := b.compare(ctx, targets, op, c); err != nil {
				return err
			}
		}
	}
	return nil
}

// inTurn measures one operation on all targets in turn, round by round, so
// that a disturbance meets all of them.
func (b *bench) inTurn(ctx context.Context, targets []*target, op string, c int) (map[string][]figures, error) {
	got := map[string][]figures{}
	for range b.rounds {
		for _, t := range targets {
			f, err := t.load(ctx, op, c, time.Duration(b.seconds*float64(time.Second)))
			if err != nil {
				return nil, fmt.Errorf("%s %s: %w", t.name, op, err)
			}
			got[t.name] = append(got[t.name], f)
		}
	}
	return got, nil
}

// compare prints what one operation costs on each target, and the ratios.
func (b *bench) compare(ctx context.Context, targets []*target, op string, c int) error {
	got, err := b.inTurn(ctx, targets, op, c)
	if err != nil {
		return err
	}
	base, frames := median(got["floor"]), median(got["frames"])
	for _, t := range targets {
		m := median(got[t.name])
		fmt.Printf("%-24s %3d  %10.0f %10.0f %10.0f %10.0f %8.0f", t.name+" "+op, c, m.cpu, m.own, m.p50, m.p99, m.rate)
		if t.name != "floor" {
			fmt.Printf("   %.2f × floor", m.cpu/base.cpu)
		}
		if t.name != "floor" && t.name != "frames" {
			fmt.Printf(", %.2f × frames", m.cpu/frames.cpu)
		}
		fmt.Println()
	}
	return nil
}

// figures of one measurement; times in microseconds, CPU for each call.
type figures struct{ cpu, own, p50, p99, rate float64 }

func median(all []figures) figures {
	mid := func(f func(figures) float64) float64 {
		var v []float64
		for _, x := range all {
			v = append(v, f(x))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	return figures{mid(func(f figures) float64 { return f.cpu }), mid(func(f figures) float64 { return f.own }), mid(func(f figures) float64 { return f.p50 }),
		mid(func(f figures) float64 { return f.p99 }), mid(func(f figures) float64 { return f.rate })}
}

// sizes prints memory, time to ready and the cost of lists and wraps by number
// of keys.
func (b *bench) sizes(ctx context.Context) error {
	var all []*sized
	var targets []*target
	defer func() {
		for _, s := range all {
			_ = s.stop() // it has nothing to lose
		}
	}()
	for _, n := range []int{1000, b.many} {
		if n == 0 {
			continue
		}
		s, err := b.grown(ctx, n)
		if err != nil {
			return err
		}
		all, targets = append(all, s), append(targets, s.target)
	}
	got, err := b.inTurn(ctx, targets, "wrap", 8)
	if err != nil {
		return err
	}
	fmt.Printf("\n%8s  %8s %8s %8s  %9s %9s %11s\n", "keys", "ready ms", "RSS MiB", "peak MiB", "page ms", "list CPU", "wrap CPU µs")
	least := median(got[all[0].name]).cpu
	for _, s := range all {
		if err := b.look(ctx, s); err != nil {
			return err
		}
		cpu := median(got[s.name]).cpu
		fmt.Printf("%8d  %8d %8.1f %8.1f  %9.2f %6d ms %11.0f   %.2f × %d keys\n", s.n, s.ready.Milliseconds(), s.rss, s.peak, s.page, s.list.Milliseconds(), cpu, cpu/least, all[0].n)
	}
	return nil
}

// sized is a server of n keys, and what it takes.
type sized struct {
	*target
	n         int
	instance  string
	rss, peak float64       // MiB
	page      float64       // ms
	list      time.Duration // CPU
}

// grown starts a server whose store has n keys.
func (b *bench) grown(ctx context.Context, n int) (*sized, error) {
	data := fmt.Sprintf("keys%d", n)
	s, err := b.serve(ctx, data, "--plain-http")
	if err != nil {
		return nil, err
	}
	svc, err := b.onboard(ctx, data, "bench")
	if err := errors.Join(err, s.stop()); err != nil {
		return nil, err
	}
	if err := b.seed(ctx, filepath.Join(b.dir, data), svc, n); err != nil {
		return nil, fmt.Errorf("seed: %w", err)
	}
	if s, err = b.serve(ctx, data, "--plain-http"); err != nil {
		return nil, err
	}
	t, err := newTarget(ctx, data, s, svc)
	return &sized{target: t, n: n, instance: svc.InstanceID}, err
}

// look measures what is no load: memory after it, a page, and a list.
func (b *bench) look(ctx context.Context, s *sized) (err error) {
	s.rss, s.peak = memory(s.pids)
	if s.page, err = b.page(ctx, s); err != nil {
		return err
	}
	list := b.kmsctl(ctx, "keys", "list", "--data", s.name, "--instance", s.instance)
	if out, err := list.CombinedOutput(); err != nil {
		return fmt.Errorf("keys list: %w\n%s", err, out)
	}
	s.list = list.ProcessState.UserTime() + list.ProcessState.SystemTime()
	return nil
}
