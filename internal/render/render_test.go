package render_test

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/render"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/templates"
)

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("../../testdata/golden", name)
	if os.Getenv("KMSCTL_UPDATE") != "" {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got):\n%s", name, d)
	}
}

func secretOf(model string) render.Secret {
	s := render.Secret{Namespace: "kube-system", Password: secret.New([]byte("password"))}
	if model == "gemalto" {
		s.ServerCA = []byte("server certificate\n")
		s.Clients = map[string]render.Pair{
			"10.0.0.12": {Cert: []byte("certificate 12\n"), Key: []byte("key 12\n")},
			"10.0.0.11": {Cert: []byte("certificate 11\n"), Key: []byte("key 11\n")},
		}
	}
	return s
}

func overridesOf(t *testing.T, model string) render.Overrides {
	t.Helper()
	m, err := hsm.Lookup(model)
	if err != nil {
		t.Fatal(err)
	}
	o := render.Overrides{HSM: hsm.Settings{Model: model}, Images: render.Images("mycluster.icp:8500", "3.2.1", m)}
	if m.NeedsHSMIP {
		o.HSM.HSMIP = "10.0.0.1"
	}
	if m.NeedsRFSIP {
		o.HSM.RFSIP = "10.0.0.2"
	}
	if m.NeedsSlot {
		o.HSM.SlotID = "492971158"
	}
	return o
}

func TestGolden(t *testing.T) {
	for _, model := range hsm.Names() {
		b, err := secretOf(model).YAML()
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "hsm-Secret-"+model+".yaml", b)
		// What kubectl decodes is what we meant.
		var k corev1.Secret
		if err := yaml.UnmarshalStrict(b, &k); err != nil {
			t.Errorf("%s: %v", model, err)
		}
		if d := cmp.Diff(secretOf(model).Data(), k.Data); d != "" || k.Type != corev1.SecretTypeOpaque {
			t.Errorf("%s: type %q, data (-want +got):\n%s", model, k.Type, d)
		}
		back, err := render.ParseSecret(b)
		if err != nil || len(back.Warnings) > 0 {
			t.Errorf("%s: %v, warnings %q", model, err, back.Warnings)
		}
		if d := cmp.Diff(secretOf(model).Data(), back.Data()); d != "" {
			t.Errorf("%s (-want +got):\n%s", model, d)
		}

		want := overridesOf(t, model)
		if b, err = want.YAML(); err != nil {
			t.Fatal(err)
		}
		golden(t, "overrides_hsm-"+model+".yaml", b)
		got, err := render.ParseOverrides(b)
		if err != nil || len(got.Warnings) > 0 {
			t.Errorf("%s: %v, warnings %q", model, err, got.Warnings)
		}
		if d := cmp.Diff(want.HSM, got.HSM); d != "" {
			t.Errorf("%s (-want +got):\n%s", model, d)
		}
		if d := cmp.Diff(want.Images, got.Images); d != "" {
			t.Errorf("%s (-want +got):\n%s", model, d)
		}
	}
}

