package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"slices"
	"strings"
	"testing"

	"github.com/golang-jwt/jwt/v5"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/internal/testkit"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// edit changes a text: it replaces, inserts or deletes.
func edit(s string, op uint8, at uint16, text string) string {
	i := int(at) % (len(s) + 1)
	j := min(i+len(text), len(s))
	switch op % 3 {
	case 0:
		return s[:i] + text + s[j:]
	case 1:
		return s[:i] + text + s[i:]
	}
	return s[:i] + s[j:]
}

var b64 = base64.RawURLEncoding

// forgery makes another token of a good one.
func forgery(tb testing.TB, x *target, good string, op uint8, at uint16, text string) string {
	tb.Helper()
	part := strings.Split(good, ".")
	sign := func(m jwt.SigningMethod, key any) string {
		t := jwt.New(m)
		t.Header["kid"] = jwtHeader(tb, part[0])["kid"]
		head, err := json.Marshal(t.Header)
		must(tb, err)
		signed := b64.EncodeToString(head) + "." + b64.EncodeToString([]byte(text))
		sig, err := m.Sign(signed, key)
		must(tb, err)
		return signed + "." + b64.EncodeToString(sig)
	}
	switch n := op / 3; n % 10 {
	case 0, 1, 2:
		part[n%10] = edit(part[n%10], op, at, text)
	case 3, 4, 5: // what the part says is changed, and spelled well again
		said, err := b64.DecodeString(part[n%10-3])
		must(tb, err)
		part[n%10-3] = b64.EncodeToString([]byte(edit(string(said), op, at, text)))
	case 6:
		return edit(good, op, at, text)
	case 7: // signed by somebody else
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(tb, err)
		return sign(jwt.SigningMethodES256, k)
	case 8: // signed by what everybody knows
		all, err := x.iam.SigningKeys(tb.Context())
		must(tb, err)
		return sign(jwt.SigningMethodHS256, all[int(at)%len(all)].Public)
	case 9: // the other signature that a curve has for the same text
		sig, err := b64.DecodeString(part[2])
		must(tb, err)
		s := new(big.Int).SetBytes(sig[32:])
		s.Sub(elliptic.P256().Params().N, s).FillBytes(sig[32:])
		part[2] = b64.EncodeToString(sig)
	}
	return strings.Join(part, ".")
}

func jwtHeader(tb testing.TB, part string) (h map[string]any) {
	tb.Helper()
	b, err := b64.DecodeString(part)
	must(tb, err)
	must(tb, json.Unmarshal(b, &h))
	return h
}

// FuzzTokens changes an access token. Only what we signed, as we spelled it,
// proves anybody; everything else is refused, and all in the same words.
func FuzzTokens(f *testing.F) {
	x := newTarget(f)
	good, key := x.by.token, x.fill.Replace("/api/v2/keys/{id}")
	refusal := x.ask(f, "GET", key, "", "").body
	part := strings.Split(good, ".")
	claims, err := b64.DecodeString(part[1])
	must(f, err)
	for n := range uint8(10) {
		for op := range uint8(3) {
			for _, text := range []string{"", "A", ".", "=", "\n", " ", "none", string(claims), `{"alg":"none","typ":"JWT"}`, `{"key_id":"a/b","iss":"kmsctl","exp":9999999999,"iat":1}`} {
				f.Add(3*n+op, uint16(7*len(text)), text)
			}
		}
	}
	f.Add(uint8(6), uint16(len(part[2])-1), "B") // the last letter of a signature has bits that say nothing
	f.Fuzz(func(t *testing.T, op uint8, at uint16, text string) {
		token := forgery(t, x, good, op, at, text)
		r := x.ask(t, "GET", key, "Bearer "+token, "")
		switch {
		case strings.Trim(token, " ") == good:
			if r.status != 200 {
				t.Errorf("our token: %d %s", r.status, r.body)
			}
		case r.status != 401 || r.body != refusal:
			t.Errorf("%q: %d %s", token, r.status, r.body)
		}
	})
}

// FuzzEnvelopes changes ciphertexts, and what was authenticated with them. The
// whole and unchanged one gives the plaintext; any other is the caller's
// error, and leaves nothing behind.
func FuzzEnvelopes(f *testing.F) { fuzzEnvelopes(f, newTarget(f)) }

// FuzzEnvelopesOnSoftHSM does the same with a real token behind the connector.
// It stays up, logged in once, and what is whole still opens.
func FuzzEnvelopesOnSoftHSM(f *testing.F) {
	c, err := connector.Start(f.Context(), connector.Options{Path: testkit.Connector(f), Module: testkit.SoftHSM, SoftHSMDir: f.TempDir(), PIN: secret.New([]byte("password"))})
	must(f, err)
	f.Cleanup(c.Close)
	must(f, c.Login(f.Context()))
	_, err = c.OpenMaster(f.Context(), hsm.MasterIDs{Install: "test", Wrap: []byte("wrap-id-16-bytes"), Seal: []byte("seal-id-16-bytes"), Sign: []byte("sign-id-16-bytes")}, true)
	must(f, err)
	pid := c.Pid()
	fuzzEnvelopes(f, newTargetOn(f, c))
	if c.Pid() != pid {
		f.Errorf("the connector's process %d became %d", pid, c.Pid())
	}
}

