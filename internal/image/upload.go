package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// PutBlob sends a blob whose digest is known, in chunks. open gives its bytes
// from a place on; sent is told what the registry has confirmed. A break is
// taken up where the registry says that it stands, in this run and, by
// Sessions, in the next. A registry that has lost the upload gets it anew.
//
// Docker's own registry (2.x) loses an upload that breaks inside a chunk: its
// upload state names the length that it must find. There, resuming works
// between chunks only.
func (r *Registry) PutBlob(ctx context.Context, repo, digest string, size int64, open func(from int64) (io.Reader, error), sent func(n int64)) error {
	u := &upload{r: r, repo: repo, key: r.opts.Host + "/" + repo + "@" + digest, size: size, open: open, sent: sent}
	if err := u.resume(ctx); err != nil {
		return err
	}
	resumed := u.at > 0
	for try := 1; ; try++ {
		err := u.run(ctx, digest)
		if err == nil {
			u.forget()
			return nil
		}
		var s *statusError
		wrong := errors.As(err, &s) && slices.Contains(s.codes, "DIGEST_INVALID")
		if wrong && resumed { // what an earlier run left there was something else
			resumed, u.location, u.at = false, "", 0
			u.forget()
			continue
		}
		if wrong {
			u.forget()
			return fault.Newf(fault.BadContent, "send blob", digest, "registry %q received other bytes than the digest says", r.opts.Host).
				WithHint("the archive was damaged or changed; run `kmsctl archive verify`")
		}
		if !u.again(err) || try >= r.opts.Tries {
			return err
		}
		slog.Debug("registry: upload broke", "repo", repo, "digest", digest, "at", u.at, "try", try, "cause", err)
		if werr := r.wait(ctx, backOff(try, err)); werr != nil {
			return r.unreachable(werr)
		}
		before := u.at
		if err := u.ask(ctx); err != nil {
			return err
		}
		if u.at > before {
			try = 0 // it moves
		}
		if u.location == "" {
			// Lost, or committed while the answer was on its way.
			if has, err := r.HasBlob(ctx, repo, digest); err != nil || has {
				return err
			}
		}
	}
}

// upload is one blob on its way.
type upload struct {
	r         *Registry
	repo, key string
	location  string
	at, size  int64
	open      func(from int64) (io.Reader, error)
	sent      func(n int64)
	told      int64
}

func (u *upload) forget() {
	if u.r.opts.Sessions != nil {
		u.r.opts.Sessions.Drop(u.key)
	}
}

// resume takes up what an earlier run left.
func (u *upload) resume(ctx context.Context) error {
	if u.r.opts.Sessions == nil {
		return nil
	}
	location, ok := u.r.opts.Sessions.Load(u.key)
	if !ok {
		return nil
	}
	u.location = location
	return u.ask(ctx)
}

// ask asks the registry how far an upload is. One that is lost starts anew.
func (u *upload) ask(ctx context.Context) error {
	if u.location == "" {
		u.at = 0
		return nil
	}
	resp, err := u.r.do(ctx, request{method: http.MethodGet, url: u.location, repo: u.repo, want: []int{204, 202, 200, 400, 404, 405, 416}})
	if err != nil {
		return err
	}
	drain(resp)
	if resp.StatusCode >= 300 {
		u.location, u.at = "", 0
		u.forget()
		return nil
	}
	u.take(resp, 0)
	return nil
}

// take reads where the registry stands from its answer; without a Range it
// has what was sent.
func (u *upload) take(resp *http.Response, assumed int64) {
	if l := resp.Header.Get("Location"); l != "" {
		u.location = l
	}
	u.at = assumed
	if _, last, ok := strings.Cut(strings.TrimPrefix(resp.Header.Get("Range"), "bytes="), "-"); ok {
		if n, err := strconv.ParseInt(last, 10, 64); err == nil && n >= 0 && n < u.size {
			u.at = n + 1
			if n == 0 && assumed == 0 {
				u.at = 0 // 0-0 means nothing, not one byte, to most registries
			}
		}
	}
	if u.at > u.told && u.sent != nil {
		u.sent(u.at - u.told)
		u.told = u.at
	}
}

// again says whether an upload that failed so may be taken up or begun anew.
func (u *upload) again(err error) bool {
	switch statusOf(err) {
	case 0:
		return fault.KindOf(err) == fault.Unreachable
	case http.StatusNotFound, http.StatusRequestedRangeNotSatisfiable, http.StatusBadRequest, http.StatusConflict:
		return u.location != "" // the session is lost, or stands elsewhere than thought
	case http.StatusTooManyRequests, http.StatusRequestTimeout, 500, 502, 503, 504:
		return true
	}
	return false
}

// run sends what is missing and commits.
func (u *upload) run(ctx context.Context, digest string) error {
	if u.location == "" {
		resp, err := u.r.do(ctx, request{method: http.MethodPost, path: "/v2/" + u.repo + "/blobs/uploads/", repo: u.repo, once: true, want: []int{202}})
		if err != nil {
			return err
		}
		drain(resp)
		u.location, u.at = resp.Header.Get("Location"), 0
	}
	for u.size-u.at > u.r.opts.Chunk {
		if err := u.chunk(ctx, u.r.opts.Chunk); err != nil {
			return err
		}
		if u.r.opts.Sessions != nil {
			u.r.opts.Sessions.Save(u.key, u.location)
		}
	}
	return u.commit(ctx, digest)
}

