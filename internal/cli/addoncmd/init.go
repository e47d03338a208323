package addoncmd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	yaml3 "go.yaml.in/yaml/v3"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/file"
	"github.com/kmsctl/kmsctl/templates"
)

type initOptions struct {
	*app.App
	dir      string
	name     string
	repo     string
	archive  string
	charts   []string
	loadOnly bool
	hsm      app.HSMFlags
	seal     app.SealFlags
}

func newInitCmd(a *app.App, run func(context.Context, *initOptions) error) *cobra.Command {
	o := &initOptions{App: a}
	if run == nil {
		run = runInit
	}
	cmd := &cobra.Command{
		Use: "init", Short: "Lay out a cluster folder for an archive", Args: cobra.NoArgs,
		Long: `Lay out ICP's cluster folder for an archive, as the manual's steps 3 to 6 do by hand: the
folders resources and addon, the archive in the latter, and an entry of archive_addons in
config.yaml, whose other lines stay as they are.

With --model, the entry has the chart's settings, and resources/hsm-Secret.yaml is written,
encrypted with age unless --plain is given; apply opens it.

Run it again at any time: what is there already is left alone.`,
		Example: `  kmsctl addon init --archive key-management-hsm-amd64.tar.gz --model softhsm --hsm-password-file pw --recipient age1…
  kmsctl addon init --archive icp-cam-x86_64-3.2.1.0.tar.gz --name cam --namespace services --repo local-charts --chart ibm-cam
  kmsctl addon init --archive images.tar.gz --name images --namespace shop --load-only`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	fs := cmd.Flags()
	fs.StringVar(&o.dir, "directory", "cluster", "the cluster folder")
	fs.StringVar(&o.archive, "archive", "", "archive to put into the folder addon; without it, put key-management-hsm-amd64.tar.gz there yourself")
	fs.StringVar(&o.name, "name", templates.ChartName, "name of the addon")
	fs.StringVar(&o.repo, "repo", app.ICPRepositories[0], "chart repository: "+strings.Join(app.ICPRepositories, ", "))
	fs.StringSliceVar(&o.charts, "chart", []string{templates.ChartName}, "chart of the archive that is to be installed; repeatable")
	fs.BoolVar(&o.loadOnly, "load-only", false, "list no chart: the archive is loaded, and nothing is installed")
	_ = cmd.RegisterFlagCompletionFunc("repo", cobra.FixedCompletions(app.ICPRepositories, cobra.ShellCompDirectiveNoFileComp))
	o.hsm.AddModel(cmd)
	o.hsm.AddNamespace(fs)
	o.hsm.AddSecret(fs)
	o.hsm.AddSettings(fs)
	o.seal.Add(fs)
	return cmd
}

// Check holds the rules of the flags.
func (o *initOptions) Check() error {
	errs := []error{o.seal.Check()}
	if !slices.Contains(app.ICPRepositories, o.repo) {
		errs = append(errs, fault.Usagef("--repo: unknown %q", o.repo).WithHint("one of: %s", strings.Join(app.ICPRepositories, ", ")))
	}
	if o.name == "" || strings.ContainsAny(o.name, " :#{}[]&*!|>'\"%@`,\n") {
		errs = append(errs, fault.Usagef("--name: %q is not a plain word", o.name))
	}
	if o.hsm.Namespace == "" {
		errs = append(errs, fault.Usagef("--namespace: missing"))
	}
	if o.hsm.Model == "" {
		return errors.Join(errs...)
	}
	if o.loadOnly || !slices.Contains(o.charts, templates.ChartName) {
		errs = append(errs, fault.Usagef("--model: is for the chart %s, which is not installed here", templates.ChartName))
	}
	return errors.Join(append(errs, o.hsm.CheckValues(), o.hsm.CheckSecret())...)
}

// laidOut is what init prints.
type laidOut struct {
	Directory string     `json:"directory"`
	Files     []fileLine `json:"files"`
	Next      []string   `json:"next"`
}

type fileLine struct {
	File   string `json:"file"`
	Status string `json:"status"`
}

const written = "written"

// Table is one line a file, then what is left to do.
func (l laidOut) Table() ([]string, [][]string) {
	var rows [][]string
	for _, f := range l.Files {
		rows = append(rows, []string{f.Status, f.File})
	}
	for _, n := range l.Next {
		rows = append(rows, []string{"next", n})
	}
	return nil, rows
}

func runInit(ctx context.Context, o *initOptions) error {
	want, err := o.addon()
	if err != nil {
		return err
	}
	config := filepath.Join(o.dir, "config.yaml")
	// First, since it may refuse.
	text, changed, err := o.config(config, want)
	if err != nil {
		return err
	}
	for _, d := range []string{resourcesFolder, archiveFolder} {
		if err := os.MkdirAll(filepath.Join(o.dir, d), 0o755); err != nil {
			return fault.New(fault.Other, "make folder", filepath.Join(o.dir, d), err)
		}
	}
	out := laidOut{Directory: o.dir, Files: []fileLine{}, Next: []string{}}
	did := func(name string, changed bool) {
		status := unchanged
		if changed {
			status = written
		}
		out.Files = append(out.Files, fileLine{name, status})
	}
	placed, err := o.placeArchive(ctx, filepath.Join(o.dir, filepath.FromSlash(want.Path)))
	switch {
	case err != nil:
		return err
	case o.archive != "":
		did(filepath.Join(o.dir, want.Path), placed)
	default:
		out.Next = append(out.Next, "put the archive at "+filepath.Join(o.dir, want.Path))
	}
	if o.hsm.Model != "" {
		name := filepath.Join(o.dir, resourcesFolder, secretFile)
		made, err := o.secret(name)
		if err != nil {
			return err
		}
		did(name, made)
	} else if want.ours() && !o.loadOnly {
		out.Next = append(out.Next, "write the settings of the chart below values, and hsm-secret into "+filepath.Join(o.dir, resourcesFolder)+" (--model does both)")
	}
	if changed {
		if err := app.WriteFile(config, text, modeOf(config)); err != nil {
			return err
		}
	}
	did(config, changed)
	out.Next = append(out.Next, "kmsctl addon apply -f "+config+" --registry REGISTRY")
	return o.Print(out)
}

// addon is the entry that the flags say.
func (o *initOptions) addon() (addon, error) {
	a := addon{Name: o.name, Namespace: o.hsm.Namespace, Repo: o.repo, Path: path.Join(archiveFolder, templates.ChartName+"-amd64.tar.gz")}
	if o.archive != "" {
		a.Path = path.Join(archiveFolder, filepath.Base(o.archive))
	}
	if o.loadOnly {
		return a, nil
	}
	for _, name := range o.charts {
		c := chart{Name: name}
		if c.ours() && o.hsm.Model != "" {
			ov, err := o.hsm.Overrides()
			if err != nil {
				return a, err
			}
			for _, w := range ov.Warnings {
				o.Warn("%s", w)
			}
			c.Values = ov.Helm()
		}
		a.Charts = append(a.Charts, c)
	}
	return a, nil
}

// config gives config.yaml with the entry in it, and whether that changes it.
func (o *initOptions) config(name string, want addon) (text []byte, changed bool, err error) {
	text, err = os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, fault.New(fault.Other, "read", name, err)
	}
	have, _, err := parseConfig(text)
	if err != nil {
		return nil, false, fault.New(fault.Usage, "read", name, err).WithHint("%s", hintOr(err, "correct it first"))
	}
	for _, a := range have {
		if a.Name != want.Name {
			continue
		}
		if !same(a, want) {
			return nil, false, fault.Newf(fault.Conflict, "write", name, "%s has %q already, with other settings", addonsKey, want.Name).WithHint("change the file by hand, or give another --name")
		}
		return text, false, nil
	}
	text, err = insert(text, want)
	if err != nil {
		return nil, false, fault.New(fault.Usage, "write", name, err).WithHint("write the entry by hand, as the manual's step 6 has it")
	}
	// What was inserted into a file of another's making is read back.
	after, _, err := parseConfig(text)
	if n := slices.IndexFunc(after, func(a addon) bool { return a.Name == want.Name }); err != nil || n < 0 || len(after) != len(have)+1 || !same(after[n], want) {
		return nil, false, fault.Newf(fault.Usage, "write", name, "the entry cannot be put into it").WithHint("write the entry by hand, as the manual's step 6 has it")
	}
	return text, true, nil
}

