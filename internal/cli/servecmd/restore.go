package servecmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/backup"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/internal/seal"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/store"
)

type restoreOptions struct {
	*app.App
	kms       Embedded
	inCluster bool
	kube      app.KubeFlags
	file      string // empty: undo
	undo      bool
	pass      app.SecretInput
	identity  string
	removals  removalFlags
}

func newRestoreCmd(a *app.App, run func(context.Context, *restoreOptions) error) *cobra.Command {
	o := &restoreOptions{App: a, pass: app.BackupPassphrase()}
	if run == nil {
		run = runRestore
	}
	cmd := &cobra.Command{
		Use: "restore FILE | --undo", Short: "Bring a backup's records back into a KMS", Args: cobra.MaximumNArgs(1),
		Long: `Bring the records of a backup back: into the data folder of an embedded KMS that is not running,
or with --in-cluster-service into a release, whose API answers 503 meanwhile. The store must be
empty, hold a newer state of the same KMS, or be a new installation that nobody has used yet,
which is replaced (its administrators stay). A folder's SoftHSM token must be there: DATA/softhsm.

The HSM must hold the master keys that the backup was made under; every record is checked
against them before the first one is written. A run that was killed leaves the store closed:
the same command again goes on, and --undo takes back what it did.

For a release the backup is decrypted here, so that neither its passphrase nor its identity
leaves this machine. The records, whose secrets only the HSM opens, go through the cluster's API
server by TLS to a pod of the API, which keeps them encrypted by a key of its own while it reads
them. The account of the kubeconfig needs the right to run commands in pods (create pods/exec).

What was purged, destroyed or revoked after the backup was made is not brought back in passing:
when the store holds the newer state, or --audit-log tells of it, choose --revive or --leave-out.
In a release the logs of all its API's pods are looked at, too. Into a store that is empty, and without an
audit log, nothing can tell what was removed since, and everything in the backup comes back. So
do there the counts of what each key encrypted: rotate a key that had come near its limit.

The KMS that opens the store next writes into its audit log who restored which backup, how much
came back, and each thing that was revived.`,
		Example: "  kmsctl restore kms.backup.age --data ./new --secret hsm-Secret.yaml --values overrides_hsm.yaml --audit-log old/audit/audit.log --leave-out\n" +
			"  kmsctl restore kms.backup.age --in-cluster-service --backup-passphrase-file pass\n  kmsctl restore --undo --in-cluster-service",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.file = strings.Join(args, "")
			return app.Run(cmd.Context(), o, run)
		},
	}
	fs := cmd.Flags()
	app.DataFlag(fs, a, &o.kms.Data)
	fs.StringVar(&o.kms.SecretFile, "secret", "", "hsm-Secret.yaml; without it, the one that the folder remembers")
	fs.StringVar(&o.kms.ValuesFile, "values", "", "overrides_hsm.yaml; without it, the one that the folder remembers")
	o.kms.Add(fs, ofModel)
	o.kube.AddInCluster(fs, &o.inCluster)
	fs.StringVar(&o.identity, "backup-identity-file", "", "age identity that opens the backup")
	fs.BoolVar(&o.undo, "undo", false, "take back what a restore did that was not finished")
	o.removals.Add(fs)
	o.pass.Add(fs)
	o.kms.Pass.Add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *restoreOptions) Check() error {
	errs := []error{o.kms.Check(), o.pass.Check(), o.kms.Pass.Check(), o.removals.Check(), oneOf(o.file, o.undo)}
	if o.inCluster && len(o.removals.auditLog) > 0 {
		errs = append(errs, fault.Usagef("--audit-log, --in-cluster-service: only one of them").WithHint("the logs of the API's pods are looked at anyhow"))
	}
	if (o.kms.SecretFile == "") != (o.kms.ValuesFile == "") {
		errs = append(errs, fault.Usagef("--secret, --values: give both or none"))
	}
	return errors.Join(errs...)
}

// oneOf wants a file or --undo.
func oneOf(file string, undo bool) error {
	if (file == "") == undo {
		return nil
	}
	return fault.Usagef("FILE, --undo: exactly one of them").WithHint("FILE is what `kmsctl backup` wrote")
}

// removalFlags say what becomes of that which was removed after the backup.
type removalFlags struct {
	auditLog []string
	revive   bool
	leaveOut bool
	by       string            // who restores, for the audit log
	told     map[string]string // of what was removed since, by who knows more logs
}