func (u *upload) body(n int64) func() (io.Reader, error) {
	return func() (io.Reader, error) {
		in, err := u.open(u.at)
		if err != nil {
			return nil, err
		}
		return &counted{r: in, left: n}, nil
	}
}

// counted reads n bytes and then looks whether the source ends well, so that
// damage at its end is seen before the registry is told that all is there.
type counted struct {
	r    io.Reader
	left int64
	last bool
}

func (c *counted) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.left)])
	if c.left -= int64(n); c.left == 0 && c.last && err == nil {
		var one [1]byte
		if k, e := c.r.Read(one[:]); k > 0 || (e != nil && !errors.Is(e, io.EOF)) {
			if e == nil || errors.Is(e, io.EOF) {
				e = errors.New("it is longer than said")
			}
			return 0, e
		}
	}
	if err == io.EOF && c.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Close is there so that net/http hands on the body as it is, not wrapped.
func (c *counted) Close() error { return nil }

// Section gives what stands together in a file, if r can.
func (c *counted) Section(limit int64) (f *os.File, at, n int64) {
	s, ok := c.r.(sectioned)
	if !ok {
		return nil, 0, 0
	}
	f, at, n = s.Section(min(limit, c.left))
	c.left -= n
	return f, at, n
}

func (u *upload) chunk(ctx context.Context, n int64) error {
	resp, err := u.r.do(ctx, request{method: http.MethodPatch, url: u.location, repo: u.repo, body: u.body(n), size: n, once: true,
		header: http.Header{"Content-Range": {fmt.Sprintf("%d-%d", u.at, u.at+n-1)}}, want: []int{202}})
	if err != nil {
		return err
	}
	drain(resp)
	u.take(resp, u.at+n)
	return nil
}

// commit sends the last chunk and closes the upload.
func (u *upload) commit(ctx context.Context, digest string) error {
	n := u.size - u.at
	q := request{method: http.MethodPut, url: u.location, repo: u.repo, query: url.Values{"digest": {digest}}, size: n, once: true, want: []int{201, 204}}
	if n > 0 {
		q.body = func() (io.Reader, error) {
			in, err := u.open(u.at)
			if err != nil {
				return nil, err
			}
			return &counted{r: in, left: n, last: true}, nil
		}
		q.header = http.Header{"Content-Range": {fmt.Sprintf("%d-%d", u.at, u.size-1)}}
	}
	resp, err := u.r.do(ctx, q)
	if err != nil {
		return err
	}
	drain(resp)
	if u.sent != nil {
		u.sent(u.size - u.told)
	}
	return nil
}

// PutBytes sends a small blob from memory.
func (r *Registry) PutBytes(ctx context.Context, repo, digest string, b []byte) error {
	return r.PutBlob(ctx, repo, digest, int64(len(b)), func(from int64) (io.Reader, error) { return bytes.NewReader(b[from:]), nil }, nil)
}

// Writer is an upload whose digest is known at its end only. Each Write is one
// chunk, held by the caller until Write returns, so that it can be sent again.
type Writer struct {
	u   upload
	ctx context.Context //nolint:containedctx // one upload, one context: Write has io.Writer's shape
}

// NewWriter starts an upload.
func (r *Registry) NewWriter(ctx context.Context, repo string) *Writer {
	return &Writer{u: upload{r: r, repo: repo}, ctx: ctx}
}

// ErrLost says that the registry has lost an upload, whose bytes are gone: the
// layer has to be read once more.
var ErrLost = errors.New("the registry lost the upload")

// Write sends one chunk.
func (w *Writer) Write(p []byte) (int, error) {
	u := &w.u
	start := u.at
	u.size = start + int64(len(p)) + 1
	u.open = func(from int64) (io.Reader, error) { return bytes.NewReader(p[from-start:]), nil }
	for try := 1; u.at < start+int64(len(p)); try++ {
		err := w.write(start + int64(len(p)))
		if err == nil {
			continue
		}
		if !u.again(err) || try >= u.r.opts.Tries {
			return 0, err
		}
		if err := u.r.wait(w.ctx, backOff(try, err)); err != nil {
			return 0, u.r.unreachable(err)
		}
		if err := u.ask(w.ctx); err != nil {
			return 0, err
		}
		if u.at < start || u.at > start+int64(len(p)) {
			return 0, ErrLost
		}
	}
	return len(p), nil
}

func (w *Writer) write(end int64) error {
	u := &w.u
	if u.location == "" {
		resp, err := u.r.do(w.ctx, request{method: http.MethodPost, path: "/v2/" + u.repo + "/blobs/uploads/", repo: u.repo, once: true, want: []int{202}})
		if err != nil {
			return err
		}
		drain(resp)
		u.location = resp.Header.Get("Location")
	}
	return u.chunk(w.ctx, end-u.at)
}

// Commit closes the upload under its digest.
func (w *Writer) Commit(digest string) error {
	w.u.size = w.u.at
	return w.u.commit(w.ctx, digest)
}

// Cancel gives the upload up.
func (w *Writer) Cancel() { w.u.r.cancel(context.WithoutCancel(w.ctx), w.u.repo, w.u.location) }
