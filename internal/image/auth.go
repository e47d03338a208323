package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// authorizer logs requests in. One token covers all repositories of a run, so
// that mounts between them work and the token service is asked once.
type authorizer struct {
	r     *Registry
	mu    sync.Mutex
	basic string // header value
	realm string
	serv  string
	push  []string // repositories to push to
	pull  []string // repositories to mount from
	token string
	until time.Time
}

// Scope names the repositories of a run beforehand.
func (r *Registry) Scope(repos ...string) {
	r.auth.mu.Lock()
	defer r.auth.mu.Unlock()
	for _, repo := range repos {
		r.auth.add(&r.auth.push, repo)
	}
}

func (a *authorizer) add(to *[]string, repo string) {
	if repo != "" && !slices.Contains(*to, repo) {
		*to = append(*to, repo)
		a.token = "" // the one at hand does not cover it
	}
}

func (a *authorizer) alsoFrom(repo string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Contains(a.push, repo) {
		a.add(&a.pull, repo)
	}
}

func (a *authorizer) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.token = ""
}

// challenge reads how the registry wants to be logged in to, and tries.
func (a *authorizer) challenge(ctx context.Context, headers []string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range headers {
		scheme, rest, _ := strings.Cut(h, " ")
		switch strings.ToLower(scheme) {
		case "basic":
			if !a.r.opts.Token.Empty() {
				a.basic = "Bearer " + string(a.r.opts.Token.Reveal())
				return nil
			}
			user, pass, _, err := a.credentials(ctx)
			if err != nil || user == "" {
				return firstErr(err, a.noCredentials())
			}
			a.basic = "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+pass))
			return a.tryBasic(ctx)
		case "bearer":
			p := params(rest)
			if a.realm, a.serv = p["realm"], p["service"]; a.realm == "" {
				return fault.Newf(fault.BadContent, "log in to registry", a.r.opts.Host, "it names no token service")
			}
			return nil
		}
	}
	return fault.Newf(fault.Denied, "log in to registry", a.r.opts.Host, "it asks for a login of an unknown kind: %q", headers)
}

func firstErr(errs ...error) error {
	for _, e := range errs {
		if e != nil {
			return e
		}
	}
	return nil
}

func (a *authorizer) noCredentials() error {
	return fault.Newf(fault.Denied, "log in to registry", a.r.opts.Host, "it asks for a user and a password").
		WithHint("pass --registry-user and --registry-password-file, or log in with your registry tool")
}

