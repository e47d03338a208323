package chart

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// HTTP is a chart repository behind HTTP: where, by which client (its TLS), and
// as whom. Authorize puts the login on a request; nil is nobody.
type HTTP struct {
	URL       string
	Client    *http.Client
	Authorize func(*http.Request)
}

const tries = 4

// do sends a request, again after what may pass, and gives the body of an
// answer of the wanted status. 404 is a nil body where it is wanted.
func (h *HTTP) do(ctx context.Context, method, u, contentType string, body []byte, want ...int) (status int, answer []byte, err error) {
	for try := 1; ; try++ {
		status, answer, err = h.once(ctx, method, u, contentType, body)
		passing := err != nil || status == http.StatusTooManyRequests || status >= 500
		if !passing || try == tries || ctx.Err() != nil {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(250 * time.Millisecond << try):
		}
	}
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return 0, nil, fault.New(fault.Unreachable, "reach chart repository", h.URL, err).WithHint("is it running, and are its address and CA file right?")
	}
	for _, w := range want {
		if status == w {
			return status, answer, nil
		}
	}
	return status, nil, h.refused(method, status, answer)
}

// Get reads a file of the repository, or one that its index names elsewhere,
// where nobody learns who asks.
func (h *HTTP) Get(ctx context.Context, u string) ([]byte, error) {
	at, err := url.Parse(u)
	if err != nil {
		return nil, fault.New(fault.BadContent, "read chart repository", h.URL, fmt.Errorf("its index names no URL: %w", err))
	}
	from := h
	if own, err := url.Parse(h.URL); err != nil || own.Host != at.Host || own.Scheme != at.Scheme {
		from = &HTTP{URL: u, Client: h.Client}
	}
	_, b, err := from.do(ctx, http.MethodGet, u, "", nil, 200)
	return b, err
}

func (h *HTTP) once(ctx context.Context, method, u, contentType string, body []byte) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, u, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if h.Authorize != nil {
		h.Authorize(req)
	}
	resp, err := h.Client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	return resp.StatusCode, b, err
}

func (h *HTTP) refused(method string, status int, answer []byte) error {
	text := fmt.Sprintf("%s: it answered %d %s", method, status, strings.ToLower(http.StatusText(status)))
	var e struct{ Error, Message string }
	if json.Unmarshal(answer, &e) == nil && e.Error+e.Message != "" {
		text += ": " + e.Error + e.Message
	}
	kind, hint := fault.Other, ""
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		kind, hint = fault.Denied, "give --repo-token-file, --repo-user with --repo-password-file, or a client certificate by --repo-cert-file and --repo-key-file"
	case status == http.StatusNotFound, status == http.StatusMethodNotAllowed:
		kind, hint = fault.NotFound, "check the path of --repo"
	case status == http.StatusConflict:
		kind, hint = fault.Conflict, "the repository has another chart of this name and version; remove it there, or allow it to be overwritten"
	case status == http.StatusTooManyRequests, status >= 500:
		kind, hint = fault.Unreachable, "the chart repository is not well; try again later"
	}
	op := "put chart into"
	if method == http.MethodGet {
		op = "read chart repository"
	}
	return fault.New(kind, op, h.URL, errors.New(text)).WithHint("%s", hint)
}

// has asks the repository's index for a package of that digest.
func (h *HTTP) has(ctx context.Context, c *Chart, pkg []byte) (bool, error) {
	status, b, err := h.do(ctx, http.MethodGet, strings.TrimSuffix(h.URL, "/")+"/index.yaml", "", nil, 200, 404)
	if err != nil || status == http.StatusNotFound {
		return false, err
	}
	index := map[string]any{}
	if err := yaml.Unmarshal(b, &index); err != nil {
		return false, fault.New(fault.BadContent, "read the index of", h.URL, err).WithHint("is it a chart repository?")
	}
	for _, v := range versions(index, c.Name) {
		if text(v["version"]) == c.Version && strings.TrimPrefix(text(v["digest"]), "sha256:") == sha(pkg) {
			return true, nil
		}
	}
	return false, nil
}

