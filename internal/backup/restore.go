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
	"time"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/record"
)

// Target is a store that a copy goes into. From Begin or Mark to Finish or
// Undo nobody else writes into it, killed runs included.
type Target interface {
	Present(ctx context.Context, each func(record.Raw) error) (install json.RawMessage, mark *record.RestoreMark, err error)
	Begin(ctx context.Context, m record.RestoreMark) error
	Mark(ctx context.Context, m record.RestoreMark) error // changes the mark that Present saw
	Put(ctx context.Context, swaps []record.Swap) error
	Finish(ctx context.Context, install json.RawMessage, note record.Raw) error
}

// Choice is what becomes of that which was removed after the copy was made.
type Choice int

// The choices; without one, a restore that would revive something stops.
const (
	Ask Choice = iota
	Revive
	LeaveOut
)

// Removed is something that the copy has and that was taken away after it
// was made: to restore it would revive it.
type Removed struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// Plan is a restore: what it does, and how far it is.
type Plan struct {
	Header  Header
	Summary Summary
	Removed []Removed
	// Kept are records that the store has in a newer form; they stay.
	Kept []string
	// Replaced is another installation, which nobody had used yet and which
	// goes; empty when there is none.
	Replaced string
	// Begun says that a run which was killed is gone on with; Revive is what
	// was decided.
	Begun, Revive bool

	t       Target
	choice  Choice
	install json.RawMessage // of the store before; nil: there was none
	merge   bool            // into a store of the same installation
	digest  string
	aside   []record.Swap // records of the installation that is replaced
	write   map[string]planned
}

