package store

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
)

// A store comes to its end when its installation is cleared: a record says so
// (record.EndPath), every process that works on the store stops, and one of
// them resets it. What is written late, by a process that has not seen the
// record, falls with the rest; after the reset it is fenced off, since the
// installation that it belongs to is not there. A restore takes that away, too
// (see Restorer).

const (
	// keptPlain are the folders and names that outlive a reset: the ledger of
	// logins (a password is tried once, whatever is cleared), the heads of the
	// audit logs, and what was cleared.
	loginsDir   = "logins/"
	headsDir    = "heads/"
	clearedName = "cleared"
	auditDir    = "audit/"

	maxOps = 100 // of one transaction; etcd takes 128
)

// Ended is closed when the store comes to its end, or has.
func (s *Store) Ended() <-chan struct{} { return s.ended }

func (s *Store) end() { s.ending.Do(func() { close(s.ended) }) }

// madeAt is the revision that made the installation; 0 when there is none.
func madeAt(ctx context.Context, c *clientv3.Client) (int64, error) {
	ctx, cancel := bound(ctx)
	defer cancel()
	res, err := c.Get(ctx, plain+installName, clientv3.WithKeysOnly())
	if err != nil {
		return 0, unreachable("read", installName, err)
	}
	return made(res.Kvs), nil
}

func made(kvs []*mvccpb.KeyValue) int64 {
	if len(kvs) == 0 {
		return 0
	}
	return kvs[0].CreateRevision
}

// same is an error when another installation has taken the store over.
func (s *Store) same(ctx context.Context) error {
	now, err := madeAt(ctx, s.c)
	if err == nil && now != s.fence {
		s.end()
		err = errEnded()
	}
	return err
}

// fenced is same with what a transaction read.
func (s *Store) fenced(kvs []*mvccpb.KeyValue) error {
	if made(kvs) == s.fence {
		return nil
	}
	s.end()
	return errEnded()
}

func errEnded() error {
	return fault.Newf(fault.NotReady, "use the store", "", "its data were cleared, or a backup is being restored").WithHint("the KMS opens again by itself; then try again")
}

// Ending reads the record that ends the store, unproven, and gives its
// revision; record.ErrNotFound when there is none.
func (p *Plain) Ending(ctx context.Context, v any) (int64, error) {
	ctx, cancel := bound(ctx)
	defer cancel()
	res, err := p.c.Get(ctx, rec+record.EndPath)
	if err != nil {
		return 0, unreachable("read", record.EndPath, err)
	}
	if len(res.Kvs) == 0 {
		return 0, fmt.Errorf("%q: %w", record.EndPath, record.ErrNotFound)
	}
	if err := json.Unmarshal(record.Body(res.Kvs[0].Value), v); err != nil {
		return 0, fault.New(fault.BadContent, "read record", record.EndPath, err)
	}
	return res.Kvs[0].ModRevision, nil
}

// Reset removes every record and the installation in one transaction, if the
// record that ends the store still has the revision: record.ErrConflict when
// another process was first. cleared is kept, and so are the ledger of logins
// and the last heads of the audit logs.
func (p *Plain) Reset(ctx context.Context, rev int64, cleared any) error {
	b, err := json.Marshal(cleared)
	if err != nil {
		return err
	}
	return p.reset(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(rec+record.EndPath), "=", rev)}, clientv3.OpPut(plain+clearedName, string(b)))
}

// Leave does what Reset does in a store that was reset already and holds
// nothing since: if its installation still has the revision, and no record was
// written after the revision upTo.
func (p *Plain) Leave(ctx context.Context, install, upTo int64) error {
	return p.reset(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(plain+installName), "=", install),
		clientv3.Compare(clientv3.ModRevision(rec), "<", upTo+1).WithPrefix()})
}

// Peek reads every record at one revision, unproven, and gives that revision.
func (p *Plain) Peek(ctx context.Context, each func(record.Raw) error) (rev int64, err error) {
	return rev, walk(ctx, p.c, func(r int64) error { rev = r; return nil }, each)
}

func (p *Plain) reset(ctx context.Context, cmps []clientv3.Cmp, more ...clientv3.Op) error {
	ctx, cancel := context.WithTimeout(ctx, shrinkLimit)
	defer cancel()
	heads, err := p.heads(ctx)
	if err != nil {
		return err
	}
	others, err := p.mortal(ctx)
	if err != nil {
		return err
	}
	ops := slices.Concat([]clientv3.Op{clientv3.OpDelete(rec, clientv3.WithPrefix())}, more, heads, others)
	if len(ops) > maxOps {
		return fault.Newf(fault.Other, "reset", "the store", "%d things at once are too many", len(ops))
	}
	res, err := p.c.Txn(ctx).If(cmps...).Then(ops...).Commit()
	if err != nil {
		return unreachable("reset", "the store", err)
	}
	if !res.Succeeded {
		return fmt.Errorf("reset the store: %w", record.ErrConflict)
	}
	_, _ = shrink(ctx, p.c, res.Header.Revision) // what fails here, etcd does by itself within minutes
	return nil
}

// heads keeps the heads of the audit logs, which their files are compared with.
func (p *Plain) heads(ctx context.Context) (ops []clientv3.Op, err error) {
	res, err := p.c.Get(ctx, rec+auditDir, clientv3.WithPrefix())
	if err != nil {
		return nil, unreachable("read", auditDir, err)
	}
	for _, e := range res.Kvs {
		name := strings.TrimPrefix(string(e.Key), rec+auditDir)
		ops = append(ops, clientv3.OpPut(plain+headsDir+name, string(record.Body(e.Value))))
	}
	return ops, nil
}

// mortal removes what is of the installation: all plain things but the kept.
func (p *Plain) mortal(ctx context.Context) (ops []clientv3.Op, err error) {
	res, err := p.c.Get(ctx, plain, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return nil, unreachable("read", "the installation", err)
	}
	for _, e := range res.Kvs {
		name := strings.TrimPrefix(string(e.Key), plain)
		if name != clearedName && !strings.HasPrefix(name, loginsDir) && !strings.HasPrefix(name, headsDir) {
			ops = append(ops, clientv3.OpDelete(string(e.Key)))
		}
	}
	return ops, nil
}