// tryBasic asks the root again, since a wrong password should fail now.
func (a *authorizer) tryBasic(ctx context.Context) error {
	resp, err := a.r.send(ctx, request{method: http.MethodGet, path: "/v2/", bare: true, header: http.Header{"Authorization": {a.basic}}})
	if err != nil {
		return a.r.unreachable(err)
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusOK {
		return fault.New(fault.Denied, "log in to registry", a.r.opts.Host, a.r.refused(resp)).WithHint("check --registry-user and --registry-password-file")
	}
	return nil
}

// params reads k="v" pairs of a challenge.
func params(s string) map[string]string {
	out := map[string]string{}
	for s != "" {
		k, rest, ok := strings.Cut(s, "=")
		if !ok {
			break
		}
		k = strings.ToLower(strings.Trim(k, " ,"))
		var v string
		if strings.HasPrefix(rest, `"`) {
			v, s, _ = strings.Cut(rest[1:], `"`)
		} else {
			v, s, _ = strings.Cut(rest, ",")
		}
		out[k] = v
		s = strings.TrimLeft(s, " ,")
	}
	return out
}

// credentials come from the flags, else from the Docker configuration and its
// helpers. identity is an OAuth2 refresh token.
func (a *authorizer) credentials(ctx context.Context) (user, pass, identity string, err error) {
	if a.r.opts.User != "" {
		return a.r.opts.User, string(a.r.opts.Password.Reveal()), "", nil
	}
	reg, err := name.NewRegistry(a.r.opts.Host, name.WeakValidation)
	if err != nil {
		return "", "", "", fault.New(fault.Usage, "read registry", a.r.opts.Host, err)
	}
	found, err := authn.Resolve(ctx, authn.DefaultKeychain, reg)
	if err != nil {
		return "", "", "", fault.New(fault.Denied, "read the Docker configuration for", a.r.opts.Host, err).WithHint("or pass --registry-user and --registry-password-file")
	}
	c, err := authn.Authorization(ctx, found)
	if err != nil {
		return "", "", "", fault.New(fault.Denied, "read the Docker configuration for", a.r.opts.Host, err).WithHint("or pass --registry-user and --registry-password-file")
	}
	if c.RegistryToken != "" {
		a.token, a.until = c.RegistryToken, time.Now().Add(time.Hour)
	}
	return c.Username, c.Password, c.IdentityToken, nil
}

// authorize puts the login on a request.
func (a *authorizer) authorize(ctx context.Context, req *http.Request, repo string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.basic != "" {
		req.Header.Set("Authorization", a.basic)
		return nil
	}
	if a.realm == "" {
		return nil
	}
	a.add(&a.push, repo)
	if a.token == "" || time.Now().After(a.until) {
		if err := a.fetch(ctx); err != nil {
			return err
		}
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	return nil
}

// fetch gets a token by the Docker token protocol; ICP's token service speaks
// it too, and takes a bearer token where others take a password.
func (a *authorizer) fetch(ctx context.Context) error {
	user, pass, identity, err := "", "", "", error(nil)
	if a.r.opts.Token.Empty() {
		if user, pass, identity, err = a.credentials(ctx); err != nil || a.token != "" {
			return err
		}
	}
	req, err := a.tokenRequest(ctx, user, pass, identity)
	if err != nil {
		return err
	}
	resp, err := a.r.client.Do(req)
	if err != nil {
		f := fault.New(fault.Unreachable, "reach the token service of registry", a.r.opts.Host, err)
		return f.WithHint("the registry names %s for it; is it reachable from here?", a.realm)
	}
	defer drain(resp)
	if resp.StatusCode != http.StatusOK {
		e := fault.Newf(fault.Denied, "log in to registry", a.r.opts.Host, "its token service answered %d %s", resp.StatusCode, strings.ToLower(http.StatusText(resp.StatusCode)))
		if resp.StatusCode >= 500 {
			e.Kind = fault.Unreachable
		}
		return e.WithHint("pass --registry-user and --registry-password-file or --registry-token-file, or log in with your registry tool")
	}
	var t struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int    `json:"expires_in"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&t); err != nil || t.Token+t.AccessToken == "" {
		return fault.Newf(fault.BadContent, "log in to registry", a.r.opts.Host, "its token service gave no token")
	}
	a.token = firstOf(t.Token, t.AccessToken)
	a.until = time.Now().Add(time.Duration(max(t.ExpiresIn, 60)) * time.Second * 4 / 5)
	return nil
}

func (a *authorizer) tokenRequest(ctx context.Context, user, pass, identity string) (*http.Request, error) {
	var scopes []string
	for _, repo := range a.push {
		scopes = append(scopes, "repository:"+repo+":pull,push")
	}
	for _, repo := range a.pull {
		scopes = append(scopes, "repository:"+repo+":pull")
	}
	if identity != "" {
		form := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {identity}, "service": {a.serv}, "scope": {strings.Join(scopes, " ")}, "client_id": {"kmsctl"}}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.realm, strings.NewReader(form.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		return req, err
	}
	u, err := url.Parse(a.realm)
	if err != nil {
		return nil, fmt.Errorf("the registry's token service is no URL: %w", err)
	}
	q := u.Query()
	q.Set("service", a.serv)
	for _, s := range scopes {
		q.Add("scope", s)
	}
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	switch {
	case !a.r.opts.Token.Empty():
		req.Header.Set("Authorization", "Bearer "+string(a.r.opts.Token.Reveal()))
	case user != "":
		req.SetBasicAuth(user, pass)
	}
	return req, nil
}
