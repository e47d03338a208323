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
