package image

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// breaking is a registry with one blob, whose answers to GET the handler
// spoils; it gives what was asked for, by the requests' Range.
func breaking(t *testing.T, blob []byte, digest string, spoil func(w http.ResponseWriter, r *http.Request, n int)) (*Registry, func() []string) {
	t.Helper()
	inner := registry.New()
	var mu sync.Mutex
	var asked []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, digest) {
			inner.ServeHTTP(w, r)
			return
		}
		mu.Lock()
		asked = append(asked, r.Header.Get("Range"))
		n := len(asked)
		mu.Unlock()
		spoil(w, r, n)
	}))
	t.Cleanup(srv.Close)
	r := dial(t, Options{Host: srv.Listener.Addr().String()})
	if err := r.PutBlob(t.Context(), "a/b", digest, int64(len(blob)), from(blob), nil); err != nil {
		t.Fatal(err)
	}
	return r, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(asked)
	}
}

// serve gives what is asked for, as registries do, and breaks after n bytes.
func serve(w http.ResponseWriter, r *http.Request, blob []byte, n int) {
	at, head := 0, http.StatusOK
	if h := r.Header.Get("Range"); h != "" {
		if _, err := fmt.Sscanf(h, "bytes=%d-", &at); err != nil {
			panic(err)
		}
		if at >= len(blob) {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", at, len(blob)-1, len(blob)))
		head = http.StatusPartialContent
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(blob)-at))
	w.WriteHeader(head)
	_, _ = w.Write(blob[at:min(at+n, len(blob))])
	if at+n < len(blob) {
		panic(http.ErrAbortHandler)
	}
}

func read(t *testing.T, r *Registry, digest string) ([]byte, error) {
	t.Helper()
	in, err := r.OpenBlob(t.Context(), "a/b", digest)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	return io.ReadAll(in)
}

// TestDownloadGoesOn: a connection that breaks again and again costs no byte
// twice, and what comes out is the blob.
func TestDownloadGoesOn(t *testing.T) {
	blob, d := content(1 << 20)
	r, asked := breaking(t, blob, d, func(w http.ResponseWriter, req *http.Request, _ int) { serve(w, req, blob, 100_000) })
	got, err := read(t, r, d)
	if err != nil || !bytes.Equal(got, blob) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	at := 0
	for n, rg := range asked() {
		want := ""
		if n > 0 {
			want = fmt.Sprintf("bytes=%d-%d", at, len(blob)-1)
		}
		if rg != want {
			t.Errorf("request %d: Range %q, want %q", n, rg, want)
		}
		at += 100_000
	}
	if len(asked()) != len(blob)/100_000+1 {
		t.Errorf("%d requests", len(asked()))
	}
}

// TestDownloadFromTheStart: a registry that knows no ranges gives all again,
// and so does one that does not understand which part is asked for.
func TestDownloadFromTheStart(t *testing.T) {
	blob, d := content(300_000)
	r, asked := breaking(t, blob, d, func(w http.ResponseWriter, _ *http.Request, n int) {
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		_, _ = w.Write(blob[:min(n*100_000, len(blob))])
		if n*100_000 < len(blob) {
			panic(http.ErrAbortHandler)
		}
	})
	if got, err := read(t, r, d); err != nil || !bytes.Equal(got, blob) || len(asked()) < 3 {
		t.Errorf("%d bytes in %d requests, %v", len(got), len(asked()), err)
	}
	r, asked = breaking(t, blob, d, func(w http.ResponseWriter, req *http.Request, n int) {
		if n == 1 { // chunked: what ends without its last chunk broke
			_, _ = w.Write(blob)
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		serve(w, req, blob, len(blob))
	})
	if got, err := read(t, r, d); err != nil || !bytes.Equal(got, blob) || len(asked()) != 3 {
		t.Errorf("%d bytes in %d requests, %v", len(got), len(asked()), err)
	}
}

// TestDownloadStalls: a connection on which nothing comes is one that broke.
func TestDownloadStalls(t *testing.T) {
	blob, d := content(300_000)
	r, _ := breaking(t, blob, d, func(w http.ResponseWriter, req *http.Request, n int) {
		if n > 1 {
			serve(w, req, blob, len(blob))
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		_, _ = w.Write(blob[:1000])
		w.(http.Flusher).Flush()
		<-req.Context().Done()
	})
	r.stall = 500 * time.Millisecond // of the first connection, which never goes on
	if got, err := read(t, r, d); err != nil || !bytes.Equal(got, blob) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestDownloadGivesUp: other bytes, other places and breaks without end are
// errors, and the end is never given for a blob that is not whole.
func TestDownloadGivesUp(t *testing.T) {
	blob, d := content(300_000)
	other := bytes.Clone(blob)
	other[200_000] ^= 1
	for name, c := range map[string]struct {
		spoil func(w http.ResponseWriter, r *http.Request, n int)
		kind  fault.Kind
		most  int // requests
	}{
		"other bytes behind a break": {func(w http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				serve(w, r, blob, 100_000)
			}
			serve(w, r, other, len(blob))
		}, fault.BadContent, 2},
		"shorter": {func(w http.ResponseWriter, r *http.Request, _ int) { serve(w, r, blob[:1000], len(blob)) }, fault.BadContent, 1},
		"another place": {func(w http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				serve(w, r, blob, 100_000)
			}
			w.Header().Set("Content-Range", "bytes 0-299999/300000")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(blob)
		}, fault.BadContent, 2},
		"no byte any more": {func(w http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				serve(w, r, blob, 100_000)
			}
			panic(http.ErrAbortHandler)
		}, fault.Unreachable, 1 + defaultTries},
		"gone": {func(w http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				serve(w, r, blob, 100_000)
			}
			w.WriteHeader(http.StatusNotFound)
		}, fault.NotFound, 2},
	} {
		t.Run(name, func(t *testing.T) {
			r, asked := breaking(t, blob, d, c.spoil)
			got, err := read(t, r, d)
			if fault.KindOf(err) != c.kind || len(asked()) > c.most {
				t.Errorf("%d bytes in %d requests, %v", len(got), len(asked()), err)
			}
		})
	}
}