// TestManualSamples loads what the manual prints, placeholders filled in.
func TestManualSamples(t *testing.T) {
	for name, c := range map[string]struct{ text, warns string }{
		"nshield": {"apiVersion: v1\nkind: Secret\ntype: Opaque\nmetadata:\n  name: hsm-secret\nnamespace: kube-system\ndata:\n  hsm-pass: cGFzc3dvcmQ=\n", "namespace stands outside metadata"},
		"softhsm": {"apiVersion: v1\nkind: Secret\nmetadata:\n  name: hsm-secret\n  namespace: kube-system\ndata:\n  hsm-pass: cGFzc3dvcmQ=\n", "type is absent"},
	} {
		s, err := render.ParseSecret([]byte(c.text))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if s.Namespace != "kube-system" || string(s.Password.Reveal()) != "password" {
			t.Errorf("%s: namespace %q", name, s.Namespace)
		}
		if !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, c.warns) }) {
			t.Errorf("%s: warnings %q lack %q", name, s.Warnings, c.warns)
		}
	}
	// The nShield sample is indented by one blank; the note has a stray blank.
	o, err := render.ParseOverrides([]byte(" hsm:\n   hsm_model: thales\n   hsm_ip: 10.0.0.1\n   rfs_ip: 10.0.0.2\n   slotId: \"492971158\"\n" +
		" oss:\n   image:\n     repository: docker- registry.default.svc:5000/ibmcom/kms-oss\n     tag: 3.2.1\n"))
	if err != nil {
		t.Fatal(err)
	}
	if o.HSM.SlotID != "492971158" || o.Images["oss"].Repository != "docker-registry.default.svc:5000/ibmcom/kms-oss" {
		t.Errorf("%+v", o)
	}
	if len(o.Warnings) != 1 || !strings.Contains(o.Warnings[0], "blank") {
		t.Errorf("warnings %q", o.Warnings)
	}
	// The clear_data sample: the password moves out of what Helm gets.
	o, err = render.ParseOverrides([]byte("hsm:\n  hsm_model: gemalto\n  clear_data: true\n  hsm_ip: 10.0.0.1\n  hsm_pw: canary-pw\n"))
	if err != nil {
		t.Fatal(err)
	}
	if !o.HSM.ClearData || string(o.Password.Reveal()) != "canary-pw" {
		t.Errorf("%+v", o)
	}
	if s := fmt.Sprint(o.Values); strings.Contains(s, "canary") || strings.Contains(s, "clear_data") {
		t.Errorf("Helm would get %s", s)
	}
}

