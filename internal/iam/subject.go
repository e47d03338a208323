package iam

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/pattern"
	"github.com/kmsctl/kmsctl/internal/record"
)

// A service ID may be proved by more than its API keys: by a client
// certificate with a common name, or by the token of a ServiceAccount of
// Kubernetes. Such a proof is written as a subject.
const (
	subjects       = "iam/subjects/" // <hash of the subject>
	subjectCert    = "cert:"
	subjectAccount = "serviceaccount:"
	maxSubjects    = 16
)

// subjectRecord says which service ID a subject is.
type subjectRecord struct {
	Subject   string `json:"subject"`
	ServiceID string `json:"serviceId"`
}

// SubjectOfCert is the subject of a client certificate with a common name.
func SubjectOfCert(commonName string) string { return subjectCert + commonName }

// SubjectOfAccount is the subject of a ServiceAccount, written namespace:name.
func SubjectOfAccount(account string) string { return subjectAccount + account }

var subjectForm = pattern.Lazy(`^(cert:[^\x00-\x1f/]{1,64}|serviceaccount:[a-z0-9-]{1,63}:[a-z0-9.-]{1,253})$`)

func subjectPath(subject string) string {
	sum := sha256.Sum256([]byte(subject))
	return subjects + hex.EncodeToString(sum[:])
}

// subjectChanges are the records that bind subjects to a service ID.
func subjectChanges(sid ServiceID) ([]record.Change, error) {
	if len(sid.Subjects) > maxSubjects {
		return nil, fault.Usagef("a service ID has at most %d subjects", maxSubjects)
	}
	var out []record.Change
	for _, s := range sid.Subjects {
		if !subjectForm().MatchString(s) {
			return nil, fault.Usagef("subject %q is neither cert:COMMON-NAME nor serviceaccount:NAMESPACE:NAME", s)
		}
		out = append(out, record.Change{Path: subjectPath(s), Value: subjectRecord{s, sid.ID}})
	}
	return out, nil
}

// dropSubjects are the changes that free a service ID's subjects.
func (s *Service) dropSubjects(ctx context.Context, sid ServiceID) ([]record.Change, error) {
	var out []record.Change
	for _, name := range sid.Subjects {
		var r subjectRecord
		rev, err := s.store.Get(ctx, subjectPath(name), &r)
		if err != nil {
			return nil, err
		}
		out = append(out, record.Change{Path: subjectPath(name), Rev: rev})
	}
	return out, nil
}

// AuthenticateSubject gives the service ID that a subject is bound to. The
// caller has proved the subject.
func (s *Service) AuthenticateSubject(ctx context.Context, subject string) (Principal, error) {
	var r subjectRecord
	_, err := s.store.Get(ctx, subjectPath(subject), &r)
	if err == nil {
		var sid ServiceID
		_, err = s.store.Get(ctx, serviceIDs+r.ServiceID, &sid)
	}
	if errors.Is(err, record.ErrNotFound) {
		return Principal{}, fault.New(fault.Denied, "", "", errNotKnown)
	}
	if err != nil {
		return Principal{}, err
	}
	return Principal{Kind: KindService, ServiceID: r.ServiceID}, nil
}