// check is what Check of the types below answers.
func (h *HTTP) check(ctx context.Context, c *Chart, pkg []byte) (Result, error) {
	has, err := h.has(ctx, c, pkg)
	if err != nil || !has {
		return Pushed, err
	}
	return Present, nil
}

// Museum is ChartMuseum, also one with tenants: the path of its URL is the
// tenant's.
type Museum struct{ HTTP }

// Location says where a chart is found.
func (m *Museum) Location(c *Chart) string {
	return strings.TrimSuffix(m.URL, "/") + "/charts/" + c.File()
}

// Check says what Put would do.
func (m *Museum) Check(ctx context.Context, c *Chart, pkg []byte) (Result, error) {
	return m.check(ctx, c, pkg)
}

// Put uploads a package.
func (m *Museum) Put(ctx context.Context, c *Chart, pkg []byte) (Result, error) {
	if was, err := m.check(ctx, c, pkg); err != nil || was == Present {
		return was, err
	}
	u, err := url.Parse(m.URL)
	if err != nil {
		return "", fault.New(fault.Usage, "read chart repository", m.URL, err)
	}
	u.Path = strings.TrimSuffix("/api"+strings.TrimSuffix(u.Path, "/"), "/") + "/charts"
	_, _, err = m.do(ctx, http.MethodPost, u.String(), "application/gzip", pkg, 201)
	return Pushed, err
}

// ICP is one of IBM Cloud Private's helm repositories, local-charts
// (/helm-repo/charts) or mgmt-charts (/mgmt-repo/charts). Upload is a PUT; its
// path and body are not documented, hence Tail and Multipart. After it the
// catalog is told to read its repositories again.
type ICP struct {
	HTTP
	Tail      string // behind the URL; {file} is the package's name
	Multipart bool   // the package as field chart of a form
	Sync      string // path at the same host, "" for none
}

// Location says where a chart is found.
func (i *ICP) Location(c *Chart) string { return strings.TrimSuffix(i.URL, "/") + "/" + c.File() }

// Check says what Put would do.
func (i *ICP) Check(ctx context.Context, c *Chart, pkg []byte) (Result, error) {
	return i.check(ctx, c, pkg)
}

// Put uploads a package and has the catalog synchronised.
func (i *ICP) Put(ctx context.Context, c *Chart, pkg []byte) (Result, error) {
	if was, err := i.check(ctx, c, pkg); err != nil || was == Present {
		return was, err
	}
	body, kind := pkg, "application/gzip"
	if i.Multipart {
		var err error
		if body, kind, err = form(c.File(), pkg); err != nil {
			return "", err
		}
	}
	u := strings.TrimSuffix(i.URL, "/")
	if tail := strings.ReplaceAll(i.Tail, "{file}", c.File()); tail != "" {
		u += "/" + strings.TrimPrefix(tail, "/")
	}
	if _, _, err := i.do(ctx, http.MethodPut, u, kind, body, 200, 201, 202, 204); err != nil {
		return "", err
	}
	if i.Sync == "" {
		return Pushed, nil
	}
	s, err := url.Parse(i.URL)
	if err != nil {
		return "", fault.New(fault.Usage, "read chart repository", i.URL, err)
	}
	s.Path = i.Sync
	if _, _, err := i.do(ctx, http.MethodGet, s.String(), "", nil, 200, 202); err != nil {
		return "", fault.New(fault.KindOf(err), "synchronise the catalog at", s.String(), err).WithHint("the chart is uploaded; synchronise the repositories in the console, or pass --repo-sync-path ''")
	}
	return Pushed, nil
}

func form(file string, pkg []byte) ([]byte, string, error) {
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	f, err := w.CreateFormFile("chart", file)
	if err != nil {
		return nil, "", err
	}
	if _, err := f.Write(pkg); err != nil {
		return nil, "", err
	}
	err = w.Close()
	return b.Bytes(), w.FormDataContentType(), err
}
