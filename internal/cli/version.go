package cli

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
)

type versionResult struct {
	Program  string `json:"program"`
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// Table is one line.
func (v versionResult) Table() ([]string, [][]string) {
	return nil, [][]string{{v.Program + " " + v.Version, v.Go, v.Platform}}
}

func newVersionCmd(program string, a *app.App) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Example: "  " + program + " version -o json",
		RunE: func(*cobra.Command, []string) error {
			return a.Print(versionResult{program, a.Version, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH})
		},
	}
}

// Version is the linker's word, else the build information's, else "devel".
func Version(linked string) string {
	if linked != "" {
		return linked
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" && bi.Main.Version != "(devel)" {
		return bi.Main.Version
	}
	return "devel"
}
