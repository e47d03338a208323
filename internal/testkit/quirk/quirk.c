// A PKCS#11 library for tests: it wraps another one (QUIRK_MODULE, SoftHSM)
// and behaves badly in the ways that real HSMs do. The words in the file
// QUIRK_CONTROL say how, and may change while it is in use; each login is
// noted in QUIRK_LOG. The modes are listed in quirk.go.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long ul;
typedef unsigned char byte;
typedef struct {
	byte version[2];
	void *f[68];
} list_t;
typedef struct {
	ul mechanism;
	void *param;
	ul param_len;
} mech_t;
typedef struct {
	ul type;
	void *value;
	ul len;
} attr_t;
typedef struct {
	byte *iv;
	ul iv_len, iv_bits;
	byte *aad;
	ul aad_len, tag_bits;
} gcm_t;

enum {
	OK = 0, SLOT_ID_INVALID = 0x03, GENERAL_ERROR = 0x05, DEVICE_MEMORY = 0x31, ATTRIBUTE_READ_ONLY = 0x10, DEVICE_ERROR = 0x30, KEY_HANDLE_INVALID = 0x60,
	MECHANISM_INVALID = 0x70, MECHANISM_PARAM_INVALID = 0x71, PIN_INCORRECT = 0xA0, PIN_LOCKED = 0xA4, SESSION_COUNT = 0xB1, SESSION_HANDLE_INVALID = 0xB3,
	TEMPLATE_INCOMPLETE = 0xD0, BUFFER_TOO_SMALL = 0x150, TEMPLATE_INCONSISTENT = 0xD1, ENCRYPTED_DATA_INVALID = 0x40
};
enum { AES_ECB = 0x1081, CBC_PAD = 0x1085, AES_GCM = 0x1087, KW = 0x2109, KW_PAD = 0x210A, KWP = 0x210B, GENERIC_GEN = 0x350 };
#define LUNA_GCM 0x8000011CUL
#define LUNA_KW 0x80000170UL
#define LUNA_KWP 0x80000171UL
#define NC_MAC_GEN 0xDE436997UL
enum { CKA_CLASS = 0x00, CKA_TOKEN = 0x01, CKA_PRIVATE = 0x02, CKA_VALUE = 0x11, CKA_KEY_TYPE = 0x100, CKA_SENSITIVE = 0x103, CKA_ENCRYPT = 0x104,
	CKA_DECRYPT = 0x105, CKA_WRAP = 0x106, CKA_UNWRAP = 0x107, CKA_VALUE_LEN = 0x161, CKA_EXTRACTABLE = 0x162 };
enum { CKO_SECRET_KEY = 4, CKK_GENERIC = 0x10, CKK_AES = 0x1F, CKK_SHA256_HMAC = 0x2B };
enum { F_INITIALIZE = 0, F_FINALIZE = 1, F_GET_LIST = 3, F_SLOT_LIST = 4, F_SLOT_INFO = 5, F_TOKEN_INFO = 6, F_MECH_LIST = 7, F_MECH_INFO = 8,
	F_OPEN = 12, F_CLOSE = 13, F_CLOSE_ALL = 14, F_LOGIN = 18, F_CREATE = 20, F_DESTROY = 22, F_GET_ATTR = 24, F_SET_ATTR = 25, F_FIND_INIT = 26,
	F_FIND = 27, F_FIND_FINAL = 28, F_ENC_INIT = 29, F_ENC = 30, F_DEC_INIT = 33, F_DEC = 34, F_SIGN_INIT = 42, F_SIGN = 43, F_GEN = 58, F_GEN_PAIR = 59,
	F_WRAP = 60, F_UNWRAP = 61, F_RANDOM = 64 };

