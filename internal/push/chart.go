package push

import (
	"context"
	"io"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Chart gives one chart of the archive as Load would put it into a repository:
// pointed at the registry, or as it is when the options have no Host. A version
// of "" is any.
func Chart(ctx context.Context, o Options, name, version string) ([]byte, error) {
	if !o.Archive.Seekable() {
		return nil, fault.Newf(fault.Usage, "read a chart of archive", o.Archive.Name, "it can be read only once").WithHint("give a file instead of standard input")
	}
	m, pkgs, err := readCharts(ctx, o)
	if err != nil {
		return nil, err
	}
	l := &load{Options: o}
	for _, i := range m.Images {
		l.names = append(l.names, i.Name)
	}
	var have []string
	for _, in := range m.Charts {
		pkg, ok := pkgs[in.Archive]
		if !ok {
			continue
		}
		c, err := chart.Open(in.Archive, pkg)
		if err != nil {
			return nil, err
		}
		have = append(have, c.Name+" "+c.Version)
		if c.Name != name || (version != "" && c.Version != version) {
			continue
		}
		if o.Host == "" {
			return pkg, nil
		}
		return l.rewrite(c, in, pkg)
	}
	return nil, fault.Newf(fault.NotFound, strings.TrimSpace("find chart "+name+" "+version)+" in archive", o.Archive.Name, "its charts are: %s", strings.Join(have, ", ")).
		WithHint("see `kmsctl archive inspect`")
}

// readCharts reads the manifest and the packed charts by their members.
func readCharts(ctx context.Context, o Options) (ppa.Manifest, map[string][]byte, error) {
	pkgs := map[string][]byte{}
	if o.Archive.Index != nil {
		m, err := o.Archive.Manifest()
		if err != nil {
			return m, nil, err
		}
		for _, c := range m.Charts {
			if pkgs[c.Archive], err = o.Archive.Member(c.Archive); err != nil {
				return m, nil, err
			}
		}
		return m, pkgs, nil
	}
	m, _, err := o.Archive.Head(ctx, o.Limits)
	if err != nil {
		return m, nil, err
	}
	wanted := func(member string) bool {
		return slices.ContainsFunc(m.Charts, func(c ppa.Chart) bool { return c.Archive == member })
	}
	missing := len(m.Charts)
	err = o.Archive.Walk(ctx, o.Limits, nil, func(member string, size int64, r io.Reader) error {
		if !wanted(member) {
			return nil
		}
		b, err := archive.ReadSmall(member, size, r)
		if err != nil {
			return err
		}
		pkgs[member] = b
		if missing--; missing == 0 {
			return archive.ErrStop
		}
		return nil
	})
	return m, pkgs, err
}
