// Package kmsclient is a Go client of the KMS's HTTP API. It needs the
// standard library only. It reaches a server by URL with an API key, or the
// embedded KMS of the same machine by its unix socket, where the user who
// runs it is administrator.
package kmsclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// Config says where the server is and who asks. Either Socket or Server is
// set. With Server, APIKey is exchanged for a token when the first call needs
// one. CAFile is the PEM of the server's CA; without it the system's count.
type Config struct {
	Server   string
	Socket   string
	CAFile   string
	CA       []byte // the same as PEM, instead of a file
	Instance string
	APIKey   []byte
}

// Client calls the API. Safe for concurrent use.
type Client struct {
	base     string
	instance string
	ring     string
	apiKey   []byte
	http     *http.Client

	mu     sync.Mutex
	bearer string
	until  time.Time
}

// Error is a refusal by the server.
type Error struct {
	Status  int    // HTTP status
	Code    string // reason code, may be empty
	Message string
}

// Error gives the server's own words.
func (e *Error) Error() string {
	if e.Code == "" {
		return fmt.Sprintf("server answered %d: %s", e.Status, e.Message)
	}
	return fmt.Sprintf("server answered %d: %s (%s)", e.Status, e.Message, e.Code)
}

const timeout = 30 * time.Second

// New makes a client. It does not connect yet.
func New(c Config) (*Client, error) {
	t := &http.Transport{MaxIdleConnsPerHost: 16, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 10 * time.Second}
	cl := &Client{instance: c.Instance, apiKey: c.APIKey, http: &http.Client{Transport: t, Timeout: timeout}}
	if c.Socket != "" {
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", c.Socket)
		}
		cl.base, cl.apiKey = "http://local", nil
		return cl, nil
	}
	u, err := url.Parse(c.Server)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") {
		return nil, fmt.Errorf("server %q is not an http:// or https:// URL", c.Server)
	}
	cl.base = strings.TrimRight(c.Server, "/")
	pem := c.CA
	if c.CAFile != "" {
		if pem, err = os.ReadFile(c.CAFile); err != nil {
			return nil, err
		}
	}
	if len(pem) > 0 {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read the server's CA %q: no certificate in it", c.CAFile)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return cl, nil
}

// Instance is the id that calls name, or "".
func (c *Client) Instance() string { return c.instance }

// SetInstance chooses the instance of the calls that follow.
func (c *Client) SetInstance(id string) { c.instance = id }

// SetKeyRing narrows the calls that follow to one key ring; "" is any.
func (c *Client) SetKeyRing(ring string) { c.ring = ring }

// Do sends in as JSON (nil: no body) and reads the answer into out (nil:
// dropped). path is below the server's root. A refusal is *Error. A token that
// is not taken any more, since its signing key was withdrawn, is replaced once.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
		defer clear(body)
	}
	err := c.once(ctx, method, path, body, out)
	if IsStatus(err, http.StatusUnauthorized) && c.forget() {
		err = c.once(ctx, method, path, body, out)
	}
	return err
}

func (c *Client) once(ctx context.Context, method, path string, body []byte, out any) error {
	var r io.Reader
	if body != nil {
		r = bytes.NewReader(body)
	}
	req, err := c.request(ctx, method, path, r)
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return c.send(req, out)
}

// forget drops the token, and says whether there was one.
func (c *Client) forget() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	had := c.bearer != ""
	c.bearer, c.until = "", time.Time{}
	return had
}

// Stream copies the answer of a GET to w as it comes, however long that
// takes. What is broken off is an error.
func (c *Client) Stream(ctx context.Context, path string, w io.Writer) error {
	req, err := c.request(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	patient := *c.http
	patient.Timeout = 0
	res, err := patient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
		if err != nil {
			return err
		}
		return refusal(res.StatusCode, b)
	}
	_, err = io.Copy(w, res.Body)
	return err
}

// Health asks how the server is, which needs no API key. One that is not ready
// is no error: the answer says why it is not.
func (c *Client) Health(ctx context.Context) (h kmsapi.Health, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/readyz", nil)
	if err != nil {
		return h, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return h, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return h, err
	}
	if json.Unmarshal(b, &h) != nil || h.Ready != (res.StatusCode == http.StatusOK) {
		return kmsapi.Health{}, refusal(res.StatusCode, b)
	}
	return h, nil
}

// request names the instance and who asks.
func (c *Client) request(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, err
	}
	if c.instance != "" {
		req.Header.Set(kmsapi.HeaderInstance, c.instance)
	}
	if c.ring != "" {
		req.Header.Set(kmsapi.HeaderKeyRing, c.ring)
	}
	if len(c.apiKey) > 0 {
		token, err := c.token(ctx)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return req, nil
}