static list_t *real, mine;
static char control[1024];
static int broken;            // the line was lost: only C_Finalize helps
static ul dropped_before = 0; // sessions opened before are stale
static ul opened = 0;
static ul open_now = 0;
#define FEW 4                 // so many sessions are allowed at once
static int dropping = 0;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void read_control(void) {
	const char *path = getenv("QUIRK_CONTROL");
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	char buf[sizeof control] = " ";
	if (fd >= 0) {
		ssize_t n = read(fd, buf + 1, sizeof buf - 3);
		close(fd);
		if (n < 0)
			n = 0;
		for (ssize_t i = 1; i <= n; i++)
			if (buf[i] == '\n')
				buf[i] = ' ';
		buf[n + 1] = ' ';
		buf[n + 2] = 0;
	}
	pthread_mutex_lock(&lock);
	memcpy(control, buf, sizeof control);
	pthread_mutex_unlock(&lock);
}

static int on(const char *mode) {
	char word[64];
	snprintf(word, sizeof word, " %s ", mode);
	pthread_mutex_lock(&lock);
	int hit = strstr(control, word) != NULL;
	pthread_mutex_unlock(&lock);
	return hit;
}

static void note(const char *what) {
	const char *path = getenv("QUIRK_LOG");
	int fd = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
	if (fd < 0)
		return;
	if (write(fd, what, strlen(what)) < 0) // nothing to be done in a test's library
		abort();
	close(fd);
}

// gate is passed by every call: it dies, hangs or fails as the line would.
static ul gate(void) {
	read_control();
	if (on("die"))
		raise(SIGSEGV);
	while (on("hang")) {
		usleep(20000);
		read_control();
	}
	if (on("gone"))
		broken = 1;
	return broken ? DEVICE_ERROR : OK;
}

#define GATE()            \
	do {                  \
		ul g_ = gate();   \
		if (g_ != OK)     \
			return g_;    \
	} while (0)

// Sessions are numbered by order, so that old ones can be told to be stale.
#define MAX_SESSIONS 8192
typedef struct {
	ul real;
	int kind; // of the running encryption: 0 none, 1 IV appended
	byte iv[16];
	ul iv_len;
} session_t;
static session_t sessions[MAX_SESSIONS];

static session_t *session(ul s) {
	int drop = on("drop-sessions");
	pthread_mutex_lock(&lock);
	if (drop && !dropping) // once, each time that the mode begins
		dropped_before = opened;
	dropping = drop;
	pthread_mutex_unlock(&lock);
	if (s <= dropped_before || s > opened || s >= MAX_SESSIONS)
		return NULL;
	return &sessions[s];
}

#define SESSION(v, s)                       \
	session_t *v = session(s);              \
	do {                                    \
		if (v == NULL)                      \
			return SESSION_HANDLE_INVALID;  \
	} while (0)

// An alias is a second name of one object.
#define ALIAS (1UL << 40)
static ul plain(ul h) { return h & ~ALIAS; }

#define BASE (on("slots64") ? 2305843009213693953UL : 492971157UL)
static ul to_real(ul slot) {
	if (!on("slots") && !on("slots64"))
		return slot;
	ul all[64], n = 64;
	if (((ul(*)(byte, ul *, ul *))real->f[F_SLOT_LIST])(1, all, &n) != OK || slot < BASE || slot - BASE >= n)
		return ~0UL;
	return all[slot - BASE];
}

static ul q_initialize(void *args) {
	read_control();
	if (on("gone"))
		return DEVICE_ERROR;
	ul rv = ((ul(*)(void *))real->f[F_INITIALIZE])(args);
	if (rv == OK)
		broken = 0;
	return rv;
}

static ul q_finalize(void *p) {
	read_control();
	ul rv = ((ul(*)(void *))real->f[F_FINALIZE])(p);
	dropped_before = opened;
	open_now = 0;
	return rv;
}

static ul q_slot_list(byte present, ul *list, ul *n) {
	GATE();
	ul rv = ((ul(*)(byte, ul *, ul *))real->f[F_SLOT_LIST])(present, list, n);
	if (rv == OK && list != NULL && (on("slots") || on("slots64")))
		for (ul i = 0; i < *n; i++)
			list[i] = BASE + i;
	return rv;
}

