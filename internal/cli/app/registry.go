package app

import (
	"context"
	"errors"
	"path"
	"strings"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/internal/push"
)

// TLSFlags are the three files by which a server is believed and ourselves
// shown to it.
type TLSFlags struct{ CA, Cert, Key string }

func (f *TLSFlags) add(fs *pflag.FlagSet, prefix, of string) {
	fs.StringVar(&f.CA, prefix+"ca-file", "", "PEM file of the CA that signed the certificate of "+of)
	fs.StringVar(&f.Cert, prefix+"cert-file", "", "PEM file of a client certificate for "+of)
	fs.StringVar(&f.Key, prefix+"key-file", "", "PEM file of that certificate's key")
}

func (f *TLSFlags) check(prefix string) error {
	if (f.Cert == "") != (f.Key == "") {
		return fault.Usagef("--%scert-file, --%skey-file: give both or none", prefix, prefix)
	}
	return nil
}

// or fills what is not given from the flags that count for all.
func (f TLSFlags) or(all TLSFlags) TLSFlags {
	if f.CA == "" {
		f.CA = all.CA
	}
	if f.Cert == "" {
		f.Cert, f.Key = all.Cert, all.Key
	}
	return f
}

// DeliveryFlags say where images and charts go, and as whom.
type DeliveryFlags struct {
	Registry  string
	Repo      string
	Namespace string
	Map       string
	Insecure  bool
	User      string
	ChunkSize int64

	all, registry     TLSFlags
	password, token   SecretInput
	charts            repoAccess
	putPath, syncPath string
	putForm           bool
}

const defaultMap = "{prefix}/{namespace}/{path}"

// SiteAt is where a load with no other flag than --registry puts images.
func SiteAt(registry string) *DeliveryFlags {
	return &DeliveryFlags{Registry: registry, Map: defaultMap}
}

// Add puts the flags into fs.
func (f *DeliveryFlags) Add(fs *pflag.FlagSet) {
	f.password = SecretInput{Name: "registry-password", Title: "password of the registry's user"}
	f.token = SecretInput{Name: "registry-token", Title: "bearer token for the registry or its token service"}
	fs.StringVar(&f.Registry, "registry", "", "registry for the images, as HOST[:PORT][/PATH]")
	fs.StringVar(&f.Repo, "repo", "", "chart repository: a folder, oci://HOST/PATH, icp+https://…, cm+https://…, or a name that repo add gave")
	fs.StringVar(&f.Namespace, "namespace", "", "namespace (project) in the registry that the images go to")
	fs.StringVar(&f.Map, "map", defaultMap, "repository of an image, from {prefix} (the path of --registry), {namespace}, {path} (as in the manifest), {name} (its last part), {flat} (its parts joined by -)")
	fs.BoolVar(&f.Insecure, "insecure", false, "allow plain HTTP and certificates that nobody vouches for")
	fs.StringVar(&f.User, "registry-user", "", "user at the registry; without it the Docker configuration counts")
	fs.StringVar(&f.putPath, "repo-put-path", "{file}", "path of an upload behind an icp+https:// URL; {file} is the package's name")
	fs.BoolVar(&f.putForm, "repo-put-form", false, "upload to an icp+https:// repository as a form with the field chart")
	fs.StringVar(&f.syncPath, "repo-sync-path", "/helm-api/api/v2/synch", "path by which an icp+https:// repository's catalog is synchronised; empty: not at all")
	fs.Int64Var(&f.ChunkSize, "chunk-size", 16<<20, "bytes that an upload sends at once")
	f.password.Add(fs)
	f.token.Add(fs)
	f.all.add(fs, "", "registry and chart repository alike")
	f.registry.add(fs, "registry-", "the registry")
	f.charts.add(fs)
}

