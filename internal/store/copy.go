package store

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
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
	var m record.RestoreMark
	_, err := p.Get(ctx, markName, &m)
	if errors.Is(err, record.ErrNotFound) {
		return nil
	}
	if err == nil {
		err = errHalf()
	}
	return err
}

func errHalf() error {
	return fault.Newf(fault.NotReady, "open the store", "", "a backup is being restored into it, or a restore was not finished").
		WithHint("when no `kmsctl restore` is running any more, the same command again goes on where it was, and `kmsctl restore --undo` takes back what it did")
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

// Restorer writes a copy into a store. From Begin to Finish or Undo a mark lies
// in the store instead of the installation's record. That keeps everybody else
// out: who has the store open sees the record go and stops, and what is written
// late is refused. A run that was killed goes on, or is undone.
type Restorer struct {
	c    *clientv3.Client
	mark string
}

// keptDir holds what a restore replaces, until it is finished.
const keptDir = plain + markName + "/"

// NewRestorer works on a client.
func NewRestorer(c *clientv3.Client) *Restorer { return &Restorer{c: c} }

// Present tells what is in the store now: the installation (nil when there is
// none), the mark of an unfinished restore (nil when there is none), and by
// each every record.
func (r *Restorer) Present(ctx context.Context, each func(record.Raw) error) (install json.RawMessage, mark *record.RestoreMark, err error) {
	if _, err := NewPlain(r.c).Get(ctx, installName, &install); err != nil && !errors.Is(err, record.ErrNotFound) {
		return nil, nil, err
	}
	if mark, _, err = r.marked(ctx); err != nil && !errors.Is(err, record.ErrNotFound) {
		return nil, nil, err
	}
	return install, mark, walk(ctx, r.c, func(int64) error { return nil }, each)
}

// marked reads the mark, and the revision that set it.
func (r *Restorer) marked(ctx context.Context) (*record.RestoreMark, int64, error) {
	ctx, cancel := bound(ctx)
	defer cancel()
	res, err := r.c.Get(ctx, plain+markName)
	if err != nil {
		return nil, 0, unreachable("read", markName, err)
	}
	if len(res.Kvs) == 0 {
		return nil, 0, fmt.Errorf("%q: %w", markName, record.ErrNotFound)
	}
	m := &record.RestoreMark{}
	if err := json.Unmarshal(res.Kvs[0].Value, m); err != nil {
		return nil, 0, fmt.Errorf("read %q: %w", markName, err)
	}
	r.mark = string(res.Kvs[0].Value)
	return m, res.Kvs[0].CreateRevision, nil
}

// Begin puts the mark into the place of the installation's record that it
// holds; record.ErrConflict when another one is there, or a mark.
func (r *Restorer) Begin(ctx context.Context, m record.RestoreMark) error {
	install := clientv3.Compare(clientv3.CreateRevision(plain+installName), "=", 0)
	if m.Install != nil {
		install = clientv3.Compare(clientv3.Value(plain+installName), "=", string(m.Install))
	}
	return r.set(ctx, m, []clientv3.Op{clientv3.OpDelete(plain + installName)}, install, clientv3.Compare(clientv3.CreateRevision(plain+markName), "=", 0))
}

// Mark changes the mark that Present or Begin saw last, and makes it this
// Restorer's: another one cannot go on. record.ErrConflict when it was changed.
func (r *Restorer) Mark(ctx context.Context, m record.RestoreMark) error {
	return r.set(ctx, m, nil, clientv3.Compare(clientv3.Value(plain+markName), "=", r.mark))
}

func (r *Restorer) set(ctx context.Context, m record.RestoreMark, ops []clientv3.Op, cmps ...clientv3.Cmp) error {
	m.Run = rand.Text()
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	ctx, cancel := bound(ctx)
	defer cancel()
	res, err := r.c.Txn(ctx).If(cmps...).Then(append(ops, clientv3.OpPut(plain+markName, string(b)))...).Commit()
	if err != nil {
		return unreachable("write", markName, err)
	}
	if !res.Succeeded {
		return fmt.Errorf("write %q: %w", markName, record.ErrConflict)
	}
	r.mark = string(b)
	return nil
}

// Put swaps records as they are, in one transaction, and keeps what was there
// before. It takes maxOps/2 of them. A head of the audit log that goes is kept
// where a reset keeps it: the log's files are compared with it.
func (r *Restorer) Put(ctx context.Context, swaps []record.Swap) error {
	var ops []clientv3.Op
	for _, e := range swaps {
		if e.Before != nil {
			ops = append(ops, clientv3.OpPut(keptDir+e.Path, string(e.Before)))
		}
		if e.Value != nil {
			ops = append(ops, clientv3.OpPut(rec+e.Path, string(e.Value)))
			continue
		}
		ops = append(ops, clientv3.OpDelete(rec+e.Path))
		if name, head := strings.CutPrefix(e.Path, auditDir); head {
			ops = append(ops, clientv3.OpPut(plain+headsDir+name, string(record.Body(e.Before))))
		}
	}
	return r.commit(ctx, ops...)
}

// Finish writes the installation's record and a note, and takes the mark away,
// with what was kept: from now on the store is whole.
func (r *Restorer) Finish(ctx context.Context, install json.RawMessage, note record.Raw) error {
	return r.end(ctx, install, clientv3.OpPut(rec+note.Path, string(note.Value)))
}

// Undo takes back what an unfinished restore did; record.ErrNotFound when
// there is none. From its first step on the restore cannot go on; an Undo that
// was killed can.
func (r *Restorer) Undo(ctx context.Context) error {
	m, since, err := r.marked(ctx)
	if err != nil {
		return err
	}
	m.Undo = true
	if err := r.Mark(ctx, *m); err != nil {
		return err
	}
	// Nobody else wrote since the mark was set.
	err = r.pages(ctx, rec, func(e *mvccpb.KeyValue) *clientv3.Op {
		if e.CreateRevision <= since {
			return nil
		}
		op := clientv3.OpDelete(string(e.Key))
		return &op
	})
	if err != nil {
		return err
	}
	err = r.pages(ctx, keptDir, func(e *mvccpb.KeyValue) *clientv3.Op {
		op := clientv3.OpPut(rec+strings.TrimPrefix(string(e.Key), keptDir), string(e.Value))
		return &op
	})
	if err != nil {
		return err
	}
	return r.end(ctx, m.Install)
}

// pages does what op says of each key under a prefix, page by page.
func (r *Restorer) pages(ctx context.Context, prefix string, op func(*mvccpb.KeyValue) *clientv3.Op) error {
	for from, end := prefix, clientv3.GetPrefixRangeEnd(prefix); ; {
		pctx, cancel := bound(ctx)
		res, err := r.c.Get(pctx, from, clientv3.WithRange(end), clientv3.WithLimit(maxOps))
		cancel()
		if err != nil {
			return unreachable("read", prefix, err)
		}
		var ops []clientv3.Op
		for _, e := range res.Kvs {
			if o := op(e); o != nil {
				ops = append(ops, *o)
			}
		}
		if err := r.commit(ctx, ops...); err != nil {
			return err
		}
		if !res.More {
			return nil
		}
		from = string(res.Kvs[len(res.Kvs)-1].Key) + "\x00"
	}
}

func (r *Restorer) end(ctx context.Context, install json.RawMessage, ops ...clientv3.Op) error {
	ops = append(ops, clientv3.OpDelete(plain+markName), clientv3.OpDelete(keptDir, clientv3.WithPrefix()))
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
		return fault.New(fault.Conflict, "restore into", "the store", fmt.Errorf("another command ended this restore, or took it over: %w", record.ErrConflict)).
			WithHint("look whether another `kmsctl restore` is running")
	}
	return nil
}