// Add puts the flags into fs.
func (f *removalFlags) Add(fs *pflag.FlagSet) {
	fs.StringArrayVar(&f.auditLog, "audit-log", nil, "file or folder of an audit log that goes on after the backup was made; repeatable")
	fs.BoolVar(&f.revive, "revive", false, "bring back what was removed after the backup was made, too")
	f.by = iam.LocalAdmin().String()
	fs.BoolVar(&f.leaveOut, "leave-out", false, "do not bring back what was removed after the backup was made")
}

// Check holds the rules of the flags.
func (f *removalFlags) Check() error {
	if f.revive && f.leaveOut {
		return fault.Usagef("--revive, --leave-out: only one of them")
	}
	return nil
}

func (f *removalFlags) choice() backup.Choice {
	switch {
	case f.revive:
		return backup.Revive
	case f.leaveOut:
		return backup.LeaveOut
	}
	return backup.Ask
}

// restoreResult is what a restore did.
type restoreResult struct {
	Data     string           `json:"data,omitempty"`
	Release  string           `json:"release,omitempty"`
	Revision int64            `json:"revision"` // of the backup
	Written  int              `json:"written"`
	Revived  []backup.Removed `json:"revived"`
	LeftOut  []backup.Removed `json:"leftOut"`
	Kept     []string         `json:"kept"`               // newer in the store than in the backup
	Replaced string           `json:"replaced,omitempty"` // an unused installation that went
	GoneOn   bool             `json:"goneOn"`
	backup.Summary
}

func (r restoreResult) where() string {
	if r.Release != "" {
		return "release " + r.Release
	}
	return r.Data
}

// Table is one line a field.
func (r restoreResult) Table() ([]string, [][]string) {
	rows := [][]string{{"restored into", r.where()}, {"records written", fmt.Sprintf("%d of %d", r.Written, r.Records)}, {"keys in the backup", fmt.Sprint(r.Keys)}}
	if r.Replaced != "" {
		rows = append(rows, []string{"replaced", "installation " + r.Replaced + ", which was not used; see `kmsctl hsm clear --leftovers`"})
	}
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

// undoResult is what --undo did.
type undoResult struct {
	Data    string `json:"data,omitempty"`
	Release string `json:"release,omitempty"`
	Undone  bool   `json:"undone"` // false: there was nothing to undo
}

// Table is one line.
func (r undoResult) Table() ([]string, [][]string) {
	done := "the store is as it was before the restore"
	if !r.Undone {
		done = "nothing: no restore is unfinished"
	}
	return nil, [][]string{{"undone", done}}
}

func runRestore(ctx context.Context, o *restoreOptions) error {
	switch {
	case o.inCluster:
		return o.runInCluster(ctx)
	case o.undo:
		return o.undoEmbedded(ctx)
	}
	if err := o.recall(); err != nil {
		return err
	}
	c, err := o.open()
	if err != nil {
		return err
	}
	defer c.close()
	r, err := c.read()
	if err != nil {
		return err
	}
	unlock, err := LockData(o.kms.Data)
	if err != nil {
		return err
	}
	defer unlock()
	to, err := o.kms.openForRestore(ctx, o.App, r.Header)
	if err != nil {
		return err
	}
	defer to.close()
	res, err := o.removals.restore(ctx, o.App, c.read, to)
	if err != nil {
		return err
	}
	res.Data = o.kms.Data
	return errors.Join(o.kms.remember(), o.Print(res))
}

// undoWait bounds the undoing of a restore that failed before it wrote
// anything.
const undoWait = 30 * time.Second

// restore brings a copy, which read gives from its begin each time, into a
// store. Before anything is written an error leaves all as it was.
func (f *removalFlags) restore(ctx context.Context, a *app.App, read func() (*backup.Reader, error), to *restoring) (restoreResult, error) {
	r, err := read()
	if err != nil {
		return restoreResult{}, err
	}
	later, err := f.later(r.Header.CreatedAt)
	if err != nil {
		return restoreResult{}, err
	}
	target := store.NewRestorer(to.etcd)
	plan, err := backup.Begin(ctx, r, target, f.choice())
	if err != nil {
		return restoreResult{}, err
	}
	codec, err := f.plan(ctx, a, plan, read, to, later)
	if err != nil {
		if !plan.Begun {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWait)
			defer cancel()
			err = errors.Join(err, target.Undo(ctx))
		}
		return restoreResult{}, err
	}
	if r, err = read(); err != nil {
		return restoreResult{}, err
	}
	n, err := plan.Run(ctx, r, codec, f.by, a.Now())
	if err != nil {
		return restoreResult{}, err
	}
	res := restoreResult{Revision: plan.Header.Revision, Written: n, Revived: []backup.Removed{}, LeftOut: []backup.Removed{}, Kept: append([]string{}, plan.Kept...),
		Replaced: plan.Replaced, GoneOn: plan.Begun, Summary: plan.Summary}
	if plan.Revive {
		res.Revived = append(res.Revived, plan.Removed...)
	} else {
		res.LeftOut = append(res.LeftOut, plan.Removed...)
	}
	return res, nil
}

