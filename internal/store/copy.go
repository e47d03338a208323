package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
)

const (
	installName = "install"
	markName    = "restore" // plain; while it is there, the store is half-restored
	copyPage    = 500       // records of one read
)

// Install reads the installation's plain record as it is.
func (p *Plain) Install(ctx context.Context) (json.RawMessage, error) {
	var raw json.RawMessage
	_, err := p.Get(ctx, installName, &raw)
	return raw, err
}

// Whole is fault.NotReady while a restore is unfinished: such a store must
// not be used.
func (p *Plain) Whole(ctx context.Context) error {
	var m json.RawMessage
	_, err := p.Get(ctx, markName, &m)
	if err == nil {
		return fault.Newf(fault.NotReady, "open the store", "", "a restore of it was not finished").
			WithHint("run the same `kmsctl restore` again: it goes on where it was; or begin with an empty data folder")
	}
	if errors.Is(err, record.ErrNotFound) {
		return nil
	}
	return err
}

// Dump reads every record at one revision, in path order, whatever is written
// meanwhile, and checks each. begin is told the revision before the first.
func (s *Store) Dump(ctx context.Context, begin func(rev int64) error, each func(record.Raw) error) error {
	return walk(ctx, s.c, begin, func(r record.Raw) error {
		var body json.RawMessage
		if err := s.codec.Decode(r.Path, r.Value, &body); err != nil {
			return fault.New(fault.BadContent, "copy record", r.Path, err)
		}
		return each(r)
	})
}

// walk reads the records page by page at the revision of the first page. A
// history that is compacted away under it is fault.Conflict.
func walk(ctx context.Context, c *clientv3.Client, begin func(rev int64) error, each func(record.Raw) error) error {
	var rev int64
	for from, end := rec, clientv3.GetPrefixRangeEnd(rec); ; {
		opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(copyPage)}
		if rev != 0 {
			opts = append(opts, clientv3.WithRev(rev))
		}
		pctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		res, err := c.Get(pctx, from, opts...)
		cancel()
		if errors.Is(err, rpctypes.ErrCompacted) {
			return fault.Newf(fault.Conflict, "copy the store", "", "its history was compacted meanwhile").WithHint("try again")
		}
		if err != nil {
			return unreachable("copy", "records", err)
		}
		if rev == 0 {
			rev = res.Header.Revision
			if err := begin(rev); err != nil {
				return err
			}
		}
		for _, e := range res.Kvs {
			if err := each(record.Raw{Path: strings.TrimPrefix(string(e.Key), rec), Value: e.Value, Rev: e.ModRevision}); err != nil {
				return err
			}
		}
		if !res.More {
			return nil
		}
		from = string(res.Kvs[len(res.Kvs)-1].Key) + "\x00"
	}
}

// Restorer writes a copy into a store. While it works a mark lies in the
// store that keeps everybody else out; a run that was killed goes on.
type Restorer struct {
	c    *clientv3.Client
	mark string
}

// NewRestorer works on a client.
func NewRestorer(c *clientv3.Client) *Restorer { return &Restorer{c: c} }

// Present tells what is in the store now: the installation (nil when there is
// none), the mark of an unfinished restore (nil when there is none), and by
// each every record.
func (r *Restorer) Present(ctx context.Context, each func(record.Raw) error) (install, mark json.RawMessage, err error) {
	p := NewPlain(r.c)
	if _, err := p.Get(ctx, installName, &install); err != nil && !errors.Is(err, record.ErrNotFound) {
		return nil, nil, err
	}
	if _, err := p.Get(ctx, markName, &mark); err != nil && !errors.Is(err, record.ErrNotFound) {
		return nil, nil, err
	}
	return install, mark, walk(ctx, r.c, func(int64) error { return nil }, each)
}

// Begin sets the mark, or takes over the same mark of a run that was killed.
func (r *Restorer) Begin(ctx context.Context, mark any) error {
	b, err := json.Marshal(mark)
	if err != nil {
		return err
	}
	r.mark = string(b)
	ctx, cancel := bound(ctx)
	defer cancel()
	key := plain + markName
	res, err := r.c.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, r.mark)).Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		return unreachable("write", markName, err)
	}
	if res.Succeeded {
		return nil
	}
	if kvs := res.Responses[0].GetResponseRange().Kvs; len(kvs) == 0 || string(kvs[0].Value) != r.mark {
		return fault.Newf(fault.Conflict, "restore into", "the store", "a restore of another backup was not finished").
			WithHint("finish it with its own file, or begin with an empty data folder")
	}
	return nil
}

// Put writes records as they are, in one transaction.
func (r *Restorer) Put(ctx context.Context, records []record.Raw) error {
	ops := make([]clientv3.Op, 0, len(records))
	for _, e := range records {
		ops = append(ops, clientv3.OpPut(rec+e.Path, string(e.Value)))
	}
	return r.commit(ctx, ops...)
}

// Finish writes the installation's record, when one is given, and takes the
// mark away: from now on the store is whole.
func (r *Restorer) Finish(ctx context.Context, install json.RawMessage) error {
	ops := []clientv3.Op{clientv3.OpDelete(plain + markName)}
	if install != nil {
		ops = append(ops, clientv3.OpPut(plain+installName, string(install)))
	}
	return r.commit(ctx, ops...)
}

func (r *Restorer) commit(ctx context.Context, ops ...clientv3.Op) error {
	ctx, cancel := bound(ctx)
	defer cancel()
	res, err := r.c.Txn(ctx).If(clientv3.Compare(clientv3.Value(plain+markName), "=", r.mark)).Then(ops...).Commit()
	if err != nil {
		return unreachable("restore into", "the store", err)
	}
	if !res.Succeeded {
		return fmt.Errorf("restore into the store: %w", record.ErrConflict)
	}
	return nil
}