static ul q_slot_info(ul slot, void *info) {
	GATE();
	return ((ul(*)(ul, void *))real->f[F_SLOT_INFO])(to_real(slot), info);
}

static ul q_token_info(ul slot, byte *info) {
	GATE();
	ul rv = ((ul(*)(ul, void *))real->f[F_TOKEN_INFO])(to_real(slot), info);
	ul *flags = (ul *)(info + 96); // label 32, manufacturer 32, model 16, serial 16
	if (rv == OK && on("locked"))
		*flags |= 0x40000;
	if (rv == OK && on("final-try"))
		*flags |= 0x20000;
	if (rv == OK && on("read-only"))
		*flags |= 0x2;
	if (rv == OK && on("few-sessions"))
		flags[1] = flags[3] = FEW; // ulMaxSessionCount, ulMaxRwSessionCount
	if (rv == OK && on("accelerator"))
		*flags &= ~0x4UL; // CKF_LOGIN_REQUIRED
	return rv;
}

// seen gives the number by which the world sees a mechanism.
#define HIDDEN (~0UL)
static ul seen(ul m) {
	if (m == AES_GCM)
		return on("no-gcm") ? HIDDEN : on("luna") ? LUNA_GCM : m;
	if (m == KW)
		return on("no-kw") ? HIDDEN : on("luna") ? LUNA_KW : m;
	if (m == KW_PAD)
		return on("kwp") ? KWP : on("luna-kwp") ? LUNA_KWP : on("luna") || on("no-kw") ? HIDDEN : m;
	if (m == GENERIC_GEN && on("nc-mac"))
		return NC_MAC_GEN;
	return m;
}

static ul meant(ul m) {
	return m == LUNA_GCM ? AES_GCM : m == LUNA_KW ? KW : m == KWP || m == LUNA_KWP ? KW_PAD : m == NC_MAC_GEN ? GENERIC_GEN : m;
}

static ul q_mech_list(ul slot, ul *list, ul *n) {
	GATE();
	ul all[512], count = 512;
	ul rv = ((ul(*)(ul, ul *, ul *))real->f[F_MECH_LIST])(to_real(slot), all, &count);
	if (rv != OK)
		return rv;
	ul k = 0;
	for (ul i = 0; i < count; i++)
		if (seen(all[i]) != HIDDEN)
			all[k++] = seen(all[i]);
	if (list != NULL && *n < k)
		return BUFFER_TOO_SMALL;
	if (list != NULL)
		memcpy(list, all, k * sizeof *all);
	*n = k;
	return OK;
}

static ul q_mech_info(ul slot, ul m, void *info) {
	GATE();
	return ((ul(*)(ul, ul, void *))real->f[F_MECH_INFO])(to_real(slot), meant(m), info);
}

static ul q_open(ul slot, ul flags, void *app, void *notify, ul *s) {
	GATE();
	ul r = 0;
	pthread_mutex_lock(&lock);
	ul others = open_now;
	pthread_mutex_unlock(&lock);
	if (on("few-sessions") && others >= FEW)
		return SESSION_COUNT;
	ul rv = ((ul(*)(ul, ul, void *, void *, ul *))real->f[F_OPEN])(to_real(slot), flags, app, notify, &r);
	if (rv != OK)
		return rv;
	pthread_mutex_lock(&lock);
	open_now++;
	if (opened + 1 >= MAX_SESSIONS) {
		pthread_mutex_unlock(&lock);
		return GENERAL_ERROR;
	}
	*s = ++opened;
	sessions[*s] = (session_t){.real = r};
	pthread_mutex_unlock(&lock);
	return OK;
}

static ul q_close(ul s) {
	GATE();
	SESSION(v, s);
	pthread_mutex_lock(&lock);
	open_now--;
	pthread_mutex_unlock(&lock);
	return ((ul(*)(ul))real->f[F_CLOSE])(v->real);
}

