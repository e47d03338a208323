package setupcmd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kmsctl/kmsctl/internal/archive"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/image"
	"github.com/kmsctl/kmsctl/templates"
)

// question is one question of the wizard. Its name is the flag that it fills.
type question struct {
	name     string
	title    string
	help     string
	optional func(o *options) bool                                 // may stay empty; nil: never
	secret   bool                                                  // typed twice, kept in memory alone
	when     func(o *options) bool                                 // asked at all; nil: always
	options  func(o *options) []string                             // one of these
	preset   func(ctx context.Context, o *options) string          // what is likely
	check    func(o *options, s string) error                      // its form; asked again
	verify   func(ctx context.Context, o *options, s string) error // as check, at a terminal only: it takes a moment
	try      func(ctx context.Context, o *options, s string) error // whether it works from here; told, and taken
}

func (q question) mayBeEmpty(o *options) bool { return q.optional != nil && q.optional(o) }

func always(*options) bool { return true }

func hasArchive(o *options) bool { return o.archive != "" }

func needs(f func(hsm.Model) bool) func(*options) bool {
	return func(o *options) bool {
		m, err := hsm.Lookup(o.hsm.Model)
		return err == nil && f(m)
	}
}

var (
	needsHSM   = needs(func(m hsm.Model) bool { return m.NeedsHSMIP })
	needsRFS   = needs(func(m hsm.Model) bool { return m.NeedsRFSIP })
	needsSlot  = needs(func(m hsm.Model) bool { return m.NeedsSlot })
	needsCerts = needs(func(m hsm.Model) bool { return m.NeedsCerts })
)

// needsPairs: no pair was given file by file.
func needsPairs(o *options) bool { return needsCerts(o) && !o.hsm.PairsGiven() }

// asksVolumes: neither the flags nor --values say on what the data are kept.
func asksVolumes(o *options) bool {
	return !o.rel.NoClaims() && (o.settings == nil || o.settings.Values["persistence"] == nil)
}

const nothing = "none"

// questions in the order of asking. What a model needs is data of package hsm.
func questions() []question {
	return []question{
		{name: "model", title: "HSM model", help: "gemalto is a SafeNet Luna, thales an nCipher nShield, softhsm a token in software for trials",
			options: func(*options) []string { return hsm.Names() },
			check:   func(_ *options, s string) error { _, err := hsm.Lookup(s); return err }},
		{name: "archive", title: "Archive with images and chart", help: "the file key-management-hsm-amd64.tar.gz; none when both are loaded already", optional: always,
			preset: foundArchive, check: checkArchive, verify: lookIntoArchive},
		{name: "registry", title: "Registry for the images", help: "HOST[:PORT][/PATH] that this machine and the nodes reach, as in registry.example:5000",
			check: func(_ *options, s string) error {
				if s == "" || strings.Contains(s, "://") || strings.ContainsAny(s, " @?#") {
					return errors.New("give HOST[:PORT][/PATH], without a scheme")
				}
				return nil
			}, when: hasArchive, try: tryRegistry},
		{name: "repo", title: "Chart repository", help: "a folder, oci://HOST/PATH, icp+https://HOST:8443/mgmt-repo/charts, or a name that `kmsctl repo add` gave; none installs straight from the archive",
			optional: hasArchive, when: func(o *options) bool { return o.chartFile == "" },
			preset: func(_ context.Context, o *options) string {
				if o.delivery.Registry == "" {
					return ""
				}
				return "oci://" + o.delivery.Host() + "/charts"
			}, check: checkRepo},
		{name: "namespace", title: "Namespace of the release", help: "the manual's is kube-system",
			preset: func(context.Context, *options) string { return "kube-system" }, check: checkName},
		{name: "version", title: "Version of the chart", help: "empty for the newest in the repository", optional: always, preset: archiveVersion},
		{name: "hsm-ip", title: "Address of the HSM", help: "the IP address of the Luna appliance or the nShield Connect", when: needsHSM, check: checkIP, try: tryHSM},
		{name: "rfs-ip", title: "Address of the remote file system", help: "the IP address of the machine with the Security World's files (RFS)", when: needsRFS, check: checkIP},
		{name: "slot-id", title: "Slot", help: "decimal digits, as the commands nfkminfo and cklist show it: 492971158", when: needsSlot, check: func(_ *options, s string) error {
			if _, err := strconv.ParseUint(s, 10, 64); err != nil {
				return errors.New("give a number in decimal digits")
			}
			return nil
		}},
		{name: "esn", title: "Serial number of the Connect", help: "as in 1111-2222-3333, at the front panel; with the key hash nothing is trusted on first use", when: needsSlot, optional: always, check: checkForm("esn")},
		{name: "key-hash", title: "Key hash of the Connect", help: "40 hex digits, at the front panel", when: needsSlot, optional: always, check: checkForm("key-hash")},
		{name: "server-ca-file", title: "File with the appliance's certificate", help: "fetch it with: kmsctl hsm luna-cert fetch-server", when: needsCerts,
			preset: existing("server.pem"), check: checkServerCA},
		{name: "node", title: "Addresses of the nodes, with commas between", help: "every node that may run the pods needs a certificate pair", when: needsPairs,
			preset: nodesOfCluster, check: checkNodes},
		{name: "cert-dir", title: "Folder with the nodes' certificate pairs", help: "IP.pem and IPKey.pem of each node; make them with: kmsctl hsm luna-cert create", when: needsPairs,
			preset: existing("certs"), check: checkCertDir},
		{name: "hsm-password", title: "HSM password", help: "of the partition or the token; it goes into the Secret hsm-secret and into no file", secret: true,
			check: func(_ *options, s string) error { return hsm.CheckPIN([]byte(s)) }},
		{name: "storage-class", title: "Storage class of the volumes", help: "empty for the cluster's default", optional: always,
			when: asksVolumes, preset: defaultClass, check: checkClass},
		{name: "admin-key-file", title: "File for the administrator's API key", help: "it is made with the first installation, and only its hash is kept in the cluster",
			preset: func(context.Context, *options) string { return "admin.key" }, check: required},
	}
}

