package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/token"
)

// The floor is HTTP, JSON, one call by gRPC over a unix socket to the process
// that has the token, and the operation there: no token check, policy, record
// or log. The product carries wraps by frames instead; the floor stays at gRPC,
// so that a gain of the product's does not lower what it is measured by. What
// frames alone would cost in its place is measured beside it.

const module = "/usr/lib/softhsm/libsofthsm2.so"

// wrapper is the token as the floor's HTTP side sees it.
type wrapper interface {
	Wrap(ctx context.Context, blob, plain, aad []byte) (hsm.Sealed, error)
	Unwrap(ctx context.Context, blob []byte, c hsm.Sealed, aad []byte) ([]byte, error)
}

var masterIDs = hsm.MasterIDs{Install: "bench", Wrap: append(make([]byte, 15), 1), Seal: append(make([]byte, 15), 2), Sign: append(make([]byte, 15), 3)}

// framed is the product's connector, with one root key.
func framed(ctx context.Context, bin, dir string) (*connector.Client, []byte, error) {
	t, err := connect(ctx, bin, dir)
	if err != nil {
		return nil, nil, err
	}
	if err = t.Login(ctx); err == nil {
		_, err = t.OpenMaster(ctx, masterIDs, true)
	}
	var k hsm.NewKey
	if err == nil {
		k, err = t.CreateRootKey(ctx)
	}
	if err != nil {
		t.Close()
	}
	return t, k.Blob, err
}

func connect(ctx context.Context, bin, dir string) (*connector.Client, error) {
	return connector.Start(ctx, connector.Options{Path: filepath.Join(bin, "kms-connector"), Module: module, TokenLabel: "kms", SoftHSMDir: dir,
		PIN: secret.New([]byte(pin)), Stderr: os.Stderr})
}

// called is a token behind gRPC, with one root key there.
type called struct{ *grpc.ClientConn }

const (
	floorService = "floor.Token"
	callWrap     = "Wrap"
	callUnwrap   = "Unwrap"
)

func (c called) Wrap(ctx context.Context, _, plain, aad []byte) (hsm.Sealed, error) {
	var out wire.WrapReply
	err := c.Invoke(ctx, "/"+floorService+"/"+callWrap, &wire.WrapRequest{Plaintext: plain, Aad: aad}, &out)
	s := out.GetSealed()
	return hsm.Sealed{Suite: uint8(s.GetSuite()), IV: s.GetIv(), Ciphertext: s.GetCiphertext()}, err
}

func (c called) Unwrap(ctx context.Context, _ []byte, s hsm.Sealed, aad []byte) ([]byte, error) {
	var out wire.Bytes
	err := c.Invoke(ctx, "/"+floorService+"/"+callUnwrap, &wire.UnwrapRequest{Sealed: &wire.Sealed{Suite: uint32(s.Suite), Iv: s.IV, Ciphertext: s.Ciphertext}, Aad: aad}, &out)
	return out.Data, err
}

// byCalls starts the process that has the token, and waits for it; it ends
// with ctx.
func byCalls(ctx context.Context, dir string) (called, error) {
	self, err := os.Executable()
	if err != nil {
		return called{}, err
	}
	child := exec.CommandContext(ctx, self, "-floor-token", dir)
	child.Stderr = os.Stderr
	if err := child.Start(); err != nil {
		return called{}, err
	}
	conn, err := grpc.NewClient("unix:"+socketIn(dir), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return called{}, err
	}
	_, err = called{conn}.Wrap(ctx, nil, []byte(wrapBody), nil)
	return called{conn}, err
}

func socketIn(dir string) string { return filepath.Join(dir, "floor.sock") }

// floorToken answers the calls.
type floorToken struct {
	*token.Token
	blob []byte
}

func (t floorToken) wrap(q *wire.WrapRequest) (*wire.WrapReply, error) {
	s, err := t.Wrap(t.blob, q.Plaintext, q.Aad)
	return &wire.WrapReply{Sealed: &wire.Sealed{Suite: uint32(s.Suite), Iv: s.IV, Ciphertext: s.Ciphertext}}, err
}

func (t floorToken) unwrap(q *wire.UnwrapRequest) (*wire.Bytes, error) {
	s := q.GetSealed()
	p, err := t.Unwrap(t.blob, hsm.Sealed{Suite: uint8(s.GetSuite()), IV: s.GetIv(), Ciphertext: s.GetCiphertext()}, q.Aad)
	return &wire.Bytes{Data: p}, err
}

// method answers one call with f.
func method[Q, R any](name string, f func(floorToken, *Q) (*R, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(t any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		q := new(Q)
		if err := decode(q); err != nil {
			return nil, err
		}
		return f(t.(floorToken), q)
	}}
}

// serveToken is the process that has the token, in dir.
func serveToken(ctx context.Context, dir string) error {
	p := secret.New([]byte(pin))
	if err := token.MakeSoftToken(dir, module, "kms", p); err != nil {
		return err
	}
	t, err := token.Open(token.Config{Module: module, Label: "kms"})
	if err != nil {
		return err
	}
	defer t.Close()
	if err := t.Login(p); err != nil {
		return err
	}
	if _, err := t.OpenMaster(masterIDs, true); err != nil {
		return err
	}
	k, err := t.CreateRootKey()
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", socketIn(dir))
	if err != nil {
		return err
	}
	g := grpc.NewServer()
	g.RegisterService(&grpc.ServiceDesc{ServiceName: floorService, HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{method(callWrap, floorToken.wrap), method(callUnwrap, floorToken.unwrap)}}, floorToken{t, k.Blob})
	return g.Serve(l)
}

// floorBody is a request, floorCipher the least that an answer of wrap carries.
type floorBody struct {
	Plaintext  []byte   `json:"plaintext"`
	Ciphertext []byte   `json:"ciphertext"`
	AAD        []string `json:"aad"`
}

type floorCipher struct {
	Ciphertext hsm.Sealed `json:"sealed"`
}

// serveFloor answers wrap and unwrap with a token in o.floorDir.
func serveFloor(ctx context.Context, o options) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	var t wrapper
	var blob []byte
	if o.frames {
		c, b, err := framed(ctx, o.bin, o.floorDir)
		if err != nil {
			return err
		}
		defer c.Close()
		t, blob = c, b
	} else {
		c, err := byCalls(ctx, o.floorDir)
		if err != nil {
			return err
		}
		t = c
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /wrap", answer("ciphertext", func(ctx context.Context, in floorBody) ([]byte, error) {
		s, err := t.Wrap(ctx, blob, in.Plaintext, []byte(in.AAD[0]))
		if err != nil {
			return nil, err
		}
		return json.Marshal(floorCipher{s})
	}))
	mux.HandleFunc("POST /unwrap", answer("plaintext", func(ctx context.Context, in floorBody) ([]byte, error) {
		var c floorCipher
		if err := json.Unmarshal(in.Ciphertext, &c); err != nil {
			return nil, err
		}
		return t.Unwrap(ctx, blob, c.Ciphertext, []byte(in.AAD[0]))
	}))
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	h := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	go func() { <-ctx.Done(); _ = h.Close() }() // it has nothing to lose
	fmt.Printf("ready  http://%s\n", l.Addr())
	if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func answer(field string, f func(context.Context, floorBody) ([]byte, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in floorBody
		err := json.NewDecoder(r.Body).Decode(&in)
		var out []byte
		if err == nil {
			out, err = f(r.Context(), in)
		}
		if err == nil {
			err = json.NewEncoder(w).Encode(map[string][]byte{field: out})
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}
}