func (c *Client) send(req *http.Request, out any) error {
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	if err != nil {
		return err
	}
	defer clear(b)
	if res.StatusCode/100 != 2 {
		return refusal(res.StatusCode, b)
	}
	if out == nil || len(b) == 0 {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("read the answer of %s %s: %w", req.Method, req.URL.Path, err)
	}
	return nil
}

func refusal(status int, b []byte) error {
	e := &Error{Status: status, Message: http.StatusText(status)}
	var body kmsapi.Errors
	var tok kmsapi.TokenError
	switch {
	case json.Unmarshal(b, &body) == nil && len(body.Resources) > 0:
		r := body.Resources[0]
		e.Message = r.ErrorMsg
		if len(r.Reasons) > 0 {
			e.Code, e.Message = r.Reasons[0].Code, r.Reasons[0].Message
		}
	case json.Unmarshal(b, &tok) == nil && tok.ErrorCode != "":
		e.Code, e.Message = tok.ErrorCode, tok.ErrorMessage
	}
	return e
}

// token exchanges the API key, or gives the token of the last exchange while
// it lives for another minute.
func (c *Client) token(ctx context.Context) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Now().Before(c.until) {
		return c.bearer, nil
	}
	t, err := c.Token(ctx)
	if err != nil {
		return "", err
	}
	c.bearer, c.until = t.AccessToken, time.Now().Add(time.Duration(t.ExpiresIn)*time.Second-time.Minute)
	return c.bearer, nil
}

// Token exchanges the API key for an access token.
func (c *Client) Token(ctx context.Context) (kmsapi.Token, error) {
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {string(c.apiKey)}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return kmsapi.Token{}, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	var t kmsapi.Token
	return t, c.send(req, &t)
}

func one(ks kmsapi.Keys) (kmsapi.Key, error) {
	if len(ks.Resources) != 1 {
		return kmsapi.Key{}, fmt.Errorf("the answer holds %d keys, want 1", len(ks.Resources))
	}
	return ks.Resources[0], nil
}

// CreateKey makes or imports a key. With a rotation policy or dual
// authorization, it uses the call that takes them.
func (c *Client) CreateKey(ctx context.Context, k kmsapi.CreateKey) (kmsapi.Key, error) {
	k.Type = kmsapi.TypeKey
	path := "/api/v2/keys"
	if k.Rotation != nil || k.DualAuthDelete != nil {
		path = "/api/v2/keys_with_policy_overrides"
	}
	var out kmsapi.Keys
	if err := c.Do(ctx, http.MethodPost, path, collection(k), &out); err != nil {
		return kmsapi.Key{}, err
	}
	return one(out)
}

func collection(v any) any {
	return map[string]any{"metadata": kmsapi.Metadata{CollectionType: kmsapi.TypeKey, CollectionTotal: 1}, "resources": []any{v}}
}

// Key gives a key by id, a standard key with its payload; metadata leaves
// the payload out.
func (c *Client) Key(ctx context.Context, id string, metadata bool) (kmsapi.Key, error) {
	path := "/api/v2/keys/" + url.PathEscape(id)
	if metadata {
		path += "/metadata"
	}
	var out kmsapi.Keys
	if err := c.Do(ctx, http.MethodGet, path, nil, &out); err != nil {
		return kmsapi.Key{}, err
	}
	return one(out)
}

// Keys lists keys; the query has the parameters of the API's list, such as
// limit, offset, search and sort.
func (c *Client) Keys(ctx context.Context, query url.Values) (kmsapi.Keys, error) {
	var out kmsapi.Keys
	err := c.Do(ctx, http.MethodGet, "/api/v2/keys?"+query.Encode(), nil, &out)
	return out, err
}

// Wrap and Unwrap call the actions of a root key.
func (c *Client) Wrap(ctx context.Context, id string, in kmsapi.WrapRequest) (out kmsapi.ActionAnswer, err error) {
	err = c.Do(ctx, http.MethodPost, "/api/v2/keys/"+url.PathEscape(id)+"/actions/wrap", in, &out)
	return out, err
}

// Unwrap opens what Wrap made.
func (c *Client) Unwrap(ctx context.Context, id string, in kmsapi.UnwrapRequest) (out kmsapi.ActionAnswer, err error) {
	err = c.Do(ctx, http.MethodPost, "/api/v2/keys/"+url.PathEscape(id)+"/actions/unwrap", in, &out)
	return out, err
}

// Rewrap wraps anew, by the newest version of the key, what any version had
// wrapped.
func (c *Client) Rewrap(ctx context.Context, id string, in kmsapi.UnwrapRequest) (out kmsapi.ActionAnswer, err error) {
	err = c.Do(ctx, http.MethodPost, "/api/v2/keys/"+url.PathEscape(id)+"/actions/rewrap", in, &out)
	return out, err
}

// IsStatus says whether err is a refusal with this HTTP status.
func IsStatus(err error, status int) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == status
}