// Check holds the rules of the flags.
func (f *DeliveryFlags) Check(a *App) error {
	errs := []error{f.all.check(""), f.registry.check("registry-"), f.charts.check(), f.password.Check(), f.token.Check()}
	if f.Registry == "" {
		errs = append(errs, fault.Usagef("--registry: missing").WithHint("give the site's registry, as in --registry registry.example:5000"))
	} else if strings.Contains(f.Registry, "://") || strings.ContainsAny(f.Registry, " @?#") {
		errs = append(errs, fault.Usagef("--registry: %q is not HOST[:PORT][/PATH]", f.Registry).WithHint("leave the scheme out, as in --registry registry.example:5000/kms"))
	}
	if f.User != "" && !f.password.Given(a) {
		errs = append(errs, fault.Usagef("--registry-user: needs a password").WithHint("give --registry-password-file or --registry-password-stdin, or set KMSCTL_REGISTRY_PASSWORD"))
	}
	if f.User == "" && f.password.Given(a) {
		errs = append(errs, fault.Usagef("--registry-password-file: needs --registry-user"))
	}
	if f.ChunkSize < 1<<16 {
		errs = append(errs, fault.Usagef("--chunk-size: %d is under 65536", f.ChunkSize))
	}
	if _, err := mapped(f.Map, "", "", "org/name"); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Host is the registry's HOST[:PORT].
func (f *DeliveryFlags) Host() string {
	host, _, _ := strings.Cut(f.Registry, "/")
	return host
}

func (f *DeliveryFlags) prefix() string {
	_, p, _ := strings.Cut(f.Registry, "/")
	return strings.Trim(p, "/")
}

// Repository is where an image goes: the one rule for images and values.
func (f *DeliveryFlags) Repository(name string) string {
	out, err := mapped(f.Map, f.prefix(), f.Namespace, name)
	if err != nil {
		return name // Check has seen the template
	}
	return out
}

// RegistryValue is what keys of a registry alone get in a chart's values: the
// place before the part of the rule that names the image, which the chart puts
// behind it.
func (f *DeliveryFlags) RegistryValue() string {
	at := f.Map
	for _, part := range []string{"{path}", "{name}", "{flat}"} {
		at, _, _ = strings.Cut(at, part)
	}
	at = at[:strings.LastIndexByte(at, '/')+1] // a part of a name is no place
	place := strings.NewReplacer("{prefix}", f.prefix(), "{namespace}", f.Namespace).Replace(at)
	return strings.Trim(path.Join(f.Host(), place), "/")
}

// mapped fills the template. A registry in front of an image's name falls
// away; an organisation that the place ends with already is not put in twice.
func mapped(template, prefix, namespace, name string) (string, error) {
	if host, rest, ok := strings.Cut(name, "/"); ok && strings.ContainsAny(host, ".:") {
		name = rest
	}
	if template == defaultMap {
		at := strings.Trim(prefix+"/"+namespace, "/")
		if org, _, ok := strings.Cut(name, "/"); ok && path.Base(at) == org {
			name = strings.TrimPrefix(name, org+"/")
		}
	}
	out := strings.NewReplacer("{prefix}", prefix, "{namespace}", namespace, "{path}", name, "{name}", path.Base(name), "{flat}", strings.ReplaceAll(name, "/", "-")).Replace(template)
	if strings.ContainsAny(out, "{} :@") {
		return "", fault.Usagef("--map: %q has a part that is not known", template).WithHint("the parts are {prefix}, {namespace}, {path}, {name} and {flat}")
	}
	out = strings.Trim(path.Join(out), "/")
	if !strings.Contains(template, "{path}") && !strings.Contains(template, "{name}") && !strings.Contains(template, "{flat}") {
		return "", fault.Usagef("--map: %q names no part of the image", template).WithHint("use {path}, {name} or {flat}")
	}
	return out, nil
}

// target makes push's picture of an image registry out of image's.
type target struct{ *image.Registry }

// Stream starts an upload.
func (r target) Stream(ctx context.Context, repo string) push.Upload {
	return streamed{r.NewWriter(ctx, repo)}
}

// streamed says a lost upload in push's words.
type streamed struct{ *image.Writer }

// Write sends one part.
func (s streamed) Write(p []byte) (int, error) {
	n, err := s.Writer.Write(p)
	if errors.Is(err, image.ErrLost) {
		err = push.ErrLost
	}
	return n, err
}

var _ push.Registry = target{}

// OpenRegistry reaches the registry of the flags and logs in.
func (a *App) OpenRegistry(ctx context.Context, f *DeliveryFlags, sessions image.Sessions) (push.Registry, error) {
	o := image.Options{Host: f.Host(), Insecure: f.Insecure, User: f.User, Chunk: f.ChunkSize, Sessions: sessions, UserAgent: "kmsctl/" + a.Version}
	t := f.registry.or(f.all)
	o.CAFile, o.CertFile, o.KeyFile = t.CA, t.Cert, t.Key
	var err error
	if f.User != "" {
		if o.Password, err = f.password.Read(a, false); err != nil {
			return nil, err
		}
	}
	if f.token.Given(a) {
		if o.Token, err = f.token.Read(a, false); err != nil {
			return nil, err
		}
	}
	r, err := image.Dial(ctx, o)
	return target{r}, err
}
