package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/file"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/kube"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// ClientFlags say which KMS a command talks to, and as whom.
type ClientFlags struct {
	Server      string
	CAFile      string
	Instance    string
	APIKeyFile  string
	APIKeyStdin bool
	Data        string
	InCluster   bool
	Start       *StartFlags // how to start the embedded KMS for one call; nil: as its folder remembers
	kube        KubeFlags
}

// Release is the name of the release that is reached; empty when none is.
func (f *ClientFlags) Release() string {
	if !f.InCluster {
		return ""
	}
	return f.kube.Release
}

// AddKey puts the flag of the API key alone into fs, for a command that reaches
// a release by its own flags; see At.
func (f *ClientFlags) AddKey(fs *pflag.FlagSet, usage string) {
	fs.StringVar(&f.APIKeyFile, "api-key-file", "", usage+" (or KMSCTL_API_KEY in the environment)")
}

// At is f for the release that k names.
func (f ClientFlags) At(k KubeFlags) *ClientFlags {
	f.InCluster, f.kube = true, k
	return &f
}

// HasKey says whether an API key was given.
func (f *ClientFlags) HasKey(a *App) bool {
	return f.APIKeyStdin || f.APIKeyFile != "" || a.Getenv("KMSCTL_API_KEY") != ""
}

// Add puts the flags into fs.
func (f *ClientFlags) Add(fs *pflag.FlagSet, a *App) {
	fs.StringVar(&f.Server, "server", "", "URL of the KMS; without it, the embedded KMS of --data is used")
	fs.StringVar(&f.CAFile, "ca-file", "", "PEM file of the CA that signed the server's certificate")
	fs.StringVar(&f.APIKeyFile, "api-key-file", "", "file with the API key (or KMSCTL_API_KEY in the environment)")
	fs.BoolVar(&f.APIKeyStdin, "api-key-stdin", false, "read the API key from standard input")
	f.kube.AddInCluster(fs, &f.InCluster)
	DataFlag(fs, a, &f.Data)
}

// AddInstance adds --instance, for commands that work in one.
func (f *ClientFlags) AddInstance(fs *pflag.FlagSet) {
	fs.StringVar(&f.Instance, "instance", "", "id or name of the instance")
}

// DataFlag adds --data, the folder of the embedded KMS.
func DataFlag(fs *pflag.FlagSet, a *App, p *string) {
	fs.StringVar(p, "data", DataDir(a.Getenv), "folder of the embedded KMS")
}

// DataDir is $XDG_DATA_HOME/kmsctl, as the XDG base directory specification
// has it.
func DataDir(getenv func(string) string) string {
	base := getenv("XDG_DATA_HOME")
	if base == "" {
		base = filepath.Join(getenv("HOME"), ".local", "share")
	}
	return filepath.Join(base, "kmsctl")
}

// Check holds the rules of the flags; needInstance when the command works in
// an instance.
func (f *ClientFlags) Check(needInstance bool) error {
	var errs []error
	if needInstance && f.Instance == "" {
		errs = append(errs, fault.Usagef("--instance: missing").WithHint("give the id or name of an instance, or set KMSCTL_INSTANCE"))
	}
	if f.APIKeyFile != "" && f.APIKeyStdin {
		errs = append(errs, fault.Usagef("--api-key-file, --api-key-stdin: only one of them"))
	}
	if f.Server != "" && f.InCluster {
		errs = append(errs, fault.Usagef("--server, --in-cluster-service: only one of them"))
	}
	if f.Server != "" && !strings.HasPrefix(f.Server, "https://") && !strings.HasPrefix(f.Server, "http://") {
		errs = append(errs, fault.Usagef("--server: %q is not a URL", f.Server).WithHint("as in https://kms-api.kube-system:28674"))
	}
	return errors.Join(errs...)
}

