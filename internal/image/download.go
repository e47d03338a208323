package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// OpenBlob opens a blob of any size. When the connection breaks, reading goes
// on from the byte where it broke. The end is given only when all that was read
// has the digest.
func (r *Registry) OpenBlob(ctx context.Context, repo, digest string) (io.ReadCloser, error) {
	d := &download{r: r, ctx: ctx, repo: repo, digest: digest, sum: sha256.New()}
	return d, d.open()
}

// download is one blob on its way here.
type download struct {
	r            *Registry
	ctx          context.Context //nolint:containedctx // one download, one context: Read has io.Reader's shape
	repo, digest string
	body         io.ReadCloser // nil when the connection broke
	stop         context.CancelFunc
	at, size     int64 // size is 0 while nobody has said it
	noRange      bool  // the registry does not understand how a part is asked for
	breaks       int   // since a byte last came
	sum          hash.Hash
}

// open asks for what is missing.
func (d *download) open() error {
	ctx, stop := context.WithCancel(d.ctx)
	if d.size > 0 && d.at == d.size { // it broke behind the last byte
		d.body, d.stop = http.NoBody, stop
		return nil
	}
	q := request{method: http.MethodGet, path: "/v2/" + d.repo + "/blobs/" + d.digest, repo: d.repo, want: []int{200}}
	if d.at > 0 && !d.noRange {
		part := fmt.Sprintf("bytes=%d-", d.at)
		if d.size > 0 {
			part += fmt.Sprint(d.size - 1) // some know closed ranges alone
		}
		q.header, q.want = http.Header{"Range": {part}}, []int{200, 206, 416}
	}
	resp, err := d.r.do(ctx, q)
	if err != nil {
		stop()
		return err
	}
	if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		drain(resp)
		stop()
		d.noRange = true
		return d.open()
	}
	d.body, d.stop = resp.Body, stop
	if d.at == 0 {
		d.size = max(resp.ContentLength, 0)
	}
	if resp.StatusCode == http.StatusPartialContent {
		if from := resp.Header.Get("Content-Range"); !strings.HasPrefix(from, fmt.Sprintf("bytes %d-", d.at)) {
			return fault.Newf(fault.BadContent, "read blob", d.digest, "registry %q was asked for it from byte %d on, and gives %q", d.r.opts.Host, d.at, from)
		}
		return nil
	}
	// The registry knows no ranges: what is here already goes by once more.
	if _, err := io.CopyN(io.Discard, d.watched(), d.at); err != nil {
		d.drop()
		d.breaks++
		slog.Debug("registry: download broke again before it got so far", "digest", d.digest, "at", d.at, "cause", err)
	}
	return nil
}

// watched reads the body, and ends it when nothing comes.
func (d *download) watched() io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		dead := time.AfterFunc(d.r.stall, d.stop)
		n, err := d.body.Read(p)
		if !dead.Stop() && err != nil && d.ctx.Err() == nil {
			err = fmt.Errorf("no byte came for %s", d.r.stall)
		}
		return n, err
	})
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Read reads on, over as many breaks as have to be.
func (d *download) Read(p []byte) (int, error) {
	for {
		if d.body == nil {
			if err := d.r.wait(d.ctx, backOff(d.breaks, nil)); err != nil {
				return 0, d.r.unreachable(err)
			}
			if err := d.open(); err != nil {
				return 0, err
			}
			if d.body == nil && d.breaks >= d.r.opts.Tries {
				return 0, d.r.unreachable(io.ErrUnexpectedEOF)
			}
			continue
		}
		n, err := d.watched().Read(p)
		d.sum.Write(p[:n]) // a hash never fails
		if d.at += int64(n); n > 0 {
			d.breaks = 0
		}
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, io.EOF):
			return n, d.end()
		}
		d.drop()
		if d.breaks++; d.ctx.Err() != nil || d.breaks >= d.r.opts.Tries {
			return n, d.r.unreachable(err)
		}
		slog.Debug("registry: download broke", "repo", d.repo, "digest", d.digest, "at", d.at, "cause", err)
		if n > 0 {
			return n, nil
		}
	}
}

// end is what Read gives at the end.
func (d *download) end() error {
	if got := "sha256:" + hex.EncodeToString(d.sum.Sum(nil)); got != d.digest {
		return fault.Newf(fault.BadContent, "read blob", d.digest, "registry %q gives other bytes for it", d.r.opts.Host)
	}
	return io.EOF
}

func (d *download) drop() {
	d.stop()
	_ = d.body.Close() // it broke
	d.body = nil
}

// Close ends the download.
func (d *download) Close() error {
	if d.body == nil {
		return nil
	}
	d.stop()
	return d.body.Close()
}
