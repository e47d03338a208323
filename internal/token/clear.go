package token

import (
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
)

// labelRoot begins the label of every object that any installation made.
const labelRoot = "kms:"

// named is an object of an installation.
type named struct {
	handle        pkcs11.ObjectHandle
	install, what string // what is the label without the installation
}

// seals says whether the object belongs to the sealing key.
func (n named) seals() bool {
	return strings.HasPrefix(n.what, "mseal:") || strings.HasPrefix(n.what, "smac:")
}

// Installations lists what installations of this product left in the token.
// Objects of anybody else are not looked at.
func (t *Token) Installations() (all []hsm.Installation, err error) {
	t.opening.Lock()
	defer t.opening.Unlock()
	err = t.withLogin(func(s pkcs11.SessionHandle) error {
		objects, err := t.listOurs(s)
		if err != nil {
			return err
		}
		for _, o := range objects {
			i := slices.IndexFunc(all, func(i hsm.Installation) bool { return i.ID == o.install })
			if i < 0 {
				i = len(all)
				all = append(all, hsm.Installation{ID: o.install})
			}
			all[i].Objects = append(all[i].Objects, o.what)
		}
		return nil
	})
	for _, i := range all {
		slices.Sort(i.Objects)
	}
	slices.SortFunc(all, func(a, b hsm.Installation) int { return strings.Compare(a.ID, b.ID) })
	return all, err
}

// Clear destroys what has the label of an installation, and nothing else. It
// gives the number of objects that went. The sealing key goes last: while
// anything else is left a proof, when one is given, must open under it. A run
// that was cut off is completed by the next.
func (t *Token) Clear(install string, proof *hsm.Proof) (n int, err error) {
	if install == "" {
		return 0, fault.Usagef("which installation's keys are to go?")
	}
	t.opening.Lock()
	defer t.opening.Unlock()
	var a *abilities
	if proof != nil {
		if a, err = t.abilities(); err != nil {
			return 0, err
		}
	}
	if err := t.withLogin(func(s pkcs11.SessionHandle) error {
		n, err = t.clear(s, a, install, proof)
		return err
	}); err != nil {
		return n, err
	}
	t.mu.Lock()
	ours := t.master != nil && t.master.ids.Install == install
	t.mu.Unlock()
	if ours {
		t.leave()
	}
	return n, nil
}

// withLogin is with on a token that shows its private objects: without a login
// it would look empty.
func (t *Token) withLogin(f func(s pkcs11.SessionHandle) error) error {
	t.mu.Lock()
	logged := t.logged
	t.mu.Unlock()
	if !logged {
		return ErrNotOpen
	}
	return t.with(f)
}

func (t *Token) clear(s pkcs11.SessionHandle, a *abilities, install string, proof *hsm.Proof) (n int, err error) {
	objects, err := t.listOf(s, install)
	if err != nil || len(objects) == 0 {
		return 0, err
	}
	if proof != nil {
		if err := t.proven(s, a, install, objects, *proof); err != nil {
			return 0, err
		}
	}
	slices.SortStableFunc(objects, func(a, b named) int {
		switch {
		case a.seals() == b.seals():
			return 0
		case b.seals():
			return -1
		}
		return 1
	})
	for _, o := range objects {
		t.objects.Lock()
		err := t.ctx.DestroyObject(s, o.handle)
		t.objects.Unlock()
		if is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			continue // named twice, or another replica was first
		}
		if err != nil {
			return n, t.device("destroy a key on", err)
		}
		n++
	}
	if objects, err = t.listOf(s, install); err == nil && len(objects) > 0 {
		err = fault.Newf(fault.NotReady, "destroy the keys of", install, "%d objects are still in the token", len(objects)).
			WithHint("the token says that it destroyed them: look at it with its own tools")
	}
	return n, err
}

// proven checks a proof under the sealing key of an installation. Where that
// is not whole any more, what it sealed is lost and nothing is left to guard.
func (t *Token) proven(s pkcs11.SessionHandle, a *abilities, install string, objects []named, p hsm.Proof) error {
	_, c, err := parseSealed(p.Sealed)
	if err != nil {
		return err
	}
	var keys, macs []pkcs11.ObjectHandle
	for _, o := range objects {
		switch {
		case strings.HasPrefix(o.what, "mseal:"):
			keys = append(keys, o.handle)
		case strings.HasPrefix(o.what, "smac:"):
			macs = append(macs, o.handle)
		}
	}
	if a.suite != hsm.SuiteCBCHMAC {
		macs = []pkcs11.ObjectHandle{0}
	}
	whole := false
	for _, k := range keys {
		for _, m := range macs {
			whole = true
			if _, err := t.decrypt(s, a, keyPair{enc: k, mac: m}, c, p.AAD); err == nil {
				return nil
			} else if Lost(err) {
				return err
			}
		}
	}
	if !whole {
		return nil
	}
	return fault.Newf(fault.BadContent, "clear installation", install, "its sealing key did not make the proof that this was asked for").
		WithHint("somebody wrote to the store: compare with a backup; nothing was destroyed")
}

// listOf lists the objects of one installation.
func (t *Token) listOf(s pkcs11.SessionHandle, install string) ([]named, error) {
	all, err := t.listOurs(s)
	return slices.DeleteFunc(all, func(o named) bool { return o.install != install }), err
}

// listOurs lists the objects of all installations. Labels have no prefix
// search in PKCS#11.
func (t *Token) listOurs(s pkcs11.SessionHandle) (out []named, err error) {
	hs, err := t.listAll(s)
	if err != nil {
		return nil, err
	}
	for _, h := range hs {
		v, err := t.ctx.GetAttributeValue(s, h, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, nil)})
		if err != nil {
			if Lost(err) {
				return nil, t.device("read a label on", err)
			}
			continue // it has no label
		}
		rest, ours := strings.CutPrefix(string(v[0].Value), labelRoot)
		install, what, whole := strings.Cut(rest, ":")
		if ours && whole && install != "" {
			out = append(out, named{h, install, what})
		}
	}
	return out, nil
}

// listAll gives every object.
func (t *Token) listAll(s pkcs11.SessionHandle) (all []pkcs11.ObjectHandle, err error) {
	t.objects.Lock()
	defer t.objects.Unlock()
	if err := t.ctx.FindObjectsInit(s, nil); err != nil {
		return nil, t.device("search", err)
	}
	for {
		hs, _, err := t.ctx.FindObjects(s, 256)
		if err != nil || len(hs) == 0 {
			if ferr := t.ctx.FindObjectsFinal(s); err == nil {
				err = ferr
			}
			if err != nil {
				return nil, t.device("search", err)
			}
			break
		}
		all = append(all, hs...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}
