// Package plugin is the KMS v2 plugin of Kubernetes: the API server asks it,
// over a unix socket, to wrap and unwrap what encrypts its Secrets. The root
// key stays in the KMS; nothing is kept here but which key it is.
package plugin

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsv2 "k8s.io/kms/apis/v2"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// KMS does what the plugin is asked for. kmsclient.Client is one.
type KMS interface {
	Key(ctx context.Context, id string, metadata bool) (kmsapi.Key, error)
	Wrap(ctx context.Context, id string, in kmsapi.WrapRequest) (kmsapi.ActionAnswer, error)
	Unwrap(ctx context.Context, id string, in kmsapi.UnwrapRequest) (kmsapi.ActionAnswer, error)
}

// Plugin answers the API server. Safe for concurrent use.
type Plugin struct {
	kmsv2.UnimplementedKeyManagementServiceServer
	kms KMS
	key string // id or alias
	log *slog.Logger

	mu sync.Mutex
	id string // of the key, once it is known
}

// New makes a plugin that wraps by a root key.
func New(k KMS, key string, log *slog.Logger) *Plugin { return &Plugin{kms: k, key: key, log: log} }

// Serve answers on l until ctx ends, then lets running calls finish.
func (p *Plugin) Serve(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage))
	kmsv2.RegisterKeyManagementServiceServer(s, p)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		s.GracefulStop()
		return <-done
	}
}

// maxMessage is more than the API server sends: a seed of 32 bytes, or a
// ciphertext of less than 1 kB.
const maxMessage = 64 << 10

// The version of the API, and the word for good health, that the API server
// expects.
const (
	apiVersion = "v2"
	healthy    = "ok"
)

// canary is what Status wraps and unwraps: a key that cannot be used must show
// before a Secret has to be written.
const canary = "kmsctl plugin status"

// Status says whether the key can be used, and which version of it wraps now:
// when that changes, the API server wraps anew.
func (p *Plugin) Status(ctx context.Context, _ *kmsv2.StatusRequest) (*kmsv2.StatusResponse, error) {
	wrapped, id, err := p.wrap(ctx, []byte(canary))
	if err == nil {
		var back []byte
		if back, err = p.unwrap(ctx, id, wrapped); err == nil && string(back) != canary {
			err = errors.New("the KMS gave back something else than it was given")
		}
	}
	if err != nil {
		p.log.Error("status", "error", err)
		return &kmsv2.StatusResponse{Version: apiVersion, Healthz: err.Error(), KeyId: p.key}, nil
	}
	return &kmsv2.StatusResponse{Version: apiVersion, Healthz: healthy, KeyId: id}, nil
}

// Encrypt wraps.
func (p *Plugin) Encrypt(ctx context.Context, in *kmsv2.EncryptRequest) (*kmsv2.EncryptResponse, error) {
	wrapped, id, err := p.wrap(ctx, in.Plaintext)
	if err != nil {
		return nil, p.refuse("encrypt", in.Uid, err)
	}
	return &kmsv2.EncryptResponse{Ciphertext: wrapped, KeyId: id}, nil
}

// Decrypt unwraps, by the key that wrapped: not the present one, when the
// plugin was given another key since.
func (p *Plugin) Decrypt(ctx context.Context, in *kmsv2.DecryptRequest) (*kmsv2.DecryptResponse, error) {
	plain, err := p.unwrap(ctx, in.KeyId, in.Ciphertext)
	if err != nil {
		return nil, p.refuse("decrypt", in.Uid, err)
	}
	return &kmsv2.DecryptResponse{Plaintext: plain}, nil
}

// wrap gives the ciphertext, and the id of the key and the version that made
// it.
func (p *Plugin) wrap(ctx context.Context, plain []byte) (wrapped []byte, id string, err error) {
	key, err := p.keyID(ctx)
	if err != nil {
		return nil, "", err
	}
	if len(plain) == 0 { // the KMS would make a key of its own
		return nil, "", fault.Usagef("there is nothing to encrypt")
	}
	out, err := p.kms.Wrap(ctx, key, kmsapi.WrapRequest{Plaintext: base64.StdEncoding.EncodeToString(plain)})
	if err != nil {
		return nil, "", err
	}
	if out.KeyVersion == nil {
		return nil, "", fault.Usagef("the instance speaks ICP's dialect, which does not name the version of a key: use an instance of Key Protect's")
	}
	return []byte(out.Ciphertext), key + "/" + out.KeyVersion.ID, nil
}

func (p *Plugin) unwrap(ctx context.Context, id string, wrapped []byte) ([]byte, error) {
	key, _, ok := strings.Cut(id, "/")
	if !ok || key == "" {
		return nil, fault.Usagef("key id %q is none of this plugin's", id)
	}
	out, err := p.kms.Unwrap(ctx, key, kmsapi.UnwrapRequest{Ciphertext: string(wrapped)})
	if err != nil {
		return nil, err
	}
	return base64.StdEncoding.DecodeString(out.Plaintext)
}

// keyID asks for the key's id until it is known: the KMS may come up later
// than the plugin.
func (p *Plugin) keyID(ctx context.Context) (string, error) {
	p.mu.Lock()
	id := p.id
	p.mu.Unlock()
	if id != "" {
		return id, nil
	}
	k, err := p.kms.Key(ctx, p.key, true)
	if err != nil {
		return "", fmt.Errorf("look up key %q: %w", p.key, err)
	}
	if k.Extractable {
		return "", fault.Usagef("key %q is no root key", p.key)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.id = k.ID
	return k.ID, nil
}

func (p *Plugin) refuse(what, uid string, err error) error {
	p.log.Error(what, "uid", uid, "error", err)
	return status.Error(code(err), err.Error())
}

// code is the gRPC code of a refusal.
func code(err error) codes.Code {
	var e *kmsclient.Error
	if errors.As(err, &e) {
		return statusCode(e.Status)
	}
	var f *fault.Error
	if !errors.As(err, &f) { // no answer
		return codes.Unavailable
	}
	return kindCode(f.Kind)
}

// kindCode translates the kinds of faults.
func kindCode(k fault.Kind) codes.Code {
	switch k {
	case fault.Usage:
		return codes.InvalidArgument
	case fault.Denied:
		return codes.PermissionDenied
	case fault.NotFound:
		return codes.NotFound
	case fault.BadContent:
		return codes.DataLoss
	case fault.NotReady, fault.Unreachable:
		return codes.Unavailable
	case fault.Conflict:
		return codes.FailedPrecondition
	case fault.Stopped:
		return codes.Canceled
	case fault.Partial, fault.Other:
	}
	return codes.Internal
}

// statusCode translates the API's HTTP status.
func statusCode(n int) codes.Code {
	switch n {
	case 401:
		return codes.Unauthenticated
	case 403:
		return codes.PermissionDenied
	case 404:
		return codes.NotFound
	case 409, 410:
		return codes.FailedPrecondition
	case 422:
		return codes.DataLoss
	case 429, 503:
		return codes.Unavailable
	}
	if n >= 500 {
		return codes.Internal
	}
	return codes.InvalidArgument
}
