package kms_test

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"strings"
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

var errDead = errors.New("the process is dead")

// life is a process that dies before its next write when it has none left.
type life struct{ writes int }

func (l *life) write() error {
	if l.writes == 0 {
		return errDead
	}
	l.writes--
	return nil
}

type mortalStore struct {
	*store.Store
	*life
}

func (m mortalStore) Commit(ctx context.Context, changes ...record.Change) error {
	if err := m.write(); err != nil {
		return err
	}
	return m.Store.Commit(ctx, changes...)
}

type mortalPlain struct {
	*store.Plain
	*life
}

func (m mortalPlain) Put(ctx context.Context, name string, v any, rev int64) (int64, error) {
	if name == "install" {
		if err := m.write(); err != nil {
			return 0, err
		}
	}
	return m.Plain.Put(ctx, name, v, rev)
}

// moveWorld is a store, and two tokens between which its keys go.
type moveWorld struct {
	st    *store.Store
	plain *store.Plain
}

func newMoveWorld(t *testing.T, token kms.Token) (*moveWorld, kms.Opened) {
	t.Helper()
	m, err := store.OpenEmbedded(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	codec, err := record.NewCodec(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	c := m.Client()
	w := &moveWorld{plain: store.NewPlain(c)}
	opened, err := kms.Unlock(t.Context(), w.plain, token, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if w.st, err = store.Open(t.Context(), c, codec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.st.Close(); c.Close(); m.Close() })
	return w, opened
}

func givingToken(t *testing.T) *connector.Client {
	t.Helper()
	c, err := connector.Start(t.Context(), connector.Options{Path: testkit.Connector(t), Module: testkit.SoftHSM, SoftHSMDir: filepath.Join(t.TempDir(), "softhsm"), PIN: secret.New([]byte("password")), GivesKeys: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// start is a start of the KMS with both tokens.
func (w *moveWorld) start(t *testing.T, l *life, from, to *connector.Client) (*kms.Rotation, *kms.Service) {
	t.Helper()
	open := func(ctx context.Context) (epoch kms.Epoch, err error) {
		for _, c := range []*connector.Client{from, to} {
			o, err := kms.Attend(ctx, w.plain, c, time.Now)
			if err != nil {
				return epoch, err
			}
			epoch = o.Epoch
		}
		s, err := kms.Stands(ctx, w.plain)
		from.Moved(s.Serial, s.Since, s.Version)
		return epoch, err
	}
	epoch, err := open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	masters := kms.NewMasters(w.plain, epoch, open)
	service := kms.New(w.st, from, from, time.Now, kms.DefaultWindows())
	service.Follow(masters)
	r := kms.Rotation{Store: mortalStore{w.st, l}, Plain: mortalPlain{w.plain, l}, HSM: from, Masters: masters, Name: "the only one", Now: time.Now,
		Note: func(context.Context, string, string, string) error { return l.write() }}
	if to != from {
		r.Next = to
	}
	return kms.NewRotation(r), service
}

// TestAMoveThatIsKilledAnywhere: keys go to and fro between two tokens, each
// time the process dies before another of its writes. In between every
// ciphertext opens and new keys are made, and the next process finishes.
func TestAMoveThatIsKilledAnywhere(t *testing.T) {
	ctx := t.Context()
	from, to := givingToken(t), givingToken(t)
	w, opened := newMoveWorld(t, from)
	_, service := w.start(t, &life{-1}, from, from)
	in, err := service.CreateInstance(ctx, kmsapi.CreateInstance{Name: "shop"}, "me")
	if err != nil {
		t.Fatal(err)
	}
	type wrapped struct{ key, plain, cipher string }
	var all []wrapped
	use := func(s *kms.Service, key string) {
		t.Helper()
		out, err := s.Wrap(ctx, in.ID, key, kmsapi.WrapRequest{})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, wrapped{key, out.Plaintext, out.Ciphertext})
	}
	create := func(s *kms.Service, q kmsapi.CreateKey) kmsapi.Key {
		t.Helper()
		k, err := s.CreateKey(ctx, in.ID, "default", "me", q)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	for range 2 {
		k := create(service, kmsapi.CreateKey{Name: "root"})
		use(service, k.ID)
		if err := service.Rotate(ctx, in.ID, k.ID, kmsapi.RotateRequest{}); err != nil {
			t.Fatal(err)
		}
		use(service, k.ID)
	}
	standard := create(service, kmsapi.CreateKey{Name: "standard", Extractable: true})
	opens := func(s *kms.Service) {
		t.Helper()
		for _, v := range all {
			if got, err := s.Unwrap(ctx, in.ID, v.key, kmsapi.UnwrapRequest{Ciphertext: v.cipher}); err != nil || got.Plaintext != v.plain {
				t.Errorf("key %s: %v", v.key, err)
			}
		}
		if k, err := s.Key(ctx, in.ID, standard.ID, true); err != nil || k.Payload != standard.Payload {
			t.Errorf("standard key: %v", err)
		}
	}
	cut := 0
	for finished := false; !finished && !t.Failed(); cut++ {
		info, err := to.Describe(ctx)
		if err != nil {
			t.Fatal(err)
		}
		from.Succeed(to, info.Serial)
		r, _ := w.start(t, &life{cut}, from, to)
		_, err = r.Migrate(ctx, "me", kmsapi.MigrationRequest{})
		finished = errors.Join(err, r.Work(ctx)) == nil
		r, service := w.start(t, &life{-1}, from, to)
		opens(service)
		if cut < 6 { // one record more is one write more
			use(service, create(service, kmsapi.CreateKey{Name: "made between"}).ID)
		}
		if _, err := r.Migrate(ctx, "me", kmsapi.MigrationRequest{}); err != nil {
			t.Fatalf("after %d writes: %v", cut, err)
		}
		if err := r.Work(ctx); err != nil {
			t.Fatalf("after %d writes: %v", cut, err)
		}
		s, err := r.Status(ctx)
		if err != nil || s.Token != info.Serial || len(s.Older) > 0 || s.Rotation.State != kmsapi.RotationDone {
			t.Fatalf("after %d writes: %+v %v", cut, s, err)
		}
		from.Succeed(nil, "")
		_, service = w.start(t, &life{-1}, to, to) // the new token alone
		opens(service)
		again, err := kms.Unlock(ctx, w.plain, to, time.Now)
		if err != nil || !bytes.Equal(again.RecordKey, opened.RecordKey) || !bytes.Equal(again.TokenKey, opened.TokenKey) {
			t.Fatalf("after %d writes, the installation's own secrets: %v", cut, err)
		}
		from, to = to, from
	}
	if cut < 10 {
		t.Errorf("finished after %d writes", cut)
	}
	t.Logf("killed before each of %d writes; %d ciphertexts open", cut-1, len(all))
}

// TestAMoveThatIsRefused says why, and nothing has begun.
func TestAMoveThatIsRefused(t *testing.T) {
	ctx := t.Context()
	from := givingToken(t)
	w, _ := newMoveWorld(t, from)
	refused := func(r *kms.Rotation, why string) {
		t.Helper()
		if _, err := r.Migrate(ctx, "me", kmsapi.MigrationRequest{}); fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), why) {
			t.Errorf("want %q: %v", why, err)
		}
		if s, err := r.Status(ctx); err != nil || s.Version != hsm.FirstMaster || s.Rotation != nil && s.Rotation.State != kmsapi.RotationStopped {
			t.Errorf("%+v %v", s, err)
		}
	}
	alone, service := w.start(t, &life{-1}, from, from)
	refused(alone, "no second token is configured")

	testkit.OpenCryptokiToken(t)
	cryptoki, err := connector.Start(ctx, connector.Options{Path: testkit.Connector(t), Module: testkit.OpenCryptoki, TokenLabel: testkit.OpenCryptokiLabel, PIN: secret.New([]byte(testkit.OpenCryptokiPIN))})
	if err != nil {
		t.Fatal(err)
	}
	defer from.Succeed(nil, "")
	defer cryptoki.Close()
	info, err := cryptoki.Describe(ctx)
	if err != nil {
		t.Fatal(err)
	}
	from.Succeed(cryptoki, info.Serial)
	r, _ := w.start(t, &life{-1}, from, cryptoki)
	refused(r, "the new token does not open a ciphertext of suite 1")
	s, err := r.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := cryptoki.Clear(ctx, s.Installation, nil); err != nil || n == 0 {
		t.Errorf("%d objects of the rehearsal: %v", n, err)
	}

	in, err := service.CreateInstance(ctx, kmsapi.CreateInstance{Name: "vault", Placement: hsm.PlacementToken}, "me")
	if err != nil {
		t.Fatal(err)
	}
	k, err := service.CreateKey(ctx, in.ID, "default", "me", kmsapi.CreateKey{Name: "stays"})
	if err != nil {
		t.Fatal(err)
	}
	refused(r, "1 of them stay in the token by their instance's placement, and cannot leave it: "+k.ID)
}