static ul q_close_all(ul slot) {
	GATE();
	return ((ul(*)(ul))real->f[F_CLOSE_ALL])(to_real(slot));
}

static int wrong_pins;

static ul q_login(ul s, ul user, byte *pin, ul len) {
	GATE();
	SESSION(v, s);
	if (on("lock-after-ten") && wrong_pins >= 10) {
		note("login locked\n");
		return PIN_LOCKED;
	}
	ul rv = ((ul(*)(ul, ul, byte *, ul))real->f[F_LOGIN])(v->real, user, pin, len);
	note(rv == OK ? "login good\n" : rv == PIN_INCORRECT ? "login wrong\n" : "login other\n");
	wrong_pins = rv == PIN_INCORRECT ? wrong_pins + 1 : rv == OK ? 0 : wrong_pins;
	return rv;
}

static int says(attr_t *t, ul n, ul type) {
	for (ul i = 0; i < n; i++)
		if (t[i].type == type && t[i].len == 1 && *(byte *)t[i].value)
			return 1;
	return 0;
}

// kept says how the token refuses a template, of an object that stays above
// all.
static ul kept(attr_t *t, ul n) {
	if (on("accelerator") && says(t, n, CKA_PRIVATE))
		return TEMPLATE_INCONSISTENT; // such a slot has no private objects
	if (!says(t, n, CKA_TOKEN))
		return OK;
	if (on("assurances") && says(t, n, CKA_EXTRACTABLE))
		return TEMPLATE_INCONSISTENT;
	return on("token-full") ? DEVICE_MEMORY : on("no-token-keys") ? TEMPLATE_INCONSISTENT : OK;
}

// A template as SoftHSM is to see it: keys that wrap may encrypt too, so that
// wrapping by CBC can be done for them, and HMAC keys have no type of their own.
#define MOST 32
static ul rewritten(attr_t *out, attr_t *t, ul n) {
	static byte yes = 1;
	static ul generic = CKK_GENERIC;
	ul k = 0;
	int cbc = on("cbc-wrap") && (says(t, n, CKA_WRAP) || says(t, n, CKA_UNWRAP));
	for (ul i = 0; i < n && k < MOST; i++) {
		out[k] = t[i];
		if (cbc && (t[i].type == CKA_ENCRYPT || t[i].type == CKA_DECRYPT))
			out[k].value = &yes;
		if (on("nc-mac") && t[i].type == CKA_KEY_TYPE && *(ul *)t[i].value == CKK_SHA256_HMAC)
			out[k].value = &generic;
		k++;
	}
	return k;
}

static ul q_create(ul s, attr_t *t, ul n, ul *h) {
	GATE();
	SESSION(v, s);
	if (on("no-import"))
		return TEMPLATE_INCONSISTENT;
	if (kept(t, n) != OK)
		return kept(t, n);
	attr_t r[MOST];
	return ((ul(*)(ul, attr_t *, ul, ul *))real->f[F_CREATE])(v->real, r, rewritten(r, t, n), h);
}

static ul q_destroy(ul s, ul h) {
	GATE();
	SESSION(v, s);
	return ((ul(*)(ul, ul))real->f[F_DESTROY])(v->real, plain(h));
}

// Keys that the quirk left readable, in spite of their templates.
#define MAX_LOOSE 4096
static ul loose[MAX_LOOSE];
static int is_loose(ul h) { return loose[h % MAX_LOOSE] == h; }

static ul q_get_attr(ul s, ul h, attr_t *t, ul n) {
	GATE();
	SESSION(v, s);
	h = plain(h);
	ul rv = ((ul(*)(ul, ul, attr_t *, ul))real->f[F_GET_ATTR])(v->real, h, t, n);
	for (ul i = 0; i < n; i++) {
		if (is_loose(h) && t[i].value != NULL && t[i].len == 1 && (t[i].type == CKA_SENSITIVE || t[i].type == CKA_EXTRACTABLE))
			*(byte *)t[i].value = t[i].type == CKA_EXTRACTABLE;
		if (on("readable") && t[i].type == CKA_VALUE) {
			t[i].len = 32;
			if (t[i].value != NULL)
				memset(t[i].value, 7, 32);
			rv = OK;
		}
	}
	return rv;
}

