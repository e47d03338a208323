package servecmd

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/store"
)

// behindFlags say what stands behind an API in the cluster: an etcd, and
// connectors beside it.
type behindFlags struct {
	sockets []string
	etcd    store.Remote
}

// Add puts the flags into fs.
func (f *behindFlags) Add(fs *pflag.FlagSet) {
	fs.StringSliceVar(&f.sockets, "connector-socket", nil, "unix socket of kms-connector; several of them serve HSMs with the same master keys")
	fs.StringSliceVar(&f.etcd.Endpoints, "etcd-endpoints", nil, "https:// addresses of etcd")
	fs.StringVar(&f.etcd.CAFile, "etcd-ca-file", "", "CA of etcd's certificates")
	fs.StringVar(&f.etcd.CertFile, "etcd-cert-file", "", "client certificate for etcd")
	fs.StringVar(&f.etcd.KeyFile, "etcd-key-file", "", "its key")
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

// Open reaches both, until closeBoth.
func (f *behindFlags) Open(ctx context.Context) (client store.EtcdClient, token *connector.Client, closeBoth func(), err error) {
	if client, err = store.Dial(ctx, f.etcd); err != nil {
		return nil, nil, nil, err
	}
	dial, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	if token, err = connector.DialAny(dial, f.sockets...); err != nil {
		return nil, nil, nil, errors.Join(err, client.Close())
	}
	return client, token, func() {
		token.Close()
		_ = client.Close() // the connection may be broken already
	}, nil
}
