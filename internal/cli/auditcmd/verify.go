// Package auditcmd has the verbs for the audit log.
package auditcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
	"github.com/kmsctl/kmsctl/pkg/kmsclient"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Check the audit log",
		Long: "The audit log has one line for each call. Every line names the hash of the line before it,\nand the HSM signs the head of the chain."}
	cmd.AddCommand(newVerifyCmd(a, nil))
	return []*cobra.Command{cmd}
}

type verifyOptions struct {
	*app.App
	data      string
	logs      []string
	partial   bool
	publicKey string
	headFile  string
}

func newVerifyCmd(a *app.App, run func(context.Context, *verifyOptions) error) *cobra.Command {
	o := &verifyOptions{App: a}
	if run == nil {
		run = runVerify
	}
	cmd := &cobra.Command{
		Use: "verify", Short: "Check that no line of the audit log was changed, added or removed", Args: cobra.NoArgs,
		Long: `Check every line and every signature of an audit log, over all its files. It works offline.

Give --public-key a copy that was kept elsewhere: whoever can write the log can also
replace the key that lies beside it. When the embedded KMS of --data is running, its
store's copy of the key and of the last signed head is used, so that a missing tail is
found too; for a log without its KMS, --head gives a head that was kept elsewhere.

After the HSM's application data were cleared another key signs: give all keys in one file,
the oldest first, as public-key.pem beside the log has them.
A log whose first files were moved away does not verify by itself: name them too, in
their order, or say --partial.`,
		Example: "  kmsctl audit verify --data ./kms\n  kmsctl audit verify --log audit.log --public-key kept-elsewhere.pem -o json\n  kmsctl audit verify --log old/audit-00000000000000000001.log --log ./kms/audit",
		RunE:    func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	app.DataFlag(fs, a, &o.data)
	fs.StringArrayVar(&o.logs, "log", nil, "file or folder of the log; repeatable, in their order; without it, the one in --data")
	fs.BoolVar(&o.partial, "partial", false, "the first files of the log may be missing")
	fs.StringVar(&o.publicKey, "public-key", "", "PEM file of the public key that signed; without it, the running KMS's, else the one beside the log")
	fs.StringVar(&o.headFile, "head", "", "JSON file with a signed head that the log must contain")
	return cmd
}

// Check has nothing to refuse: any combination makes sense.
func (o *verifyOptions) Check() error { return nil }

// verifyResult is what a whole log looks like.
type verifyResult struct {
	Log       string `json:"log"`
	PublicKey string `json:"publicKey"` // where it came from
	audit.Report
}

// Table is one line a field.
func (r verifyResult) Table() ([]string, [][]string) {
	return nil, [][]string{{"log", r.Log}, {"public key", r.PublicKey}, {"files", fmt.Sprint(r.Files)}, {"first line", fmt.Sprint(r.First)}, {"lines", fmt.Sprint(r.Lines)}, {"events", fmt.Sprint(r.Events)},
		{"keys that signed", fmt.Sprint(r.Keys)}, {"signed up to line", fmt.Sprint(r.SignedUpTo)}, {"recoveries", fmt.Sprint(r.Recoveries)}, {"calls lost on a full disk", fmt.Sprint(r.Lost)},
		{"clock set back", fmt.Sprint(r.SetBack)}, {"tail", r.Tail}}
}

func runVerify(ctx context.Context, o *verifyOptions) error {
	logs := o.logs
	if len(logs) == 0 {
		logs = []string{filepath.Join(o.data, "audit")}
	}
	// The head is asked for before the log is read: what is signed by now must
	// be in the files.
	var live *kmsapi.AuditHeads
	if len(o.logs) == 0 {
		var err error
		if live, err = o.askRunning(ctx); err != nil {
			return err
		}
	}
	pubs, from, err := o.keys(logs[len(logs)-1], live)
	if err != nil {
		return err
	}
	head, err := o.head(live)
	if err != nil {
		return err
	}
	files, done, err := openLogs(logs, live != nil)
	if err != nil {
		return err
	}
	defer done()
	rep, err := audit.Verify(files, pubs, head, o.partial)
	if err != nil {
		return err
	}
	return o.Print(verifyResult{logs[len(logs)-1], from, rep})
}

// openLogs opens every file of the logs. Of a live log the last line may be
// half-written at this moment, and is left out.
func openLogs(logs []string, live bool) (files []audit.File, done func(), err error) {
	var open []*os.File
	done = func() {
		for _, f := range open {
			f.Close()
		}
	}
	defer func() {
		if err != nil {
			done()
		}
	}()
	names, err := fileNames(logs)
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return nil, nil, fault.New(fault.NotFound, "read audit log", name, err).WithHint("give --data the folder of `kmsctl serve`, or --log the file")
		}
		open = append(open, f)
		files = append(files, audit.File{Name: filepath.Base(name), Reader: f})
	}
	if !live {
		return files, done, nil
	}
	last := len(open) - 1
	if files[last].Reader, err = wholeLines(open[last]); err != nil {
		return nil, nil, fault.New(fault.Other, "read audit log", open[last].Name(), err)
	}
	if now, err := fileNames(logs); err != nil || !slices.Equal(now, names) { // a new file was begun meanwhile
		done()
		return openLogs(logs, live)
	}
	return files, done, nil
}

