// Package backupcmd has the verb that copies the KMS's data out; what brings
// them back in is servecmd's.
package backupcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/backup"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/seal"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	return []*cobra.Command{newBackupCmd(a, nil)}
}

type backupOptions struct {
	*app.App
	client     app.ClientFlags
	outputFile string
	recipients []string
	pass       app.SecretInput
}

func newBackupCmd(a *app.App, run func(context.Context, *backupOptions) error) *cobra.Command {
	o := &backupOptions{App: a, pass: app.BackupPassphrase()}
	if run == nil {
		run = runBackup
	}
	cmd := &cobra.Command{
		Use: "backup --output-file FILE", Short: "Copy the KMS's data into an encrypted file", Args: cobra.NoArgs,
		Long: `Copy every record of the KMS, as it was at one moment, into a file that age encrypts: to
--recipient, or by a passphrase. The KMS goes on serving. It is the running KMS of --server or
--data, or the one of --data, started for this call.

The file is read back, decrypted and counted before it gets its name. Root keys stay wrapped
by the HSM's master key in it, so that only the same HSM makes use of it. The result lists what
the file lacks: the HSM's own content, the audit log's files, TLS keys, and the material of keys
that were placed in the token.`,
		Example: "  kmsctl backup --data ./kms --output-file kms.backup.age --recipient age1…\n  kmsctl backup --server https://kms.example:28674 --output-file kms.backup.age -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	o.client.Add(fs, a)
	fs.StringVar(&o.outputFile, "output-file", "", "the backup, mode 0600")
	fs.StringArrayVar(&o.recipients, "recipient", nil, "age recipient (age1…) who can decrypt; repeatable; without one, a passphrase does")
	o.pass.Add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *backupOptions) Check() error {
	errs := []error{o.client.Check(false), o.pass.Check()}
	if o.outputFile == "" {
		errs = append(errs, fault.Usagef("--output-file: missing"))
	}
	for _, r := range o.recipients {
		if err := seal.CheckRecipient(r); err != nil {
			errs = append(errs, fault.Usagef("--recipient: %w", err))
		}
	}
	if len(o.recipients) > 0 && (o.pass.File != "" || o.pass.Stdin) {
		errs = append(errs, fault.Usagef("--recipient, --backup-passphrase-file: only one of them"))
	}
	return errors.Join(errs...)
}

// backupResult is what a backup holds.
type backupResult struct {
	OutputFile string `json:"outputFile"`
	Revision   int64  `json:"revision"`
	CreatedAt  string `json:"createdAt"`
	Bytes      int64  `json:"bytes"`
	backup.Summary
}

// Table is one line a field.
func (r backupResult) Table() ([]string, [][]string) {
	rows := [][]string{{"written", r.OutputFile}, {"revision", fmt.Sprint(r.Revision)}, {"records", fmt.Sprint(r.Records)}, {"keys", fmt.Sprint(r.Keys)},
		{"instances", fmt.Sprint(r.Instances)}, {"verified", "decrypted and counted after writing"}}
	for _, l := range r.Lacks {
		rows = append(rows, []string{"lacks", l})
	}
	return nil, rows
}

func runBackup(ctx context.Context, o *backupOptions) error {
	var pass secret.Value
	if len(o.recipients) == 0 {
		var err error
		if pass, err = o.pass.Read(o.App, true); err != nil {
			return err
		}
		defer pass.Zero()
		if pass.Empty() {
			return fault.Usagef("the passphrase is empty").WithHint("give a passphrase, or --recipient")
		}
	}
	c, err := o.Client(ctx, &o.client)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(o.outputFile), "."+filepath.Base(o.outputFile)+".*")
	if err != nil {
		return fault.New(fault.Other, "write", o.outputFile, err)
	}
	defer func() { _ = os.Remove(f.Name()) }() // fails after the rename, as it should
	defer f.Close()
	once, err := o.fill(f, pass, func(w io.Writer) error { return c.Stream(ctx, "/kmsctl/v1/backup", w) })
	if err != nil {
		return err
	}
	res, err := o.verify(f, once, pass)
	if err != nil {
		return err
	}
	// CreateTemp made it 0600.
	if err := errors.Join(f.Sync(), f.Close(), os.Rename(f.Name(), o.outputFile)); err != nil {
		return fault.New(fault.Other, "write", o.outputFile, err)
	}
	for _, l := range res.Lacks {
		if strings.Contains(l, "placed in the token") {
			o.Warn("the backup lacks %s", l)
		}
	}
	return o.Print(res)
}

// fill encrypts what the KMS sends into f.
func (o *backupOptions) fill(f *os.File, pass secret.Value, stream func(io.Writer) error) (once []byte, err error) {
	w, once, err := seal.NewWriter(f, o.recipients, pass)
	if err != nil {
		return nil, fault.New(fault.Other, "write", o.outputFile, err)
	}
	if err := stream(w); err != nil {
		return nil, o.ClientError("back up", o.outputFile, err)
	}
	if err := w.Close(); err != nil {
		return nil, fault.New(fault.Other, "write", o.outputFile, err)
	}
	return once, nil
}

// verify reads the file back from the disk.
func (o *backupOptions) verify(f *os.File, once []byte, pass secret.Value) (backupResult, error) {
	defer clear(once)
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return backupResult{}, fault.New(fault.Other, "read back", o.outputFile, err)
	}
	r, err := seal.NewReader(f, once, pass)
	if err != nil {
		return backupResult{}, fault.New(fault.BadContent, "read back", o.outputFile, err)
	}
	head, sum, err := backup.Check(r)
	if err != nil {
		return backupResult{}, fault.New(fault.BadContent, "verify", o.outputFile, err).WithHint("the KMS broke off, or the disk lost data: nothing was kept; try again")
	}
	return backupResult{OutputFile: o.outputFile, Revision: head.Revision, CreatedAt: head.CreatedAt.Format("2006-01-02T15:04:05Z"), Bytes: end, Summary: sum}, nil
}