// Client makes the client that the flags ask for, and resolves the instance's
// name.
func (a *App) Client(ctx context.Context, f *ClientFlags) (*kmsclient.Client, error) {
	key, err := a.apiKey(f)
	if err != nil {
		return nil, err
	}
	cfg := kmsclient.Config{Server: f.Server, CAFile: f.CAFile, APIKey: key}
	where := f.Server
	if f.InCluster {
		where = "release " + f.kube.Release
	}
	if where == "" {
		if cfg.Socket, err = a.embedded(ctx, f.Data, f.Start); err != nil {
			return nil, err
		}
	} else if len(key) == 0 {
		return nil, fault.Usagef("no API key for %q", where).WithHint("give --api-key-file or --api-key-stdin, or set KMSCTL_API_KEY")
	}
	if f.InCluster {
		if err := a.inCluster(ctx, f, &cfg); err != nil {
			return nil, err
		}
	}
	c, err := kmsclient.New(cfg)
	if err != nil {
		return nil, fault.New(fault.Usage, "", "", err)
	}
	if f.Instance != "" {
		id, err := resolveInstance(ctx, c, f.Instance)
		if err != nil {
			return nil, a.ClientError("find instance", f.Instance, err)
		}
		c.SetInstance(id)
	}
	return c, nil
}

// inCluster makes the release's API reachable from here until the command ends.
func (a *App) inCluster(ctx context.Context, f *ClientFlags, cfg *kmsclient.Config) error {
	c, err := a.Cluster(&f.kube)
	if err != nil {
		return err
	}
	if cfg.CAFile == "" {
		if cfg.CA, err = caOf(ctx, c, f.kube); err != nil {
			return err
		}
	}
	addr, stop, err := c.Forward(ctx, f.kube.Namespace, install.API(f.kube.Release), apiPort)
	if err != nil {
		return err
	}
	a.atExit = append(a.atExit, stop)
	cfg.Server = "https://" + addr
	return nil
}

func caOf(ctx context.Context, c *kube.Cluster, k KubeFlags) ([]byte, error) {
	ca, err := c.Secret(ctx, k.Namespace, install.CASecret(k.Release))
	return ca.Data["ca.crt"], withHint(err, "is the release in this namespace? without the right to read the Secret, give its CA with --ca-file")
}

// Replicas asks each pod of a release's API how it is. That needs no API key.
func (a *App) Replicas(ctx context.Context, c *kube.Cluster, k KubeFlags) ([]diagnose.Replica, error) {
	pods, err := c.PodsBehind(ctx, k.Namespace, install.API(k.Release))
	if err != nil {
		return nil, err
	}
	ca, err := caOf(ctx, c, k)
	if err != nil {
		return nil, err
	}
	out := make([]diagnose.Replica, len(pods))
	for i, p := range pods {
		out[i] = diagnose.Replica{Pod: p.Name, Node: p.Node}
		out[i].Health, out[i].Err = healthOf(ctx, c, k.Namespace, p.Name, ca)
	}
	return out, nil
}

func healthOf(ctx context.Context, c *kube.Cluster, namespace, pod string, ca []byte) (h kmsapi.Health, err error) {
	addr, stop, err := c.ForwardPod(ctx, namespace, pod, apiPort)
	if err != nil {
		return h, err
	}
	defer stop()
	client, err := kmsclient.New(kmsclient.Config{Server: "https://" + addr, CA: ca})
	if err != nil {
		return h, err
	}
	return client.Health(ctx)
}

// apiPort is where the pods of the API listen.
const apiPort = 28674

func (a *App) apiKey(f *ClientFlags) ([]byte, error) {
	var b []byte
	switch {
	case f.APIKeyStdin:
		in, err := io.ReadAll(io.LimitReader(a.In, 4096))
		if err != nil {
			return nil, fault.New(fault.Other, "read the API key from", "standard input", err)
		}
		b = in
	case f.APIKeyFile != "":
		in, err := os.ReadFile(f.APIKeyFile)
		if err != nil {
			return nil, fault.New(fault.NotFound, "read the API key from", f.APIKeyFile, err).WithHint("check --api-key-file")
		}
		b = in
	default:
		b = []byte(a.Getenv("KMSCTL_API_KEY"))
	}
	return bytes.TrimSpace(b), nil
}

