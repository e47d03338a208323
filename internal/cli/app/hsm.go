package app

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/pattern"
	"github.com/kmsctl/kmsctl/internal/render"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/templates"
)

// HSMFlags are the settings of the manual's two files.
type HSMFlags struct {
	hsm.Settings
	Password     SecretInput
	ServerCAFile string
	ClientCerts  []string // IP=FILE
	ClientKeys   []string
	Nodes        []string // must all have a pair
	Registry     string
	Version      string
	Namespace    string

	filed struct { // what a values file has that belongs into hsm-secret
		password secret.Value
		clients  map[string]render.Pair
	}
}

// AddModel puts --model and its completion into the command.
func (f *HSMFlags) AddModel(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.Model, "model", "", "HSM model: "+strings.Join(hsm.Names(), ", "))
	_ = cmd.RegisterFlagCompletionFunc("model", cobra.FixedCompletions(hsm.Names(), cobra.ShellCompDirectiveNoFileComp))
}

// AddNamespace puts --namespace into fs.
func (f *HSMFlags) AddNamespace(fs *pflag.FlagSet) {
	fs.StringVarP(&f.Namespace, "namespace", "n", "kube-system", "namespace of the release")
}

// AddSecret puts what hsm-secret needs into fs.
func (f *HSMFlags) AddSecret(fs *pflag.FlagSet) {
	f.Password = SecretInput{Name: "hsm-password", Title: "HSM password", Exact: true}
	f.Password.Add(fs)
	fs.StringVar(&f.ServerCAFile, "server-ca-file", "", "gemalto: PEM file with the appliances' certificates")
	fs.StringArrayVar(&f.ClientCerts, "client-cert", nil, "gemalto: IP=FILE, a management node's certificate; repeatable")
	fs.StringArrayVar(&f.ClientKeys, "client-key", nil, "gemalto: IP=FILE, a management node's key; repeatable")
	fs.StringSliceVar(&f.Nodes, "node", nil, "gemalto: IP of a management node, which must have a pair; repeatable")
}

// AddValues puts what overrides_hsm.yaml needs into fs.
func (f *HSMFlags) AddValues(fs *pflag.FlagSet) {
	f.AddSettings(fs)
	fs.StringVar(&f.Registry, "registry", "", "site's registry, HOST[:PORT][/PATH]; without a path, images are looked for under "+render.Organisation)
	fs.StringVar(&f.Version, "version", templates.ChartVersion, "tag of the images")
}

// AddSettings puts the settings of the HSM into fs.
func (f *HSMFlags) AddSettings(fs *pflag.FlagSet) {
	fs.StringVar(&f.HSMIP, "hsm-ip", "", "gemalto, thales: address of the HSM")
	fs.StringVar(&f.RFSIP, "rfs-ip", "", "thales: address of the remote file system")
	fs.StringVar(&f.SlotID, "slot-id", "", "thales: slot, in decimal digits")
	fs.StringVar(&f.ESN, "esn", "", "thales: serial number of the Connect, as in 1111-2222-3333")
	fs.StringVar(&f.KeyHash, "key-hash", "", "thales: hash of the Connect's key, 40 hex digits")
	fs.StringVar(&f.TokenLabel, "token-label", "", "label of the token, where slots move")
	fs.BoolVar(&f.FIPS, "fips", false, "the token is in FIPS mode")
	fs.BoolVar(&f.ClearData, "clear-data", false, "the manual's clear_data in the settings; it clears nothing by itself, 'kmsctl hsm clear' and 'kmsctl upgrade --clear-data' do")
}

// AddValuesFile puts --values into fs, a file that the other flags beat.
func AddValuesFile(fs *pflag.FlagSet, path *string) {
	fs.StringVar(path, "values", "", "overrides_hsm.yaml, plain or encrypted, with any value of the chart")
}

// ValuesFile reads overrides_hsm.yaml and lets the flags beat it; afterwards
// the flags hold what is in force.
func (f *HSMFlags) ValuesFile(a *App, path string, pass *PassphraseFlags) (render.Overrides, error) {
	raw, err := a.ReadInput("--values", path, 1<<20)
	if err != nil {
		return render.Overrides{}, err
	}
	text, err := pass.Open(a, path, raw)
	if err != nil {
		return render.Overrides{}, err
	}
	defer clear(text)
	o, err := render.ParseOverrides(text)
	if err != nil {
		return o, fault.New(fault.Usage, "read", path, err).WithHint("%s", cmp.Or(fault.HintOf(err), "make it with `kmsctl render overrides`"))
	}
	f.Beat(&o)
	return o, nil
}

