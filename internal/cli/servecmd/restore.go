package servecmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/backup"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/seal"
	"github.com/kmsctl/kmsctl/internal/secret"
)

type restoreOptions struct {
	*app.App
	kms      Embedded
	file     string
	pass     app.SecretInput
	identity string
	auditLog []string
	revive   bool
	leaveOut bool
}

func newRestoreCmd(a *app.App, run func(context.Context, *restoreOptions) error) *cobra.Command {
	o := &restoreOptions{App: a, pass: app.BackupPassphrase()}
	if run == nil {
		run = runRestore
	}
	cmd := &cobra.Command{
		Use: "restore FILE", Short: "Bring a backup's records back into a data folder", Args: cobra.ExactArgs(1),
		Long: `Bring the records of a backup back into the data folder of an embedded KMS that is not running.
The folder must be empty (but for the SoftHSM token's folder softhsm, when that is the HSM), or
hold a newer state of the same KMS.

The HSM must hold the master keys that the backup was made under; every record is checked
against them before the first one is written. A run that was killed leaves the folder closed:
the same command again goes on.

What was purged, destroyed or revoked after the backup was made is not brought back in passing:
when the folder holds the newer state, or --audit-log tells of it, choose --revive or
--leave-out. Into a folder that is empty, and without an audit log, nothing can tell what was
removed since, and everything in the backup comes back.`,
		Example: "  kmsctl restore kms.backup.age --data ./new --secret hsm-Secret.yaml --values overrides_hsm.yaml --audit-log old/audit/audit.log --leave-out",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.file = args[0]
			return app.Run(cmd.Context(), o, run)
		},
	}
	fs := cmd.Flags()
	app.DataFlag(fs, a, &o.kms.Data)
	fs.StringVar(&o.kms.SecretFile, "secret", "", "hsm-Secret.yaml; without it, the one that the folder remembers")
	fs.StringVar(&o.kms.ValuesFile, "values", "", "overrides_hsm.yaml; without it, the one that the folder remembers")
	fs.StringVar(&o.kms.Module, "module", "", "path of the PKCS#11 library")
	fs.StringVar(&o.kms.Label, "token-label", "", "label of the token")
	fs.StringVar(&o.kms.Serial, "token-serial", "", "serial number of the token")
	fs.StringVar(&o.kms.Slot, "slot", "", "slot id")
	fs.StringVar(&o.identity, "backup-identity-file", "", "age identity that opens the backup")
	fs.StringArrayVar(&o.auditLog, "audit-log", nil, "file or folder of an audit log that goes on after the backup was made; repeatable")
	fs.BoolVar(&o.revive, "revive", false, "bring back what was removed after the backup was made, too")
	fs.BoolVar(&o.leaveOut, "leave-out", false, "do not bring back what was removed after the backup was made")
	o.pass.Add(fs)
	o.kms.Pass.Add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *restoreOptions) Check() error {
	errs := []error{o.pass.Check(), o.kms.Pass.Check()}
	if o.revive && o.leaveOut {
		errs = append(errs, fault.Usagef("--revive, --leave-out: only one of them"))
	}
	if (o.kms.SecretFile == "") != (o.kms.ValuesFile == "") {
		errs = append(errs, fault.Usagef("--secret, --values: give both or none"))
	}
	if _, err := app.ParseSlot(o.kms.Slot); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// restoreResult is what a restore did.
type restoreResult struct {
	Data     string           `json:"data"`
	Revision int64            `json:"revision"` // of the backup
	Written  int              `json:"written"`
	Revived  []backup.Removed `json:"revived"`
	LeftOut  []backup.Removed `json:"leftOut"`
	Kept     []string         `json:"kept"` // newer in the folder than in the backup
	GoneOn   bool             `json:"goneOn"`
	backup.Summary
}

// Table is one line a field.
func (r restoreResult) Table() ([]string, [][]string) {
	rows := [][]string{{"restored into", r.Data}, {"records written", fmt.Sprintf("%d of %d", r.Written, r.Records)}, {"keys in the backup", fmt.Sprint(r.Keys)}}
	for _, e := range r.Revived {
		rows = append(rows, []string{"revived", e.Path + ": " + e.Why})
	}
	for _, e := range r.LeftOut {
		rows = append(rows, []string{"left out", e.Path + ": " + e.Why})
	}
	for _, p := range r.Kept {
		rows = append(rows, []string{"kept, newer", p})
	}
	for _, l := range r.Lacks {
		rows = append(rows, []string{"not in the backup", l})
	}
	return nil, rows
}

func runRestore(ctx context.Context, o *restoreOptions) error {
	if err := o.recall(); err != nil {
		return err
	}
	f, err := os.Open(o.file)
	if err != nil {
		return fault.New(fault.NotFound, "read backup", o.file, err).WithHint("check the file's name")
	}
	defer f.Close()
	c, err := o.open(f)
	if err != nil {
		return err
	}
	defer c.close()
	r, err := c.read()
	if err != nil {
		return err
	}
	later, err := o.later(r.Header)
	if err != nil {
		return err
	}
	unlock, err := LockData(o.kms.Data)
	if err != nil {
		return err
	}
	defer unlock()
	k, err := o.kms.OpenForRestore(ctx, o.App, r.Header)
	if err != nil {
		return err
	}
	defer k.Close()
	plan, err := backup.Prepare(ctx, r, k.Codec, k.Target, later)
	if err != nil {
		return err
	}
	if err := o.decide(plan); err != nil {
		return err
	}
	if r, err = c.read(); err != nil {
		return err
	}
	n, err := plan.Run(ctx, r, k.Codec, k.Target, o.revive)
	if err != nil {
		return err
	}
	res := restoreResult{Data: o.kms.Data, Revision: plan.Header.Revision, Written: n, Revived: []backup.Removed{}, LeftOut: []backup.Removed{}, Kept: append([]string{}, plan.Kept...), GoneOn: plan.Begun, Summary: plan.Summary}
	if o.revive = o.revive || plan.Revive; o.revive {
		res.Revived = append(res.Revived, plan.Removed...)
	} else {
		res.LeftOut = append(res.LeftOut, plan.Removed...)
	}
	return errors.Join(o.kms.remember(), o.Print(res))
}

// recall takes the HSM's settings from the folder when none are given.
func (o *restoreOptions) recall() error {
	if o.kms.SecretFile != "" {
		return nil
	}
	e, err := o.kms.recall()
	if err != nil {
		return err
	}
	if e == nil {
		return fault.Usagef("--secret, --values: missing, and %q remembers none", o.kms.Data).WithHint("make the two files with `kmsctl render`; they must be for the backup's HSM")
	}
	o.kms = *e
	return nil
}

// decide stops before anything that was removed is revived without a word.
func (o *restoreOptions) decide(p *backup.Plan) error {
	if len(p.Removed) == 0 || p.Begun || o.revive || o.leaveOut {
		return nil
	}
	for _, e := range p.Removed {
		o.Warn("%s: %s", e.Path, e.Why)
	}
	return fault.Newf(fault.Conflict, "restore", o.file, "%d records were removed after the backup was made", len(p.Removed)).
		WithHint("choose --revive to bring them back, or --leave-out; nothing was written")
}

// later reads from audit logs what was removed after the backup was made.
func (o *restoreOptions) later(h backup.Header) (map[string]string, error) {
	all := map[string]string{}
	for _, log := range o.auditLog {
		files, err := audit.Files(log)
		if err != nil {
			return nil, fault.New(fault.NotFound, "read audit log", log, err).WithHint("check --audit-log")
		}
		for _, path := range files {
			f, err := os.Open(path)
			if err != nil {
				return nil, fault.New(fault.NotFound, "read audit log", path, err).WithHint("check --audit-log")
			}
			err = audit.Removals(f, h.CreatedAt, func(id, why string) { all[id] = why })
			if err := errors.Join(err, f.Close()); err != nil {
				return nil, fault.New(fault.BadContent, "read audit log", path, err).WithHint("see `kmsctl audit verify --log %s`", log)
			}
		}
	}
	return all, nil
}

// copied is an encrypted copy that can be read more than once.
type copied struct {
	f    *os.File
	ids  []byte
	pass secret.Value
}

func (o *restoreOptions) open(f *os.File) (*copied, error) {
	c := &copied{f: f}
	head, err := bufio.NewReaderSize(f, 4096).Peek(4096)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Other, "read backup", f.Name(), err)
	}
	if !seal.Is(head) {
		return nil, fault.Newf(fault.BadContent, "read backup", f.Name(), "it is no file that `kmsctl backup` wrote")
	}
	if o.identity != "" {
		if c.ids, err = o.ReadInput("--backup-identity-file", o.identity, 64<<10); err != nil {
			return nil, err
		}
		return c, nil
	}
	if !seal.ByPassphrase(head) {
		return nil, fault.Usagef("%q is encrypted to a recipient", f.Name()).WithHint("give the identity with --backup-identity-file")
	}
	c.pass, err = o.pass.Read(o.App, false)
	return c, err
}

func (c *copied) close() {
	clear(c.ids)
	c.pass.Zero()
}

func (c *copied) read() (*backup.Reader, error) {
	if _, err := c.f.Seek(0, io.SeekStart); err != nil {
		return nil, fault.New(fault.Other, "read backup", c.f.Name(), err)
	}
	r, err := seal.NewReader(c.f, c.ids, c.pass)
	if err != nil {
		return nil, fault.New(fault.Denied, "open backup", c.f.Name(), err).WithHint("check --backup-passphrase-file or --backup-identity-file")
	}
	return backup.NewReader(r)
}
