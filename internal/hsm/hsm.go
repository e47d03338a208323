// Package hsm has the HSM models as data: what each needs, what its fields,
// secret keys, values keys and image are called in the product's manual. A new
// model is one new entry here.
package hsm

import (
	"fmt"
	"slices"
	"strings"
)

// Model is one kind of HSM.
type Model struct {
	Name        string   // value of hsm.hsm_model, and the image block's key in the values
	Title       string   // for people
	Image       string   // image of the connector's pod
	NeedsHSMIP  bool     // hsm.hsm_ip
	NeedsRFSIP  bool     // hsm.rfs_ip
	NeedsSlot   bool     // hsm.slotId, a string of decimal digits
	NeedsCerts  bool     // ServerCAFile, <IP>, <IP>-key in hsm-secret
	Module      string   // where the vendor's client puts its PKCS#11 library
	Files       []string // of that client, besides, which the chart's configuration names
	DefaultPass string   // the manual's pass phrase, where any will do
}

// The models of the manual.
var models = []Model{
	{Name: "gemalto", Title: "SafeNet Luna Network HSM 6.2", Image: "kms-gemaltov6", NeedsHSMIP: true, NeedsCerts: true,
		Module: "/usr/safenet/lunaclient/lib/libCryptoki2_64.so", Files: []string{"/usr/safenet/lunaclient/bin/openssl.cnf"}},
	{Name: "thales", Title: "nCipher nShield Connect 12.40.2", Image: "kms-thalesv12", NeedsHSMIP: true, NeedsRFSIP: true, NeedsSlot: true,
		Module: "/opt/nfast/toolkits/pkcs11/libcknfast.so", Files: []string{"/opt/nfast/sbin/hardserver"}},
	{Name: "softhsm", Title: "SoftHSM (a token in software: for trials, not for secrets that matter)", Image: "kms-softhsm",
		Module: "/usr/lib/softhsm/libsofthsm2.so"},
}

// Names lists the models' names.
func Names() []string {
	out := make([]string, len(models))
	for i, m := range models {
		out[i] = m.Name
	}
	return out
}

// OfImage finds a model by the image of its connector.
func OfImage(image string) (Model, bool) {
	i := slices.IndexFunc(models, func(m Model) bool { return m.Image == image })
	if i < 0 {
		return Model{}, false
	}
	return models[i], true
}

// Lookup finds a model by name; the error names those that exist.
func Lookup(name string) (Model, error) {
	i := slices.IndexFunc(models, func(m Model) bool { return m.Name == name })
	if i < 0 {
		return Model{}, fmt.Errorf("unknown HSM model %q: known are %s", name, strings.Join(Names(), ", "))
	}
	return models[i], nil
}

// Settings are the values of overrides_hsm.yaml's hsm block.
type Settings struct {
	Model      string
	HSMIP      string
	RFSIP      string
	SlotID     string // decimal digits, a string in the manual
	ClearData  bool
	ESN        string // nShield: serial number of the Connect, as in 1111-2222-3333
	KeyHash    string // nShield: hash of the Connect's key; with ESN nothing is trusted on first use
	TokenLabel string // finds the token where slots move
	FIPS       bool   // the token is in FIPS mode
}

// CheckPIN refuses what `echo PIN | base64` does to a PIN: white space or
// control characters around or in it. A PIN that the HSM refuses costs one of
// few tries, so the check comes before any login.
func CheckPIN(pin []byte) error {
	if len(pin) == 0 {
		return fmt.Errorf("the HSM password is empty")
	}
	for i, c := range pin {
		if c < 0x20 || c == 0x7f {
			return fmt.Errorf("the HSM password has a control character (byte %d of %d): was it made by `echo` without -n?", i+1, len(pin))
		}
	}
	if pin[0] == ' ' || pin[len(pin)-1] == ' ' {
		return fmt.Errorf("the HSM password begins or ends with a blank")
	}
	return nil
}