// Beat puts the flags that were given into o, where they win, and what o says
// into the other flags.
func (f *HSMFlags) Beat(o *render.Overrides) {
	f.filed.password, f.filed.clients = o.Password, o.Clients
	for _, p := range []struct{ flag, file *string }{
		{&f.Model, &o.HSM.Model}, {&f.HSMIP, &o.HSM.HSMIP}, {&f.RFSIP, &o.HSM.RFSIP}, {&f.SlotID, &o.HSM.SlotID}, {&f.ESN, &o.HSM.ESN},
		{&f.KeyHash, &o.HSM.KeyHash}, {&f.TokenLabel, &o.HSM.TokenLabel},
	} {
		if *p.flag == "" {
			*p.flag = *p.file
		}
		*p.file = *p.flag
	}
	f.FIPS = f.FIPS || o.HSM.FIPS
	f.ClearData = f.ClearData || o.HSM.ClearData
	o.HSM.FIPS, o.HSM.ClearData = f.FIPS, f.ClearData
	if m, err := hsm.Lookup(f.Model); err == nil && f.Registry != "" {
		o.Images = render.Images(f.Registry, f.Version, m)
	}
}

// CheckModel checks --model alone.
func (f *HSMFlags) CheckModel() (hsm.Model, error) {
	if f.Model == "" {
		return hsm.Model{}, fault.Usagef("--model: missing").WithHint("one of: %s", strings.Join(hsm.Names(), ", "))
	}
	m, err := hsm.Lookup(f.Model)
	if err != nil {
		return m, fault.Usagef("--model: %w", err).WithHint("one of: %s", strings.Join(hsm.Names(), ", "))
	}
	return m, nil
}