func TestClientCerts(t *testing.T) {
	b64 := base64.StdEncoding.EncodeToString
	o, err := render.ParseOverrides([]byte("hsm: {hsm_model: gemalto, hsm_ip: 10.0.0.1}\nclient_certs:\n- ip: 10.0.0.11\n  cert: " + b64([]byte("C")) + "\n  key: " + b64([]byte("canary")) + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]render.Pair{"10.0.0.11": {Cert: []byte("C"), Key: []byte("canary")}}, o.Clients); d != "" {
		t.Error(d)
	}
	if _, there := o.Values["client_certs"]; there {
		t.Error("Helm would get the client keys")
	}
	for _, bad := range []string{"client_certs: {a: b}", "client_certs: [x]", "client_certs: [{ip: x, cert: QQ==, key: QQ==}]", "client_certs: [{ip: 10.0.0.1, cert: '!', key: QQ==}]",
		"client_certs: [{ip: 10.0.0.1, crt: QQ==, key: QQ==}]"} {
		if _, err := render.ParseOverrides([]byte("hsm: {hsm_model: gemalto}\n" + bad)); err == nil || !strings.Contains(err.Error(), "client_certs") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	const head = "apiVersion: v1\nkind: Secret\ntype: Opaque\nmetadata: {name: hsm-secret}\n"
	for in, want := range map[string]string{
		"":                              "the file is empty",
		"a: [":                          "fault in line",
		"- 1":                           "not a YAML mapping",
		"kind: Pod":                     "kind is Pod",
		head + "data: {hsm-pas: cGE=}":  "unknown key data.hsm-pas",
		head + "data: {hsm-pass: '!!'}": "data.hsm-pass is not base64",
		head + "dat: {}":                "unknown key dat",
		head:                            "data.hsm-pass is missing",
		head + "data: {hsm-pass: cGE=, 10.0.0.1: cGE=}":      "node 10.0.0.1 has only one of",
		head + "data: {hsm-pass: cGE=}\ndata: {}":            "not a YAML mapping",
		strings.Replace(head, "hsm-secret", "hsmsecret", 1):  "metadata.name is hsmsecret",
		strings.Replace(head, "Opaque", "kubernetes/tls", 1): "type is kubernetes/tls",
	} {
		if _, err := render.ParseSecret([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
	for in, want := range map[string][2]string{
		"hsm: {hsm_model: luna}":                       {`unknown HSM model "luna"`, ""},
		"hsm: {hsm_modl: softhsm}":                     {"unknown key hsm.hsm_modl", "did you mean hsm_model?"},
		"hsm: {hsm_model: thales, slotid: '1'}":        {"unknown key hsm.slotid", "did you mean slotId?"},
		"hsm: {hsm_model: softhsm}\nwatchr: {}":        {"unknown key watchr", "did you mean watcher?"},
		"hsm: {hsm_model: softhsm, clear_data: maybe}": {"hsm.clear_data is not true or false", ""},
		"oss: {}":                           {"the block hsm is missing", ""},
		"hsm: {hsm_ip: 10.0.0.1}":           {"hsm.hsm_model is missing", ""},
		"hsm: {hsm_model: softhsm}\noss: 1": {"oss must be a mapping", ""},
		"hsm: {hsm_model: softhsm}\noss: {image: {repository: <CLUSTER_NAME>.icp:8500/ibmcom/kms-oss}}": {"placeholder", ""},
	} {
		_, err := render.ParseOverrides([]byte(in))
		if err == nil || !strings.Contains(err.Error(), want[0]) {
			t.Errorf("%q: %v, want %q", in, err, want[0])
		}
		if want[1] != "" && fault.HintOf(err) != want[1] {
			t.Errorf("%q: hint %q, want %q", in, fault.HintOf(err), want[1])
		}
	}
}

// TestErrorsHideSecrets: no fault of a file shows what stands in it.
func TestErrorsHideSecrets(t *testing.T) {
	for _, in := range []string{"data: {hsm-pass: canary", "kind: Secret\nmetadata: {name: hsm-secret}\ndata: {hsm-pass: '%%canary'}", "canary", "{{canary}}: 1", "hsm-pass:\n\tcanary: 1"} {
		if _, err := render.ParseSecret([]byte(in)); err == nil || strings.Contains(err.Error()+fault.HintOf(err), "canary") {
			t.Errorf("%q: %v", in, err)
		}
	}
}

// TestSlotKeepsItsDigits: a number of 64 bits is not rounded.
func TestSlotKeepsItsDigits(t *testing.T) {
	o, err := render.ParseOverrides([]byte("hsm: {hsm_model: thales, slotId: 18446744073709551615}\noss: {image: {tag: 3.20}}"))
	if err != nil {
		t.Fatal(err)
	}
	if o.HSM.SlotID != "18446744073709551615" || o.Values["hsm"].(map[string]any)["slotId"] != "18446744073709551615" || len(o.Warnings) == 0 {
		t.Errorf("%+v", o)
	}
}

// TestRepositoryKeysExist: what the archive's manifest lists is in the chart.
func TestRepositoryKeysExist(t *testing.T) {
	for _, k := range templates.RepositoryKeys() {
		parts := strings.Split(k, ".")
		in := parts[0] + ": {image: {repository: r/x, tag: '1'}}\n"
		o, err := render.ParseOverrides([]byte("hsm: {hsm_model: softhsm}\n" + in))
		if err != nil || o.Images[parts[0]].Repository != "r/x" {
			t.Errorf("%s: %v", k, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("hsm: {hsm_model: softhsm}"))
	f.Add([]byte("apiVersion: v1\nkind: Secret\nmetadata: {name: hsm-secret}\ndata: {hsm-pass: cGE=}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := render.ParseSecret(b); err == nil {
			y, err := s.YAML()
			if err != nil {
				t.Fatal(err)
			}
			back, err := render.ParseSecret(y)
			if err != nil {
				t.Fatalf("%v\n%s", err, y)
			}
			if d := cmp.Diff(s.Data(), back.Data()); d != "" {
				t.Fatal(d)
			}
		}
		if o, err := render.ParseOverrides(b); err == nil {
			if _, err := o.YAML(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
