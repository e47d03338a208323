package backup

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
)

// Target is a store that a copy goes into. Nobody else may use it between
// Begin and Finish, killed runs included.
type Target interface {
	Present(ctx context.Context, each func(record.Raw) error) (install, mark json.RawMessage, err error)
	Begin(ctx context.Context, mark any) error
	Put(ctx context.Context, records []record.Raw) error
	Finish(ctx context.Context, install json.RawMessage) error
}

// Removed is something that the copy has and that was taken away after it
// was made: to restore it would revive it.
type Removed struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// Plan is what a restore would do.
type Plan struct {
	Header  Header
	Summary Summary
	Removed []Removed
	// Kept are records that the store has in a newer form; they stay.
	Kept []string
	// Begun says that a run which was killed is gone on with; Revive is what
	// was decided then.
	Begun, Revive bool

	digest string
	merge  bool            // into a store that is in use
	write  map[string]bool // false: only to revive
}

// mark is what lies in the store while a restore is under way.
type mark struct {
	Backup string `json:"backup"`
	Revive bool   `json:"revive"`
}

// Same says whether a token with this serial number can be the one that a
// copy needs, before anything is asked of it.
func (h Header) Same(serial string) error {
	_, want, err := installOf(h.Install)
	if err != nil {
		return broken("%v", err)
	}
	if serial != want {
		return fault.Newf(fault.BadContent, "restore", "", "the backup belongs to the token with serial number %q, this one has %q", want, serial).
			WithHint("restore needs the HSM, or the restored SoftHSM folder, whose master keys the backup was made under; nothing was written")
	}
	return nil
}

