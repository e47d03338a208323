package servecmd

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/kmsctl/kmsctl/internal/backup"
	"github.com/kmsctl/kmsctl/internal/cli/app"
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

// Restoring is the data folder of an embedded KMS that nobody serves, with its
// HSM open for a backup's records.
type Restoring struct {
	Target *store.Restorer
	Codec  *record.Codec
	stop   []func()
}

// Close ends it, last part first.
func (r *Restoring) Close() {
	for i := len(r.stop) - 1; i >= 0; i-- {
		r.stop[i]()
	}
}

// OpenForRestore opens the folder's HSM and store for a restore. A token that
// is not the backup's is refused before anything is made in the folder. The
// caller holds the folder's lock.
func (e *Embedded) OpenForRestore(ctx context.Context, a *app.App, head backup.Header) (restoring *Restoring, err error) {
	sec, set, err := e.settings(a)
	if err != nil {
		return nil, err
	}
	defer sec.Password.Zero()
	r := &Restoring{}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	if dir := filepath.Join(e.Data, "softhsm"); set.Model == "softhsm" && e.Label == "" && e.Serial == "" && e.Slot == "" {
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			return nil, fault.Newf(fault.NotFound, "restore into", e.Data, "there is no SoftHSM token in %q", dir).
				WithHint("put the folder softhsm of the backed-up KMS there: a new token could not open the backup")
		}
	}
	token, err := e.connector(ctx, a, sec, set, io.Discard)
	if err != nil {
		return nil, err
	}
	r.stop = append(r.stop, token.Close)
	info, err := token.Describe(ctx)
	if err != nil {
		return nil, err
	}
	if err := head.Same(info.Serial); err != nil {
		return nil, err
	}
	member, err := store.OpenEmbedded(ctx, filepath.Join(e.Data, "etcd"))
	if err != nil {
		return nil, err
	}
	r.stop = append(r.stop, member.Close)
	client := member.Client()
	r.stop = append(r.stop, func() { _ = client.Close() }) // the member behind it ends next
	opened, err := kms.Unlock(ctx, installed{store.NewPlain(client), head}, token, a.Now)
	if err != nil {
		return nil, err
	}
	defer opened.Zero()
	r.Codec, err = record.NewCodec(opened.RecordKey)
	r.Target = store.NewRestorer(client)
	return r, err
}

// installed answers with the backup's installation; the ledger of logins is
// the folder's own.
type installed struct {
	*store.Plain
	head backup.Header
}

func (i installed) Get(ctx context.Context, name string, v any) (int64, error) {
	if name == "install" {
		return 1, json.Unmarshal(i.head.Install, v)
	}
	return i.Plain.Get(ctx, name, v)
}
