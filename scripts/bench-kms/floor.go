package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/store"
)

const module = "/usr/lib/softhsm/libsofthsm2.so"

func token(ctx context.Context, bin, dir string) (*connector.Client, error) {
	return connector.Start(ctx, connector.Options{Path: filepath.Join(bin, "kms-connector"), Module: module, TokenLabel: "kms", SoftHSMDir: dir,
		PIN: secret.New([]byte(pin)), Stderr: os.Stderr})
}

// floorCipher is the least that an answer of wrap must carry.
type floorCipher struct {
	Ciphertext hsm.Sealed `json:"sealed"`
}

// serveFloor answers wrap and unwrap with nothing but HTTP, JSON, the
// connector and the token: no token check, policy, record or log.
func serveFloor(ctx context.Context, o options) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	t, err := token(ctx, o.bin, o.floorDir)
	if err != nil {
		return err
	}
	defer t.Close()
	ids := hsm.MasterIDs{Install: "bench", Wrap: make([]byte, 16), Seal: make([]byte, 16), Sign: make([]byte, 16)}
	ids.Wrap[0], ids.Seal[0], ids.Sign[0] = 1, 2, 3
	if err := t.Login(ctx); err != nil {
		return err
	}
	if _, err := t.OpenMaster(ctx, ids, true); err != nil {
		return err
	}
	k, err := t.CreateRootKey(ctx)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /wrap", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Plaintext []byte   `json:"plaintext"`
			AAD       []string `json:"aad"`
		}
		err := json.NewDecoder(r.Body).Decode(&in)
		if err == nil {
			var s hsm.Sealed
			if s, err = t.Wrap(r.Context(), k.Blob, in.Plaintext, []byte(in.AAD[0])); err == nil {
				var b []byte
				if b, err = json.Marshal(floorCipher{s}); err == nil {
					err = json.NewEncoder(w).Encode(map[string][]byte{"ciphertext": b})
				}
			}
		}
		answer(w, err)
	})
	mux.HandleFunc("POST /unwrap", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Ciphertext []byte   `json:"ciphertext"`
			AAD        []string `json:"aad"`
		}
		var c floorCipher
		err := json.NewDecoder(r.Body).Decode(&in)
		if err == nil {
			err = json.Unmarshal(in.Ciphertext, &c)
		}
		if err == nil {
			var p []byte
			if p, err = t.Unwrap(r.Context(), k.Blob, c.Ciphertext, []byte(in.AAD[0])); err == nil {
				err = json.NewEncoder(w).Encode(map[string][]byte{"plaintext": p})
			}
		}
		answer(w, err)
	})
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

func answer(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// seed fills the store of a stopped KMS with copies of the service's key,
// each under an id and name of its own.
func (b *bench) seed(ctx context.Context, data string, svc service, n int) error {
	m, err := store.OpenEmbedded(ctx, filepath.Join(data, "etcd"))
	if err != nil {
		return err
	}
	defer m.Close()
	c := m.Client()
	defer func() { _ = c.Close() }() // the member behind it ends next
	t, err := token(ctx, b.bin, filepath.Join(data, "softhsm"))
	if err != nil {
		return err
	}
	defer t.Close()
	opened, err := kms.Unlock(ctx, store.NewPlain(c), t, time.Now)
	if err != nil {
		return err
	}
	codec, err := record.NewCodec(opened.RecordKey)
	if err != nil {
		return err
	}
	st, err := store.Open(ctx, c, codec)
	if err != nil {
		return err
	}
	defer st.Close()
	b.instance = svc.InstanceID
	var k map[string]any
	dir := "keys/" + svc.InstanceID + "/"
	if _, err := st.Get(ctx, dir+svc.KeyID, &k); err != nil {
		return err
	}
	var batch []record.Change
	for i := 1; i < n; i++ {
		other := map[string]any{}
		for name, v := range k {
			other[name] = v
		}
		id := uuid.NewString()
		other["id"], other["name"] = id, fmt.Sprintf("key number %d", i)
		batch = append(batch, record.Change{Path: dir + id, Value: other})
		if len(batch) == 100 || i == n-1 {
			if err := st.Commit(ctx, batch...); err != nil {
				return err
			}
			batch = nil
		}
	}
	return nil
}
