package archive

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/ppa"
)

const otherManifest = "the manifest and the images disagree; get the archive again from its maker"

// Placed are the images whose members the manifest names.
func Placed(m ppa.Manifest) map[string]bool {
	out := map[string]bool{}
	for _, i := range m.Images {
		out[i.Ref()] = out[i.Ref()] || i.Archive != ""
	}
	return out
}

// Unplaced says whether the manifest leaves open which member holds an image,
// as a manifest.yaml alone does.
func Unplaced(m ppa.Manifest) bool {
	has := Placed(m)
	return slices.ContainsFunc(m.Images, func(i ppa.Image) bool {
		if i.IsList() {
			return !slices.ContainsFunc(i.References, func(r ppa.Reference) bool { return has[r.Ref()] })
		}
		return !has[i.Ref()]
	})
}

// Assign finds the members of images for which the manifest names none, by the
// names in the members' own tars.
func Assign(m ppa.Manifest, members []ContentImage) (ppa.Manifest, error) {
	if !Unplaced(m) {
		return m, nil
	}
	var images []ppa.Image
	var errs []error
	has := Placed(m)
	for _, i := range m.Images {
		if i.Archive != "" {
			images = append(images, i)
			continue
		}
		refs := []ppa.Reference{{Name: i.Name, Tag: i.Tag}}
		if len(i.References) > 0 {
			refs = i.References
		}
		n := 0
		for _, r := range refs {
			if has[r.Ref()] {
				n++
				continue
			}
			in, err := holder(members, r)
			if err != nil {
				errs = append(errs, err)
			}
			if in != "" {
				images = append(images, ppa.Image{Name: r.Name, Tag: r.Tag, Archive: in, References: []ppa.Reference{r}})
				n++
			}
		}
		if n == 0 {
			errs = append(errs, fmt.Errorf("image %q is in no member", i.Ref()))
		}
		if i.IsList() {
			images = append(images, i)
		}
	}
	m.Images = images
	if len(errs) > 0 {
		return m, fault.New(fault.BadContent, "read archive", "", errors.Join(errs...)).WithHint(otherManifest)
	}
	return m, nil
}

// holder is the member with an image of that name, "" when there is none; two
// that are not the same are an error.
func holder(members []ContentImage, r ppa.Reference) (string, error) {
	var found []ContentImage
	for _, held := range members {
		if Named(held.Refs, r.Ref()) || (r.PullRepository != "" && Named(held.Refs, r.PullRepository)) {
			found = append(found, held)
		}
	}
	if len(found) == 0 {
		return "", nil
	}
	for _, f := range found[1:] {
		if !bytes.Equal(f.Config, found[0].Config) {
			return found[0].Member, fmt.Errorf("image %q stands in %q and in %q, and is not the same there", r.Ref(), found[0].Member, f.Member)
		}
	}
	return found[0].Member, nil
}

// ListOf is the list of a tar that the manifest means: the one of that name, or
// the only one where nothing has a name; -1 when there is none.
func (t *Images) ListOf(e ppa.Image) int {
	unnamed := !slices.ContainsFunc(t.Images, func(i Image) bool { return len(i.Refs) > 0 })
	return slices.IndexFunc(t.Lists, func(l List) bool {
		return Named(l.Refs, e.Ref()) || (unnamed && len(t.Lists) == 1)
	})
}

// Pick finds the image of a tar that the manifest means: the only one, or the
// one of that name.
func Pick(got *Images, e ppa.Image) (Image, error) {
	if len(got.Images) == 1 {
		return got.Images[0], nil
	}
	var found []Image
	var have []string
	for _, i := range got.Images {
		if Named(i.Refs, e.Ref()) {
			found = append(found, i)
		}
		have = append(have, i.Refs...)
	}
	for _, i := range found {
		if !bytes.Equal(i.Config, found[0].Config) {
			return i, fault.Newf(fault.BadContent, "", "", "member %q holds two images of that name, and they are not the same", e.Archive).
				WithHint("get the archive again from its maker")
		}
	}
	if len(found) > 0 {
		return found[0], nil
	}
	return Image{}, fault.Newf(fault.BadContent, "", "", "member %q does not hold it, but %q", e.Archive, have).
		WithHint(otherManifest)
}

// Named says whether one of an image's names is ref, a registry's name in
// front or not.
func Named(refs []string, ref string) bool {
	for _, r := range refs {
		if r == ref || strings.HasSuffix(r, "/"+ref) {
			return true
		}
	}
	return false
}

// CheckPlatform compares what the manifest says of an image's platform with
// what the image says itself.
func CheckPlatform(e ppa.Image, has ppa.Platform) error {
	for _, r := range e.References {
		if said := r.Platform.Architecture; r.Ref() == e.Ref() && said != "" && has.Architecture != "" && said != has.Architecture {
			return badContent(fmt.Errorf("image %q is for %s, as the manifest says, and for %s, as the image itself does", e.Ref(), said, has.Architecture)).WithHint(otherManifest)
		}
	}
	return nil
}
