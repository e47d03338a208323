#define _GNU_SOURCE
#include "shim.h"

#include <dlfcn.h>
#include <string.h>

typedef kms_ul ul;
typedef unsigned char byte;

// CK_FUNCTION_LIST, PKCS#11 2.40: a version, then pointers in this order.
typedef struct {
	byte version[2];
	void *f[68];
} list_t;
enum { INIT_PIN = 10, LOGIN = 18, GET_ATTRIBUTE = 24, ENCRYPT_INIT = 29, ENCRYPT = 30, DECRYPT_INIT = 33, DECRYPT = 34, SIGN_INIT = 42, SIGN = 43, GENERATE_RANDOM = 64 };

typedef struct {
	ul mechanism;
	void *param;
	ul param_len;
} mechanism_t;

typedef struct {
	ul type;
	void *value;
	ul len;
} attribute_t;

// CK_GCM_PARAMS with ulIvBits, which every vendor's header has.
typedef struct {
	byte *iv;
	ul iv_len, iv_bits;
	byte *aad;
	ul aad_len, tag_bits;
} gcm_t;

typedef ul (*init_fn)(ul, mechanism_t *, ul);
typedef ul (*work_fn)(ul, byte *, ul, byte *, ul *);
typedef ul (*random_fn)(ul, byte *, ul);

void *kms_list(const char *path) {
	// The library is loaded: this only counts one more use of it, and keeps it
	// in memory for good, since some crash when they are unloaded.
	void *lib = dlopen(path, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
	if (lib == NULL)
		lib = dlopen(path, RTLD_LAZY | RTLD_NODELETE);
	if (lib == NULL)
		return NULL;
	ul (*get)(list_t **) = (ul (*)(list_t **))dlsym(lib, "C_GetFunctionList");
	list_t *l = NULL;
	if (get == NULL || get(&l) != 0)
		return NULL;
	return l;
}

static ul run(list_t *l, int decrypt, ul session, ul key, mechanism_t *m, byte *in, ul in_len, byte *out, ul *out_len, int *begun) {
	ul rv = ((init_fn)l->f[decrypt ? DECRYPT_INIT : ENCRYPT_INIT])(session, m, key);
	if (rv != 0)
		return rv;
	*begun = 1;
	return ((work_fn)l->f[decrypt ? DECRYPT : ENCRYPT])(session, in, in_len, out, out_len);
}

kms_ul kms_gcm(void *list, int decrypt, int random, ul session, ul key, ul mechanism, byte *iv, ul iv_len, byte *aad, ul aad_len, byte *in, ul in_len,
               byte *out, ul *out_len, int *begun) {
	byte own[64] = {0}; // the token keeps a pointer until C_Encrypt is done
	if (iv_len > sizeof own)
		return 7; // CKR_ARGUMENTS_BAD
	memcpy(own, iv, iv_len);
	if (random) {
		ul rv = ((random_fn)((list_t *)list)->f[GENERATE_RANDOM])(session, own, iv_len);
		if (rv != 0)
			return rv;
	}
	byte given[sizeof own];
	memcpy(given, own, iv_len);
	gcm_t p = {own, iv_len, iv_len * 8, aad, aad_len, 128};
	mechanism_t m = {mechanism, &p, sizeof p};
	ul rv = run(list, decrypt, session, key, &m, in, in_len, out, out_len, begun);
	if (*begun && memcmp(given, own, iv_len) != 0)
		*begun = 2;
	memcpy(iv, own, iv_len);
	return rv;
}

kms_ul kms_crypt(void *list, int decrypt, ul session, ul key, ul mechanism, byte *param, ul param_len, byte *in, ul in_len, byte *out, ul *out_len,
                 int *begun) {
	mechanism_t m = {mechanism, param, param_len};
	return run(list, decrypt, session, key, &m, in, in_len, out, out_len, begun);
}

kms_ul kms_sign(void *list, ul session, ul key, ul mechanism, byte *in, ul in_len, byte *out, ul *out_len) {
	mechanism_t m = {mechanism, NULL, 0};
	ul rv = ((init_fn)((list_t *)list)->f[SIGN_INIT])(session, &m, key);
	if (rv != 0)
		return rv;
	return ((work_fn)((list_t *)list)->f[SIGN])(session, in, in_len, out, out_len);
}

kms_ul kms_flags(void *list, ul session, ul object, const ul *types, byte *values, ul n) {
	enum { MOST = 8 };
	attribute_t t[MOST];
	if (n > MOST)
		return 7; // CKR_ARGUMENTS_BAD
	for (ul i = 0; i < n; i++) {
		values[i] = 0;
		t[i] = (attribute_t){types[i], &values[i], 1};
	}
	return ((ul(*)(ul, ul, attribute_t *, ul))((list_t *)list)->f[GET_ATTRIBUTE])(session, object, t, n);
}

kms_ul kms_login(void *list, ul session, byte *pin, ul pin_len) {
	enum { USER = 1 };
	return ((ul(*)(ul, ul, byte *, ul))((list_t *)list)->f[LOGIN])(session, USER, pin, pin_len);
}

kms_ul kms_init_pin(void *list, ul session, byte *pin, ul pin_len) {
	return ((ul(*)(ul, byte *, ul))((list_t *)list)->f[INIT_PIN])(session, pin, pin_len);
}
