// Package archivecmd has the verbs for archives, one file each.
package archivecmd

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/cli/app"
)

// New gives the commands of this package.
func New(a *app.App) []*cobra.Command {
	cmd := &cobra.Command{Use: "archive", Short: "Build, inspect and verify archives of charts and images",
		Long: `Build, inspect and verify archives of charts and images: a tar.gz with manifest.json,
manifest.yaml, charts/ and images/, as IBM's Passport Advantage has them.

ARCHIVE is a file, a folder with the parts of a split archive (x.tar.gz.aa, x.tar.gz.ab),
or - for standard input.`}
	cmd.AddCommand(newBuildCmd(a, nil), newInspectCmd(a, nil), newVerifyCmd(a, nil), newRepackCmd(a, nil), newDiffCmd(a, nil), newExtractCmd(a, nil))
	return []*cobra.Command{cmd}
}

// contents is what inspect and verify print.
type contents struct {
	Archive  string       `json:"archive"`
	Format   string       `json:"format"` // kmsctl or foreign
	Index    string       `json:"index,omitempty"`
	Verified bool         `json:"verified"`
	Charts   []chartLine  `json:"charts"`
	Images   []imageLine  `json:"images"`
	Members  []memberLine `json:"members"`
	Lists    []listLine   `json:"lists"`
	Base     string       `json:"base,omitempty"`
}

type chartLine struct {
	Archive        string   `json:"archive"`
	RepositoryKeys []string `json:"repositoryKeys"`
	RegistryKeys   []string `json:"registryKeys"`
}

type imageLine struct {
	Name     string `json:"name"` // as the manifest has it, or as the image's own tar
	Member   string `json:"member"`
	Platform string `json:"platform"`
	Layers   int    `json:"layers"`
	Size     int64  `json:"size"`
}

type memberLine struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	Digest string `json:"digest,omitempty"`
}

type listLine struct {
	Name      string   `json:"name"`
	Platforms []string `json:"platforms"`
}

// Table is charts and images, one a line.
func (c contents) Table() ([]string, [][]string) {
	var rows [][]string
	for _, x := range c.Charts {
		rows = append(rows, []string{"chart", x.Archive, "", "", ""})
	}
	for _, i := range c.Images {
		rows = append(rows, []string{"image", i.Name, i.Platform, fmt.Sprint(i.Layers), bytesText(i.Size)})
	}
	for _, l := range c.Lists {
		rows = append(rows, []string{"list", l.Name, fmt.Sprint(l.Platforms), "", ""})
	}
	return []string{"KIND", "NAME", "PLATFORM", "LAYERS", "SIZE"}, rows
}

// bytesText is a size for people.
func bytesText(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%.1f KiB", float64(n)/1024)
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

func describe(a *archive.Archive, c *archive.Content, verified bool) contents {
	out := contents{Archive: a.Name, Format: "foreign", Verified: verified, Charts: []chartLine{}, Images: []imageLine{}, Members: []memberLine{}, Lists: []listLine{}}
	if a.Index != nil {
		out.Format, out.Index, out.Base = "kmsctl", archive.DigestOf(a.Raw), a.Index.Base
	}
	for _, x := range c.Manifest.Charts {
		out.Charts = append(out.Charts, chartLine{x.Archive, orEmpty(x.RepositoryKeys), orEmpty(x.RegistryKeys)})
	}
	for _, m := range c.Members {
		out.Members = append(out.Members, memberLine{m.Name, m.Size, m.Digest})
	}
	for _, i := range c.Manifest.Images {
		if !i.IsList() {
			continue
		}
		l := listLine{Name: i.Ref(), Platforms: []string{}}
		for _, r := range i.References {
			l.Platforms = append(l.Platforms, r.Platform.String())
		}
		out.Lists = append(out.Lists, l)
	}
	for _, i := range c.Images {
		line := imageLine{Member: i.Member, Platform: i.Platform.String(), Layers: len(i.Layers), Size: i.Size}
		for _, r := range i.Refs {
			line.Name = r
			out.Images = append(out.Images, line)
		}
		if len(i.Refs) == 0 {
			line.Name = "(no name)"
			out.Images = append(out.Images, line)
		}
	}
	return out
}

func orEmpty(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}