var (
	esnForm     = pattern.Lazy(`^[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{4}$`)
	keyHashForm = pattern.Lazy(`^[0-9a-f]{40}$`)
	tagForm     = pattern.Lazy(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`) // OCI distribution specification
	registry    = pattern.Lazy(`^[A-Za-z0-9.\-]+(:[0-9]+)?(/[a-z0-9._\-/]+)?$|^\[[0-9a-fA-F:]+\](:[0-9]+)?(/[a-z0-9._\-/]+)?$`)
)

// CheckValues holds the rules of overrides_hsm.yaml for the model.
func (f *HSMFlags) CheckValues() error {
	m, err := f.CheckModel()
	if err != nil {
		return err
	}
	errs := []error{
		f.needAddress(m.NeedsHSMIP, "hsm-ip", f.HSMIP), f.needAddress(m.NeedsRFSIP, "rfs-ip", f.RFSIP),
		f.only(m.NeedsSlot || f.SlotID == "", "slot-id"), f.only(m.Name == "thales" || f.ESN == "", "esn"), f.only(m.Name == "thales" || f.KeyHash == "", "key-hash"),
	}
	if m.NeedsSlot && f.SlotID == "" {
		errs = append(errs, fault.Usagef("--slot-id: missing").WithHint("the slot that `nfkminfo` and `cklist` show, as in 492971158"))
	}
	if f.SlotID != "" {
		if _, err := strconv.ParseUint(f.SlotID, 10, 64); err != nil {
			errs = append(errs, fault.Usagef("--slot-id: %q is not a number of 64 bits in decimal", f.SlotID))
		}
	}
	for _, c := range []struct {
		flag, value string
		form        func() *regexp.Regexp
		like        string
	}{
		{"esn", f.ESN, esnForm, "1111-2222-3333"}, {"key-hash", f.KeyHash, keyHashForm, "40 hex digits in lower case"},
		{"registry", f.Registry, registry, "registry.example:5000/ibmcom"}, {"version", f.Version, tagForm, templates.ChartVersion},
	} {
		if c.value != "" && !c.form().MatchString(c.value) {
			errs = append(errs, fault.Usagef("--%s: %q has not the form of %s", c.flag, c.value, c.like))
		}
	}
	return errors.Join(errs...)
}

func (f *HSMFlags) needAddress(needed bool, flag, value string) error {
	switch {
	case needed && value == "":
		return fault.Usagef("--%s: missing for the model %s", flag, f.Model)
	case !needed:
		return f.only(value == "", flag)
	}
	if _, err := netip.ParseAddr(value); err != nil {
		return fault.Usagef("--%s: %q is not an IP address", flag, value)
	}
	return nil
}

func (f *HSMFlags) only(ok bool, flag string) error {
	if ok {
		return nil
	}
	return fault.Usagef("--%s: the model %s has none", flag, f.Model).WithHint("leave it out")
}

// CheckSecret holds the rules of hsm-secret's flags for the model.
func (f *HSMFlags) CheckSecret() error {
	m, err := f.CheckModel()
	if err != nil {
		return err
	}
	errs := []error{f.Password.Check()}
	if !m.NeedsCerts {
		errs = append(errs, f.only(f.ServerCAFile == "", "server-ca-file"), f.only(len(f.ClientCerts) == 0, "client-cert"),
			f.only(len(f.ClientKeys) == 0, "client-key"), f.only(len(f.Nodes) == 0, "node"))
		return errors.Join(errs...)
	}
	if f.ServerCAFile == "" {
		errs = append(errs, fault.Usagef("--server-ca-file: missing for the model %s", f.Model).WithHint("the appliance's server.pem: see `kmsctl hsm luna-cert fetch-server`"))
	}
	certs, err1 := byIP("client-cert", f.ClientCerts)
	keys, err2 := byIP("client-key", f.ClientKeys)
	errs = append(errs, err1, err2)
	if len(certs)+len(keys)+len(f.filed.clients) == 0 && err1 == nil && err2 == nil {
		errs = append(errs, fault.Usagef("--client-cert, --client-key: missing for the model %s", f.Model).
			WithHint("give one pair for each management node: --client-cert 10.0.0.11=node1.pem --client-key 10.0.0.11=node1Key.pem"))
	}
	for ip := range certs {
		if keys[ip] == "" {
			errs = append(errs, fault.Usagef("--client-key: missing for %s, which has a certificate", ip))
		}
	}
	for ip := range keys {
		if certs[ip] == "" {
			errs = append(errs, fault.Usagef("--client-cert: missing for %s, which has a key", ip))
		}
	}
	for _, ip := range f.Nodes {
		if _, filed := f.filed.clients[ip]; certs[ip] == "" && !filed {
			errs = append(errs, fault.Usagef("--node %s: has no --client-cert", ip).WithHint("a pod on that node could not reach the HSM; see `kmsctl hsm luna-cert create --node %s`", ip))
		}
	}
	slices.SortStableFunc(errs, func(a, b error) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	return errors.Join(errs...)
}

func byIP(flag string, given []string) (map[string]string, error) {
	out := map[string]string{}
	var errs []error
	for _, g := range given {
		ip, file, ok := strings.Cut(g, "=")
		a, err := netip.ParseAddr(ip)
		switch {
		case !ok || file == "":
			errs = append(errs, fault.Usagef("--%s: %q is not IP=FILE", flag, g))
		case err != nil:
			errs = append(errs, fault.Usagef("--%s: %q is not an IP address", flag, ip))
		case !a.Is4():
			errs = append(errs, fault.Usagef("--%s: %s is an IPv6 address, and a Secret's key may hold no colon", flag, ip).WithHint("register the node at the appliance by its IPv4 address"))
		case out[ip] != "":
			errs = append(errs, fault.Usagef("--%s: %s is given twice", flag, ip))
		default:
			out[ip] = file
		}
	}
	return out, errors.Join(errs...)
}

// Overrides is overrides_hsm.yaml by the flags.
func (f *HSMFlags) Overrides() (render.Overrides, error) {
	m, err := f.CheckModel()
	if err != nil {
		return render.Overrides{}, err
	}
	o := render.Overrides{HSM: f.Settings}
	if f.Registry != "" {
		o.Images = render.Images(f.Registry, f.Version, m)
	}
	if m.Name == "thales" && (f.ESN == "" || f.KeyHash == "") {
		o.Warnings = append(o.Warnings, "without --esn and --key-hash the Connect is trusted on first use: compare both with its front panel")
	}
	return o, nil
}

// SecretGiven says whether the HSM's password can be had without a question.
func (f *HSMFlags) SecretGiven(a *App) bool {
	return f.Password.Given(a) || !f.filed.password.Empty()
}

// PairsGiven says whether certificate pairs were given one by one.
func (f *HSMFlags) PairsGiven() bool { return len(f.ClientCerts)+len(f.filed.clients) > 0 }

// Secret is hsm-secret by the flags, checked as far as that goes without an
// HSM. The caller zeroes the password.
func (f *HSMFlags) Secret(a *App) (render.Secret, error) { return f.SecretWith(a, secret.Value{}) }

// SecretWith is Secret with a password that is known already, unless empty.
func (f *HSMFlags) SecretWith(a *App, password secret.Value) (render.Secret, error) {
	s := render.Secret{Password: password, Namespace: f.Namespace, Clients: map[string]render.Pair{}}
	maps.Copy(s.Clients, f.filed.clients)
	var err error
	if f.ServerCAFile != "" {
		if s.ServerCA, err = readFile("--server-ca-file", f.ServerCAFile); err != nil {
			return s, err
		}
	}
	certs, err1 := byIP("client-cert", f.ClientCerts)
	keys, err2 := byIP("client-key", f.ClientKeys)
	if err := errors.Join(err1, err2); err != nil {
		return s, err
	}
	for ip, file := range certs {
		cert, err1 := readFile("--client-cert", file)
		key, err2 := readFile("--client-key", keys[ip])
		if err := errors.Join(err1, err2); err != nil {
			return s, err
		}
		s.Clients[ip] = render.Pair{Cert: cert, Key: key}
	}
	if err := a.CheckCertificates(&s); err != nil {
		return s, err
	}
	switch {
	case !password.Empty():
	case !f.Password.Given(a) && !f.filed.password.Empty():
		s.Password = f.filed.password
	default:
		s.Password, err = f.Password.Read(a, true)
	}
	if err == nil {
		err = CheckPassword(s.Password, "the HSM password")
	}
	return s, err
}

// CheckPassword refuses a password that would cost a login attempt.
func CheckPassword(v secret.Value, object string) error {
	if err := hsm.CheckPIN(v.Reveal()); err != nil {
		return fault.New(fault.Usage, "check", object, err).WithHint("write it without a line break: printf %%s \"$PASSWORD\" > file")
	}
	return nil
}

// CheckCertificates checks the certificates of an hsm-secret.
func (a *App) CheckCertificates(s *render.Secret) error {
	var errs []error
	if len(s.ServerCA) > 0 {
		errs = append(errs, hsm.CheckServerCA(s.ServerCA, a.Now()))
	}
	for _, c := range s.SortedClients() {
		warns, err := hsm.CheckClient(c.IP, c.Cert, c.Key, a.Now())
		errs = append(errs, err)
		for _, w := range warns {
			s.Warnings = append(s.Warnings, string(w))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fault.New(fault.Usage, "check the certificates of", render.SecretName, err).WithHint("see `kmsctl hsm luna-cert --help`")
	}
	return nil
}

func readFile(flag, path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.New(fault.NotFound, "read", path, err).WithHint("check %s", flag)
	}
	return b, nil
}

// Warn prints a warning on stderr, in every format.
func (a *App) Warn(format string, args ...any) {
	fmt.Fprintf(a.Err, "kmsctl: warning: "+format+"\n", args...)
}

// TokenFlags name a PKCS#11 library, and a token by one of three ways.
type TokenFlags struct {
	Module string `json:"module,omitempty"`
	Label  string `json:"tokenLabel,omitempty"`
	Serial string `json:"tokenSerial,omitempty"`
	Slot   string `json:"slot,omitempty"`
}

// Add puts the flags into fs; without says what counts without --module.
func (f *TokenFlags) Add(fs *pflag.FlagSet, without string) {
	fs.StringVar(&f.Module, "module", "", "path of the PKCS#11 library"+without)
	fs.StringVar(&f.Label, "token-label", "", "label of the token")
	fs.StringVar(&f.Serial, "token-serial", "", "serial number of the token")
	fs.StringVar(&f.Slot, "slot", "", "slot id; slots can move, so prefer label or serial")
}

// Check holds the rules of the flags.
func (f *TokenFlags) Check() error {
	chosen := 0
	for _, v := range []string{f.Label, f.Serial, f.Slot} {
		if v != "" {
			chosen++
		}
	}
	_, err := ParseSlot(f.Slot)
	if chosen > 1 {
		err = errors.Join(err, fault.Usagef("--token-label, --token-serial, --slot: only one of them"))
	}
	return err
}

// ParseSlot reads the value of --slot; empty is none.
func ParseSlot(s string) (*uint64, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || fmt.Sprint(n) != s {
		return nil, fault.Usagef("--slot: %q is not a number", s)
	}
	return &n, nil
}
