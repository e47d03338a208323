// Package image talks to image registries and makes the product's own images.
// It knows the OCI distribution API: blobs, uploads in chunks that can be taken
// up again, mounts, manifests, and the ways to log in. It does not know
// archives; who pushes gives it readers.
//
// What it promises: what failed for a passing reason is tried again with
// back-off, what was refused is not; each error says which registry answered
// what, and is a fault of the right kind; credentials stand in no error.
package image

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// Options say how to reach a registry, and as whom.
type Options struct {
	// Host is HOST[:PORT].
	Host string
	// Insecure allows plain HTTP and certificates that nobody vouches for.
	Insecure                  bool
	CAFile, CertFile, KeyFile string
	// User and Password beat the Docker configuration. Token is for
	// registries whose token service takes a bearer token (ICP), or that take
	// one themselves.
	User     string
	Password secret.Value
	Token    secret.Value
	// Tries is how often a request is made at most, 0 for the default.
	Tries int
	// Chunk is how many bytes an upload sends at once, 0 for the default.
	Chunk int64
	// Sessions keeps unfinished uploads; nil forgets them.
	Sessions Sessions
	// Getenv finds the Docker configuration (DOCKER_CONFIG, HOME).
	UserAgent string
}

// Sessions remembers where the registry keeps an unfinished upload, for a
// later run. It is safe to lose.
type Sessions interface {
	Load(key string) (location string, ok bool)
	Save(key, location string)
	Drop(key string)
}

const (
	defaultTries = 6
	defaultChunk = 16 << 20
	stallLimit   = 2 * time.Minute // no byte moved for so long: the connection is dead
	commitLimit  = 10 * time.Minute
)

// Registry is one registry. Safe for concurrent use.
type Registry struct {
	opts   Options
	base   url.URL // scheme and host
	client *http.Client
	auth   *authorizer
	wait   func(ctx context.Context, d time.Duration) error
	stall  time.Duration // no byte moved for so long: the connection is dead
}

// Dial finds out how the registry speaks (TLS or not, which login) and logs
// in, so that a wrong address or password fails before anything is sent.
func Dial(ctx context.Context, o Options) (*Registry, error) {
	if o.Tries == 0 {
		o.Tries = defaultTries
	}
	if o.Chunk == 0 {
		o.Chunk = defaultChunk
	}
	client, err := NewClient(o)
	if err != nil {
		return nil, err
	}
	r := &Registry{opts: o, base: url.URL{Scheme: "https", Host: o.Host}, client: client, wait: sleep, stall: stallLimit}
	r.auth = &authorizer{r: r}
	return r, r.ping(ctx)
}

// NewClient makes an HTTP client by the options' TLS files, which gives up a
// connection on which nothing moves.
func NewClient(o Options) (*http.Client, error) {
	conf, err := tlsConfig(o)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: 20 * time.Second, KeepAlive: 30 * time.Second}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &patient{Conn: c}, nil
		},
		TLSClientConfig: conf, TLSHandshakeTimeout: 20 * time.Second, ResponseHeaderTimeout: commitLimit,
		MaxIdleConnsPerHost: 64, IdleConnTimeout: 90 * time.Second, ForceAttemptHTTP2: false, DisableCompression: true,
		WriteBufferSize: 64 << 10, ReadBufferSize: 16 << 10,
	}
	return &http.Client{Transport: t}, nil
}

// patient is a connection that fails when nothing moves for stallLimit: a
// deadline for progress, not for the whole of a large blob.
type patient struct{ net.Conn }

func (p *patient) Write(b []byte) (int, error) {
	if err := p.SetWriteDeadline(time.Now().Add(stallLimit)); err != nil {
		return 0, err
	}
	return p.Conn.Write(b)
}

// sectioned is a body whose next bytes, limit at most, stand together in a
// file; they count as read then. None when they stand in memory.
type sectioned interface {
	Section(limit int64) (f *os.File, at, n int64)
}