// Prepare reads the whole copy, checks it, and compares it with the store. It
// writes nothing. later tells of ids that were removed after the copy was
// made, and how that is known (from an audit log).
func Prepare(ctx context.Context, r *Reader, dec Decoder, t Target, later map[string]string) (*Plan, error) {
	have := map[string][]byte{}
	install, begun, err := t.Present(ctx, func(e record.Raw) error {
		have[e.Path] = e.Value
		return nil
	})
	if err != nil {
		return nil, err
	}
	p := &Plan{Header: r.Header, merge: install != nil, write: map[string]bool{}}
	if err := p.sameStore(install, begun, len(have)); err != nil {
		return nil, err
	}
	named := map[string][]byte{}
	p.Summary, err = r.Each(dec, func(e record.Raw) error {
		now, there := have[e.Path]
		switch {
		case there && bytes.Equal(now, e.Value):
		case there && destroyed(e.Path, now) && !destroyed(e.Path, e.Value):
			p.remove(e.Path, "it was destroyed in the store")
		case there:
			p.Kept = append(p.Kept, e.Path)
		case p.merge:
			p.remove(e.Path, "it was removed from the store")
		default:
			p.write[e.Path] = true
			named[e.Path] = nil
			if strings.HasPrefix(e.Path, namesDir) {
				named[e.Path] = record.Body(e.Value)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	p.digest = hex.EncodeToString(r.sum.Sum(nil))
	p.leaveOut(named, later)
	if begun != nil {
		return p, p.goOn(begun)
	}
	return p, nil
}

// namesDir maps the names of service IDs to their ids: an audit line may have
// either.
const namesDir = "iam/names/"

// sameStore refuses a store that is neither empty nor of the same
// installation.
func (p *Plan) sameStore(install, begun json.RawMessage, records int) error {
	want, _, err := installOf(p.Header.Install)
	if err != nil {
		return broken("%v", err)
	}
	if install == nil {
		if records > 0 && begun == nil {
			return fault.Newf(fault.Conflict, "restore into", "the store", "it holds %d records of no installation", records).WithHint("begin with an empty data folder")
		}
		return nil
	}
	if id, _, err := installOf(install); err != nil || id != want {
		return fault.Newf(fault.Conflict, "restore into", "the store", "it belongs to another installation than the backup").WithHint("begin with an empty data folder")
	}
	return sameMasters(p.Header.Install, install)
}

// sameMasters refuses a backup whose records a version of the master keys made
// that the store does not name any more.
func sameMasters(backup, store json.RawMessage) error {
	var b, s masters
	if err := errors.Join(json.Unmarshal(backup, &b), json.Unmarshal(store, &s)); err != nil {
		return broken("%v", err)
	}
	for _, v := range b.all() {
		if !slices.Contains(s.all(), v) {
			return fault.Newf(fault.Conflict, "restore into", "the store", "the backup was made under version %d of the master keys, which the store does not name", v).
				WithHint("the master keys were rotated since; take a backup from after that, or restore into an empty data folder if the token still holds that version")
		}
	}
	return nil
}

// masters are the versions of the master keys that an installation names.
type masters struct {
	Version uint16
	Others  []struct{ Version uint16 }
}

func (m masters) all() []uint16 {
	out := []uint16{max(m.Version, hsm.FirstMaster)}
	for _, o := range m.Others {
		out = append(out, o.Version)
	}
	return out
}

func (p *Plan) goOn(begun json.RawMessage) error {
	var m mark
	if err := json.Unmarshal(begun, &m); err != nil || m.Backup != p.digest {
		return fault.Newf(fault.Conflict, "restore into", "the store", "a restore of another backup was not finished").
			WithHint("finish it with its own file, or begin with an empty data folder")
	}
	p.Begun, p.Revive = true, m.Revive
	return nil
}

func (p *Plan) remove(path, why string) {
	p.write[path] = false
	p.Removed = append(p.Removed, Removed{path, why})
}

// leaveOut takes from what would be written everything that has a removed id
// in its path.
func (p *Plan) leaveOut(named map[string][]byte, later map[string]string) {
	if len(later) == 0 {
		return
	}
	ids := map[string]string{}
	for id, why := range later {
		ids[id] = why
		var of string
		if json.Unmarshal(named[namesDir+id], &of) == nil && of != "" {
			ids[of] = why
		}
	}
	for _, path := range slices.Sorted(maps.Keys(named)) {
		parts := strings.Split(path, "/")
		var of string
		if json.Unmarshal(named[path], &of) == nil { // a name without its service ID would be taken for ever
			parts = append(parts, of)
		}
		for _, part := range parts {
			if why, gone := ids[part]; gone {
				p.remove(path, why)
				break
			}
		}
	}
}

func destroyed(path string, value []byte) bool {
	k, ok := view(record.Raw{Path: path, Value: value})
	return ok && k.State == stateDestroyed
}

// Bounds of one transaction.
const (
	batchRecords = 100
	batchBytes   = 1 << 20
)

// Run writes what was planned, from a second reading of the same copy, and
// gives the number of records written. Killed at any moment, the store stays
// closed until Run has been called again and has ended well.
func (p *Plan) Run(ctx context.Context, r *Reader, dec Decoder, t Target, revive bool) (int, error) {
	if p.Begun {
		revive = p.Revive
	}
	if err := t.Begin(ctx, mark{p.digest, revive}); err != nil {
		return 0, err
	}
	b := batch{t: t}
	_, err := r.Each(dec, func(e record.Raw) error {
		if always, planned := p.write[e.Path]; !planned || (!always && !revive) {
			return nil
		}
		return b.add(ctx, e)
	})
	if err != nil {
		return b.done, err
	}
	if hex.EncodeToString(r.sum.Sum(nil)) != p.digest {
		return b.done, broken("it changed while it was read")
	}
	if err := b.flush(ctx); err != nil {
		return b.done, err
	}
	install := p.Header.Install
	if p.merge {
		install = nil // the store's own is newer
	}
	return b.done, t.Finish(ctx, install)
}

type batch struct {
	t       Target
	records []record.Raw
	bytes   int
	done    int
}

func (b *batch) add(ctx context.Context, e record.Raw) error {
	b.records = append(b.records, e)
	b.bytes += len(e.Value)
	if len(b.records) < batchRecords && b.bytes < batchBytes {
		return nil
	}
	return b.flush(ctx)
}

func (b *batch) flush(ctx context.Context) error {
	if len(b.records) == 0 {
		return nil
	}
	err := b.t.Put(ctx, b.records)
	if err == nil {
		b.done += len(b.records)
	}
	b.records, b.bytes = nil, 0
	return err
}
