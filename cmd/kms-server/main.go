// Command kms-server is the KMS: kmsctl runs it for the commands that open the
// KMS, and the pods of the release run it without kmsctl.
package main

import (
	"os"
	"path/filepath"

	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/auditcmd"
	"github.com/kmsctl/kmsctl/internal/cli/servecmd"
)

// version is set by the linker; without it, the build's own information counts.
var version string

func main() {
	cli.Run(cli.Program{
		Name:  filepath.Base(os.Args[0]), // kmsctl runs it under its own name
		Short: "The KMS: API, storage and what opens them",
		Long: `kms-server is the Key Management Service itself. kmsctl runs it for its commands serve, run,
restore and plugin; the images of the release run it alone.`,
		Verbs: cli.Verbs{servecmd.New, auditcmd.New},
	}, version)
}
