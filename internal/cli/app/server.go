package app

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/file"
)

// The KMS is in a program of its own: who delivers and asks does not carry
// etcd along, and who serves does not carry Helm.
const (
	serverProgram  = "kms-server"
	serverVariable = "KMSCTL_KMS_SERVER"
)

// FindServer says where kms-server is: KMSCTL_KMS_SERVER, else beside this
// program, else in PATH.
func FindServer(getenv func(string) string) (string, error) {
	p, err := file.Program(getenv, serverVariable, serverProgram)
	if err != nil {
		return "", fault.New(fault.NotFound, "find the KMS", cmp.Or(p, serverProgram), err).
			WithHint("put kms-server beside kmsctl, or name it by %s", serverVariable)
	}
	return p, nil
}

// Delegate is a command of kms-server that kmsctl knows by name: the program
// becomes kms-server, which has its flags, help and completion.
func (a *App) Delegate(use, short string) *cobra.Command {
	name, _, _ := strings.Cut(use, " ")
	run := func(ctx context.Context, args ...string) error {
		path, err := FindServer(a.Getenv)
		if err != nil {
			return err
		}
		return become(ctx, path, append([]string{"kmsctl"}, args...))
	}
	cmd := &cobra.Command{
		Use: use, Short: short, DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return run(cmd.Context(), append([]string{name}, args...)...)
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.complete(cmd.Context(), append(append([]string{name}, args...), toComplete))
		},
	}
	cmd.SetHelpFunc(func(cmd *cobra.Command, _ []string) {
		if err := run(cmd.Context(), name, "--help"); err != nil {
			cmd.PrintErrln(err)
		}
	})
	return cmd
}

// StartFlags say how the embedded KMS is started for one call.
type StartFlags struct {
	SecretFile string
	ValuesFile string
	Pass       PassphraseFlags
}

// Add puts the flags into fs.
func (f *StartFlags) Add(fs *pflag.FlagSet) {
	fs.StringVar(&f.SecretFile, "secret", "", "hsm-Secret.yaml of an embedded KMS that is not running; without it, the one that --data remembers")
	fs.StringVar(&f.ValuesFile, "values", "", "overrides_hsm.yaml of an embedded KMS that is not running; without it, the one that --data remembers")
	f.Pass.Add(fs)
}

// Check holds the rules of the flags.
func (f *StartFlags) Check() error {
	if (f.SecretFile == "") != (f.ValuesFile == "") {
		return errors.Join(f.Pass.Check(), fault.Usagef("--secret, --values: give both or none"))
	}
	return f.Pass.Check()
}

func (f *StartFlags) args() []string {
	var args []string
	for _, v := range [][2]string{{"--secret", f.SecretFile}, {"--values", f.ValuesFile}, {"--passphrase-file", f.Pass.passphrase.File}, {"--identity-file", f.Pass.identityFile}} {
		if v[1] != "" {
			args = append(args, v[0], v[1])
		}
	}
	if f.Pass.passphrase.Stdin {
		args = append(args, "--passphrase-stdin")
	}
	return args
}

// Names in the data folder of an embedded KMS.
const (
	// RememberedFile says how the KMS was served last, without what is secret.
	RememberedFile = "serve.json"
	// CallSocket is the local socket of a KMS that was started for one call.
	// It is not the usual one: nobody else may begin what would end with it.
	CallSocket = "call.sock"
)

// SocketPath is the local socket of the embedded KMS in a data folder.
func SocketPath(data string) string { return filepath.Join(data, "api.sock") }

// CallReply is what a KMS that is started for one call says once, as a line of
// JSON, to who started it: where it answers, or why it does not.
type CallReply struct {
	Socket string      `json:"socket,omitempty"`
	Failed *fault.Said `json:"failed,omitempty"`
}

// Failed is the reply that carries an error.
func Failed(err error) CallReply {
	said := fault.Say(err)
	return CallReply{Failed: &said}
}