// ReadFrom is how a request's body is written where nothing encrypts it: by the
// system from a file, or else in large pieces.
func (p *patient) ReadFrom(r io.Reader) (total int64, err error) {
	if l, ok := r.(*io.LimitedReader); ok {
		if s, ok := l.R.(sectioned); ok {
			if total, err = p.sections(s, l); err != nil {
				return total, err
			}
		}
	}
	buf := make([]byte, 128<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			m, werr := p.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

func (p *patient) sections(s sectioned, l *io.LimitedReader) (total int64, err error) {
	for l.N > 0 {
		f, at, n := s.Section(l.N)
		if n == 0 {
			break
		}
		m, err := p.sendFile(f, at, n)
		total, l.N = total+m, l.N-m
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// copyFile is sendFile where the system has none for this file or connection.
func (p *patient) copyFile(f *os.File, at, n int64) (int64, error) {
	m, err := io.Copy(struct{ io.Writer }{p}, io.NewSectionReader(f, at, n))
	if err == nil && m < n {
		err = errShorter
	}
	return m, err
}

var errShorter = fault.Newf(fault.BadContent, "", "", "the file that is sent has become shorter")

func tlsConfig(o Options) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: o.Insecure} //nolint:gosec // only when the person asks by --insecure
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fault.New(fault.NotFound, "read CA file", o.CAFile, err).WithHint("check --ca-file and --registry-ca-file")
		}
		if c.RootCAs, err = x509.SystemCertPool(); err != nil {
			c.RootCAs = x509.NewCertPool()
		}
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fault.Newf(fault.BadContent, "read CA file", o.CAFile, "there is no PEM certificate in it")
		}
	}
	if o.CertFile != "" || o.KeyFile != "" {
		pair, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
		if err != nil {
			return nil, fault.New(fault.BadContent, "read client certificate", o.CertFile, err).WithHint("--cert-file and --key-file must be a PEM pair")
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// plainAllowed says whether the registry may be spoken to without TLS: by
// --insecure, or because it is on this machine, as docker has it.
func (r *Registry) plainAllowed() bool {
	host, _, err := net.SplitHostPort(r.opts.Host)
	if err != nil {
		host = r.opts.Host
	}
	ip := net.ParseIP(host)
	return r.opts.Insecure || host == "localhost" || (ip != nil && ip.IsLoopback())
}

// ping asks for the API's root: it must be a registry, and it says how to log
// in.
func (r *Registry) ping(ctx context.Context) error {
	answer, err := r.root(ctx)
	var notTLS tls.RecordHeaderError
	if errors.As(err, &notTLS) || (err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client")) {
		if !r.plainAllowed() {
			return fault.Newf(fault.Unreachable, "reach registry", r.opts.Host, "it does not speak TLS").WithHint("pass --insecure if plain HTTP is meant")
		}
		r.base.Scheme = "http"
		answer, err = r.root(ctx)
	}
	if err != nil {
		return r.unreachable(err)
	}
	switch answer.status {
	case http.StatusOK:
		if strings.HasPrefix(answer.contentType, "text/html") {
			return fault.Newf(fault.NotFound, "reach registry", r.opts.Host, "it answers, but is no image registry (a web page for /v2/)").WithHint("check the host and port of --registry, and whether a proxy stands before it")
		}
		return nil
	case http.StatusUnauthorized:
		return r.auth.challenge(ctx, answer.challenges)
	case http.StatusNotFound:
		return fault.Newf(fault.NotFound, "reach registry", r.opts.Host, "it answers, but is no image registry (404 for /v2/)").WithHint("check the host and port of --registry")
	}
	return fault.New(fault.KindOf(answer.refusal), "reach registry", r.opts.Host, answer.refusal).WithHint("%s", fault.HintOf(answer.refusal))
}

// rootAnswer is what the API's root says.
type rootAnswer struct {
	status      int
	contentType string
	challenges  []string
	refusal     error
}

func (r *Registry) root(ctx context.Context) (rootAnswer, error) {
	resp, err := r.send(ctx, request{method: http.MethodGet, path: "/v2/", bare: true})
	if err != nil {
		return rootAnswer{}, err
	}
	defer drain(resp)
	return rootAnswer{resp.StatusCode, resp.Header.Get("Content-Type"), resp.Header.Values("WWW-Authenticate"), r.refused(resp)}, nil
}

func (r *Registry) unreachable(err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err // the URL may carry an upload's state
	}
	out := fault.New(fault.Unreachable, "reach registry", r.opts.Host, err).WithHint("is the registry running, and is --registry right?")
	var unknown x509.UnknownAuthorityError
	var wrongHost x509.HostnameError
	if errors.As(err, &unknown) || errors.As(err, &wrongHost) {
		out.Hint = "give the CA that signed the registry's certificate by --registry-ca-file, or pass --insecure"
	}
	if errors.Is(err, context.Canceled) {
		out.Kind, out.Hint = fault.Stopped, "run the same command again to go on"
	}
	return out
}

// request is one request to the registry.
type request struct {
	method, path string
	url          string // in place of path: a Location
	query        url.Values
	header       http.Header
	body         func() (io.Reader, error) // anew for every try
	size         int64
	repo         string // for the login's scope
	bare         bool   // without login, as a ping is
	once         bool   // not to be tried again: the caller does
	want         []int
}

func (r *Registry) send(ctx context.Context, q request) (*http.Response, error) {
	u := r.base
	u.Path = q.path
	if q.url != "" {
		ref, err := url.Parse(q.url)
		if err != nil {
			return nil, fmt.Errorf("registry %q gave a location that is no URL: %w", r.opts.Host, err)
		}
		u = *r.base.ResolveReference(ref)
	}
	if q.query != nil {
		all := u.Query()
		for k, v := range q.query {
			all[k] = v
		}
		u.RawQuery = all.Encode()
	}
	var body io.Reader
	if q.body != nil {
		b, err := q.body()
		if err != nil {
			return nil, err
		}
		body = b
	}
	req, err := http.NewRequestWithContext(ctx, q.method, u.String(), body)
	if err != nil {
		return nil, err
	}
	for k, v := range q.header {
		req.Header[k] = v
	}
	if q.body != nil {
		req.ContentLength = q.size
		req.Header.Set("Content-Type", firstOf(q.header.Get("Content-Type"), "application/octet-stream"))
	}
	req.Header.Set("User-Agent", firstOf(r.opts.UserAgent, "kmsctl"))
	if !q.bare && u.Host == r.base.Host {
		if err := r.auth.authorize(ctx, req, q.repo); err != nil {
			return nil, err
		}
	}
	return r.client.Do(req)
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// do sends a request, again where that makes sense, until one of q.want comes.
// The caller closes the answer's body.
func (r *Registry) do(ctx context.Context, q request) (*http.Response, error) {
	relogged := false
	for try := 1; ; try++ {
		resp, err := r.send(ctx, q)
		if err == nil {
			for _, w := range q.want {
				if resp.StatusCode == w {
					return resp, nil
				}
			}
			if resp.StatusCode == http.StatusUnauthorized && !relogged && !q.bare {
				relogged = true
				drain(resp)
				r.auth.forget()
				try--
				continue
			}
		}
		last := err
		if err == nil {
			last = r.refused(resp)
			drain(resp)
		}
		if q.once || try >= r.opts.Tries || !passing(resp, err) {
			if err != nil {
				return nil, r.unreachable(err)
			}
			return nil, last
		}
		slog.Debug("registry: trying again", "method", q.method, "path", q.path, "try", try, "cause", last)
		if err := r.wait(ctx, backOff(try, last)); err != nil {
			return nil, r.unreachable(err)
		}
	}
}

// passing says whether a failure may be gone on the next try.
func passing(resp *http.Response, err error) bool {
	if err != nil {
		var f *fault.Error
		var cert *tls.CertificateVerificationError
		return !errors.Is(err, context.Canceled) && !errors.As(err, &f) && !errors.As(err, &cert)
	}
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusRequestTimeout, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// backOff doubles from a quarter of a second, half of it by chance, unless the
// registry said how long to wait.
func backOff(try int, cause error) time.Duration {
	var e *statusError
	if errors.As(cause, &e) {
		if s, err := strconv.Atoi(e.retryAfter); err == nil && s >= 0 {
			return min(time.Duration(s)*time.Second, 2*time.Minute)
		}
	}
	d := min(250*time.Millisecond<<min(try-1, 8), 20*time.Second)
	return d/2 + rand.N(d/2+1) //nolint:gosec // spreads load, hides nothing
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func drain(resp *http.Response) {
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // only so that the connection can be used again
	_ = resp.Body.Close()
}

// statusError is an answer that was not wanted; the fault around it has the
// kind.
type statusError struct {
	status     int
	codes      []string
	text       string
	retryAfter string
}

func (e *statusError) Error() string { return e.text }

func statusOf(err error) int {
	var s *statusError
	if errors.As(err, &s) {
		return s.status
	}
	return 0
}

// refused turns an unwanted answer into a fault.
func (r *Registry) refused(resp *http.Response) error {
	var body struct {
		Errors []struct{ Code, Message string }
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 8<<10)) // what cannot be read is not shown
	_ = json.Unmarshal(b, &body)                         // not all answers are JSON
	e := &statusError{status: resp.StatusCode, retryAfter: resp.Header.Get("Retry-After"), text: fmt.Sprintf("registry %q answered %d %s", r.opts.Host, resp.StatusCode, strings.ToLower(http.StatusText(resp.StatusCode)))}
	for _, one := range body.Errors {
		e.codes = append(e.codes, one.Code)
		e.text += fmt.Sprintf(": %s: %s", one.Code, one.Message)
	}
	kind, hint := fault.Other, ""
	switch c := resp.StatusCode; {
	case c == http.StatusUnauthorized:
		kind, hint = fault.Denied, "pass --registry-user and --registry-password-file, or log in with your registry tool"
	case c == http.StatusForbidden:
		kind, hint = fault.Denied, "this user may not do that; ask for push rights on the repository, or use another user"
	case c == http.StatusNotFound:
		kind, hint = fault.NotFound, "check --registry, and that the project or namespace exists there"
	case c == http.StatusRequestEntityTooLarge:
		kind, hint = fault.Other, "a proxy before the registry limits the size of requests; raise its limit, or pass a smaller --chunk-size"
	case c == http.StatusTooManyRequests, c >= 500:
		kind, hint = fault.Unreachable, "the registry is not well or too busy; try again later"
	}
	return fault.New(kind, "", "", e).WithHint("%s", hint)
}

// HasBlob says whether a repository has a blob.
func (r *Registry) HasBlob(ctx context.Context, repo, digest string) (bool, error) {
	resp, err := r.do(ctx, request{method: http.MethodHead, path: "/v2/" + repo + "/blobs/" + digest, repo: repo, want: []int{200, 404}})
	if err != nil {
		return false, err
	}
	drain(resp)
	return resp.StatusCode == http.StatusOK, nil
}

// Mount makes a blob of one repository one of another's, without sending it.
// False when the registry would rather have it sent.
func (r *Registry) Mount(ctx context.Context, repo, digest, from string) (bool, error) {
	r.auth.alsoFrom(from)
	resp, err := r.do(ctx, request{method: http.MethodPost, path: "/v2/" + repo + "/blobs/uploads/", repo: repo,
		query: url.Values{"mount": {digest}, "from": {from}}, want: []int{201, 202}})
	if err != nil {
		return false, err
	}
	drain(resp)
	if resp.StatusCode == http.StatusCreated {
		return true, nil
	}
	r.cancel(ctx, repo, resp.Header.Get("Location"))
	return false, nil
}

// cancel ends an upload that is not wanted; a registry that does not know how
// lets it expire.
func (r *Registry) cancel(ctx context.Context, repo, location string) {
	if location == "" {
		return
	}
	if resp, err := r.send(ctx, request{method: http.MethodDelete, url: location, repo: repo}); err == nil {
		drain(resp)
	}
}

// Manifest reads a manifest by tag or digest and gives its type and bytes; ok
// is false when there is none.
func (r *Registry) Manifest(ctx context.Context, repo, ref string) (mediaType string, body []byte, ok bool, err error) {
	resp, err := r.do(ctx, request{method: http.MethodGet, path: "/v2/" + repo + "/manifests/" + ref, repo: repo, header: acceptAll, want: []int{200, 404}})
	if err != nil {
		return "", nil, false, err
	}
	defer drain(resp)
	if resp.StatusCode == http.StatusNotFound {
		return "", nil, false, nil
	}
	const most = 8 << 20
	b, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err != nil {
		return "", nil, false, r.unreachable(err)
	}
	if len(b) > most {
		return "", nil, false, fault.Newf(fault.BadContent, "read manifest", repo+":"+ref, "it has more than %d bytes", most)
	}
	return resp.Header.Get("Content-Type"), b, true, nil
}

var acceptAll = http.Header{"Accept": {
	"application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json",
	"application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"}}

// ManifestDigest is the digest of the manifest under a tag, "" when there is
// none.
func (r *Registry) ManifestDigest(ctx context.Context, repo, ref string) (string, error) {
	resp, err := r.do(ctx, request{method: http.MethodHead, path: "/v2/" + repo + "/manifests/" + ref, repo: repo, header: acceptAll, want: []int{200, 404}})
	if err != nil {
		return "", err
	}
	drain(resp)
	if resp.StatusCode == http.StatusNotFound {
		return "", nil
	}
	if d := resp.Header.Get("Docker-Content-Digest"); d != "" {
		return d, nil
	}
	_, b, ok, err := r.Manifest(ctx, repo, ref) // an old registry that does not say
	if err != nil || !ok {
		return "", err
	}
	return digestOf(b), nil
}

// PutManifest writes a manifest under a tag or its digest, and reads it back.
func (r *Registry) PutManifest(ctx context.Context, repo, ref, mediaType string, body []byte) error {
	resp, err := r.do(ctx, request{method: http.MethodPut, path: "/v2/" + repo + "/manifests/" + ref, repo: repo,
		header: http.Header{"Content-Type": {mediaType}}, size: int64(len(body)),
		body: func() (io.Reader, error) { return strings.NewReader(string(body)), nil }, want: []int{200, 201, 202}})
	if err != nil {
		return err
	}
	drain(resp)
	_, back, ok, err := r.Manifest(ctx, repo, ref)
	if err != nil {
		return err
	}
	if !ok || digestOf(back) != digestOf(body) {
		return fault.Newf(fault.BadContent, "", "", "registry %q does not give back the manifest that it was sent", r.opts.Host).
			WithHint("does somebody else write this tag, or is the registry read through a cache?")
	}
	return nil
}

func digestOf(b []byte) string {
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

// ReadBlob reads a small blob and checks its digest.
func (r *Registry) ReadBlob(ctx context.Context, repo, digest string, limit int64) ([]byte, error) {
	resp, err := r.do(ctx, request{method: http.MethodGet, path: "/v2/" + repo + "/blobs/" + digest, repo: repo, want: []int{200}})
	if err != nil {
		return nil, err
	}
	defer drain(resp)
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, r.unreachable(err)
	}
	if int64(len(b)) > limit || digestOf(b) != digest {
		return nil, fault.Newf(fault.BadContent, "read blob", digest, "registry %q gives other bytes for it", r.opts.Host)
	}
	return b, nil
}

// Tags gives the tags of a repository, none when it is not there.
func (r *Registry) Tags(ctx context.Context, repo string) ([]string, error) {
	var all []string
	const most = 1000 // pages: a registry that goes round in a circle ends too
	next := "/v2/" + repo + "/tags/list?n=1000"
	for range most {
		resp, err := r.do(ctx, request{method: http.MethodGet, url: next, repo: repo, want: []int{200, 404}})
		if err != nil {
			return nil, err
		}
		var page struct{ Tags []string }
		if resp.StatusCode == http.StatusOK {
			err = json.NewDecoder(io.LimitReader(resp.Body, 8<<20)).Decode(&page)
		}
		drain(resp)
		if err != nil {
			return nil, fault.New(fault.BadContent, "read the tags of", r.opts.Host+"/"+repo, err)
		}
		all = append(all, page.Tags...)
		link, rel, _ := strings.Cut(resp.Header.Get("Link"), ">")
		if !strings.HasPrefix(link, "<") || !strings.Contains(rel, `rel="next"`) {
			break
		}
		next = link[1:]
	}
	return all, nil
}

// HasTags says whether a repository is there and has a tag.
func (r *Registry) HasTags(ctx context.Context, repo string) (bool, error) {
	resp, err := r.do(ctx, request{method: http.MethodGet, path: "/v2/" + repo + "/tags/list", query: url.Values{"n": {"1"}}, repo: repo, want: []int{200, 404}})
	if err != nil {
		return false, err
	}
	defer drain(resp)
	var list struct{ Tags []string }
	_ = json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&list) // no list is an empty one
	return resp.StatusCode == http.StatusOK && len(list.Tags) > 0, nil
}
