package servecmd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/record"
)

// noteRestored writes down the restores that were finished since the store was
// open last. A KMS that dies between the line and the end of the note, or two
// that open at once, write it twice: better than never.
func (k *KMS) noteRestored(ctx context.Context) error {
	type note struct {
		record.Meta
		record.Restored
	}
	var all []note
	err := k.store.List(ctx, record.RestoredDir, func(m record.Meta, decode func(any) error) error {
		n := note{Meta: m}
		err := decode(&n.Restored)
		all = append(all, n)
		return err
	})
	for _, n := range all {
		if err == nil {
			err = k.writeRestored(ctx, n.Restored)
		}
		if err == nil {
			err = k.store.Commit(ctx, record.Change{Path: n.Path, Rev: n.Rev})
		}
		if errors.Is(err, record.ErrConflict) { // another one was first
			err = nil
		}
	}
	return err
}

// writeRestored is a line for the restore, and one for each thing that somebody
// had removed and that is there again.
func (k *KMS) writeRestored(ctx context.Context, r record.Restored) error {
	detail := fmt.Sprintf("backup %s of %s, revision %d, restored at %s: %d records written, %d kept, %d left out, %d revived", r.Backup, r.Made.Format(time.RFC3339), r.Revision,
		r.At.Format(time.RFC3339), r.Written, r.Kept, r.LeftOut, len(r.Revived)+r.More)
	if r.Replaced != "" {
		detail += ", installation " + r.Replaced + " replaced"
	}
	if r.More > 0 {
		detail += fmt.Sprintf(", of which %d are not named here", r.More)
	}
	k.Log.Info("restored", "by", r.By, "backup", r.Backup, "revived", len(r.Revived)+r.More)
	event := audit.Event{Action: "kmsctl.restore", Outcome: "success", Status: http.StatusNoContent, Principal: r.By, Detail: detail}
	if err := k.audit.Append(ctx, event); err != nil {
		return err
	}
	for _, path := range r.Revived {
		e := audit.Event{Action: "kmsctl.restore.revive", Outcome: "success", Status: http.StatusNoContent, Principal: r.By, Detail: path}
		if parts := strings.Split(path, "/"); len(parts) == 3 && parts[0] == "keys" {
			e.Instance, e.Key = parts[1], parts[2]
		}
		if err := k.audit.Append(ctx, e); err != nil {
			return err
		}
	}
	return nil
}