// planned is a record of the copy that goes into the store.
type planned struct {
	revive bool   // only to revive
	before []byte // what it replaces
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

// Begin closes the store of t for everybody else, or takes over where a run
// for the same copy was killed. What cannot be restored into is refused before
// that. r has read the copy's header.
func Begin(ctx context.Context, r *Reader, t Target, choice Choice) (*Plan, error) {
	records := 0
	install, begun, err := t.Present(ctx, func(record.Raw) error {
		records++
		return nil
	})
	if err != nil {
		return nil, err
	}
	p := &Plan{Header: r.Header, t: t, choice: choice, install: install, Revive: choice == Revive}
	if begun != nil {
		p.install = begun.Install
	}
	if err := p.sameStore(records, begun != nil); err != nil {
		return nil, err
	}
	if begun != nil {
		return p, p.goOn(ctx, r.id, *begun)
	}
	err = t.Begin(ctx, record.RestoreMark{Backup: r.id, Revive: p.Revive, Install: install})
	if errors.Is(err, record.ErrConflict) {
		return nil, fault.New(fault.Conflict, "restore into", "the store", errors.New("somebody else changed it at this moment")).WithHint("try again")
	}
	return p, err
}

// goOn takes over a mark.
func (p *Plan) goOn(ctx context.Context, id string, m record.RestoreMark) error {
	const undo = "take it back with `kmsctl restore --undo`"
	refuse := func(hint, format string, a ...any) error {
		return fault.Newf(fault.Conflict, "restore into", "the store", format, a...).WithHint("%s", hint)
	}
	switch {
	case m.Backup != id:
		return refuse("finish it with its own file, or "+undo, "a restore of another backup was not finished")
	case m.Undo:
		return refuse("finish that with `kmsctl restore --undo`", "a restore is being undone")
	case m.Revive && p.choice == LeaveOut:
		return refuse(undo, "this restore was begun with --revive")
	}
	p.Begun = true
	if p.choice == Revive {
		m.Revive = true
	}
	p.Revive = m.Revive
	return p.t.Mark(ctx, m)
}

// Install is the installation's record under which the copy's records and
// those of the store open: the store's own when it is of the same
// installation, since it may know newer master keys.
func (p *Plan) Install() json.RawMessage {
	if p.merge {
		return p.install
	}
	return p.Header.Install
}

// Read reads the whole copy, checks it, and compares it with the store. It
// writes nothing. later tells of ids that were removed after the copy was
// made, and how that is known (from an audit log).
func (p *Plan) Read(ctx context.Context, r *Reader, dec Decoder, later map[string]string) error {
	have := map[string][]byte{}
	_, _, err := p.t.Present(ctx, func(e record.Raw) error {
		have[e.Path] = e.Value
		return nil
	})
	if err != nil {
		return err
	}
	if have[record.EndPath] != nil {
		return fault.Newf(fault.Conflict, "restore into", "the store", "its data are being cleared").WithHint("wait until the KMS serves again, then try again")
	}
	p.write = map[string]planned{}
	named := map[string][]byte{}
	p.Summary, err = r.Each(dec, func(e record.Raw) error {
		now, there := have[e.Path]
		delete(have, e.Path)
		switch {
		case there && bytes.Equal(now, e.Value):
		case p.merge && there && destroyed(e.Path, now) && !destroyed(e.Path, e.Value):
			p.remove(e.Path, now, "it was destroyed in the store")
		case p.merge && there:
			p.Kept = append(p.Kept, e.Path)
		case p.merge:
			p.remove(e.Path, nil, "it was removed from the store")
		default:
			if there {
				have[e.Path] = now
			}
			p.write[e.Path] = planned{before: now}
			named[e.Path] = nil
			if strings.HasPrefix(e.Path, namesDir) {
				named[e.Path] = record.Body(e.Value)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	p.digest = hex.EncodeToString(r.sum.Sum(nil))
	p.leaveOut(named, later)
	if p.merge {
		return nil
	}
	return p.setAside(have)
}

// setAside takes what is left of another installation out of the way, if
// nobody had used that yet.
func (p *Plan) setAside(rest map[string][]byte) error {
	for _, path := range slices.Sorted(maps.Keys(rest)) {
		if !record.WrittenUnused(path, rest[path]) {
			return fault.Newf(fault.Conflict, "restore into", "the store", "it belongs to another installation than the backup, which has been used: it holds %s", path).
				WithHint("restore into a new release, or clear this one before with `kmsctl hsm clear`; nothing was written")
		}
		if w, ok := p.write[path]; !ok || w.revive {
			p.aside = append(p.aside, record.Swap{Path: path, Before: rest[path]})
		}
	}
	if p.install != nil {
		id, _, err := installOf(p.install)
		p.Replaced = id
		return err
	}
	return nil
}

// namesDir maps the names of service IDs to their ids: an audit line may have
// either.
const namesDir = "iam/names/"

// sameStore refuses a store that has records and no installation, and master
// keys that do not go together.
func (p *Plan) sameStore(records int, begun bool) error {
	want, _, err := installOf(p.Header.Install)
	if err != nil {
		return broken("%v", err)
	}
	if p.install == nil {
		if records > 0 && !begun {
			return fault.Newf(fault.Conflict, "restore into", "the store", "it holds %d records of no installation", records).WithHint("begin with an empty store")
		}
		return nil
	}
	id, _, err := installOf(p.install)
	if err != nil {
		return err
	}
	if p.merge = id == want; !p.merge {
		return nil
	}
	return sameMasters(p.Header.Install, p.install)
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

func (p *Plan) remove(path string, before []byte, why string) {
	p.write[path] = planned{revive: true, before: before}
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
				p.remove(path, p.write[path].before, why)
				break
			}
		}
	}
}

func destroyed(path string, value []byte) bool {
	k, ok := view(record.Raw{Path: path, Value: value})
	return ok && k.State == stateDestroyed
}

// Undecided says that something would be revived, and nobody chose.
func (p *Plan) Undecided() bool { return len(p.Removed) > 0 && !p.Revive && p.choice == Ask }

// Bounds of one transaction. A record may come with what it replaces.
const (
	batchRecords = 50
	batchBytes   = 512 << 10
)

// Codec checks records and makes them; record.Codec is one.
type Codec interface {
	Decoder
	Encoder
}

// Run writes what was planned, from a second reading of the same copy, and
// gives the number of records written. Killed at any moment, the store stays
// closed until a run for the same copy has ended well, or was undone. What it
// did, when and by whom stays as a record.Restored.
func (p *Plan) Run(ctx context.Context, r *Reader, codec Codec, by string, now time.Time) (int, error) {
	b := batch{t: p.t}
	for _, s := range p.aside {
		if err := b.add(ctx, s); err != nil {
			return 0, err
		}
	}
	_, err := r.Each(codec, func(e record.Raw) error {
		if w, ok := p.write[e.Path]; ok && (!w.revive || p.Revive) {
			return b.add(ctx, record.Swap{Path: e.Path, Value: e.Value, Before: w.before})
		}
		return nil
	})
	if err == nil && hex.EncodeToString(r.sum.Sum(nil)) != p.digest {
		err = broken("it changed while it was read")
	}
	if err == nil {
		err = b.flush(ctx)
	}
	if err != nil {
		return b.written, err
	}
	note, err := p.note(codec, record.Restored{At: now.UTC(), By: by, Backup: r.id, Made: r.Header.CreatedAt, Revision: r.Header.Revision,
		Written: b.written, Kept: len(p.Kept), Replaced: p.Replaced})
	if err != nil {
		return b.written, err
	}
	return b.written, p.t.Finish(ctx, p.Install(), note)
}

// note is the record of what was done.
func (p *Plan) note(enc Encoder, n record.Restored) (record.Raw, error) {
	if p.Revive {
		for _, e := range p.Removed[:min(len(p.Removed), record.MaxRevived)] {
			n.Revived = append(n.Revived, e.Path)
		}
		n.More = len(p.Removed) - len(n.Revived)
	} else {
		n.LeftOut = len(p.Removed)
	}
	path := record.RestoredDir + n.At.Format(time.RFC3339Nano)
	b, err := enc.Encode(path, n)
	return record.Raw{Path: path, Value: b}, err
}

type batch struct {
	t       Target
	swaps   []record.Swap
	bytes   int
	written int
}

func (b *batch) add(ctx context.Context, s record.Swap) error {
	b.swaps = append(b.swaps, s)
	b.bytes += len(s.Value) + len(s.Before)
	if len(b.swaps) < batchRecords && b.bytes < batchBytes {
		return nil
	}
	return b.flush(ctx)
}

func (b *batch) flush(ctx context.Context) error {
	if len(b.swaps) == 0 {
		return nil
	}
	if err := b.t.Put(ctx, b.swaps); err != nil {
		return err
	}
	for _, s := range b.swaps {
		if s.Value != nil {
			b.written++
		}
	}
	b.swaps, b.bytes = nil, 0
	return nil
}