func fileNames(logs []string) ([]string, error) {
	var all []string
	for _, log := range logs {
		names, err := audit.Files(log)
		if err != nil {
			return nil, fault.New(fault.NotFound, "read audit log", log, err).WithHint("give --data the folder of `kmsctl serve`, or --log the file")
		}
		all = append(all, names...)
	}
	return all, nil
}

// askRunning gives what the running KMS of --data knows; nil when none runs.
func (o *verifyOptions) askRunning(ctx context.Context) (*kmsapi.AuditHeads, error) {
	socket := app.SocketPath(o.data)
	var d net.Dialer
	probe, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, nil //nolint:nilerr // no socket, or one that a killed process left: none runs
	}
	probe.Close()
	c, err := kmsclient.New(kmsclient.Config{Socket: socket})
	if err != nil {
		return nil, err
	}
	var out kmsapi.AuditHeads
	err = c.Do(ctx, "GET", "/kmsctl/v1/audit/heads", nil, &out)
	return &out, o.ClientError("ask the running KMS for the audit log's head", o.data, err)
}

// keys gives the keys that signed, the oldest first. Of a running KMS the last
// one must be its own: earlier ones beside the log cannot vouch for later lines.
func (o *verifyOptions) keys(log string, live *kmsapi.AuditHeads) (ders [][]byte, from string, err error) {
	path := o.publicKey
	if path == "" {
		path = filepath.Join(log, audit.KeyName)
		if st, err := os.Stat(log); err != nil || !st.IsDir() {
			path = filepath.Join(filepath.Dir(log), audit.KeyName)
		}
	}
	b, err := o.ReadInput("--public-key", path, 64<<10)
	if err == nil {
		ders, err = audit.ParsePublicKeys(b)
	}
	if o.publicKey == "" && live != nil {
		if n := len(ders); err != nil || !bytes.Equal(ders[n-1], live.PublicKey) {
			ders = [][]byte{live.PublicKey}
		}
		return ders, "of the running KMS", nil
	}
	if err != nil && fault.KindOf(err) == fault.Other {
		err = fault.New(fault.Usage, "read public key", path, err).WithHint("check --public-key")
	}
	return ders, path, err
}

func (o *verifyOptions) head(live *kmsapi.AuditHeads) (*audit.Head, error) {
	if o.headFile != "" {
		b, err := o.ReadInput("--head", o.headFile, 64<<10)
		if err != nil {
			return nil, err
		}
		var h audit.Head
		if err := json.Unmarshal(b, &h); err != nil || h.Chain == "" {
			return nil, fault.New(fault.Usage, "read head", o.headFile, errors.Join(err, errors.New("no head in it"))).WithHint("check --head")
		}
		return &h, nil
	}
	if live == nil || live.Own == nil {
		return nil, nil
	}
	h := live.Own
	return &audit.Head{Chain: h.Chain, Seq: h.Seq, Prev: h.Prev, Signature: h.Signature}, nil
}

// wholeLines reads f up to its last line break of this moment.
func wholeLines(f *os.File) (io.Reader, error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	b := make([]byte, min(end, 1<<20))
	if _, err := f.ReadAt(b, end-int64(len(b))); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if i := bytes.LastIndexByte(b, '\n'); i >= 0 {
		end -= int64(len(b) - i - 1)
	}
	return io.NewSectionReader(f, 0, end), nil
}