static ul q_set_attr(ul s, ul h, attr_t *t, ul n) {
	GATE();
	SESSION(v, s);
	h = plain(h);
	if (is_loose(h)) {
		if (on("unwrap-lies"))
			return ATTRIBUTE_READ_ONLY;
		loose[h % MAX_LOOSE] = 0; // it can be tightened
		return OK;
	}
	return ((ul(*)(ul, ul, attr_t *, ul))real->f[F_SET_ATTR])(v->real, h, t, n);
}

static ul q_find_init(ul s, attr_t *t, ul n) {
	GATE();
	SESSION(v, s);
	return ((ul(*)(ul, attr_t *, ul))real->f[F_FIND_INIT])(v->real, t, n);
}

static ul q_find(ul s, ul *h, ul max, ul *n) {
	GATE();
	SESSION(v, s);
	if (!on("duplicates") || max < 4)
		return ((ul(*)(ul, ul *, ul, ul *))real->f[F_FIND])(v->real, h, max, n);
	ul rv = ((ul(*)(ul, ul *, ul, ul *))real->f[F_FIND])(v->real, h, max / 3, n);
	if (rv != OK)
		return rv;
	ul k = *n;
	for (ul i = 0; i < k; i++) { // once more by the same name, once by another
		h[k + i] = h[i];
		h[2 * k + i] = h[i] | ALIAS;
	}
	*n = 3 * k;
	return OK;
}

static ul q_find_final(ul s) {
	GATE();
	SESSION(v, s);
	return ((ul(*)(ul))real->f[F_FIND_FINAL])(v->real);
}

typedef ul (*init_fn)(ul, mech_t *, ul);
typedef ul (*work_fn)(ul, byte *, ul, byte *, ul *);

static ul own_iv(session_t *v, byte *iv, ul n) { return ((ul(*)(ul, byte *, ul))real->f[F_RANDOM])(v->real, iv, n); }

static ul q_enc_init(ul s, mech_t *m, ul k) {
	GATE();
	SESSION(v, s);
	mech_t mm = *m;
	mm.mechanism = meant(m->mechanism);
	v->kind = 0;
	if (seen(mm.mechanism) != m->mechanism)
		return MECHANISM_INVALID;
	if (mm.mechanism != AES_GCM)
		return ((init_fn)real->f[F_ENC_INIT])(v->real, &mm, plain(k));
	gcm_t *p = m->param, q = *p;
	if (on("luna") && p->iv_bits != 8 * p->iv_len)
		return MECHANISM_PARAM_INVALID;
	static const byte zeros[16];
	q.iv = v->iv;
	v->iv_len = 12;
	if (on("iv-append12") || on("iv-append16")) {
		v->kind = 1;
		v->iv_len = on("iv-append16") ? 16 : 12;
		if (own_iv(v, v->iv, v->iv_len) != OK)
			return DEVICE_ERROR;
	} else if (on("iv-write")) {
		if (p->iv_len != 12 || memcmp(p->iv, zeros, 12) != 0)
			return MECHANISM_PARAM_INVALID;
		if (own_iv(v, v->iv, 12) != OK)
			return DEVICE_ERROR;
		memcpy(p->iv, v->iv, 12);
	} else if (on("iv-zero")) { // the worst: it says nothing, and uses zeros
		memset(v->iv, 0, 12);
	} else {
		q.iv = p->iv;
		v->iv_len = p->iv_len;
	}
	q.iv_len = v->iv_len;
	q.iv_bits = v->iv_len * 8;
	mm.param = &q;
	mm.param_len = sizeof q;
	return ((init_fn)real->f[F_ENC_INIT])(v->real, &mm, plain(k));
}

