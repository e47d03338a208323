package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/store"
)

// seed fills the store of a stopped KMS with copies of the service's key,
// each under an id and name of its own.
func (b *bench) seed(ctx context.Context, data string, svc service, n int) error {
	m, err := store.OpenEmbedded(ctx, filepath.Join(data, "etcd"))
	if err != nil {
		return err
	}
	defer m.Close()
	c := m.Client()
	defer func() { _ = c.Close() }() // the member behind it ends next
	t, err := connect(ctx, b.bin, filepath.Join(data, "softhsm"))
	if err != nil {
		return err
	}
	defer t.Close()
	opened, err := kms.Unlock(ctx, store.NewPlain(c), t, time.Now)
	if err != nil {
		return err
	}
	codec, err := record.NewCodec(opened.RecordKey)
	if err != nil {
		return err
	}
	st, err := store.Open(ctx, c, codec)
	if err != nil {
		return err
	}
	defer st.Close()
	var k map[string]any
	dir := "keys/" + svc.InstanceID + "/"
	if _, err := st.Get(ctx, dir+svc.KeyID, &k); err != nil {
		return err
	}
	var batch []record.Change
	for i := 1; i < n; i++ {
		other := map[string]any{}
		for name, v := range k {
			other[name] = v
		}
		id := uuid.NewString()
		other["id"], other["name"] = id, fmt.Sprintf("key number %d", i)
		batch = append(batch, record.Change{Path: dir + id, Value: other})
		if len(batch) == 100 || i == n-1 {
			if err := st.Commit(ctx, batch...); err != nil {
				return err
			}
			batch = nil
		}
	}
	return nil
}