// plan checks the copy against the HSM and the store, which nobody else uses
// by now, and stops before anything that was removed is revived without a word.
func (f *removalFlags) plan(ctx context.Context, a *app.App, p *backup.Plan, read func() (*backup.Reader, error), to *restoring, later map[string]string) (*record.Codec, error) {
	codec, err := to.unlock(ctx, p.Install(), a.Now)
	if err != nil {
		return nil, err
	}
	r, err := read()
	if err != nil {
		return nil, err
	}
	if err := p.Read(ctx, r, codec, later); err != nil || !p.Undecided() {
		return codec, err
	}
	for _, e := range p.Removed {
		a.Warn("%s: %s", e.Path, e.Why)
	}
	hint := "choose --revive to bring them back, or --leave-out; nothing was written"
	if p.Begun {
		hint = "choose --revive to bring them back, or --leave-out; until then the store stays closed"
	}
	return nil, fault.Newf(fault.Conflict, "restore into", to.name, "%d records were removed after the backup was made", len(p.Removed)).WithHint("%s", hint)
}

// undoEmbedded takes back what a killed run did in the data folder. That needs
// no HSM.
func (o *restoreOptions) undoEmbedded(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(o.kms.Data, "etcd")); err != nil {
		return fault.New(fault.NotFound, "undo a restore into", o.kms.Data, err).WithHint("check --data")
	}
	unlock, err := LockData(o.kms.Data)
	if err != nil {
		return err
	}
	defer unlock()
	to := &restoring{name: o.kms.Data}
	defer to.close()
	if err := to.openStore(ctx, o.kms.Data); err != nil {
		return err
	}
	done, err := to.undo(ctx)
	if err != nil {
		return err
	}
	return o.Print(undoResult{Data: o.kms.Data, Undone: done})
}

func (r *restoring) undo(ctx context.Context) (done bool, err error) {
	err = store.NewRestorer(r.etcd).Undo(ctx)
	if errors.Is(err, record.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
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

// later reads from audit logs what was removed after the backup was made.
func (f *removalFlags) later(since time.Time) (map[string]string, error) {
	all := maps.Clone(f.told)
	if all == nil {
		all = map[string]string{}
	}
	for _, log := range f.auditLog {
		files, err := audit.Files(log)
		if err != nil {
			return nil, fault.New(fault.NotFound, "read audit log", log, err).WithHint("check --audit-log")
		}
		for _, path := range files {
			in, err := os.Open(path)
			if err != nil {
				return nil, fault.New(fault.NotFound, "read audit log", path, err).WithHint("check --audit-log")
			}
			err = audit.Removals(in, since, func(id, why string) { all[id] = why })
			if err := errors.Join(err, in.Close()); err != nil {
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

// open opens the file of the options, and asks for what opens it.
func (o *restoreOptions) open() (_ *copied, err error) {
	f, err := os.Open(o.file)
	if err != nil {
		return nil, fault.New(fault.NotFound, "read backup", o.file, err).WithHint("check the file's name")
	}
	c := &copied{f: f}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
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
	_ = c.f.Close() // it was only read
	clear(c.ids)
	c.pass.Zero()
}

// read reads the copy from its begin.
func (c *copied) read() (*backup.Reader, error) {
	r, err := c.clear()
	if err != nil {
		return nil, err
	}
	return backup.NewReader(r)
}

// clear decrypts the copy from its begin.
func (c *copied) clear() (io.Reader, error) {
	if _, err := c.f.Seek(0, io.SeekStart); err != nil {
		return nil, fault.New(fault.Other, "read backup", c.f.Name(), err)
	}
	r, err := seal.NewReader(c.f, c.ids, c.pass)
	if err != nil {
		return nil, fault.New(fault.Denied, "open backup", c.f.Name(), err).WithHint("check --backup-passphrase-file or --backup-identity-file")
	}
	return r, nil
}