func same(a, b addon) bool {
	empty := func(c []chart) []chart {
		c = slices.Clone(c)
		for n := range c {
			if len(c[n].Values) == 0 {
				c[n].Values = nil
			}
		}
		return c
	}
	a.Charts, b.Charts = empty(a.Charts), empty(b.Charts)
	return a.Namespace == b.Namespace && a.Repo == b.Repo && a.Path == b.Path && a.SCC == b.SCC && len(a.Charts) == len(b.Charts) &&
		(len(a.Charts) == 0 || reflect.DeepEqual(a.Charts, b.Charts))
}

// insert puts an entry into the text and leaves every other line alone.
func insert(text []byte, a addon) ([]byte, error) {
	key, node, err := addonsNode(text)
	if err != nil {
		return nil, err
	}
	indent, at := 2, len(text)
	head := []byte(addonsKey + ":\n")
	if key != nil {
		if !isNull(node) && (node.Kind != yaml3.MappingNode || node.Style&yaml3.FlowStyle != 0) {
			return nil, fault.Usagef("line %d: %s is not written as a block", key.Line, addonsKey)
		}
		if len(node.Content) > 0 {
			indent = node.Content[0].Column - 1
		}
		head, at = nil, lineEnd(text, key.Line)
	}
	block, err := a.block(indent)
	if err != nil {
		return nil, err
	}
	before := text[:at]
	if len(before) > 0 && !bytes.HasSuffix(before, []byte("\n")) {
		before = append(slices.Clone(before), '\n')
	}
	return slices.Concat(before, head, block, text[at:]), nil
}