static ul q_enc(ul s, byte *in, ul in_len, byte *out, ul *out_len) {
	GATE();
	SESSION(v, s);
	ul room = *out_len;
	ul rv = ((work_fn)real->f[F_ENC])(v->real, in, in_len, out, out_len);
	if (rv == OK && out == NULL && on("short-length") && *out_len >= 16)
		*out_len -= 16;
	if (rv != OK || v->kind != 1)
		return rv;
	if (out != NULL) {
		if (room < *out_len + v->iv_len)
			return BUFFER_TOO_SMALL;
		memcpy(out + *out_len, v->iv, v->iv_len);
		v->kind = 0;
	}
	*out_len += v->iv_len;
	return OK;
}

static ul q_dec_init(ul s, mech_t *m, ul k) {
	GATE();
	SESSION(v, s);
	mech_t mm = *m;
	mm.mechanism = meant(m->mechanism);
	if (seen(mm.mechanism) != m->mechanism)
		return MECHANISM_INVALID;
	return ((init_fn)real->f[F_DEC_INIT])(v->real, &mm, plain(k));
}

static ul q_dec(ul s, byte *in, ul in_len, byte *out, ul *out_len) {
	GATE();
	SESSION(v, s);
	return ((work_fn)real->f[F_DEC])(v->real, in, in_len, out, out_len);
}

static ul q_sign_init(ul s, mech_t *m, ul k) {
	GATE();
	SESSION(v, s);
	return ((init_fn)real->f[F_SIGN_INIT])(v->real, m, plain(k));
}

static ul q_sign(ul s, byte *in, ul in_len, byte *out, ul *out_len) {
	GATE();
	SESSION(v, s);
	return ((work_fn)real->f[F_SIGN])(v->real, in, in_len, out, out_len);
}

static ul q_gen(ul s, mech_t *m, attr_t *t, ul n, ul *h) {
	GATE();
	SESSION(v, s);
	if (kept(t, n) != OK)
		return kept(t, n);
	attr_t r[MOST];
	mech_t mm = *m;
	mm.mechanism = meant(m->mechanism);
	if (seen(mm.mechanism) != m->mechanism)
		return MECHANISM_INVALID;
	return ((ul(*)(ul, mech_t *, attr_t *, ul, ul *))real->f[F_GEN])(v->real, &mm, r, rewritten(r, t, n), h);
}

static ul q_gen_pair(ul s, mech_t *m, attr_t *pub, ul npub, attr_t *priv, ul npriv, ul *hpub, ul *hpriv) {
	GATE();
	SESSION(v, s);
	if (kept(priv, npriv) != OK)
		return kept(priv, npriv);
	return ((ul(*)(ul, mech_t *, attr_t *, ul, attr_t *, ul, ul *, ul *))real->f[F_GEN_PAIR])(v->real, m, pub, npub, priv, npriv, hpub, hpriv);
}

// once runs one operation with a key.
static ul once(session_t *v, int decrypt, ul mechanism, byte *iv, ul key, byte *in, ul in_len, byte *out, ul *out_len) {
	mech_t m = {mechanism, iv, iv ? 16 : 0};
	ul rv = ((init_fn)real->f[decrypt ? F_DEC_INIT : F_ENC_INIT])(v->real, &m, key);
	return rv != OK ? rv : ((work_fn)real->f[decrypt ? F_DEC : F_ENC])(v->real, in, in_len, out, out_len);
}

