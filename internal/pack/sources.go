package pack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/chart"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

// Sources are charts and images that are there as files: packages or folders of
// charts, tars of images (docker save, or an OCI layout), packed or not.
type Sources struct {
	Charts []string
	Images []ImageSource
}

// ImageSource is an image's name:tag in the archive and the file that holds it.
type ImageSource struct{ Ref, File string }

// Build makes an archive of ours of them. It writes them as an archive of the
// old kind into a pipe and repacks that, so that both go one way and are
// checked alike.
func (s *Sources) Build(ctx context.Context, p *Repack) (archive.Build, error) {
	m, files, err := s.manifest()
	if err != nil {
		return archive.Build{}, err
	}
	pr, pw := io.Pipe()
	go func() { _ = pw.CloseWithError(s.write(pw, m, files)) }() // a pipe's close does not fail
	defer func() { _ = pr.Close() }()                            // ends the writer
	a, err := archive.Open("-", pr)
	if err != nil {
		return archive.Build{}, err
	}
	a.Name = "the files given"
	return p.Build(ctx, a)
}

// manifest says what the archive holds; the charts' values tell which of their
// keys name one of the images.
func (s *Sources) manifest() (m ppa.Manifest, files []archive.File, err error) {
	m.Revision = "1.0"
	var names []string
	for n, i := range s.Images {
		name, tag := ppa.SplitRef(i.Ref)
		m.Images = append(m.Images, ppa.Image{Name: name, Tag: tag, Archive: fmt.Sprintf("images/%d.tar", n)})
		names = append(names, name)
	}
	for _, file := range s.Charts {
		c, err := openChart(file)
		if err != nil {
			return m, nil, err
		}
		pkg, err := c.Pack()
		if err != nil {
			return m, nil, err
		}
		keys, err := chart.RepositoryKeys(c.Values(), names)
		if err != nil {
			return m, nil, fault.New(fault.BadContent, "read chart", file, err)
		}
		f := archive.File{Name: "charts/" + c.File(), Data: pkg}
		files = append(files, f)
		m.Charts = append(m.Charts, ppa.Chart{Archive: f.Name, RepositoryKeys: keys})
	}
	return m, files, nil
}

func openChart(file string) (*chart.Chart, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, fault.New(fault.NotFound, "read chart", file, reason(err)).WithHint("check --chart")
	}
	if st.IsDir() {
		return chart.FromFS(os.DirFS(file))
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.New(fault.Other, "read chart", file, reason(err))
	}
	return chart.Open(file, b)
}

func (s *Sources) write(w io.Writer, m ppa.Manifest, files []archive.File) error {
	tw := tar.NewWriter(w)
	for _, f := range append([]archive.File{{Name: ppa.JSONName, Data: m.JSON()}}, files...) {
		if err := tw.WriteHeader(&tar.Header{Name: f.Name, Mode: 0o644, Size: int64(len(f.Data))}); err != nil {
			return err
		}
		if _, err := tw.Write(f.Data); err != nil {
			return err
		}
	}
	for n, i := range s.Images {
		if err := copyFile(tw, m.Images[n].Archive, i.File); err != nil {
			return err
		}
	}
	return tw.Close()
}

func copyFile(tw *tar.Writer, name, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return fault.New(fault.NotFound, "read image", file, reason(err)).WithHint("check --image")
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("it is not a file")
	}
	if err != nil {
		return fault.New(fault.Usage, "read image", file, err).WithHint("give the tar that docker save wrote, or that of an OCI layout")
	}
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: st.Size()}); err != nil {
		return err
	}
	_, err = io.Copy(tw, f)
	return err
}

// ParseImageSource reads NAME:TAG=FILE.
func ParseImageSource(s string) (ImageSource, error) {
	ref, file, ok := strings.Cut(s, "=")
	name, tag := ppa.SplitRef(ref)
	if !ok || name == "" || tag == "" || file == "" {
		return ImageSource{}, fault.Usagef("--image: %q is not NAME:TAG=FILE", s).WithHint("as in --image org/app:1.0=app.tar")
	}
	return ImageSource{ref, file}, nil
}