func fuzzEnvelopes(f *testing.F, x *target) {
	f.Helper()
	ctx, in, me := f.Context(), x.by.instance, "me"
	born, err := x.kms.CreateKey(ctx, in, "default", me, kmsapi.CreateKey{Name: "born"})
	must(f, err)
	material := base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef"))
	brought, err := x.kms.CreateKey(ctx, in, "default", me, kmsapi.CreateKey{Name: "brought", Payload: material})
	must(f, err)
	const plain = "aGVsbG8gaGVsbG8gaGVsbG8="
	aad := []string{"table=orders", "row=1"}
	wrap := func(id string) string {
		out, err := x.kms.Wrap(ctx, in, id, kmsapi.WrapRequest{Plaintext: plain, AAD: aad})
		must(f, err)
		return out.Ciphertext
	}
	whole := []struct{ key, text string }{{born.ID, wrap(born.ID)}, {brought.ID, wrap(brought.ID)}}
	must(f, x.kms.Rotate(ctx, in, born.ID, kmsapi.RotateRequest{}))
	must(f, x.kms.Rotate(ctx, in, brought.ID, kmsapi.RotateRequest{Payload: base64.StdEncoding.EncodeToString([]byte("another one, of 32 bytes in all."))}))
	whole = append(whole, struct{ key, text string }{born.ID, wrap(born.ID)}, struct{ key, text string }{brought.ID, wrap(brought.ID)})
	x.commits = x.store.commits.Load()
	texts := []string{"", "A", "e30=", `"suite":2`, `"suite":3,"`, "}", " ", "\xff", born.KeyVersion.ID, strings.Repeat("A", 64), "null", `{"ciphertext":"AAAA","iv":"AAAA","version":"2.0.0"}`}
	for which := range uint8(4) {
		for op := range uint8(12) {
			for i, text := range texts {
				f.Add(which, op, uint16(13*i), text)
			}
		}
	}
	f.Fuzz(func(t *testing.T, which, op uint8, at uint16, text string) {
		w := whole[which%4]
		body := kmsapi.UnwrapRequest{Ciphertext: w.text, AAD: slices.Clone(aad)}
		raw, err := base64.StdEncoding.DecodeString(w.text)
		must(t, err)
		switch op / 3 % 4 {
		case 0:
			body.Ciphertext = edit(w.text, op, at, text)
		case 1: // the JSON is changed, and spelled well again
			body.Ciphertext = base64.StdEncoding.EncodeToString([]byte(edit(string(raw), op, at, text)))
		case 2: // the fields are
			var c kmsapi.Ciphertext
			must(t, json.Unmarshal(raw, &c))
			switch at % 5 {
			case 0:
				c.Ciphertext = []byte(edit(string(c.Ciphertext), op, at/5, text))
			case 1:
				c.IV = []byte(edit(string(c.IV), op, at/5, text))
			case 2:
				c.Handle = edit(c.Handle, op, at/5, text)
			case 3:
				c.Version = edit(c.Version, op, at/5, text)
			case 4:
				c.Suite = uint8(at / 5)
			}
			raw, err = json.Marshal(c)
			must(t, err)
			body.Ciphertext = base64.StdEncoding.EncodeToString(raw)
		case 3:
			body.AAD[at%2] = edit(body.AAD[at%2], op, at/2, text)
		}
		b, err := json.Marshal(body)
		must(t, err)
		if err := json.Unmarshal(b, &body); err != nil { // as the server sees it: JSON holds no other text than UTF-8
			t.Fatal(err)
		}
		same := body.Ciphertext == w.text && slices.Equal(body.AAD, aad)
		for _, action := range []string{"unwrap", "rewrap"} {
			r := x.ask(t, "POST", "/api/v2/keys/"+w.key+"/actions/"+action, "Bearer "+x.by.token, string(b))
			var out kmsapi.ActionAnswer
			switch why := malformed(r); {
			case same:
				r.into(t, &out)
				if r.status != 200 || action == "unwrap" && out.Plaintext != plain || action == "rewrap" && (out.Plaintext != "" || out.Ciphertext == "") {
					t.Errorf("%s of what is whole: %d %s", action, r.status, r.body)
				}
			case why != "" || r.code() != kmsapi.BadCiphertext && r.code() != kmsapi.InvalidField && r.code() != kmsapi.NoBody:
				t.Errorf("%s of %s: %s: %d %s", action, b, why, r.status, r.body)
			}
		}
	})
}
