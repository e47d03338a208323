// Package server is the connector's end of the protocol: it holds one token
// and does what the KMS asks of it. It never logs in by itself, and nothing
// that it says holds a PIN, a handle, or a key that was born in the token.
package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/argon2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kmsctl/kmsctl/internal/connector/wire"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/token"
)

// Config of a connector.
type Config struct {
	Token       token.Config
	SoftHSMDir  string        // make a SoftHSM token here when there is none
	GivesKeys   bool          // root keys may leave, wrapped under another token's public key
	CallTimeout time.Duration // a call of the library that takes longer ends the process
	PIN         func() (secret.Value, error)
	Log         *slog.Logger
	Hung        func(since time.Duration) // ends the process
}

// queue bounds the calls that wait for a session, for each session.
const queue = 128

// Server answers the KMS.
type Server struct {
	wire.UnimplementedConnectorServer
	pin   func() (secret.Value, error)
	gives bool
	dev   *device
	slots chan struct{} // one for each session
	line  chan struct{} // bounds those that wait
	dog   *watchdog

	opTime atomic.Int64 // nanoseconds that a wrap or an unwrap takes, a running average
}

// New makes a server; the token is opened by the first call.
func New(c Config) *Server {
	if c.Token.Sessions <= 0 {
		c.Token.Sessions = token.DefaultSessions
	}
	if c.SoftHSMDir != "" && c.Token.Label == "" {
		c.Token.Label = "kms"
	}
	pin := checked(c.PIN)
	return &Server{pin: pin, gives: c.GivesKeys, dev: &device{open: opener(c, pin), log: c.Log},
		slots: make(chan struct{}, c.Token.Sessions), line: make(chan struct{}, queue*c.Token.Sessions),
		dog: &watchdog{limit: c.CallTimeout, hung: c.Hung, calls: map[uint64]time.Time{}}}
}

// checked refuses a PIN that would cost a try: white space is what an editor
// or echo left there.
func checked(source func() (secret.Value, error)) func() (secret.Value, error) {
	return func() (secret.Value, error) {
		p, err := source()
		if err != nil {
			return p, fault.New(fault.NotReady, "read the HSM's password", "", err)
		}
		if err := hsm.CheckPIN(p.Reveal()); err != nil {
			p.Zero()
			return secret.Value{}, fault.New(fault.Usage, "read the HSM's password", "", err).
				WithHint("encode it without a line break: printf %%s \"$PASSWORD\" | base64")
		}
		return p, nil
	}
}