// value gets at a key as far as SoftHSM lets anybody: wrapped by RFC 3394 under
// a key that is known here, and opened by ECB (RFC 3394, 2.2.2).
static ul value(session_t *v, ul key, byte *out, ul *out_len) {
	static byte known[32] = {1, 2, 3}, yes = 1, no = 0;
	static ul class = CKO_SECRET_KEY, type = CKK_AES;
	attr_t t[] = {{CKA_CLASS, &class, sizeof class}, {CKA_KEY_TYPE, &type, sizeof type}, {CKA_VALUE, known, sizeof known}, {CKA_TOKEN, &no, 1},
		{CKA_PRIVATE, &no, 1}, {CKA_WRAP, &yes, 1}, {CKA_DECRYPT, &yes, 1}};
	ul kek, n = 64, one;
	ul rv = ((ul(*)(ul, attr_t *, ul, ul *))real->f[F_CREATE])(v->real, t, sizeof t / sizeof t[0], &kek);
	if (rv != OK)
		return rv;
	byte c[64], b[16];
	mech_t m = {KW, NULL, 0};
	rv = ((ul(*)(ul, mech_t *, ul, ul, byte *, ul *))real->f[F_WRAP])(v->real, &m, kek, key, c, &n);
	ul parts = rv == OK ? n / 8 - 1 : 0;
	for (int j = 5; j >= 0 && rv == OK; j--)
		for (ul i = parts; i >= 1 && rv == OK; i--) {
			memcpy(b, c, 8);
			b[7] ^= parts * j + i; // at most 24
			memcpy(b + 8, c + 8 * i, 8);
			one = sizeof b;
			rv = once(v, 1, AES_ECB, NULL, kek, b, 16, b, &one);
			memcpy(c, b, 8);
			memcpy(c + 8 * i, b + 8, 8);
		}
	((ul(*)(ul, ul))real->f[F_DESTROY])(v->real, kek);
	*out_len = 8 * parts;
	memcpy(out, c + 8, 8 * parts);
	return rv;
}

// SoftHSM 2.6 wraps by no CBC: here it is, as other tokens do it.
static ul wrap_cbc(session_t *v, mech_t *m, ul kek, ul k, byte *out, ul *n) {
	byte plain_key[64], sealed[64];
	ul len, got = sizeof sealed;
	ul rv = value(v, k, plain_key, &len);
	if (rv == OK)
		rv = once(v, 0, CBC_PAD, m->param, kek, plain_key, len, sealed, &got);
	if (rv == OK && out != NULL && *n < got)
		rv = BUFFER_TOO_SMALL;
	if (rv == OK && out != NULL)
		memcpy(out, sealed, got);
	if (rv == OK)
		*n = got;
	return rv;
}

static ul unwrap_cbc(session_t *v, mech_t *m, ul kek, byte *in, ul in_len, attr_t *t, ul n, ul want, ul *h) {
	byte key[64];
	ul len = sizeof key;
	if (in_len > sizeof key || once(v, 1, CBC_PAD, m->param, kek, in, in_len, key, &len) != OK)
		return ENCRYPTED_DATA_INVALID;
	if (want != 0 && want != len)
		return TEMPLATE_INCONSISTENT;
	attr_t r[MOST + 1];
	ul k = rewritten(r, t, n);
	r[k++] = (attr_t){CKA_VALUE, key, len};
	return ((ul(*)(ul, attr_t *, ul, ul *))real->f[F_CREATE])(v->real, r, k, h);
}

static ul q_wrap(ul s, mech_t *m, ul kek, ul k, byte *out, ul *n) {
	GATE();
	SESSION(v, s);
	mech_t mm = *m;
	mm.mechanism = meant(m->mechanism);
	if (seen(mm.mechanism) != m->mechanism)
		return MECHANISM_INVALID;
	if (mm.mechanism == CBC_PAD && on("cbc-wrap"))
		return wrap_cbc(v, &mm, plain(kek), plain(k), out, n);
	ul rv = ((ul(*)(ul, mech_t *, ul, ul, byte *, ul *))real->f[F_WRAP])(v->real, &mm, plain(kek), plain(k), out, n);
	if (rv == 0x6A && on("wrap-any")) { // CKR_KEY_UNEXTRACTABLE
		if (out != NULL)
			memset(out, 9, 40);
		*n = 40;
		return OK;
	}
	if (rv == OK && out != NULL && mm.mechanism == KW_PAD && on("pad-lies"))
		out[0] ^= 0x55; // another algorithm under this number
	return rv;
}

