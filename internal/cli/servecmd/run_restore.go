package servecmd

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/backup"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/seal"
)

type runRestoreOptions struct {
	*app.App
	behind   behindFlags
	auditDir string
	undo     bool
	since    string // only say what was removed since
	removals removalFlags
}

func newRunRestoreCmd(a *app.App, run func(context.Context, *runRestoreOptions) error) *cobra.Command {
	o := &runRestoreOptions{App: a}
	if run == nil {
		run = runRunRestore
	}
	cmd := &cobra.Command{
		Use: "restore", Short: "Restore a decrypted backup into an etcd, beside an API", Args: cobra.NoArgs,
		Long: `Restore a backup, which standard input gives decrypted, into the etcd of an API by the
connector beside it. It is what ` + "`kmsctl restore --in-cluster-service`" + ` runs in a pod of the API.
All APIs of the etcd close when it begins and open when it has ended.

On the disk the backup is encrypted by a key that stays in this process, in a file without a
name in the folder of the audit log; what that log says was removed since does not come back in
passing. --removed-since only tells that, for the APIs beside the one that restores.`,
		Example: "  age --decrypt kms.backup.age | kms-server run restore --connector-socket /run/kms/connector.sock --etcd-endpoints https://storage:2379 …",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	o.behind.Add(fs)
	fs.StringVar(&o.auditDir, "audit-dir", "", "folder of the API's audit log")
	fs.BoolVar(&o.undo, "undo", false, "take back what a restore did that was not finished; reads no backup")
	fs.StringVar(&o.since, "removed-since", "", "only list what the audit log says was removed since this time, RFC 3339")
	o.removals.Add(fs)
	fs.StringVar(&o.removals.by, "by", o.removals.by, "who restores, for the audit log")
	return cmd
}

// Check holds the rules of the flags.
func (o *runRestoreOptions) Check() error {
	errs := []error{o.behind.Check(), o.removals.Check()}
	if o.auditDir == "" {
		errs = append(errs, fault.Usagef("--audit-dir: missing"))
	}
	return errors.Join(errs...)
}

// removed is what audit logs say was removed, by id, and how they say it. Before
// a backup it tells of logs that are not here.
type removed struct {
	Removed map[string]string `json:"removed"`
}

// removedHead begins the line with it.
const removedHead = `{"removed":`

// Table is one line a thing.
func (r removed) Table() ([]string, [][]string) {
	rows := [][]string{}
	for _, id := range slices.Sorted(maps.Keys(r.Removed)) {
		rows = append(rows, []string{id, r.Removed[id]})
	}
	return nil, rows
}

// ownLog adds the log of the API that this runs beside, if it has one.
func (o *runRestoreOptions) ownLog() {
	if _, err := os.Stat(filepath.Join(o.auditDir, audit.FileName)); err == nil {
		o.removals.auditLog = append(o.removals.auditLog, o.auditDir)
	}
}

func (o *runRestoreOptions) tell() error {
	since, err := time.Parse(time.RFC3339, o.since)
	if err != nil {
		return fault.Usagef("--removed-since: %q is not a time as in 2026-01-02T15:04:05Z", o.since)
	}
	o.ownLog()
	all, err := o.removals.later(since)
	if err != nil {
		return err
	}
	return o.Print(removed{all})
}

func runRunRestore(ctx context.Context, o *runRestoreOptions) error {
	if o.since != "" {
		return o.tell()
	}
	var c *copied
	if !o.undo { // the whole of it, before anything is closed
		var err error
		if c, err = o.spool(); err != nil {
			return err
		}
		defer c.close()
	}
	to := &restoring{name: "the store"}
	var closeBoth func()
	var err error
	if to.etcd, to.token, closeBoth, err = o.behind.Open(ctx); err != nil {
		return err
	}
	defer closeBoth()
	if o.undo {
		done, err := to.undo(ctx)
		if err != nil {
			return err
		}
		return o.Print(undoResult{Undone: done})
	}
	r, err := c.read()
	if err != nil {
		return err
	}
	if err := to.same(ctx, r.Header); err != nil {
		return err
	}
	o.ownLog()
	res, err := o.removals.restore(ctx, o.App, c.read, to)
	if err != nil {
		return err
	}
	return o.Print(res)
}

// spool keeps the backup of standard input, encrypted to this process alone,
// in a file that has no name, and looks whether all of it is there.
func (o *runRestoreOptions) spool() (_ *copied, err error) {
	in := bufio.NewReaderSize(o.In, 64<<10)
	if head, _ := in.Peek(len(removedHead)); string(head) == removedHead {
		line, err := in.ReadBytes('\n')
		var r removed
		if err := errors.Join(err, json.Unmarshal(line, &r)); err != nil {
			return nil, fault.New(fault.BadContent, "read", "standard input", err)
		}
		o.removals.told = r.Removed
	}
	if head, _ := in.Peek(128); seal.Is(head) {
		return nil, fault.Usagef("standard input: the backup is encrypted").WithHint("use `kmsctl restore FILE --in-cluster-service`, or decrypt it on the way: age --decrypt FILE | …")
	}
	if err := os.MkdirAll(o.auditDir, 0o700); err != nil { // of an API that was never open
		return nil, fault.New(fault.Other, "make folder", o.auditDir, err)
	}
	f, err := os.CreateTemp(o.auditDir, ".restore-*")
	if err != nil {
		return nil, fault.New(fault.Other, "write", o.auditDir, err)
	}
	c := &copied{f: f}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, fault.New(fault.Other, "write", f.Name(), err)
	}
	w, ids, err := seal.NewSpool(f)
	if err != nil {
		return nil, err
	}
	c.ids = ids
	_, err = io.Copy(w, in)
	if err := errors.Join(err, w.Close()); err != nil {
		return nil, fault.New(fault.Other, "keep the backup in", o.auditDir, err)
	}
	clearText, err := c.clear()
	if err != nil {
		return nil, err
	}
	_, _, err = backup.Check(clearText)
	return c, err
}
