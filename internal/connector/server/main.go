package server

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/token"
)

// Exit codes of kms-connector: few, since its parent or kubelet reads them.
const (
	exitFailed = 1
	exitUsage  = 2
	exitHung   = 8
)

type options struct {
	socket, pinFile string
	fd, pinFD       int
	workFD          int
	module          string
	label, serial   string
	slot            string
	softHSM         string
	givesKeys       bool
	sessions        int
	callTimeout     time.Duration
}

const usage = `kms-connector holds one PKCS#11 token and serves it to the KMS.

  kms-connector --socket PATH --pin-file FILE --module SO [--token-label L | --token-serial S | --slot N]
  kms-connector check --socket PATH       exits 0 when the connector there answers
  kms-connector probe --pin-file FILE --module SO ...
                                          tries what the token can do, and prints it as JSON

`

// Main is the program: its arguments without its name, and its exit code.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var err error
	switch {
	case len(args) > 0 && args[0] == "check":
		err = check(ctx, args[1:], stderr)
	case len(args) > 0 && args[0] == "probe":
		err = probe(args[1:], stdout, stderr)
	default:
		err = run(ctx, args, stderr)
	}
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case fault.KindOf(err) == fault.Usage:
		printFault(stderr, err)
		return exitUsage
	}
	printFault(stderr, err)
	return exitFailed
}

func printFault(w io.Writer, err error) {
	fmt.Fprintf(w, "kms-connector: error: %v\n", err)
	if h := fault.HintOf(err); h != "" {
		fmt.Fprintf(w, "kms-connector: hint: %s\n", h)
	}
}

func flags(name string, stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, usage)
		fs.PrintDefaults()
	}
	return fs
}

// parse reads the flags; toServe says that calls will come, by one way.
func parse(args []string, toServe bool, stderr io.Writer) (options, error) {
	var o options
	fs := flags("kms-connector", stderr)
	fs.StringVar(&o.socket, "socket", "", "unix socket to serve on")
	fs.StringVar(&o.pinFile, "pin-file", "", "file with the token's user PIN, read at each login")
	fs.IntVar(&o.fd, "fd", -1, "inherited socket to serve on, for kmsctl")
	fs.IntVar(&o.pinFD, "pin-fd", -1, "inherited socket to ask for the PIN, for kmsctl")
	fs.IntVar(&o.workFD, "work-fd", -1, "inherited socket for wraps and unwraps, for kmsctl")
	fs.StringVar(&o.module, "module", "", "path of the PKCS#11 library")
	fs.StringVar(&o.label, "token-label", "", "label of the token")
	fs.StringVar(&o.serial, "token-serial", "", "serial number of the token")
	fs.StringVar(&o.slot, "slot", "", "slot id; slots can move, so prefer label or serial")
	fs.StringVar(&o.softHSM, "softhsm-dir", "", "folder of a SoftHSM token, made when it is not there")
	fs.BoolVar(&o.givesKeys, "gives-keys", false, "let root keys leave for another token, wrapped under its public key; for the time of a move")
	fs.IntVar(&o.sessions, "sessions", token.DefaultSessions, "calls that the token works on at the same time")
	fs.DurationVar(&o.callTimeout, "call-timeout", 20*time.Second, "a call of the library that takes longer ends the connector")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return o, err
		}
		return o, fault.Usagef("%w", err)
	}
	return o, o.check(toServe, fs.Args())
}

func (o options) check(toServe bool, rest []string) error {
	var errs []error
	if len(rest) > 0 {
		errs = append(errs, fault.Usagef("%q: no such command", rest[0]))
	}
	if o.module == "" {
		errs = append(errs, fault.Usagef("--module: missing"))
	}
	if toServe && (o.socket == "") == (o.fd < 0) {
		errs = append(errs, fault.Usagef("--socket: missing"))
	}
	if (o.pinFile == "") == (o.pinFD < 0) {
		errs = append(errs, fault.Usagef("--pin-file: missing"))
	}
	chosen := 0
	for _, v := range []string{o.label, o.serial, o.slot} {
		if v != "" {
			chosen++
		}
	}
	if chosen > 1 {
		errs = append(errs, fault.Usagef("--token-label, --token-serial, --slot: only one of them"))
	}
	if _, err := slotNumber(o.slot); err != nil {
		errs = append(errs, err)
	}
	if o.sessions < 1 || o.sessions > 4096 {
		errs = append(errs, fault.Usagef("--sessions: %d is not between 1 and 4096", o.sessions))
	}
	if o.callTimeout < time.Second {
		errs = append(errs, fault.Usagef("--call-timeout: %s is less than a second", o.callTimeout))
	}
	return errors.Join(errs...)
}

func slotNumber(s string) (*uint64, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return nil, fault.Usagef("--slot: %q is not a number", s)
	}
	return &n, nil
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	o, err := parse(args, true, stderr)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil)).With("program", "kms-connector")
	set, missed := Harden()
	cfg := Config{Token: o.token(), SoftHSMDir: o.softHSM, GivesKeys: o.givesKeys,
		CallTimeout: o.callTimeout, Log: log, Hung: func(d time.Duration) {
			log.Error("a call of the PKCS#11 library does not return; the connector ends, to be started again", "after", d.String())
			os.Exit(exitHung)
		}}
	if cfg.PIN, err = o.pin(); err != nil {
		return err
	}
	l, err := o.listen(ctx, log)
	if err != nil {
		return err
	}
	defer l.Close()
	var work []*wire.Conn
	if o.workFD >= 0 {
		c, err := InheritedWork(o.workFD)
		if err != nil {
			return err
		}
		work = append(work, c)
	}
	log.Info("serving", "module", o.module, "set", set, "not set", missed)
	return New(cfg).Serve(ctx, l, work...)
}

func (o options) token() token.Config {
	slot, _ := slotNumber(o.slot) // checked
	return token.Config{Module: o.module, Label: o.label, Serial: o.serial, Slot: slot, Sessions: o.sessions}
}

func (o options) pin() (func() (secret.Value, error), error) {
	if o.pinFile != "" {
		return PINFile(o.pinFile), nil
	}
	return PINPipe(o.pinFD)
}

func (o options) listen(ctx context.Context, log *slog.Logger) (net.Listener, error) {
	if o.socket != "" {
		return Listen(ctx, o.socket, log)
	}
	return Inherited(o.fd)
}

// check asks a connector for its token: for the probes of a pod.
func check(ctx context.Context, args []string, stderr io.Writer) error {
	fs := flags("kms-connector check", stderr)
	socket := fs.String("socket", "", "unix socket of the connector")
	timeout := fs.Duration("timeout", 3*time.Second, "how long to wait")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return fault.Usagef("%w", err)
	}
	if *socket == "" {
		return fault.Usagef("--socket: missing")
	}
	conn, err := grpc.NewClient("unix:"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fault.New(fault.Usage, "dial", *socket, err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	if _, err := wire.NewConnectorClient(conn).Describe(ctx, &wire.DescribeRequest{}); err != nil {
		return fault.New(fault.Unreachable, "ask the connector at", *socket, err)
	}
	return nil
}
