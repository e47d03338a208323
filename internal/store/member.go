// Package store keeps records in etcd: a member inside this process, or one
// reached by endpoints and a client certificate. Every record is authenticated
// (internal/record); a watch feeds a local view, so that reads on the hot path
// touch neither disk nor network. etcd is imported here alone.
package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"

	"github.com/kmsctl/kmsctl/internal/fault"
)

const (
	quotaBytes   = 8 << 30 // etcd's advised maximum
	historyKept  = "5m"    // revisions older than this are compacted
	startTimeout = 30 * time.Second
)

// testOnlyQuota lets a test fill a store.
var testOnlyQuota int64

// Member is an etcd member in this process.
type Member struct {
	etcd *embed.Etcd
	once sync.Once
}

// OpenEmbedded starts a single member in dir that listens nowhere: only this
// process reaches it. A folder that another process holds is fault.Conflict.
func OpenEmbedded(ctx context.Context, dir string) (*Member, error) {
	if err := lock(dir); err != nil {
		return nil, err
	}
	cfg := base(dir, "embedded")
	nowhere := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = nil, nil
	cfg.AdvertiseClientUrls, cfg.AdvertisePeerUrls = []url.URL{nowhere}, []url.URL{nowhere}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	// One member elects itself; short ticks only make that quick.
	cfg.TickMs, cfg.ElectionMs = 10, 100
	// Nobody has to catch up with the only member: its log may be short, in
	// memory and on disk.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 1000, 100
	return start(ctx, cfg)
}

// ServerConfig is what a member in a pod needs. All files are PEM.
type ServerConfig struct {
	Name          string
	Dir           string
	ListenClient  string // https://0.0.0.0:2379
	AdvertiseHost string // DNS name that clients use
	CertFile      string
	KeyFile       string
	CAFile        string // clients must show a certificate signed by it
}

// OpenServer starts a member that others reach by TLS with client certificates.
func OpenServer(ctx context.Context, s ServerConfig) (*Member, error) {
	if err := lock(s.Dir); err != nil {
		return nil, err
	}
	listen, err := url.Parse(s.ListenClient)
	if err != nil || listen.Scheme != "https" {
		return nil, fault.Usagef("--listen-client: %q is not an https:// address", s.ListenClient)
	}
	cfg := base(s.Dir, s.Name)
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = nil, []url.URL{peer}
	cfg.ListenClientUrls = []url.URL{*listen}
	host := s.AdvertiseHost
	if host == "" {
		host = "localhost"
	}
	cfg.AdvertiseClientUrls = []url.URL{{Scheme: "https", Host: host + ":" + listen.Port()}}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ClientTLSInfo = transport.TLSInfo{CertFile: s.CertFile, KeyFile: s.KeyFile, TrustedCAFile: s.CAFile, ClientCertAuth: true}
	return start(ctx, cfg)
}

func base(dir, name string) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Dir, cfg.Name = dir, name
	cfg.QuotaBackendBytes = quotaBytes
	if testOnlyQuota != 0 {
		cfg.QuotaBackendBytes = testOnlyQuota
	}
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = "periodic", historyKept
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.LogLevel = "error"
	cfg.MaxRequestBytes = 2 << 20
	return cfg
}

func start(ctx context.Context, cfg *embed.Config) (*Member, error) {
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fault.New(fault.Other, "start storage in", cfg.Dir, err).
			WithHint("is the folder on a local disk with free space, and its owner the user who runs this?")
	}
	select {
	case <-e.Server.ReadyNotify():
		return &Member{etcd: e}, nil
	case err := <-e.Err():
		e.Close()
		return nil, fault.New(fault.Other, "start storage in", cfg.Dir, err)
	case <-ctx.Done():
		e.Close()
		return nil, ctx.Err()
	case <-time.After(startTimeout):
		e.Close()
		return nil, fault.Newf(fault.Unreachable, "start storage in", cfg.Dir, "not ready after %s", startTimeout)
	}
}

// Client gives a client that calls the member's own functions.
func (m *Member) Client() *clientv3.Client {
	c := v3client.New(m.etcd.Server)
	c.Maintenance = here{c.Maintenance, m.etcd}
	return c
}

// here writes the file of the member in this process anew: the client that
// calls a member's functions lacks what Defragment needs (etcd 3.7.0).
type here struct {
	clientv3.Maintenance
	etcd *embed.Etcd
}

// Defragment is part of clientv3.Maintenance.
func (h here) Defragment(context.Context, string) (*clientv3.DefragmentResponse, error) {
	return &clientv3.DefragmentResponse{}, h.etcd.Server.Backend().Defrag()
}

// Done ends when the member stops by itself.
func (m *Member) Done() <-chan error { return m.etcd.Err() }

// Close stops the member; what was committed is on disk already. A second
// call does nothing.
func (m *Member) Close() { m.once.Do(m.etcd.Close) }

// lock makes the data folder 0700.
func lock(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.New(fault.Other, "make folder", dir, err)
	}
	if err := os.Chmod(dir, 0o700); err != nil && !errors.Is(err, os.ErrPermission) {
		return fault.New(fault.Other, "protect folder", dir, err)
	}
	// A pod's volume may belong to another uid of the same group; its mode is
	// the volume's affair, a folder inside it is ours.
	if err := os.MkdirAll(filepath.Join(dir, "member"), 0o700); err != nil {
		return fault.New(fault.Other, "make folder", dir, err)
	}
	return nil
}

// Remote says how to reach etcd elsewhere.
type Remote struct {
	Endpoints                 []string
	CAFile, CertFile, KeyFile string
}

// Dial connects to etcd by TLS with a client certificate.
func Dial(ctx context.Context, r Remote) (*clientv3.Client, error) {
	info := transport.TLSInfo{CertFile: r.CertFile, KeyFile: r.KeyFile, TrustedCAFile: r.CAFile}
	t, err := info.ClientConfig()
	if err != nil {
		return nil, fault.New(fault.Usage, "read etcd's certificates", r.CertFile, err)
	}
	t.MinVersion = tls.VersionTLS12
	c, err := clientv3.New(clientv3.Config{
		Endpoints: r.Endpoints, TLS: t, DialTimeout: 5 * time.Second, Context: ctx, Logger: zap.NewNop(),
		DialKeepAliveTime: 5 * time.Second, DialKeepAliveTimeout: 3 * time.Second,
	})
	if err != nil {
		return nil, fault.New(fault.Unreachable, "dial etcd", fmt.Sprint(r.Endpoints), err)
	}
	return c, nil
}
