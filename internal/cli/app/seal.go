package app

import (
	"errors"

	"github.com/spf13/pflag"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/seal"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// SealFlags say in which form a sensitive file is written.
type SealFlags struct {
	Plain      bool
	Pass       PassphraseFlags
	recipients []string
}

// Add puts the flags into fs.
func (f *SealFlags) Add(fs *pflag.FlagSet) {
	fs.BoolVar(&f.Plain, "plain", false, "clear text instead of an age file")
	fs.StringArrayVar(&f.recipients, "recipient", nil, "age recipient (age1…) who can decrypt; repeatable; without one, a passphrase does")
	f.Pass.Add(fs)
}

// Check holds the rules of the flags.
func (f *SealFlags) Check() error {
	errs := []error{f.Pass.Check()}
	if f.Plain && len(f.recipients) > 0 {
		errs = append(errs, fault.Usagef("--plain, --recipient: only one of them"))
	}
	for _, r := range f.recipients {
		if err := seal.CheckRecipient(r); err != nil {
			errs = append(errs, fault.Usagef("--recipient: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Seal gives text in the form that was asked for. object names it in errors.
func (f *SealFlags) Seal(a *App, object string, text []byte) ([]byte, error) {
	if f.Plain {
		a.Warn("the file holds sensitive information in clear text: encrypt it or delete it when it is not in use")
		return text, nil
	}
	var pass secret.Value
	if len(f.recipients) == 0 {
		var err error
		if pass, err = f.Pass.New(a); err != nil {
			return nil, err
		}
		defer pass.Zero()
	}
	out, err := seal.Seal(text, f.recipients, pass)
	if err != nil {
		return nil, fault.New(fault.Other, "encrypt", object, err)
	}
	return out, nil
}

// BackupPassphrase is the input of the passphrase that opens a backup.
func BackupPassphrase() SecretInput {
	return SecretInput{Name: "backup-passphrase", Title: "passphrase of the backup"}
}
