package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cli/servecmd"
)

// TestHelpNamesNoWordAsValue guards against backquotes in a flag's text: pflag
// takes the first quoted words for the name of the value.
func TestHelpNamesNoWordAsValue(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if strings.Contains(f.Usage, "`") {
				t.Errorf("%s --%s: %s", c.CommandPath(), f.Name, f.Usage)
			}
		})
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	all := program
	all.Verbs = append(cli.Verbs{servecmd.New}, all.Verbs...)
	walk(cli.NewRoot(all, app.New("test")))
}

// TestServersCommandsAreKnown: what kms-server can do stands in kmsctl's help,
// in the same words.
func TestServersCommandsAreKnown(t *testing.T) {
	a := app.New("test")
	root := cli.NewRoot(program, a)
	for _, theirs := range servecmd.New(a) {
		ours, _, err := root.Find([]string{theirs.Name()})
		if err != nil || ours.Use != theirs.Use || ours.Short != theirs.Short {
			t.Errorf("%q, %q: kmsctl has %q, %q (%v)", theirs.Use, theirs.Short, ours.Use, ours.Short, err)
		}
	}
}