// Serve answers on l, and wraps and unwraps on work too, until ctx ends or l
// is done, then closes the token.
func (s *Server) Serve(ctx context.Context, l net.Listener, work ...*wire.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g := grpc.NewServer(grpc.MaxRecvMsgSize(1<<20), grpc.ConnectionTimeout(5*time.Second))
	wire.RegisterConnectorServer(g, s)
	var working sync.WaitGroup
	take := func(c *wire.Conn) { working.Go(func() { s.serveWork(ctx, c) }) }
	for _, c := range work {
		take(c)
	}
	go s.dog.run(ctx)
	go func() {
		<-ctx.Done()
		stopped := time.AfterFunc(2*time.Second, g.Stop)
		defer stopped.Stop()
		g.GracefulStop()
	}()
	err := g.Serve(newDoor(l, take))
	cancel()
	g.Stop()
	working.Wait()
	s.dev.close()
	if errors.Is(err, grpc.ErrServerStopped) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// use lends the token to f. What waits too long in the queue never reaches
// the token; a call of the library is watched from its own start.
func use[R any](ctx context.Context, s *Server, f func(t *token.Token) (R, error)) (R, error) {
	return useFor(ctx, s, 0, f)
}

// useFor is use for what may take so much longer than a call of the library
// should.
func useFor[R any](ctx context.Context, s *Server, longer time.Duration, f func(t *token.Token) (R, error)) (R, error) {
	var none R
	select {
	case s.line <- struct{}{}:
		defer func() { <-s.line }()
	default:
		return none, wireError(errBusy)
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return none, status.FromContextError(ctx.Err()).Err()
	}
	return directFor(s, longer, f)
}

// direct is use without the queue, for what needs no session.
func direct[R any](s *Server, f func(t *token.Token) (R, error)) (R, error) {
	return directFor(s, 0, f)
}

func directFor[R any](s *Server, longer time.Duration, f func(t *token.Token) (R, error)) (R, error) {
	var none R
	id := s.dog.enter(longer)
	defer s.dog.leave(id)
	t, done, err := s.dev.take()
	if err != nil {
		return none, wireError(err)
	}
	r, err := f(t)
	if token.Lost(err) {
		s.dev.lost(t, err)
	}
	done()
	if err != nil {
		return none, wireError(err)
	}
	return r, nil
}

// faultOf takes a fault apart to carry it across: never its inner types.
func faultOf(err error) *wire.Fault {
	f := &wire.Fault{Kind: fault.KindOf(err).String(), Hint: fault.HintOf(err), Ckr: token.CKR(err), Cause: err.Error()}
	var e *fault.Error
	if errors.As(err, &e) && e.Error() == err.Error() {
		f.Op, f.Object, f.Cause = e.Op, e.Object, ""
		if e.Err != nil {
			f.Cause = e.Err.Error()
		}
	}
	return f
}

func wireError(err error) error {
	code := codes.Unknown
	if errors.Is(err, token.ErrNotOpen) {
		code = codes.FailedPrecondition // the client logs in again, by its ledger
	}
	st, derr := status.New(code, err.Error()).WithDetails(faultOf(err))
	if derr != nil {
		return status.Error(code, err.Error())
	}
	return st.Err()
}

// Describe tells which token it is.
func (s *Server) Describe(context.Context, *wire.DescribeRequest) (*wire.DescribeReply, error) {
	return direct(s, func(t *token.Token) (*wire.DescribeReply, error) {
		i, err := t.Info()
		return &wire.DescribeReply{Module: i.Module, Library: i.Library, Slot: i.Slot, Label: i.Label, Serial: i.Serial, Manufacturer: i.Manufacturer, Model: i.Model,
			Firmware: i.Firmware, PinCountLow: i.PINCountLow, PinFinalTry: i.PINFinalTry, PinLocked: i.PINLocked, LoggedIn: i.LoggedIn}, err
	})
}

// Cost of the PIN's fingerprint: one of the equal choices of OWASP's password
// storage advice, that with the least memory. The connector's memory is
// locked, so that what was once touched is never given back.
const (
	argonTime   = 4
	argonMemory = 9 << 10 // KiB
	minSalt     = 16
)

// Fingerprint gives argon2id(PIN, salt).
func (s *Server) Fingerprint(_ context.Context, q *wire.FingerprintRequest) (*wire.Bytes, error) {
	if len(q.Salt) < minSalt {
		return nil, wireError(fault.Usagef("the salt has %d bytes, needs %d", len(q.Salt), minSalt))
	}
	p, err := s.pin()
	if err != nil {
		return nil, wireError(err)
	}
	defer p.Zero()
	return &wire.Bytes{Data: argon2.IDKey(p.Reveal(), q.Salt, argonTime, argonMemory, 1, 32)}, nil
}

// Login logs in with the PIN as it is now.
func (s *Server) Login(ctx context.Context, _ *wire.LoginRequest) (*wire.LoginReply, error) {
	p, err := s.pin()
	if err != nil {
		return nil, wireError(err)
	}
	defer p.Zero()
	return use(ctx, s, func(t *token.Token) (*wire.LoginReply, error) { return &wire.LoginReply{}, t.Login(p) })
}

// OpenMaster finds or makes the master keys.
func (s *Server) OpenMaster(ctx context.Context, q *wire.OpenMasterRequest) (*wire.OpenMasterReply, error) {
	return use(ctx, s, func(t *token.Token) (*wire.OpenMasterReply, error) {
		m, err := t.OpenMaster(masterIDs(q), q.Create)
		return &wire.OpenMasterReply{WrapKcv: m.WrapKCV, SealKcv: m.SealKCV, PublicKey: m.PublicKey, Suite: uint32(m.Suite), WrapWay: m.WrapWay, Notes: m.Notes}, err
	})
}

func masterIDs(q *wire.OpenMasterRequest) hsm.MasterIDs {
	return hsm.MasterIDs{Install: q.Install, Wrap: q.WrapId, Seal: q.SealId, Sign: q.SignId, Version: uint16(q.Version), Spare: q.Spare}
}

// DestroyMaster destroys a version of the master keys.
func (s *Server) DestroyMaster(ctx context.Context, q *wire.OpenMasterRequest) (*wire.DestroyMasterReply, error) {
	return use(ctx, s, func(t *token.Token) (*wire.DestroyMasterReply, error) {
		return &wire.DestroyMasterReply{}, t.DestroyMaster(masterIDs(q))
	})
}

// Rewrap takes a root key over to the master keys of today.
func (s *Server) Rewrap(ctx context.Context, q *wire.Bytes) (*wire.NewKey, error) {
	return use(ctx, s, func(t *token.Token) (*wire.NewKey, error) {
		k, err := t.Rewrap(q.Data)
		return &wire.NewKey{Blob: k.Blob, Kcv: k.KCV}, err
	})
}

// Reseal does the same with what Seal made.
func (s *Server) Reseal(ctx context.Context, q *wire.UnsealRequest) (*wire.Bytes, error) {
	return use(ctx, s, func(t *token.Token) (*wire.Bytes, error) { return asBytes(t.Reseal(q.Sealed, q.Aad)) })
}

// CarryKey gives the public key under which root keys come in.
func (s *Server) CarryKey(ctx context.Context, _ *wire.CarryKeyRequest) (*wire.Bytes, error) {
	return useFor(ctx, s, pairTime, func(t *token.Token) (*wire.Bytes, error) { return asBytes(t.CarryKey()) })
}

// GiveKey wraps a root key under another token's public key. Whoever may call
// could so have any root key wrapped under a key of his own: it is refused but
// in a connector that was started for a move, by who has the PIN.
func (s *Server) GiveKey(ctx context.Context, q *wire.GiveKeyRequest) (*wire.Carried, error) {
	if !s.gives {
		return nil, wireError(fault.Newf(fault.Denied, "give a root key", "", "the connector was not started for it").
			WithHint("it gives keys to another token only when it was started with --gives-keys"))
	}
	return use(ctx, s, func(t *token.Token) (*wire.Carried, error) {
		c, err := t.GiveKey(q.Blob, q.Public, q.Sha1)
		return &wire.Carried{Parts: c.Parts, Sha1: c.SHA1, Kcv: c.KCV}, err
	})
}

// TakeKey takes a root key in that another token gave.
func (s *Server) TakeKey(ctx context.Context, q *wire.TakeKeyRequest) (*wire.NewKey, error) {
	c := hsm.Carried{Parts: q.Carried.GetParts(), SHA1: q.Carried.GetSha1(), KCV: q.Carried.GetKcv()}
	return use(ctx, s, func(t *token.Token) (*wire.NewKey, error) { return asNewKey(t.TakeKey(c, q.Public)) })
}

// CreateRootKey makes a root key.
func (s *Server) CreateRootKey(ctx context.Context, _ *wire.CreateRootKeyRequest) (*wire.NewKey, error) {
	return use(ctx, s, func(t *token.Token) (*wire.NewKey, error) {
		k, err := t.CreateRootKey()
		return &wire.NewKey{Blob: k.Blob, Kcv: k.KCV}, err
	})
}

// ImportRootKey brings a root key in.
func (s *Server) ImportRootKey(ctx context.Context, q *wire.Bytes) (*wire.NewKey, error) {
	defer clear(q.Data)
	return use(ctx, s, func(t *token.Token) (*wire.NewKey, error) {
		k, err := t.ImportRootKey(secret.New(q.Data))
		return &wire.NewKey{Blob: k.Blob, Kcv: k.KCV}, err
	})
}

// PlaceRootKey makes or imports a key that stays in the token.
func (s *Server) PlaceRootKey(ctx context.Context, q *wire.PlaceRootKeyRequest) (*wire.NewKey, error) {
	defer clear(q.Material)
	return use(ctx, s, func(t *token.Token) (*wire.NewKey, error) {
		if len(q.Material) > 0 {
			return asNewKey(t.ImportPlacedKey(q.Id, secret.New(q.Material)))
		}
		return asNewKey(t.CreatePlacedKey(q.Id))
	})
}

// pairTime is what making an RSA pair may take beyond any other call.
const pairTime = 2 * time.Minute

// NewImportPair makes an RSA pair under which material travels.
func (s *Server) NewImportPair(ctx context.Context, q *wire.NewImportPairRequest) (*wire.ImportPair, error) {
	return useFor(ctx, s, pairTime, func(t *token.Token) (*wire.ImportPair, error) {
		p, err := t.NewImportPair(q.Id, q.Aad)
		return &wire.ImportPair{Held: p.Held, Sealed: p.Sealed, Public: p.Public}, err
	})
}

// ImportSent brings in material that travelled under an import pair.
func (s *Server) ImportSent(ctx context.Context, q *wire.ImportSentRequest) (*wire.ImportSentReply, error) {
	return use(ctx, s, func(t *token.Token) (*wire.ImportSentReply, error) {
		p := hsm.ImportPair{Held: q.Pair.GetHeld(), Sealed: q.Pair.GetSealed()}
		k, bits, err := t.ImportSent(p, q.Aad, hsm.Sent{SHA1: q.Sha1, Material: q.Material, Nonce: q.Nonce, IV: q.Iv, Want: q.Want}, q.Place)
		if i := slices.IndexFunc(hsm.Refusals, func(r error) bool { return errors.Is(err, r) }); i >= 0 {
			return &wire.ImportSentReply{Refused: uint32(i) + 1}, nil
		}
		return &wire.ImportSentReply{Key: &wire.NewKey{Blob: k.Blob, Kcv: k.KCV}, Bits: uint32(bits)}, err
	})
}

func asNewKey(k hsm.NewKey, err error) (*wire.NewKey, error) {
	return &wire.NewKey{Blob: k.Blob, Kcv: k.KCV}, err
}

// DestroyRootKey leaves nothing of a root key in the token.
func (s *Server) DestroyRootKey(ctx context.Context, q *wire.Bytes) (*wire.EvictReply, error) {
	return use(ctx, s, func(t *token.Token) (*wire.EvictReply, error) { return &wire.EvictReply{}, t.Destroy(q.Data) })
}

// maxRandom bounds what one call may ask of the token's generator.
const maxRandom = 4096

func checkRandom(n uint32) error {
	if n > maxRandom {
		return wireError(fault.Usagef("%d random bytes are too many: at most %d", n, maxRandom))
	}
	return nil
}

func wrapOn(t *token.Token, q *wire.WrapRequest) (*wire.WrapReply, error) {
	out := &wire.WrapReply{}
	plain := q.Plaintext
	if len(plain) == 0 && q.Random > 0 {
		var err error
		if plain, err = t.Random(int(q.Random)); err != nil {
			return nil, err
		}
		out.Plaintext = plain
	}
	c, err := t.Wrap(q.Blob, plain, q.Aad)
	out.Sealed = &wire.Sealed{Suite: uint32(c.Suite), Iv: c.IV, Ciphertext: c.Ciphertext}
	return out, err
}

func sealed(w *wire.Sealed) (hsm.Sealed, error) {
	c := hsm.Sealed{Suite: uint8(w.GetSuite()), IV: w.GetIv(), Ciphertext: w.GetCiphertext()}
	if w.GetSuite() > 255 || !c.Plausible() {
		return c, fault.Newf(fault.BadContent, "decrypt", "", "no suite makes such a ciphertext")
	}
	return c, nil
}

func asBytes(b []byte, err error) (*wire.Bytes, error) { return &wire.Bytes{Data: b}, err }

// Evict forgets a root key that was brought back.
func (s *Server) Evict(ctx context.Context, q *wire.Bytes) (*wire.EvictReply, error) {
	return use(ctx, s, func(t *token.Token) (*wire.EvictReply, error) {
		t.Evict(q.Data)
		return &wire.EvictReply{}, nil
	})
}

// Seal encrypts under the sealing key what is given, or random bytes.
func (s *Server) Seal(ctx context.Context, q *wire.SealRequest) (*wire.Bytes, error) {
	if err := checkRandom(q.Random); err != nil {
		return nil, err
	}
	return use(ctx, s, func(t *token.Token) (*wire.Bytes, error) {
		plain := q.Plaintext
		if len(plain) == 0 && q.Random > 0 {
			var err error
			if plain, err = t.Random(int(q.Random)); err != nil {
				return nil, err
			}
			defer clear(plain)
		}
		return asBytes(t.Seal(plain, q.Aad))
	})
}

// Unseal opens what Seal made.
func (s *Server) Unseal(ctx context.Context, q *wire.UnsealRequest) (*wire.Bytes, error) {
	return use(ctx, s, func(t *token.Token) (*wire.Bytes, error) { return asBytes(t.Unseal(q.Sealed, q.Aad)) })
}

// Sign signs with the key of the audit log.
func (s *Server) Sign(ctx context.Context, q *wire.Bytes) (*wire.Bytes, error) {
	return use(ctx, s, func(t *token.Token) (*wire.Bytes, error) { return asBytes(t.Sign(q.Data)) })
}

// Random gives bytes of the token's generator.
func (s *Server) Random(ctx context.Context, q *wire.RandomRequest) (*wire.Bytes, error) {
	if err := checkRandom(q.N); err != nil {
		return nil, err
	}
	return use(ctx, s, func(t *token.Token) (*wire.Bytes, error) { return asBytes(t.Random(int(q.N))) })
}

// Installations lists what installations left in the token.
func (s *Server) Installations(ctx context.Context, _ *wire.InstallationsRequest) (*wire.InstallationsReply, error) {
	return use(ctx, s, func(t *token.Token) (*wire.InstallationsReply, error) {
		all, err := t.Installations()
		out := &wire.InstallationsReply{}
		for _, i := range all {
			out.Installations = append(out.Installations, &wire.Installation{Id: i.ID, Objects: i.Objects})
		}
		return out, err
	})
}

// Clear destroys the objects of one installation.
func (s *Server) Clear(ctx context.Context, q *wire.ClearRequest) (*wire.ClearReply, error) {
	var proof *hsm.Proof
	if len(q.Sealed) > 0 {
		proof = &hsm.Proof{Sealed: q.Sealed, AAD: q.Aad}
	}
	return use(ctx, s, func(t *token.Token) (*wire.ClearReply, error) {
		n, err := t.Clear(q.Install, proof)
		return &wire.ClearReply{Objects: uint32(n)}, err
	})
}