static ul q_unwrap(ul s, mech_t *m, ul kek, byte *in, ul in_len, attr_t *t, ul n, ul *h) {
	GATE();
	SESSION(v, s);
	mech_t mm = *m;
	mm.mechanism = meant(m->mechanism);
	if (seen(mm.mechanism) != m->mechanism)
		return MECHANISM_INVALID;
	attr_t rest[MOST];
	ul k = 0, len = 0;
	for (ul i = 0; i < n && k < MOST; i++) {
		if (t[i].type == CKA_VALUE_LEN)
			len = *(ul *)t[i].value;
		else
			rest[k++] = t[i];
	}
	if (on("luna") && !len)
		return TEMPLATE_INCOMPLETE;
	if (kept(rest, k) != OK)
		return kept(rest, k);
	if (mm.mechanism == CBC_PAD && on("cbc-wrap")) {
		ul rv = unwrap_cbc(v, &mm, plain(kek), in, in_len, rest, k, len, h);
		if (rv == OK && (on("unwrap-lies") || on("unwrap-loose")))
			loose[*h % MAX_LOOSE] = *h;
		return rv;
	}
	k = rewritten(rest, rest, k);
	byte copy[1024];
	if (mm.mechanism == KW_PAD && on("pad-lies") && in_len <= sizeof copy) {
		memcpy(copy, in, in_len);
		copy[0] ^= 0x55;
		in = copy;
	}
	ul rv = ((ul(*)(ul, mech_t *, ul, byte *, ul, attr_t *, ul, ul *))real->f[F_UNWRAP])(v->real, &mm, plain(kek), in, in_len, rest, k, h);
	if (rv == OK && (on("unwrap-lies") || on("unwrap-loose")))
		loose[*h % MAX_LOOSE] = *h;
	return rv;
}

static ul q_random(ul s, byte *out, ul n) {
	GATE();
	SESSION(v, s);
	return ((ul(*)(ul, byte *, ul))real->f[F_RANDOM])(v->real, out, n);
}

ul C_GetFunctionList(list_t **out) {
	if (real == NULL) {
		const char *path = getenv("QUIRK_MODULE");
		void *lib = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
		ul (*get)(list_t **) = lib ? (ul(*)(list_t **))dlsym(lib, "C_GetFunctionList") : NULL;
		if (get == NULL || get(&real) != OK)
			return GENERAL_ERROR;
		mine = *real;
		struct {
			int at;
			void *f;
		} all[] = {{F_INITIALIZE, q_initialize}, {F_FINALIZE, q_finalize}, {F_GET_LIST, C_GetFunctionList}, {F_SLOT_LIST, q_slot_list},
			{F_SLOT_INFO, q_slot_info}, {F_TOKEN_INFO, q_token_info}, {F_MECH_LIST, q_mech_list}, {F_MECH_INFO, q_mech_info}, {F_OPEN, q_open},
			{F_CLOSE, q_close}, {F_CLOSE_ALL, q_close_all}, {F_LOGIN, q_login}, {F_CREATE, q_create}, {F_DESTROY, q_destroy},
			{F_GET_ATTR, q_get_attr}, {F_SET_ATTR, q_set_attr}, {F_FIND_INIT, q_find_init}, {F_FIND, q_find}, {F_FIND_FINAL, q_find_final},
			{F_ENC_INIT, q_enc_init}, {F_ENC, q_enc}, {F_DEC_INIT, q_dec_init}, {F_DEC, q_dec}, {F_SIGN_INIT, q_sign_init}, {F_SIGN, q_sign},
			{F_GEN, q_gen}, {F_GEN_PAIR, q_gen_pair}, {F_WRAP, q_wrap}, {F_UNWRAP, q_unwrap}, {F_RANDOM, q_random}};
		for (unsigned i = 0; i < sizeof all / sizeof all[0]; i++)
			mine.f[all[i].at] = all[i].f;
	}
	*out = &mine;
	return OK;
}
