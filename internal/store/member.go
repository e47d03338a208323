// Package store keeps records in etcd: a member inside this process, or one
// reached by endpoints and a client certificate. Every record is authenticated
// (internal/record); a watch feeds a local view, so that reads on the hot path
// touch neither disk nor network. etcd is imported here alone.
package store

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/etcdhttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3compactor"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"go.etcd.io/etcd/server/v3/features"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/kmsctl/kmsctl/internal/fault"
)

const (
	quotaBytes   = 8 << 30   // etcd's advised maximum
	leastQuota   = 64 << 20  // on however small a volume
	logBytes     = 512 << 20 // what etcd's log and snapshots take beside its file
	requestBytes = 2 << 20
	historyKept  = 5 * time.Minute // revisions older than this are compacted
	startTimeout = 30 * time.Second
	keepAlive    = 5 * time.Second
	peerTimeout  = 5 * time.Minute // etcd's own: a snapshot takes its time
)

// testOnlyQuota lets a test fill a store.
var testOnlyQuota int64

// Member is an etcd member in this process. It is etcd's server without the
// HTTP gateway, profiles and trace exporter of etcd's own embed package, which
// nobody here asks for and every start of the program would load.
type Member struct {
	etcd    *etcdserver.EtcdServer
	clients *grpc.Server // nil when it listens nowhere
	peers   *http.Server // nil when it is the only member
	done    chan error
	once    sync.Once
}

// OpenEmbedded starts a single member in dir that listens nowhere: only this
// process reaches it. A folder that another process holds is fault.Conflict.
func OpenEmbedded(ctx context.Context, dir string) (*Member, error) {
	if err := lock(dir); err != nil {
		return nil, err
	}
	cfg := base(dir, "embedded")
	cfg.ClientURLs = cfg.PeerURLs
	// One member elects itself; short ticks only make that quick.
	cfg.TickMs = 10
	// Nobody has to catch up with the only member: its log may be short, in
	// memory and on disk.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 1000, 100
	return start(ctx, cfg, nil, startTimeout)
}

// quotaOf is what etcd's file may hold on a volume of a size: the volume has to
// hold it twice while it is written anew. A file that reaches it is a full
// store, which can be read and recovers; a volume that is full ends the process.
func quotaOf(volume int64) int64 {
	if volume == 0 { // not known
		return quotaBytes
	}
	return min(quotaBytes, max(leastQuota, (volume-logBytes)/2))
}

// lastWords is etcd's log of what makes it end the process, which nothing else
// tells.
func lastWords(w io.Writer) *zap.Logger {
	form := zapcore.NewJSONEncoder(zapcore.EncoderConfig{TimeKey: "time", LevelKey: "level", MessageKey: "msg", EncodeTime: zapcore.RFC3339NanoTimeEncoder, EncodeLevel: zapcore.CapitalLevelEncoder})
	return zap.New(zapcore.NewCore(form, zapcore.Lock(zapcore.AddSync(w)), zapcore.PanicLevel),
		zap.Fields(zap.String("hint", "is the disk of its folder full, or failing? what was acknowledged is there when it starts again")))
}

// base has what etcd's own command has by default, and our limits.
func base(dir, name string) config.ServerConfig {
	peers := types.URLs{{Scheme: "http", Host: "127.0.0.1:0"}} // the only member talks to none
	return config.ServerConfig{
		Name: name, DataDir: dir, Logger: lastWords(os.Stderr),
		PeerURLs: peers, InitialPeerURLsMap: types.URLsMap{name: peers}, InitialClusterToken: "etcd-cluster", NewCluster: true,
		TickMs: 100, ElectionTicks: 10, InitialElectionTickAdvance: true, PreVote: true, StrictReconfigCheck: true, MaxLearners: membership.DefaultMaxLearners,
		SnapshotCount: etcdserver.DefaultSnapshotCount, SnapshotCatchUpEntries: etcdserver.DefaultSnapshotCatchUpEntries, MaxSnapFiles: 5, MaxWALFiles: 5,
		QuotaBackendBytes: cmp.Or(testOnlyQuota, quotaOf(volumeSize(dir))), BackendFreelistType: bbolt.FreelistMapType, MaxTxnOps: 128, MaxRequestBytes: requestBytes, MaxConcurrentStreams: math.MaxUint32,
		AutoCompactionMode: v3compactor.ModePeriodic, AutoCompactionRetention: historyKept, CompactHashCheckTime: time.Minute, DowngradeCheckTime: 5 * time.Second,
		WarningApplyDuration: 100 * time.Millisecond, WarningUnaryRequestDuration: 300 * time.Millisecond,
		AuthToken: "simple", TokenTTL: 300,
		V2Deprecation: config.V2DeprDefault, Metrics: "basic", ServerFeatureGate: features.NewDefaultServerFeatureGate(name, nil),
	}
}