// lineEnd is the offset behind a line, counted from 1.
func lineEnd(text []byte, line int) int {
	at := 0
	for range line {
		n := bytes.IndexByte(text[at:], '\n')
		if n < 0 {
			return len(text)
		}
		at += n + 1
	}
	return at
}

// block is the entry as YAML, indented.
func (a addon) block(indent int) ([]byte, error) {
	var b bytes.Buffer
	e := yaml3.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(map[string]addon{a.Name: a}); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for line := range bytes.Lines(b.Bytes()) {
		fmt.Fprintf(&out, "%*s%s", indent, "", line)
	}
	return out.Bytes(), nil
}

// modeOf keeps the mode of a file that is there; a new one is its owner's.
func modeOf(name string) os.FileMode {
	if st, err := os.Stat(name); err == nil {
		return st.Mode().Perm()
	}
	return 0o600
}

// secret writes hsm-secret unless there is one.
func (o *initOptions) secret(name string) (made bool, err error) {
	if _, err := os.Stat(name); err == nil {
		return false, nil
	}
	s, err := o.hsm.Secret(o.App)
	defer s.Password.Zero()
	if err != nil {
		return false, err
	}
	for _, w := range s.Warnings {
		o.Warn("%s", w)
	}
	text, err := s.YAML()
	if err != nil {
		return false, err
	}
	defer clear(text)
	out, err := o.seal.Seal(o.App, name, text)
	if err != nil {
		return false, err
	}
	return true, app.WriteFile(name, out, 0o600)
}

// placeArchive puts the archive where the entry has it: by a hard link, else
// as a copy, since an archive is large and a symbolic link would lead out of
// the folder that ICP's installer mounts.
func (o *initOptions) placeArchive(ctx context.Context, to string) (placed bool, err error) {
	if o.archive == "" {
		return false, nil
	}
	from, err := os.Stat(o.archive)
	if err != nil {
		return false, fault.New(fault.NotFound, "find archive", o.archive, err).WithHint("check --archive")
	}
	if !from.Mode().IsRegular() {
		return false, fault.Newf(fault.Usage, "place archive", o.archive, "it is not a file").WithHint("join the parts of a split archive first: cat PARTS > FILE")
	}
	if there, err := os.Stat(to); err == nil {
		if os.SameFile(from, there) || (from.Size() == there.Size() && from.ModTime().Equal(there.ModTime())) {
			return false, nil
		}
		return false, fault.Newf(fault.Conflict, "place archive", to, "another file is there").WithHint("move it away, or leave --archive out to use it")
	}
	if os.Link(o.archive, to) == nil {
		return true, nil
	}
	in, err := os.Open(o.archive)
	if err != nil {
		return false, fault.New(fault.Other, "read archive", o.archive, err)
	}
	defer in.Close()
	stop := context.AfterFunc(ctx, func() { _ = in.Close() }) // ends the copy
	defer stop()
	err = file.WriteFrom(to, 0o644, func(w io.Writer) error { _, err := io.Copy(w, in); return err })
	if err == nil {
		err = os.Chtimes(to, from.ModTime(), from.ModTime()) // by which the next run knows it
	}
	if err != nil {
		return false, fault.New(fault.Other, "place archive", to, err).WithHint("is there room for it?")
	}
	return true, nil
}
