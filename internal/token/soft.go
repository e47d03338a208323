package token

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/secret"
)

// MakeSoftToken makes a SoftHSM token with this label in dir when there is
// none, and points SoftHSM at dir. The security officer's PIN is random and
// thrown away: nobody needs it again.
func MakeSoftToken(dir, module, name string, pin secret.Value) error {
	dir, err := filepath.Abs(dir) // so that other programs can use its configuration too
	if err != nil {
		return fault.New(fault.Other, "find folder", dir, err)
	}
	tokens := filepath.Join(dir, "tokens")
	if strings.ContainsAny(tokens, "=#\n") { // its parser splits lines there
		return fault.Newf(fault.Usage, "make token in", dir, "SoftHSM's configuration bears no '=' and no '#' in a path").WithHint("choose another data folder")
	}
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return fault.New(fault.Other, "make folder", tokens, err)
	}
	conf := filepath.Join(dir, "softhsm2.conf")
	text := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", tokens)
	if have, err := os.ReadFile(conf); err != nil || string(have) != text {
		if err := os.WriteFile(conf+".new", []byte(text), 0o600); err != nil {
			return fault.New(fault.Other, "write", conf, err)
		}
		if err := os.Rename(conf+".new", conf); err != nil {
			return fault.New(fault.Other, "write", conf, err)
		}
	}
	if err := os.Setenv("SOFTHSM2_CONF", conf); err != nil {
		return err
	}
	if _, err := os.Stat(module); errors.Is(err, fs.ErrNotExist) {
		return nil // Open says it better
	}
	ctx := pkcs11.New(module)
	if ctx == nil {
		return nil // Open says it better
	}
	defer ctx.Destroy()
	if err := ctx.Initialize(); err != nil {
		return fault.New(fault.Unreachable, "initialise SoftHSM in", dir, err)
	}
	defer func() { _ = ctx.Finalize() }() // a token made here is seen by others only after it
	return initSoft(ctx, module, name, pin)
}

func initSoft(ctx *pkcs11.Ctx, module, name string, pin secret.Value) error {
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		return fault.New(fault.Unreachable, "list SoftHSM's slots", "", err)
	}
	// A run that was killed between the steps below left a token without a user
	// PIN. It holds nothing, nobody knows its officer's PIN, and it is passed
	// over here and by Open: a new one is made beside it.
	free := -1
	for _, s := range slots {
		ti, err := ctx.GetTokenInfo(s)
		if err != nil {
			return fault.New(fault.Unreachable, "read SoftHSM's token", "", err)
		}
		if trim(ti.Label) == name && ti.Flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0 {
			return nil
		}
		if ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			free = int(s)
		}
	}
	if free < 0 {
		return fault.Newf(fault.NotFound, "make token", name, "SoftHSM offers no free slot")
	}
	so := make([]byte, 16)
	if _, err := rand.Read(so); err != nil {
		return err
	}
	soPIN := hex.EncodeToString(so)
	if err := ctx.InitToken(uint(free), soPIN, name); err != nil {
		return fault.New(fault.Unreachable, "make token", name, err)
	}
	h, err := ctx.OpenSession(uint(free), pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fault.New(fault.Unreachable, "open token", name, err)
	}
	defer func() { _ = ctx.CloseSession(h) }()
	if err := ctx.Login(h, pkcs11.CKU_SO, soPIN); err != nil {
		return fault.New(fault.Unreachable, "open token as security officer", name, err)
	}
	if err := newShim(module).initPIN(h, pin.Reveal()); err != nil {
		return fault.New(fault.Usage, "set the PIN of token", name, err).WithHint("SoftHSM takes 4 to 255 characters")
	}
	return ctx.Logout(h)
}
