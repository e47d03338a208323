package kms_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/store"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// killer ends its process by SIGKILL when a record is about to be written.
type killer struct {
	kms.Store
	path  string
	times int // so many writes go by
}

func (k *killer) Commit(ctx context.Context, changes ...record.Change) error {
	if slices.ContainsFunc(changes, func(c record.Change) bool { return strings.HasPrefix(c.Path, k.path) && c.Value != nil }) {
		if k.times--; k.times < 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	return k.Store.Commit(ctx, changes...)
}

// onSoftHSM is the KMS over a store and a SoftHSM token that are both in a folder.
func onSoftHSM(t *testing.T, dir string, wrap func(kms.Store) kms.Store, now *time.Time) (*kms.Service, *connector.Client, kms.Store) {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	codec, err := record.NewCodec(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	cl := m.Client()
	st, err := store.Open(t.Context(), cl, codec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close(); cl.Close(); m.Close() })
	c, err := connector.Start(t.Context(), connector.Options{Path: testkit.Connector(t), Module: testkit.SoftHSM, SoftHSMDir: filepath.Join(dir, "softhsm"), PIN: secret.New([]byte("password"))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if err := c.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.OpenMaster(t.Context(), hsm.MasterIDs{Install: "test", Wrap: []byte("wrap-id-16-bytes"), Seal: []byte("seal-id-16-bytes"), Sign: []byte("sign-id-16-bytes")}, true); err != nil {
		t.Fatal(err)
	}
	return kms.New(wrap(st), c, c, func() time.Time { return *now }, kms.DefaultWindows()), c, st
}

// held counts what the token keeps under a name.
func held(t *testing.T, c *connector.Client, name string) (n int) {
	t.Helper()
	all, err := c.Installations(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("%v %v", all, err)
	}
	for _, o := range all[0].Objects {
		if strings.HasPrefix(o, name+":") {
			n++
		}
	}
	return n
}

// TestWhatAKilledMakerLeft in the token goes after a while, and what has a
// name stays.
func TestWhatAKilledMakerLeft(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	placed := kmsapi.CreateInstance{Name: "shop", Placement: hsm.PlacementToken}
	makers := map[string]struct {
		record, object string
		spared         int
		do             func(ctx context.Context, s *kms.Service, instance string) error
	}{
		"create": {"keys/", "root", 1, func(ctx context.Context, s *kms.Service, instance string) error {
			_, err := s.CreateKey(ctx, instance, "default", "me", kmsapi.CreateKey{Name: "two"})
			return err
		}},
		"import token": {"importtokens/", "import", 0, func(ctx context.Context, s *kms.Service, instance string) error {
			_, err := s.CreateImportToken(ctx, instance, kmsapi.ImportTokenRequest{})
			return err
		}},
	}
	if name := os.Getenv("KILLED_MAKER"); name != "" {
		mk := makers[name]
		s, _, _ := onSoftHSM(t, os.Getenv("KILLED_DIR"), func(st kms.Store) kms.Store { return &killer{st, mk.record, mk.spared} }, &now)
		in, err := s.CreateInstance(t.Context(), placed, "me")
		if err == nil {
			_, err = s.CreateKey(t.Context(), in.ID, "default", "me", kmsapi.CreateKey{Name: "one"})
		}
		if err == nil {
			err = mk.do(t.Context(), s, in.ID)
		}
		t.Fatalf("it lives: %v", err)
	}
	for name, mk := range makers {
		t.Run(name, func(t *testing.T) {
			dir, now := t.TempDir(), now
			cmd := exec.Command(os.Args[0], "-test.run", "^TestWhatAKilledMakerLeft$")
			cmd.Env = append(os.Environ(), "KILLED_MAKER="+name, "KILLED_DIR="+dir)
			out, err := cmd.CombinedOutput()
			if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
				t.Fatalf("%v: %s", err, out)
			}
			s, c, st := onSoftHSM(t, dir, func(st kms.Store) kms.Store { return st }, &now)
			sweep := func() {
				t.Helper()
				if acts, err := s.Sweep(t.Context()); err != nil || len(acts) != 0 {
					t.Fatalf("%v %v", acts, err)
				}
			}
			sweep()
			if n := held(t, c, mk.object); n != mk.spared+1 {
				t.Fatalf("too early, or never made: %d objects", n)
			}
			now = now.Add(16 * time.Minute)
			sweep()
			if n := held(t, c, mk.object); n != mk.spared {
				t.Errorf("%d objects", n)
			}
			if err := st.List(t.Context(), "making/", func(m record.Meta, _ func(any) error) error {
				t.Errorf("%s is still there", m.Path)
				return nil
			}); err != nil {
				t.Error(err)
			}
			still(t, s)
		})
	}
}

// still: the key that has a name works.
func still(t *testing.T, s *kms.Service) {
	t.Helper()
	all, err := s.Instances(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("%v %v", all, err)
	}
	page, err := s.Keys(t.Context(), all[0].ID, kms.Query{Limit: 10})
	if err != nil || len(page.Keys) != 1 {
		t.Fatalf("%v %v", page.Keys, err)
	}
	if _, err := s.Wrap(t.Context(), all[0].ID, page.Keys[0].ID, kmsapi.WrapRequest{Plaintext: "AAAA"}); err != nil {
		t.Error(err)
	}
}

// slow is a maker who is overtaken by the sweep.
type slow struct {
	kms.HSM
	meanwhile func()
}

func (s *slow) CreatePlacedKey(ctx context.Context, id []byte) (hsm.NewKey, error) {
	k, err := s.HSM.CreatePlacedKey(ctx, id)
	s.meanwhile()
	return k, err
}

// TestAMakerWhoIsTooSlow gets no key whose material is gone.
func TestAMakerWhoIsTooSlow(t *testing.T) {
	w := newWorld(t)
	in, err := w.CreateInstance(t.Context(), kmsapi.CreateInstance{Name: "placed", Placement: hsm.PlacementToken}, "me")
	if err != nil {
		t.Fatal(err)
	}
	h := &slow{HSM: w.token, meanwhile: func() {
		w.now = w.now.Add(16 * time.Minute)
		if _, err := w.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
	}}
	s := kms.New(w.store, h, w.token, func() time.Time { return w.now }, kms.DefaultWindows())
	if _, err := s.CreateKey(t.Context(), in.ID, "default", "me", kmsapi.CreateKey{Name: "late"}); fault.KindOf(err) != fault.Conflict {
		t.Errorf("%v", err)
	}
	if got := w.paths(t, in.ID+"/"); len(got) != 0 {
		t.Errorf("left behind: %q", got)
	}
}