func checkRepo(o *options, s string) error {
	if s == nothing && !hasArchive(o) {
		return errors.New("without an archive the chart must come from a repository")
	}
	return required(o, s)
}

func required(_ *options, s string) error {
	if s == "" {
		return errors.New("an answer is needed")
	}
	return nil
}

func checkIP(_ *options, s string) error {
	if _, err := netip.ParseAddr(s); err != nil {
		return errors.New("give an IP address, as in 10.0.0.1")
	}
	return nil
}

func checkName(_ *options, s string) error {
	ok := s != "" && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-'
	for _, r := range s {
		ok = ok && (r == '-' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9')
	}
	if !ok {
		return errors.New("give a name of lower-case letters, digits and dashes")
	}
	return nil
}

// checkForm checks one flag as the verbs do.
func checkForm(name string) func(*options, string) error {
	return func(o *options, s string) error {
		if s == "" {
			return nil
		}
		f := o.hsm
		f.HSMIP, f.RFSIP, f.SlotID, f.ESN, f.KeyHash = "10.0.0.1", "10.0.0.1", "1", "", ""
		switch name {
		case "esn":
			f.ESN = s
		case "key-hash":
			f.KeyHash = s
		}
		return f.CheckValues()
	}
}

func foundArchive(_ context.Context, _ *options) string {
	for _, pattern := range []string{"key-management-hsm*.tar.gz", "addon/key-management-hsm*.tar.gz", "cluster/addon/key-management-hsm*.tar.gz"} {
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			return found[0]
		}
	}
	return nothing
}

func checkArchive(_ *options, s string) error {
	if s == nothing {
		return nil
	}
	_, err := os.Stat(s)
	return err
}

// lookIntoArchive reads the manifest; the load itself checks every byte.
func lookIntoArchive(ctx context.Context, o *options, s string) error {
	if s == "" || s == nothing {
		return nil
	}
	a, err := archive.Open(s, o.In)
	if err != nil {
		return err
	}
	defer a.Close()
	m, _, err := a.Head(ctx, archive.DefaultLimits)
	if err != nil {
		return err
	}
	if len(m.Charts) == 0 {
		return errors.New("there is no chart in it")
	}
	o.chartVersion = ""
	for _, c := range m.Charts {
		name := strings.TrimSuffix(filepath.Base(c.Archive), ".tgz")
		if v, ok := strings.CutPrefix(name, templates.ChartName+"-"); ok {
			o.chartVersion = v
		}
	}
	return nil
}

