package servecmd

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/store"
)

// behindFlags say what stands behind an API in the cluster: an etcd, and
// connectors beside it.
type behindFlags struct {
	sockets   []string
	toSockets []string           // of the HSM to which keys can move; none: there is none
	moved     func(label string) // told when they have; see AddNext
	etcd      store.Remote
}

// Add puts the flags into fs.
func (f *behindFlags) Add(fs *pflag.FlagSet) {
	fs.StringSliceVar(&f.sockets, "connector-socket", nil, "unix socket of kms-connector; several of them serve HSMs with the same master keys")
	fs.StringSliceVar(&f.etcd.Endpoints, "etcd-endpoints", nil, "https:// addresses of etcd")
	fs.StringVar(&f.etcd.CAFile, "etcd-ca-file", "", "CA of etcd's certificates")
	fs.StringVar(&f.etcd.CertFile, "etcd-cert-file", "", "client certificate for etcd")
	fs.StringVar(&f.etcd.KeyFile, "etcd-key-file", "", "its key")
}

// AddNext adds the flag for a second HSM; moved is told when all keys are there.
func (f *behindFlags) AddNext(fs *pflag.FlagSet, moved func(label string)) {
	fs.StringSliceVar(&f.toSockets, "to-socket", nil, "unix socket of the kms-connector of a second HSM, to which \"kmsctl hsm migrate\" moves all keys; several of them as with --connector-socket")
	f.moved = moved
}

// Check holds the rules of the flags.
func (f *behindFlags) Check() error {
	var errs []error
	for name, v := range map[string]string{"connector-socket": strings.Join(f.sockets, ","), "etcd-ca-file": f.etcd.CAFile, "etcd-cert-file": f.etcd.CertFile,
		"etcd-key-file": f.etcd.KeyFile, "etcd-endpoints": strings.Join(f.etcd.Endpoints, ",")} {
		if v == "" {
			errs = append(errs, fault.Usagef("--%s: missing", name))
		}
	}
	return errors.Join(errs...)
}

// dialWait is how long a connector may take to answer; then /readyz says that
// it is not there.
const dialWait = 3 * time.Second

// Open reaches all, until closeAll.
func (f *behindFlags) Open(ctx context.Context) (client store.EtcdClient, token *connector.Client, closeAll func(), err error) {
	if client, err = store.Dial(ctx, f.etcd); err != nil {
		return nil, nil, nil, err
	}
	if token, err = f.tokens(ctx, store.NewPlain(client)); err != nil {
		return nil, nil, nil, errors.Join(err, client.Close())
	}
	return client, token, func() {
		token.Close()
		_ = client.Close() // the connection may be broken already
	}, nil
}

// tokens reaches the HSM, and a second one to which keys can move.
func (f *behindFlags) tokens(ctx context.Context, plain kms.Plain) (*connector.Client, error) {
	if len(f.toSockets) == 0 {
		return reach(ctx, f.sockets)
	}
	next, err := reach(ctx, f.toSockets)
	if err != nil {
		return nil, err
	}
	return join(ctx, plain, next, func() (*connector.Client, error) { return reach(ctx, f.sockets) }, f.moved)
}

func reach(ctx context.Context, sockets []string) (*connector.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	return connector.DialAny(ctx, sockets...)
}
