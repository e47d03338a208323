package hsmcmd

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/ask"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

type lunaFetchOptions struct {
	*app.App
	hsmIP, port string
	fingerprint string
	outputFile  string
	add         bool
	timeout     time.Duration
}

func newLunaFetchCmd(a *app.App, run func(context.Context, *lunaFetchOptions) error) *cobra.Command {
	o := &lunaFetchOptions{App: a}
	if run == nil {
		run = runLunaFetch
	}
	cmd := &cobra.Command{
		Use: "fetch-server --hsm-ip IP", Short: "Fetch the appliance's certificate, and save it when it is the right one", Args: cobra.NoArgs,
		Long: `Show the certificate that a Luna appliance presents, and its SHA-256 fingerprint.

Anybody on the way could present one. So it is saved only when its fingerprint is --fingerprint,
or when you have compared it with the appliance's console ("sysconf fingerprint ntls") and say so.`,
		Example: `  kmsctl hsm luna-cert fetch-server --hsm-ip 10.0.0.1
  kmsctl hsm luna-cert fetch-server --hsm-ip 10.0.0.1 --fingerprint 3A:5F:… --output-file server.pem
  kmsctl hsm luna-cert fetch-server --hsm-ip 10.0.0.2 --output-file server.pem --add`,
		RunE: func(cmd *cobra.Command, _ []string) error { return app.Run(cmd.Context(), o, run) },
	}
	f := cmd.Flags()
	f.StringVar(&o.hsmIP, "hsm-ip", "", "address of the appliance")
	f.StringVar(&o.port, "port", hsm.LunaPort, "port of the appliance")
	f.StringVar(&o.fingerprint, "fingerprint", "", "SHA-256 fingerprint that the certificate must have")
	f.StringVar(&o.outputFile, "output-file", "", "save the certificate here; without it, only show it")
	f.BoolVar(&o.add, "add", false, "add to the file's certificates: there is more than one appliance")
	f.DurationVar(&o.timeout, "timeout", 10*time.Second, "give up after this time")
	return cmd
}

// Check holds the rules of the flags.
func (o *lunaFetchOptions) Check() error {
	var errs []error
	if o.hsmIP == "" {
		errs = append(errs, fault.Usagef("--hsm-ip: missing"))
	} else if _, err := netip.ParseAddr(o.hsmIP); err != nil {
		errs = append(errs, fault.Usagef("--hsm-ip: %q is not an IP address", o.hsmIP))
	}
	if o.fingerprint != "" {
		fp, err := hsm.ParseFingerprint(o.fingerprint)
		if err != nil {
			errs = append(errs, fault.Usagef("--fingerprint: %w", err).WithHint("64 hex digits, with or without colons"))
		}
		o.fingerprint = fp
	}
	if o.add && o.outputFile == "" {
		errs = append(errs, fault.Usagef("--add: needs --output-file"))
	}
	return errors.Join(errs...)
}

type serverCert struct {
	Address     string    `json:"address"`
	Subject     string    `json:"subject"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	Fingerprint string    `json:"fingerprint"` // SHA-256
	Verified    bool      `json:"verified"`    // it is --fingerprint, or the person said so
	OutputFile  string    `json:"outputFile,omitempty"`
}

// Table is one fact a row.
func (s serverCert) Table() ([]string, [][]string) {
	rows := [][]string{{"appliance", s.Address}, {"subject", s.Subject},
		{"valid", s.NotBefore.Format(time.DateOnly) + " to " + s.NotAfter.Format(time.DateOnly)}, {"SHA-256", s.Fingerprint}}
	if s.OutputFile != "" {
		rows = append(rows, []string{"saved", s.OutputFile})
	}
	return nil, rows
}

func runLunaFetch(ctx context.Context, o *lunaFetchOptions) error {
	addr := net.JoinHostPort(o.hsmIP, o.port)
	tctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	c, err := hsm.LunaServer(tctx, addr)
	if err != nil {
		return fault.New(fault.Unreachable, "fetch the certificate of appliance", o.hsmIP, err).
			WithHint("is the address right, is NTLS running (lunash: service status ntls), and does a firewall let port %s through?", o.port)
	}
	out := serverCert{Address: addr, Subject: c.Subject.String(), NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC(), Fingerprint: hsm.Fingerprint(c.Raw)}
	if o.fingerprint != "" && o.fingerprint != out.Fingerprint {
		return fault.Newf(fault.BadContent, "fetch the certificate of appliance", o.hsmIP, "its SHA-256 fingerprint is %s, not %s", out.Fingerprint, o.fingerprint).
			WithHint("nothing was saved; compare with the appliance's console: somebody may stand between")
	}
	out.Verified = o.fingerprint != ""
	if o.outputFile == "" {
		return o.Print(out)
	}
	text, there, err := o.content(c)
	if err != nil {
		return err
	}
	if !out.Verified && !there {
		if err := o.confirm(out); err != nil {
			return err
		}
		out.Verified = true
	}
	if !there {
		if err := app.WriteFile(o.outputFile, text, 0o644); err != nil {
			return err
		}
	}
	out.OutputFile = o.outputFile
	return o.Print(out)
}

// content is what the file will hold; there means that it holds it already.
func (o *lunaFetchOptions) content(c *x509.Certificate) (text []byte, there bool, err error) {
	mine := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	old, err := readIfThere(o.outputFile)
	switch {
	case err != nil || old == nil:
		return mine, false, err
	case bytes.Contains(old, mine):
		return old, true, nil
	case !o.add:
		return nil, false, fault.Newf(fault.Conflict, "write", o.outputFile, "it holds other certificates").
			WithHint("--add for one more appliance; delete the file if the appliance has a new certificate")
	}
	return append(append(bytes.TrimRight(old, "\r\n"), '\n'), mine...), false, nil
}

func (o *lunaFetchOptions) confirm(s serverCert) error {
	t, err := o.OpenAsker("--fingerprint")
	if err != nil {
		return fault.New(fault.KindOf(err), "", "", err).WithHint("the appliance shows %s; compare it with its console, then give it as --fingerprint", s.Fingerprint)
	}
	defer func() { _ = t.Close() }() // nothing was written
	_, rows := s.Table()
	for _, r := range rows {
		fmt.Fprintf(o.Err, "%-10s %s\n", r[0], strings.Join(r[1:], " "))
	}
	answer, err := t.Ask(ask.Question{Title: "Is that the fingerprint at the appliance's console?", Options: []string{"no", "yes"},
		Help: `at the appliance: "sysconf fingerprint ntls"`})
	if err != nil {
		return fault.New(fault.Stopped, "save the certificate of appliance", s.Address, err)
	}
	if answer != "yes" {
		return fault.Newf(fault.Stopped, "save the certificate of appliance", s.Address, "you said that the fingerprint is another").
			WithHint("nothing was saved; somebody may stand between")
	}
	return nil
}