// start starts the member, who hears the others on peers when there are any,
// and waits until it is ready: for so long, 0 being as long as ctx has.
func start(ctx context.Context, cfg config.ServerConfig, peers net.Listener, patience time.Duration) (*Member, error) {
	e, err := etcdserver.NewServer(cfg)
	if err != nil {
		return nil, fault.New(fault.Other, "start storage in", cfg.DataDir, err).
			WithHint("is the folder on a local disk with free space, and its owner the user who runs this?")
	}
	e.Start()
	m := &Member{etcd: e, done: make(chan error, 3)}
	if peers != nil {
		m.hear(peers)
	}
	var late <-chan time.Time
	if patience > 0 {
		late = time.After(patience)
	}
	select {
	case <-e.ReadyNotify():
		go m.watch()
		if err := m.makeRoom(ctx); err != nil {
			m.Close()
			return nil, err
		}
		return m, nil
	case <-e.StopNotify():
		m.Close()
		return nil, fault.Newf(fault.Other, "start storage in", cfg.DataDir, "it stopped by itself")
	case <-ctx.Done():
		m.Close()
		return nil, ctx.Err()
	case <-late:
		m.Close()
		return nil, fault.Newf(fault.Unreachable, "start storage in", cfg.DataDir, "not ready after %s", patience)
	}
}

// makeRoom takes back the alarm that the member has no room, when it has some:
// its volume has grown, or its file is full of free pages. A KMS could not,
// since to open it one has to write.
func (m *Member) makeRoom(ctx context.Context) error {
	own := &pb.AlarmMember{MemberID: uint64(m.etcd.MemberID()), Alarm: pb.AlarmType_NOSPACE}
	if !slices.ContainsFunc(m.etcd.Alarms(), func(a *pb.AlarmMember) bool { return a.MemberID == own.MemberID && a.Alarm == own.Alarm }) {
		return nil
	}
	file, quota := m.etcd.Backend(), m.etcd.Cfg.QuotaBackendBytes
	if file.Size() >= quota && (file.Defrag() != nil || file.Size() >= quota) {
		return nil // it stays full, which is told to who writes
	}
	ctx, cancel := bound(ctx)
	defer cancel()
	if _, err := m.etcd.Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: own.MemberID, Alarm: own.Alarm}); err != nil {
		return unreachable("take the alarm from", "the store", err)
	}
	return nil
}

// serve answers clients on l. They may ask for a sign of life every few
// seconds, which gRPC's server takes for abuse unless told.
func (m *Member) serve(l net.Listener, t *tls.Config) {
	m.clients = v3rpc.Server(m.etcd, t, nil, grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepAlive / 2}))
	go func() {
		if err := m.clients.Serve(l); err != nil {
			m.done <- err
		}
	}()
}

// hear answers the other members on l.
func (m *Member) hear(l net.Listener) {
	m.peers = &http.Server{Handler: etcdhttp.NewPeerHandler(zap.NewNop(), m.etcd), ReadTimeout: peerTimeout, ErrorLog: log.New(io.Discard, "", 0)}
	go func() {
		if err := m.peers.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			m.done <- err
		}
	}()
}

func (m *Member) watch() {
	<-m.etcd.StopNotify()
	m.done <- errors.New("the member stopped")
}

// Client gives a client that calls the member's own functions.
func (m *Member) Client() *clientv3.Client {
	c := v3client.New(m.etcd)
	c.Maintenance = here{c.Maintenance, m.etcd}
	return c
}

// here writes the file of the member in this process anew: the client that
// calls a member's functions lacks what Defragment needs (etcd 3.7.0).
type here struct {
	clientv3.Maintenance
	etcd *etcdserver.EtcdServer
}

// Defragment is part of clientv3.Maintenance.
func (h here) Defragment(context.Context, string) (*clientv3.DefragmentResponse, error) {
	return &clientv3.DefragmentResponse{}, h.etcd.Backend().Defrag()
}

// Done ends when the member stops by itself.
func (m *Member) Done() <-chan error { return m.done }

// Close stops the member; what was committed is on disk already. A second
// call does nothing.
func (m *Member) Close() {
	m.once.Do(func() {
		if m.clients != nil {
			m.clients.Stop()
		}
		m.etcd.Stop()
		if m.peers != nil {
			_ = m.peers.Close() // the others have heard the last of it
		}
	})
}

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
		DialKeepAliveTime: keepAlive, DialKeepAliveTimeout: 3 * time.Second,
	})
	if err != nil {
		return nil, fault.New(fault.Unreachable, "dial etcd", fmt.Sprint(r.Endpoints), err)
	}
	return c, nil
}
