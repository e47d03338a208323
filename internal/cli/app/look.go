package app

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// PullFlags say how to read images from a registry, for commands that only
// look. Without a user the Docker configuration counts.
type PullFlags struct {
	user     string
	password SecretInput
	token    SecretInput
	tls      TLSFlags
	known    secret.Value // password that comes from elsewhere
}

// Add puts the flags into fs.
func (f *PullFlags) Add(fs *pflag.FlagSet) {
	f.password = SecretInput{Name: "registry-password", Title: "password of the registry's user"}
	fs.StringVar(&f.user, "registry-user", "", "user at the registry; without it the Docker configuration counts")
	f.password.Add(fs)
	f.token = SecretInput{Name: "registry-token", Title: "bearer token for the registry or its token service"}
	f.token.Add(fs)
	f.tls.add(fs, "registry-", "the registry")
}

// Check holds the rules of the flags.
func (f *PullFlags) Check() error {
	return errors.Join(f.password.Check(), f.token.Check(), f.tls.check("registry-"))
}

// Given says whether the flags or the environment say as whom.
func (f *PullFlags) Given(a *App) bool { return f.user != "" || f.token.Given(a) }

// As sets a user and a password that come from elsewhere than the flags.
func (f *PullFlags) As(user string, password secret.Value) { f.user, f.known = user, password }

// Pull is the same registry for who only looks.
func (f *DeliveryFlags) Pull() *PullFlags {
	return &PullFlags{user: f.User, password: f.password, token: f.token, tls: f.registry.or(f.all)}
}

// LookAtImages asks the registries of the references what they are for. All
// that are missing are named at once.
func (a *App) LookAtImages(ctx context.Context, f *PullFlags, refs []string, insecure bool) ([]diagnose.Image, error) {
	registries := map[string]*image.Registry{}
	var out []diagnose.Image
	var errs []error
	for _, ref := range refs {
		host, repo, tag, err := splitRef(ref)
		if err != nil {
			return nil, err
		}
		r := registries[host]
		if r == nil {
			const tries = 2 // who only looks has somebody waiting
			if r, err = a.OpenPull(ctx, f, host, insecure, tries); err != nil {
				return nil, err
			}
			registries[host] = r
		}
		archs, err := architectures(ctx, r, repo, tag)
		if err != nil {
			errs = append(errs, about(ref, err))
			continue
		}
		out = append(out, diagnose.Image{Ref: ref, Architectures: archs})
	}
	return out, errors.Join(errs...)
}

func about(ref string, err error) error {
	var f *fault.Error
	if errors.As(err, &f) && f.Object != "" {
		return err
	}
	return fault.New(fault.KindOf(err), "find image", ref, err)
}

// OpenPull reaches a registry to read from it; tries is as in image.Options.
func (a *App) OpenPull(ctx context.Context, f *PullFlags, host string, insecure bool, tries int) (*image.Registry, error) {
	o := image.Options{Host: host, Insecure: insecure, User: f.user, Tries: tries, UserAgent: "kmsctl/" + a.Version,
		CAFile: f.tls.CA, CertFile: f.tls.Cert, KeyFile: f.tls.Key}
	if o.Password = f.known; f.user != "" && f.known.Empty() {
		var err error
		if o.Password, err = f.password.Read(a, false); err != nil {
			return nil, err
		}
	}
	if f.token.Given(a) {
		var err error
		if o.Token, err = f.token.Read(a, false); err != nil {
			return nil, err
		}
	}
	return image.Dial(ctx, o)
}

func splitRef(ref string) (host, repo, tag string, err error) {
	host, rest, ok := strings.Cut(ref, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" {
		return "", "", "", fault.Newf(fault.NotReady, "find image", ref, "it names no registry, so the nodes would look in their runtime's default one").
			WithHint("give --registry, or load the archive, which points the chart at the site's registry")
	}
	repo, tag, ok = strings.Cut(rest, ":")
	if !ok || tag == "" {
		return "", "", "", fault.Newf(fault.NotReady, "find image", ref, "it has no tag").WithHint("set the tag in the values, or --version")
	}
	return host, repo, tag, nil
}

// architectures reads an image's config, or a list's entries.
func architectures(ctx context.Context, r *image.Registry, repo, tag string) ([]string, error) {
	_, body, ok, err := r.Manifest(ctx, repo, tag)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fault.New(fault.NotFound, "", "", errors.New("it is not in the registry")).WithHint("load the archive with `kmsctl load`, or correct --registry and --version")
	}
	type platform struct {
		Architecture string `json:"architecture"`
	}
	var m struct {
		Config    struct{ Digest string }
		Manifests []struct{ Platform platform }
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return nil, fault.New(fault.BadContent, "", "", err)
	}
	var out []string
	for _, e := range m.Manifests {
		if a := e.Platform.Architecture; a != "" && a != "unknown" && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	if len(out) > 0 {
		return out, nil
	}
	const most = 1 << 20
	b, err := r.ReadBlob(ctx, repo, m.Config.Digest, most)
	if err != nil {
		return nil, err
	}
	var config platform
	if err := json.Unmarshal(b, &config); err != nil {
		return nil, fault.New(fault.BadContent, "", "", err)
	}
	return []string{config.Architecture}, nil
}
