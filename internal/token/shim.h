// The calls of PKCS#11 that each wrap and each root key brought back makes, as one crossing from Go to
// C each, with buffers of the caller's size: some tokens answer a length that
// is too small, and some write the IV back into the parameters. Only the
// positions of PKCS#11 2.40's function list are used, so no header of a
// vendor is needed.
#ifndef KMS_SHIM_H
#define KMS_SHIM_H

typedef unsigned long kms_ul;

// kms_list gives the function list of a library that is loaded already.
void *kms_list(const char *path);

// kms_gcm encrypts or decrypts by AES-GCM with a tag of 128 bits. With random
// set, the token's generator fills the IV first. The IV is copied back as the
// token left it. *begun is 1 when the token had taken the key, 2 when it then
// changed the IV.
kms_ul kms_gcm(void *list, int decrypt, int random, kms_ul session, kms_ul key, kms_ul mechanism, unsigned char *iv, kms_ul iv_len,
               unsigned char *aad, kms_ul aad_len, unsigned char *in, kms_ul in_len, unsigned char *out, kms_ul *out_len, int *begun);

// kms_crypt does the same by a mechanism whose parameter is a byte string.
kms_ul kms_crypt(void *list, int decrypt, kms_ul session, kms_ul key, kms_ul mechanism, unsigned char *param, kms_ul param_len,
                 unsigned char *in, kms_ul in_len, unsigned char *out, kms_ul *out_len, int *begun);

// kms_sign signs or authenticates by a mechanism without parameter.
kms_ul kms_sign(void *list, kms_ul session, kms_ul key, kms_ul mechanism, unsigned char *in, kms_ul in_len, unsigned char *out, kms_ul *out_len);

// kms_flags reads attributes of an object that are CK_BBOOL.
kms_ul kms_flags(void *list, kms_ul session, kms_ul object, const kms_ul *types, unsigned char *values, kms_ul n);

// kms_login and kms_init_pin take the PIN from the caller's buffer, so that no
// copy of it stays behind.
kms_ul kms_login(void *list, kms_ul session, unsigned char *pin, kms_ul pin_len);
kms_ul kms_init_pin(void *list, kms_ul session, unsigned char *pin, kms_ul pin_len);

#endif
