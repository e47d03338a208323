package store

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/file"
	"github.com/kmsctl/kmsctl/internal/pki"
)

// ServerConfig is what a member in a pod needs. All files are PEM.
type ServerConfig struct {
	Name          string
	Dir           string
	ListenClient  string // https://0.0.0.0:2379
	AdvertiseHost string // DNS name that clients use
	CertFile      string
	KeyFile       string
	CAFile        string // clients and members must show a certificate signed by it

	// Members are all members of the store with their URLs for each other,
	// this one included; none for a store of one that never grows. Members may
	// join a store, and leave it only to join it anew.
	Members    map[string]string
	ListenPeer string // https://0.0.0.0:2380

	// Waits hears again and again what a member without data waits for; may be nil.
	Waits func(error)
}

// Check holds the rules for the settings.
func (s ServerConfig) Check() error {
	var errs []error
	if u, err := url.Parse(s.ListenClient); err != nil || u.Scheme != "https" {
		errs = append(errs, fault.Usagef("--listen-client: %q is not an https:// address", s.ListenClient))
	}
	if len(s.Members) == 0 {
		return errors.Join(errs...)
	}
	if u, err := url.Parse(s.ListenPeer); err != nil || u.Scheme != "https" {
		errs = append(errs, fault.Usagef("--listen-peer: %q is not an https:// address", s.ListenPeer))
	}
	if len(s.Members) != 3 && len(s.Members) != 1 {
		errs = append(errs, fault.Usagef("--member: %d of them; a store has 1 or 3", len(s.Members)))
	}
	if s.Members[s.Name] == "" {
		errs = append(errs, fault.Usagef("--member: none of them is %q, this one's --name", s.Name))
	}
	for name, at := range s.Members {
		if u, err := url.Parse(at); err != nil || u.Scheme != "https" || u.Port() == "" {
			errs = append(errs, fault.Usagef("--member: the URL of %q is not https://HOST:PORT", name))
		}
	}
	return errors.Join(errs...)
}

// OpenServer starts a member that others reach by TLS with client certificates.
func OpenServer(ctx context.Context, s ServerConfig) (*Member, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	if err := lock(s.Dir); err != nil {
		return nil, err
	}
	if err := s.keepsMembers(); err != nil {
		return nil, err
	}
	info := transport.TLSInfo{CertFile: s.CertFile, KeyFile: s.KeyFile, TrustedCAFile: s.CAFile, ClientCertAuth: true}
	t, err := info.ServerConfig()
	if err != nil {
		return nil, fault.New(fault.Usage, "read the certificates of storage", s.CertFile, err)
	}
	t.MinVersion = tls.VersionTLS12
	clients, err := listen(ctx, s.ListenClient)
	if err != nil {
		return nil, err
	}
	m, err := s.start(ctx, info, clients.Addr())
	if err != nil {
		return nil, errors.Join(err, clients.Close())
	}
	m.serve(clients, t)
	return m, nil
}

// start starts the member, alone or as one of several.
func (s ServerConfig) start(ctx context.Context, info transport.TLSInfo, clients net.Addr) (*Member, error) {
	cfg := base(s.Dir, s.Name)
	_, port, err := net.SplitHostPort(clients.String())
	if err != nil {
		return nil, err
	}
	cfg.ClientURLs = types.URLs{{Scheme: "https", Host: net.JoinHostPort(cmp.Or(s.AdvertiseHost, "localhost"), port)}}
	cfg.ClientCertAuthEnabled = true
	if len(s.Members) == 0 {
		return start(ctx, cfg, nil, startTimeout)
	}
	if cfg.InitialPeerURLsMap, err = s.urls(); err != nil {
		return nil, err
	}
	cfg.PeerURLs = cfg.InitialPeerURLsMap[s.Name]
	// A pod's address changes with every start, so that a member is told by the
	// name in its certificate, which clients do not have.
	info.AllowedCNs = []string{pki.StorageName}
	cfg.PeerTLSInfo = info
	t, err := info.ServerConfig()
	if err != nil {
		return nil, fault.New(fault.Usage, "read the certificates of storage", s.CertFile, err)
	}
	t.MinVersion = tls.VersionTLS12
	if len(s.Members) > 1 && !s.begun() {
		found, err := s.find(ctx, info, t)
		if err != nil {
			return nil, err
		}
		if found != nil {
			cfg.InitialPeerURLsMap, cfg.NewCluster = found, false
		}
	}
	peers, err := listen(ctx, s.ListenPeer)
	if err != nil {
		return nil, err
	}
	// It is ready when most members are, which may be long after.
	m, err := start(ctx, cfg, tls.NewListener(peers, t), 0)
	if err != nil {
		return nil, errors.Join(cmp.Or(s.leftOut(ctx), err), ignoreClosed(peers.Close()))
	}
	if err := m.settle(ctx, cfg.PeerURLs); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func (s ServerConfig) urls() (types.URLsMap, error) {
	out := types.URLsMap{}
	for name, at := range s.Members {
		var err error
		if out[name], err = types.NewURLs([]string{at}); err != nil {
			return nil, fault.Usagef("--member: %w", err)
		}
	}
	return out, nil
}

func listen(ctx context.Context, at string) (net.Listener, error) {
	u, err := url.Parse(at)
	if err != nil {
		return nil, err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", u.Host)
	if err != nil {
		return nil, fault.New(fault.Other, "listen for storage on", at, err)
	}
	return l, nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// membersFile says, in the folder of a member, which members its store has.
const membersFile = "members.json"

func (s ServerConfig) names() []string {
	out := []string{s.Name}
	for name := range s.Members {
		if name != s.Name {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// keepsMembers refuses a folder whose store has members that are missing in the
// settings. Which members the store really has stands in its data.
func (s ServerConfig) keepsMembers() error {
	path := filepath.Join(s.Dir, membersFile)
	had := []string{s.Name} // stores of one did not always write it down
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		if err := json.Unmarshal(b, &had); err != nil {
			return fault.New(fault.BadContent, "read", path, err).WithHint("it names the members of the store; the backup has all data")
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.Other, "read", path, err)
	}
	gone := func(name string) bool { return !slices.Contains(s.names(), name) }
	if s.begun() && slices.ContainsFunc(had, gone) {
		return fault.Newf(fault.Conflict, "start storage in", s.Dir, "its store has the members %s, and is to run with %s", strings.Join(had, ", "), strings.Join(s.names(), ", ")).
			WithHint("go back to as many members as it has: a store grows from 1 to 3, and never shrinks")
	}
	if b, err = json.Marshal(s.names()); err != nil {
		return err
	}
	return file.Write(path, b, 0o600)
}

// begun says whether the folder holds data already.
func (s ServerConfig) begun() bool {
	_, err := os.Stat(filepath.Join(s.Dir, "member", "wal"))
	return err == nil
}

// Ready is nil when the member can serve: it has a leader, and most members
// agree on what it says.
func (m *Member) Ready(ctx context.Context) error {
	return m.etcd.LinearizableReadNotify(ctx)
}
