package token

// #cgo CFLAGS: -O2 -Wall -Wextra
// #cgo LDFLAGS: -ldl
// #cgo noescape kms_gcm
// #cgo nocallback kms_gcm
// #cgo noescape kms_crypt
// #cgo nocallback kms_crypt
// #cgo noescape kms_sign
// #cgo nocallback kms_sign
// #cgo noescape kms_flags
// #cgo nocallback kms_flags
// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"unsafe"

	"github.com/miekg/pkcs11"
)

// shim makes the hot calls directly, on the function list of a library that
// the binding has loaded and initialised.
type shim struct{ list unsafe.Pointer }

func newShim(path string) shim {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	return shim{C.kms_list(p)}
}

func ptr(b []byte) *C.uchar { return (*C.uchar)(unsafe.Pointer(unsafe.SliceData(b))) }

// maxSignature is that of RSA-4096.
const maxSignature = 512

// room is what a token may add to a text: padding, a tag, an IV.
const room = 64

// progress says how far a call came: an error after begun is about the data.
type progress int

const (
	begun     progress = 1 // the token took key and mechanism
	changedIV progress = 2 // and wrote an IV of its own over ours
)

// gcm gives the output, and leaves in iv what the token left there.
func (h shim) gcm(decrypt, random bool, s pkcs11.SessionHandle, k pkcs11.ObjectHandle, mechanism uint, iv, aad, in []byte) (out []byte, p progress, err error) {
	out = make([]byte, len(in)+room)
	n, started := C.kms_ul(len(out)), C.int(0)
	r := C.kms_gcm(h.list, flagOf(decrypt), flagOf(random), C.kms_ul(s), C.kms_ul(k), C.kms_ul(mechanism), ptr(iv), C.kms_ul(len(iv)),
		ptr(aad), C.kms_ul(len(aad)), ptr(in), C.kms_ul(len(in)), ptr(out), &n, &started)
	out, err = cut(out, n, r)
	return out, progress(started), err
}

func (h shim) crypt(decrypt bool, s pkcs11.SessionHandle, k pkcs11.ObjectHandle, mechanism uint, param, in []byte) (out []byte, p progress, err error) {
	out = make([]byte, len(in)+room)
	n, started := C.kms_ul(len(out)), C.int(0)
	r := C.kms_crypt(h.list, flagOf(decrypt), C.kms_ul(s), C.kms_ul(k), C.kms_ul(mechanism), ptr(param), C.kms_ul(len(param)),
		ptr(in), C.kms_ul(len(in)), ptr(out), &n, &started)
	out, err = cut(out, n, r)
	return out, progress(started), err
}

// cut refuses a length beyond the buffer, should a token claim one.
func cut(out []byte, n C.kms_ul, r C.kms_ul) ([]byte, error) {
	if r == 0 && uint64(n) > uint64(len(out)) {
		r = pkcs11.CKR_DEVICE_ERROR
	}
	if r != 0 {
		return nil, pkcs11.Error(r)
	}
	return out[:n], nil
}

// flags reads attributes that are yes or no.
func (h shim) flags(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, attrs ...uint) ([]bool, error) {
	types, values, out := make([]C.kms_ul, len(attrs)), make([]byte, len(attrs)), make([]bool, len(attrs))
	for i, a := range attrs {
		types[i] = C.kms_ul(a)
	}
	if r := C.kms_flags(h.list, C.kms_ul(s), C.kms_ul(o), unsafe.SliceData(types), ptr(values), C.kms_ul(len(types))); r != 0 {
		return nil, pkcs11.Error(r)
	}
	for i, v := range values {
		out[i] = v != 0
	}
	return out, nil
}

func (h shim) sign(s pkcs11.SessionHandle, k pkcs11.ObjectHandle, mechanism uint, in []byte) ([]byte, error) {
	out := make([]byte, maxSignature)
	n := C.kms_ul(len(out))
	r := C.kms_sign(h.list, C.kms_ul(s), C.kms_ul(k), C.kms_ul(mechanism), ptr(in), C.kms_ul(len(in)), ptr(out), &n)
	return cut(out, n, r)
}

func flagOf(b bool) C.int {
	if b {
		return 1
	}
	return 0
}

func (h shim) login(s pkcs11.SessionHandle, pin []byte) error {
	if r := C.kms_login(h.list, C.kms_ul(s), ptr(pin), C.kms_ul(len(pin))); r != 0 {
		return pkcs11.Error(r)
	}
	return nil
}

func (h shim) initPIN(s pkcs11.SessionHandle, pin []byte) error {
	if r := C.kms_init_pin(h.list, C.kms_ul(s), ptr(pin), C.kms_ul(len(pin))); r != 0 {
		return pkcs11.Error(r)
	}
	return nil
}