func archiveVersion(_ context.Context, o *options) string { return o.chartVersion }

const tryTime = 5 * time.Second

func tryRegistry(ctx context.Context, o *options, s string) error {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	host, _, _ := strings.Cut(s, "/")
	_, err := image.Dial(ctx, image.Options{Host: host, Insecure: o.delivery.Insecure, Tries: 1, UserAgent: "kmsctl/" + o.Version})
	if fault.KindOf(err) == fault.Denied {
		return nil // it answers; a login comes later
	}
	return err
}

func tryHSM(ctx context.Context, o *options, s string) error {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	port := "9004"
	if needsCerts(o) {
		port = hsm.LunaPort
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(s, port))
	if err != nil {
		return fmt.Errorf("it does not answer on port %s from here; from the nodes it must: %w", port, err)
	}
	return c.Close()
}

func existing(name string) func(context.Context, *options) string {
	return func(context.Context, *options) string {
		if _, err := os.Stat(name); err != nil {
			return ""
		}
		return name
	}
}

func checkServerCA(o *options, s string) error {
	b, err := os.ReadFile(s)
	if err != nil {
		return err
	}
	return hsm.CheckServerCA(b, o.Now())
}

func splitNodes(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

func nodesOfCluster(ctx context.Context, o *options) string {
	var ips []string
	if c := o.cluster(ctx); c != nil {
		nodes, err := c.Nodes(ctx)
		if err != nil {
			return ""
		}
		for _, n := range nodes {
			if n.Matches(o.nodeLabel) {
				ips = append(ips, n.IP)
			}
		}
	}
	return strings.Join(ips, ",")
}

func checkNodes(_ *options, s string) error {
	nodes := splitNodes(s)
	if len(nodes) == 0 {
		return errors.New("give at least one address")
	}
	for _, n := range nodes {
		if err := hsm.CheckNodeIP(n); err != nil {
			return err
		}
	}
	return nil
}

// checkCertDir wants a good pair of every node.
func checkCertDir(o *options, dir string) error {
	if dir == "" {
		return errors.New("give a folder")
	}
	var errs []error
	for _, ip := range o.hsm.Nodes {
		certFile, keyFile := pairFiles(dir, ip)
		cert, err1 := os.ReadFile(certFile)
		key, err2 := os.ReadFile(keyFile)
		if err := errors.Join(err1, err2); err != nil {
			errs = append(errs, fmt.Errorf("node %s has no pair in %s: make it with `kmsctl hsm luna-cert create --node %s --output-dir %s`", ip, dir, ip, dir))
			continue
		}
		_, err := hsm.CheckClient(ip, cert, key, o.Now())
		clear(key)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func pairFiles(dir, ip string) (cert, key string) {
	return filepath.Join(dir, ip+".pem"), filepath.Join(dir, ip+"Key.pem")
}

// storage is what the cluster offers.
type storage struct {
	names    []string
	standard string
}

func defaultClass(ctx context.Context, o *options) string {
	if o.storage == nil {
		o.storage = &storage{}
		if c := o.cluster(ctx); c != nil {
			all, err := c.StorageClasses(ctx)
			if err != nil {
				return ""
			}
			for _, s := range all {
				o.storage.names = append(o.storage.names, s.Name)
				if s.Default {
					o.storage.standard = s.Name
				}
			}
		}
	}
	return o.storage.standard
}

func checkClass(o *options, s string) error {
	switch {
	case o.storage == nil || len(o.storage.names) == 0:
		return nil // the cluster was not asked, or does not tell
	case s == "" && o.storage.standard == "":
		return fmt.Errorf("the cluster has no default class; it has %s", strings.Join(o.storage.names, ", "))
	case s != "" && !slices.Contains(o.storage.names, s):
		return fmt.Errorf("the cluster has %s", strings.Join(o.storage.names, ", "))
	}
	return nil
}
