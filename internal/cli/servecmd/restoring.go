package servecmd

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/kmsctl/kmsctl/internal/backup"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
)

// backup writes a copy of the store.
func (k *KMS) backup(ctx context.Context, w io.Writer) error {
	install, err := k.plain.Install(ctx)
	if err != nil {
		return err
	}
	_, err = backup.Write(ctx, w, k.store, k.codec, backup.Header{CreatedAt: k.Now().UTC(), Install: install})
	return err
}

// restoring is a store that a copy goes into, with the HSM that opens it.
type restoring struct {
	etcd  store.EtcdClient
	token *connector.Client
	name  string // of the store, for errors
	stop  []func()
}

// close ends it, last part first.
func (r *restoring) close() {
	for i := len(r.stop) - 1; i >= 0; i-- {
		r.stop[i]()
	}
}

// openForRestore opens the HSM and the store of a data folder that nobody
// serves. A token that is not the backup's is refused before anything is made
// in the folder. The caller holds the folder's lock.
func (e *Embedded) openForRestore(ctx context.Context, a *app.App, head backup.Header) (_ *restoring, err error) {
	sec, set, err := e.settings(a)
	if err != nil {
		return nil, err
	}
	defer sec.Password.Zero()
	r := &restoring{name: e.Data}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if dir := filepath.Join(e.Data, "softhsm"); set.Model == "softhsm" && e.Label == "" && e.Serial == "" && e.Slot == "" {
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			return nil, fault.Newf(fault.NotFound, "restore into", e.Data, "there is no SoftHSM token in %q", dir).
				WithHint("put the folder softhsm of the backed-up KMS there: a new token could not open the backup")
		}
	}
	if r.token, err = e.connector(ctx, a, sec, set, io.Discard); err != nil {
		return nil, err
	}
	r.stop = append(r.stop, r.token.Close)
	if err := r.same(ctx, head); err != nil {
		return nil, err
	}
	return r, r.openStore(ctx, e.Data)
}

// openStore opens the store of a data folder that nobody serves.
func (r *restoring) openStore(ctx context.Context, data string) error {
	member, err := store.OpenEmbedded(ctx, filepath.Join(data, "etcd"))
	if err != nil {
		return err
	}
	r.etcd = member.Client()
	r.stop = append(r.stop, member.Close, func() { _ = r.etcd.Close() }) // the member behind it ends next
	return nil
}

// same refuses a token that is not the backup's, and a backup of two tokens.
func (r *restoring) same(ctx context.Context, head backup.Header) error {
	info, err := r.token.Members()[0].Describe(connector.Only(ctx))
	if err != nil {
		return err
	}
	if err := head.Same(info.Serial); err != nil {
		return err
	}
	stands, err := kms.Stands(ctx, installed{install: head.Install})
	if err != nil {
		return err
	}
	if len(stands.Left) > 0 {
		return fault.Newf(fault.NotReady, "restore", "", "the backup was made while keys were moving from the token with serial number %q to %q: half of them are in each", stands.Left[0], stands.Serial).
			WithHint("restore one from before the move, with the old token, or from after it, with the new one; nothing was written")
	}
	return nil
}

// unlock opens the installation's master keys in the HSM, and gives what
// proves its records. Nobody else may use another installation of the HSM's:
// a connector has the master keys of one open.
func (r *restoring) unlock(ctx context.Context, install json.RawMessage, now func() time.Time) (*record.Codec, error) {
	opened, err := kms.Unlock(connector.Only(ctx), installed{store.NewPlain(r.etcd), install}, r.token.Members()[0], now)
	if err != nil {
		return nil, err
	}
	defer opened.Zero()
	return record.NewCodec(opened.RecordKey)
}

// installed answers with an installation that is not in the store at the
// moment; the ledger of logins is the store's own.
type installed struct {
	*store.Plain
	install json.RawMessage
}

func (i installed) Get(ctx context.Context, name string, v any) (int64, error) {
	if name == "install" {
		return 1, json.Unmarshal(i.install, v)
	}
	return i.Plain.Get(ctx, name, v)
}
