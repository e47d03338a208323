// Package cli is the root command of the programs, and the one place where an
// error becomes text on stderr and an exit code.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/output"
)

// Program is one of our programs: what it is for, and its commands.
type Program struct {
	Name  string
	Short string
	Long  string
	Verbs Verbs
}

// Verbs give the commands of a program, each those of one package.
type Verbs []func(*app.App) []*cobra.Command

// Run is a program's main: it ends with the exit code.
func Run(p Program, version string) {
	os.Exit(func() int {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		return Main(ctx, p, app.New(Version(version)), os.Args[1:])
	}())
}

// Main runs a program with args (without its name) and gives the exit code.
// ctx ends when the person stops the program.
func Main(ctx context.Context, p Program, a *app.App, args []string) int {
	root := NewRoot(p, a)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	a.Close()
	if err == nil {
		return 0
	}
	if ctx.Err() != nil && fault.KindOf(err) != fault.Stopped {
		err = fault.New(fault.Stopped, "", "", fmt.Errorf("stopped: %w", err)).WithHint("run the same command again to go on")
	}
	printError(a.Err, p.Name, a.Format, err)
	return ExitCode(fault.KindOf(err))
}

// ExitCode is the number that scripts see; the README has the table.
func ExitCode(k fault.Kind) int {
	switch k {
	case fault.Usage:
		return 2
	case fault.Partial:
		return 3
	case fault.Denied:
		return 4
	case fault.NotFound:
		return 5
	case fault.BadContent:
		return 6
	case fault.NotReady:
		return 7
	case fault.Unreachable:
		return 8
	case fault.Conflict:
		return 9
	case fault.Stopped:
		return 130
	case fault.Other:
	}
	return 1
}

// errorJSON is the error object of -o json, on stderr.
type errorJSON struct {
	Code int `json:"code"`
	fault.Said
}

func printError(w io.Writer, program, format string, err error) {
	if format == "json" {
		b, jerr := json.Marshal(errorJSON{ExitCode(fault.KindOf(err)), fault.Say(err)})
		if jerr == nil {
			fmt.Fprintf(w, "%s\n", b)
			return
		}
	}
	for _, line := range strings.Split(strings.TrimSpace(err.Error()), "\n") {
		fmt.Fprintf(w, "%s: error: %s\n", program, line)
	}
	if h := fault.HintOf(err); h != "" {
		fmt.Fprintf(w, "%s: hint: %s\n", program, h)
	}
}

// NewRoot is a program's root command.
func NewRoot(p Program, a *app.App) *cobra.Command {
	var debug bool
	cmd := &cobra.Command{
		Use:   p.Name,
		Short: p.Short,
		Long: p.Long + `

Every flag can also be given in the environment as KMSCTL_<FLAG>, upper case with
underscores (--token-label is KMSCTL_TOKEN_LABEL). A flag beats the environment.`,
		Args:              cobra.NoArgs,
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := fromEnvironment(cmd, a.Getenv); err != nil {
				return err
			}
			if !slices.Contains(output.Formats, a.Format) {
				f := a.Format
				a.Format = output.Formats[0]
				return fault.Usagef("--output: unknown format %q", f).WithHint("use one of: %s", strings.Join(output.Formats, ", "))
			}
			level := slog.Level(100) // above every level in use: off
			if debug {
				level = slog.LevelDebug
			}
			slog.SetDefault(slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level})))
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.SetIn(a.In)
	cmd.SetOut(a.Out)
	cmd.SetErr(a.Err)
	pf := cmd.PersistentFlags()
	pf.StringVarP(&a.Format, "output", "o", output.Formats[0], "format of the result: table, json or yaml")
	pf.BoolVar(&debug, "debug", false, "log what is done to stderr")
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fault.New(fault.Usage, "", "", err).WithHint("see: %s --help", c.CommandPath())
	})
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(output.Formats, cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(newVersionCmd(p.Name, a))
	for _, verbs := range p.Verbs {
		cmd.AddCommand(verbs(a)...)
	}
	usageFaults(cmd)
	return cmd
}

// usageFaults makes wrong arguments of every command usage errors, with the
// same hint as wrong flags.
func usageFaults(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(c *cobra.Command, args []string) error {
			err := check(c, args)
			if err == nil {
				return nil
			}
			return fault.New(fault.Usage, "", "", err).WithHint("see: %s --help", c.CommandPath())
		}
	}
	if cmd.HasSubCommands() && cmd.HasParent() && cmd.RunE == nil && cmd.Run == nil {
		// Without this, cobra prints the help of a group and exits 0 for a
		// subcommand that does not exist.
		cmd.RunE = func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			return fault.Usagef("unknown command %q for %q", args[0], c.CommandPath()).WithHint("see: %s --help", c.CommandPath())
		}
		cmd.Args = cobra.ArbitraryArgs
	}
	for _, c := range cmd.Commands() {
		usageFaults(c)
	}
}

// fromEnvironment sets every flag that was not given from KMSCTL_<FLAG>.
func fromEnvironment(cmd *cobra.Command, getenv func(string) string) error {
	var errs []error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		name := "KMSCTL_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		v := getenv(name)
		if f.Changed || v == "" || f.Name == "help" {
			return
		}
		if err := cmd.Flags().Set(f.Name, v); err != nil {
			errs = append(errs, fault.Usagef("%s: %w", name, err).WithHint("see: %s --help", cmd.CommandPath()))
		}
	})
	return errors.Join(errs...)
}