// Descriptors of a KMS that is started for one call: it writes its reply to
// one, and the end of the other is the end of the call.
const (
	CallReplyDescriptor = 3
	CallEndDescriptor   = 4
)

// embedded gives the local socket of the KMS of data: of the running one, else
// of one that is started for this call and ends with it, by the given files or
// by those that the folder remembers.
func (a *App) embedded(ctx context.Context, data string, given *StartFlags) (socket string, err error) {
	if a.oneCall == data && data != "" {
		return filepath.Join(data, CallSocket), nil
	}
	var d net.Dialer
	if c, err := d.DialContext(ctx, "unix", SocketPath(data)); err == nil {
		return SocketPath(data), c.Close()
	}
	args := []string{"serve", "--data", data, "--for-one-call"}
	if given != nil {
		args = append(args, given.args()...)
	} else if _, err := os.Stat(filepath.Join(data, RememberedFile)); errors.Is(err, fs.ErrNotExist) {
		return "", fault.Newf(fault.Unreachable, "reach the embedded KMS of", data, "none was started there yet").
			WithHint("start it with `kmsctl serve --data %s …`, or name another KMS with --server", data)
	}
	reply, stop, err := a.startForOneCall(ctx, args)
	if err != nil {
		return "", err
	}
	a.atExit = append(a.atExit, stop)
	if reply.Socket == filepath.Join(data, CallSocket) {
		a.oneCall = data
	}
	if reply.Failed != nil {
		return "", reply.Failed.Err()
	}
	return reply.Socket, nil
}

// startForOneCall starts kms-server and waits for what it says; stop ends it.
func (a *App) startForOneCall(ctx context.Context, args []string) (reply CallReply, stop func(), err error) {
	path, err := FindServer(a.Getenv)
	if err != nil {
		return reply, nil, err
	}
	said, says, err := os.Pipe()
	if err != nil {
		return reply, nil, fault.New(fault.Other, "start", path, err)
	}
	defer said.Close()
	waits, end, err := os.Pipe()
	if err != nil {
		return reply, nil, errors.Join(fault.New(fault.Other, "start", path, err), says.Close())
	}
	cmd := exec.Command(path, args...) //nolint:noctx // the end of its descriptor ends it, in good order
	cmd.Args[0] = "kmsctl"             // as its errors and its help name it
	if f, ok := a.In.(*os.File); ok {
		cmd.Stdin = f // for a passphrase
	}
	cmd.Stderr = a.Err
	cmd.ExtraFiles = []*os.File{CallReplyDescriptor - 3: says, CallEndDescriptor - 3: waits}
	err = cmd.Start()
	_, _ = says.Close(), waits.Close() // they are the child's now
	if err != nil {
		return reply, nil, errors.Join(fault.New(fault.Other, "start", path, err), end.Close())
	}
	stop = func() {
		_ = end.Close()
		_ = cmd.Wait() // it said what there was to say
	}
	stopped := context.AfterFunc(ctx, func() { _ = said.SetReadDeadline(time.Unix(1, 0)) })
	defer stopped()
	err = json.NewDecoder(said).Decode(&reply)
	if err == nil {
		return reply, stop, nil
	}
	stop()
	if ctx.Err() != nil {
		return reply, nil, ctx.Err()
	}
	return reply, nil, fault.Newf(fault.Other, "start", path, "it ended at once (%s)", cmd.ProcessState).WithHint("kmsctl and kms-server must be of one version")
}

// complete asks kms-server what can stand in the place of the last argument.
func (a *App) complete(ctx context.Context, args []string) ([]cobra.Completion, cobra.ShellCompDirective) {
	path, err := FindServer(a.Getenv)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	cmd := exec.CommandContext(ctx, path, append([]string{cobra.ShellCompRequestCmd}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	last := len(lines) - 1 // a colon and the directive, as cobra's scripts read it
	directive, err := strconv.Atoi(strings.TrimPrefix(lines[last], ":"))
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return lines[:last], cobra.ShellCompDirective(directive)
}