// resolveInstance turns a name into an id; what looks like an id is taken as
// it is, since a service may not list instances.
func resolveInstance(ctx context.Context, c *kmsclient.Client, s string) (string, error) {
	if len(s) == 36 && strings.Count(s, "-") == 4 {
		return s, nil
	}
	var all kmsapi.Instances
	if err := c.Do(ctx, "GET", "/kmsctl/v1/instances", nil, &all); err != nil {
		return "", err
	}
	for _, in := range all.Instances {
		if in.Name == s {
			return in.ID, nil
		}
	}
	return "", fault.Newf(fault.NotFound, "find instance", s, "there is none of this name").WithHint("see: kmsctl instances list")
}

// ClientError turns a client's error into a fault: what was tried, on what.
func (a *App) ClientError(op, object string, err error) error {
	var f *fault.Error
	if err == nil || errors.As(err, &f) {
		return err
	}
	var e *kmsclient.Error
	if !errors.As(err, &e) {
		out := fault.New(fault.Unreachable, op, object, err).WithHint("is the KMS running, and are --server and --ca-file right?")
		var oe *net.OpError
		if errors.As(err, &oe) && errors.Is(err, fs.ErrNotExist) {
			out.Hint = "start the embedded KMS with `kmsctl serve`"
		}
		return out
	}
	kind, hint := fault.Other, ""
	switch e.Status {
	case 400, 413, 501:
		kind, hint = fault.Usage, "the KMS did not accept the request; see the reason above"
		if e.Code == "BXNIM0415E" {
			kind, hint = fault.Denied, "the API key is wrong or was revoked"
		}
	case 401:
		kind, hint = fault.Denied, "give a valid API key: --api-key-file, or KMSCTL_API_KEY"
	case 403:
		kind, hint = fault.Denied, "this API key's policy does not allow it; an administrator can add one with `kmsctl iam policies create`"
	case 404:
		kind, hint = fault.NotFound, "see `kmsctl keys list` and `kmsctl instances list`"
	case 409, 410:
		kind, hint = fault.Conflict, "look at the present state, then decide"
	case 422:
		kind, hint = fault.BadContent, "the ciphertext was changed, belongs to another key, or the additional data (--aad) differ"
	case 503:
		kind, hint = fault.Unreachable, "the KMS or its HSM is not ready; try again, and look at /readyz"
	}
	switch e.Code {
	case kmsapi.ConfigRule:
		hint = "a policy of the instance shuts this address out; see `kmsctl instances policy get`, as somebody who is let in"
	case kmsapi.ClockAhead:
		hint = "look at it with `kmsctl clock`; set the machine's clock right, or accept it with `kmsctl clock confirm`"
	case kmsapi.ServiceOnly:
		hint = "give a service ID's API key: --server with --api-key-file; see `kmsctl iam api-keys create`"
	case kmsapi.RegistrationAbsent:
		hint = "see `kmsctl keys registrations list`"
	case kmsapi.TokenExpired:
		hint = "make one with `kmsctl keys import-token create`; it is good for a time and a number of reads"
	}
	return fault.New(kind, op, object, err).WithHint("%s", hint)
}

// ReadInput reads a file, or standard input for "-"; at most max bytes.
func (a *App) ReadInput(flag, path string, limit int64) ([]byte, error) {
	r := a.In
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fault.New(fault.NotFound, "read", path, err).WithHint("check %s", flag)
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fault.New(fault.Other, "read", path, err)
	}
	if int64(len(b)) > limit {
		return nil, fault.New(fault.Usage, "read", path, fmt.Errorf("more than %d bytes", limit)).WithHint("check %s", flag)
	}
	return b, nil
}

// WriteFile writes b to path with mode perm, whole or not at all.
func WriteFile(path string, b []byte, perm os.FileMode) error {
	if err := file.Write(path, b, perm); err != nil {
		return fault.New(fault.Other, "write", path, err)
	}
	return nil
}
