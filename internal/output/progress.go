package output

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/vbauerster/cupwriter"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// Progress prints one line per finished object on stderr, or nothing when
// quiet. On a terminal, what is on its way has a bar below the lines. Safe for
// concurrent use; a nil one does nothing.
type Progress struct {
	mu    sync.Mutex
	w     io.Writer
	quiet bool
	bars  *mpb.Progress // nil: no terminal, or nothing is on its way yet
	below *cupwriter.Writer
	moves bool // w is a terminal that can move its cursor
}

// NewProgress prints to w unless quiet.
func NewProgress(w io.Writer, quiet bool) *Progress {
	f, ok := w.(*os.File)
	moves := ok && !quiet && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb"
	return &Progress{w: w, quiet: quiet, moves: moves}
}

// Line prints one line: what was done, then the details, each apart.
func (p *Progress) Line(did string, details ...string) {
	if p == nil || p.quiet {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.w
	if p.bars != nil {
		w = p.bars // which prints it above the bars
	}
	fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("%-10s %s", did, strings.Join(details, "  ")), " "))
}

// Begin shows a bar for something of size bytes; nil, which does nothing, where
// there is no terminal.
func (p *Progress) Begin(name string, size int64) *Bar {
	if p == nil || !p.moves {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bars == nil {
		p.below = cupwriter.New(p.w, false)
		p.bars = mpb.New(mpb.WithConsoleWriter(p.below), mpb.WithWidth(30))
	}
	const nameWidth = 44
	bar := p.bars.AddBar(0, // a bar that is made with a size ends by itself, before its End
		mpb.PrependDecorators(decor.Name(shortened(name, nameWidth), decor.WC{W: nameWidth + 1, C: decor.DindentRight})),
		mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f"), decor.Percentage(decor.WCSyncSpace)))
	bar.SetTotal(size, false)
	return &Bar{bar}
}

// shortened keeps a name's end, which tells images apart.
func shortened(s string, most int) string {
	r := []rune(s)
	if len(r) <= most {
		return s
	}
	return "…" + string(r[len(r)-most+1:])
}

// Close takes the bars away. The lines stay.
func (p *Progress) Close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	bars, below := p.bars, p.below
	p.bars = nil
	p.mu.Unlock()
	if bars != nil {
		bars.Shutdown()
		// Lines that came after the last drawing of the bars would be lost.
		_ = below.Flush(0) // as each line: nobody is told when the terminal is gone
	}
}

// Bar is something on its way. A nil one does nothing.
type Bar struct{ bar *mpb.Bar }

// Add says that n more bytes are done with.
func (b *Bar) Add(n int64) {
	if b != nil {
		b.bar.IncrInt64(n)
	}
}

// End takes the bar away, whether or not it is full.
func (b *Bar) End() {
	if b != nil {
		b.bar.Abort(true)
	}
}

// Reader moves the bar by what is read of r.
func (b *Bar) Reader(r io.Reader) io.Reader {
	if b == nil {
		return r
	}
	return counting{r, b}
}

type counting struct {
	io.Reader
	b *Bar
}

func (c counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.b.Add(int64(n))
	return n, err
}
