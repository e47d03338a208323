package server

import (
	"context"
	"crypto/sha256"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// authenticate says who asks: the local user by the socket, else whom the
// access token proves, else the ServiceAccount whose token it is, else the
// owner of the client certificate.
func (s *Server) authenticate(ctx context.Context, r *http.Request) (iam.Principal, error) {
	if local, _ := ctx.Value(localKey{}).(bool); local {
		return iam.LocalAdmin(), nil
	}
	p, err := s.prove(ctx, r)
	if fault.KindOf(err) == fault.Denied {
		return p, fault.New(fault.Denied, "authenticate", "", err).WithReason(kmsapi.Unauthorized)
	}
	return p, err
}

func (s *Server) prove(ctx context.Context, r *http.Request) (iam.Principal, error) {
	kind, token, ok := strings.Cut(r.Header.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(kind, "Bearer") {
		if name := certName(r); name != "" && !ok {
			return s.IAM.AuthenticateSubject(ctx, iam.SubjectOfCert(name))
		}
		return iam.Principal{}, fault.Newf(fault.Denied, "authenticate", "", "no bearer token")
	}
	token = strings.Trim(token, " ") // and nothing else: other white space is no part of a header
	p, err := s.IAM.Authenticate(ctx, token)
	if fault.KindOf(err) != fault.Denied || s.Review == nil {
		return p, err
	}
	account, rerr := s.reviews.account(ctx, token)
	if rerr != nil || account == "" {
		return p, rerrOr(rerr, err)
	}
	return s.IAM.AuthenticateSubject(ctx, iam.SubjectOfAccount(account))
}

func rerrOr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// certName is the common name of a client certificate that the server's CA
// for clients has signed.
func certName(r *http.Request) string {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || len(r.TLS.PeerCertificates) == 0 {
		return ""
	}
	return r.TLS.PeerCertificates[0].Subject.CommonName
}

// reviewLife is how long Kubernetes' word on a token counts. Its own API
// server keeps such words for ten seconds too.
const (
	reviewLife = 10 * time.Second
	maxReviews = 4096
)

// reviews asks Kubernetes whose a token is, and keeps the answer for a while.
// Refusals are kept as well, so that a flood does not reach Kubernetes.
type reviews struct {
	ask func(ctx context.Context, token string) (account string, err error)
	now func() time.Time

	mu   sync.Mutex
	seen map[[sha256.Size]byte]review
}

type review struct {
	account string
	until   time.Time
}

func (v *reviews) account(ctx context.Context, token string) (string, error) {
	if strings.Count(token, ".") != 2 || len(token) > 16<<10 {
		return "", nil // no JWT: Kubernetes need not be asked
	}
	key := sha256.Sum256([]byte(token))
	v.mu.Lock()
	r, ok := v.seen[key]
	v.mu.Unlock()
	// A clock that was set back makes no word last longer.
	if now := v.now(); ok && now.Before(r.until) && !now.Before(r.until.Add(-reviewLife)) {
		return r.account, nil
	}
	account, err := v.ask(ctx, token)
	if err != nil {
		return "", err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.seen == nil || len(v.seen) >= maxReviews {
		v.seen = map[[sha256.Size]byte]review{}
	}
	v.seen[key] = review{account, v.now().Add(reviewLife)}
	return account, nil
}
