package kms

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func instancePath(id string) string { return "instances/" + id }

// Instance gives an instance; what is not there, or is no UUID, is an error of
// its own code. One that is being deleted is not there.
func (s *Service) Instance(ctx context.Context, id string) (kmsapi.Instance, error) {
	in, _, err := s.instance(ctx, id)
	if err == nil && in.Deleting {
		return kmsapi.Instance{}, noInstance(id)
	}
	return in, err
}

func noInstance(id string) error {
	return fault.Newf(fault.NotFound, "", id, "instance does not exist").WithReason(kmsapi.InstanceNotFound)
}

func (s *Service) instance(ctx context.Context, id string) (in kmsapi.Instance, rev int64, err error) {
	if uuid.Validate(id) != nil || id != strings.ToLower(id) {
		return in, 0, fault.Newf(fault.Usage, "", id, "not a UUID").WithReason(kmsapi.InvalidInstance)
	}
	rev, err = s.store.Get(ctx, instancePath(id), &in)
	if errors.Is(err, record.ErrNotFound) {
		return in, 0, noInstance(id)
	}
	return in, rev, err
}

// alive goes with a change that puts something into an instance: it fails when
// the instance is being deleted meanwhile, so that nothing is left behind.
func (s *Service) alive(ctx context.Context, id string) (record.Change, error) {
	in, rev, err := s.instance(ctx, id)
	if err == nil && in.Deleting {
		err = noInstance(id)
	}
	return record.Change{Path: instancePath(id), Rev: rev, Same: true}, err
}

// DeleteInstance removes an instance that holds no key, with everything else
// that belongs to it; others removes what other parts keep. It is marked first,
// and is not there for anybody from then on; cut short, a second call goes on.
func (s *Service) DeleteInstance(ctx context.Context, id string, others func(ctx context.Context) error) error {
	in, rev, err := s.instance(ctx, id)
	if err != nil {
		return err
	}
	if !in.Deleting {
		if rev, err = s.markDeleting(ctx, in, rev); err != nil {
			return err
		}
	}
	for _, dir := range []string{ringPath(id, ""), aliasPath(id, ""), registrationDir(id), instancePolicyPath(id, ""), usesDir(id)} {
		if err := s.removeAll(ctx, dir); err != nil {
			return err
		}
	}
	if err := s.dropToken(ctx, id); err != nil {
		return err
	}
	if err := others(ctx); err != nil {
		return err
	}
	var name string
	nameRev, err := s.store.Get(ctx, "instancenames/"+in.Name, &name)
	if err != nil {
		return err
	}
	s.index.forget(id)
	return conflict(s.store.Commit(ctx, record.Change{Path: instancePath(id), Rev: rev}, record.Change{Path: "instancenames/" + in.Name, Rev: nameRev}))
}

// markDeleting marks an instance without keys. A key that was made before the
// mark is seen after it, and takes it back; none is made later.
func (s *Service) markDeleting(ctx context.Context, in kmsapi.Instance, rev int64) (int64, error) {
	if err := s.noKeys(ctx, in); err != nil {
		return 0, err
	}
	in.Deleting = true
	if err := conflict(s.store.Commit(ctx, record.Change{Path: instancePath(in.ID), Value: in, Rev: rev})); err != nil {
		return 0, err
	}
	_, rev, err := s.instance(ctx, in.ID)
	if err != nil {
		return 0, err
	}
	if err := s.noKeys(ctx, in); err != nil {
		in.Deleting = false
		return 0, errors.Join(err, s.store.Commit(ctx, record.Change{Path: instancePath(in.ID), Value: in, Rev: rev}))
	}
	return rev, nil
}

func (s *Service) noKeys(ctx context.Context, in kmsapi.Instance) error {
	keys, err := s.index.keys(ctx, s.store, in.ID)
	if err == nil && len(keys) > 0 {
		err = fault.Newf(fault.Conflict, "delete instance", in.Name, "it holds %d keys", len(keys)).
			WithHint("delete and purge them first; those that were deleted count until they are purged").WithReason(kmsapi.Conflict)
	}
	return err
}

// removeAll removes the records of a folder.
func (s *Service) removeAll(ctx context.Context, dir string) error {
	var all []record.Change
	err := s.store.List(ctx, dir, func(m record.Meta, _ func(any) error) error {
		all = append(all, record.Change{Path: m.Path, Rev: m.Rev})
		return nil
	})
	if err != nil {
		return err
	}
	return s.commitAll(ctx, all)
}

// batch is how many changes one transaction makes: etcd takes 128.
const batch = 100

// commitAll makes changes that need not come together.
func (s *Service) commitAll(ctx context.Context, changes []record.Change) error {
	for part := range slices.Chunk(changes, batch) {
		if err := s.store.Commit(ctx, part...); err != nil {
			return conflict(err)
		}
	}
	return nil
}

// dropToken removes an instance's import token, if there is one.
func (s *Service) dropToken(ctx context.Context, id string) error {
	var t tokenRecord
	rev, err := s.store.Get(ctx, importTokenDir+id, &t)
	if errors.Is(err, record.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.destroy(ctx, [][]byte{t.Held}); err != nil { // first, so that a record names it until it is gone
		return err
	}
	return conflict(s.store.Commit(ctx, record.Change{Path: importTokenDir + id, Rev: rev}))
}

// conflict is what the API says when another was quicker.
func conflict(err error) error {
	if errors.Is(err, record.ErrConflict) {
		return refusal(fault.Conflict, "", kmsapi.Conflict)
	}
	return err
}
