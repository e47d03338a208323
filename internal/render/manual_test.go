package render_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/render"
)

// sample is what the manual prints, word for word, with its placeholders
// filled in and nothing else touched.
func sample(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../testdata/manual", name))
	if err != nil {
		t.Fatal(err)
	}
	return []byte(strings.NewReplacer(
		"<BASE64 ENCODED PASSWORD OF HSM>", "cGFzc3dvcmQ=", "<ANY BASE64 ENCODED string, i.e. cGFzc3dvcmQ=>", "cGFzc3dvcmQ=",
		"<BASE64 ENCODED CONTENTS OF LUNA SERVER CERTIFICATE>", "c2VydmVy", "<BASE64 ENCODED CONTENTS OF LUNA CLIENT CERTIFICATE>", "Y2VydA==",
		"<BASE64 ENCODED CONTENTS OF LUNA CLIENT KEY>", "a2V5", "<MANAGEMENT_NODE_IP>", "10.0.0.11",
		"<HSM IP ADDRESS>", "10.0.0.1", "<RFS IP ADDRESS>", "10.0.0.2", `<HSM slot ID string, i.e. "492971158">`, `"492971158"`,
		"<CLUSTER_NAME>", "mycluster", "<ICP_version>", "3.2.1", "<HSM MODEL>", "gemalto", "<HSM PARTITION PASSWORD>", "password").Replace(string(b)))
}

// TestManualVerbatim: every sample of the manual loads, with one warning for
// each of its faults and none besides.
func TestManualVerbatim(t *testing.T) {
	for model, warns := range map[string][]string{"gemalto": nil, "thales": {"namespace stands outside metadata"}, "softhsm": {"type is absent"}} {
		s, err := render.ParseSecret(sample(t, "hsm-Secret-"+model+".yaml"))
		if err != nil {
			t.Fatalf("%s: %v", model, err)
		}
		same(t, model, s.Warnings, warns)
		if s.Namespace != "kube-system" || string(s.Password.Reveal()) != "password" || (len(s.Clients) == 1) != (model == "gemalto") {
			t.Errorf("%s: %+v", model, s)
		}
		text := sample(t, "overrides_hsm-"+model+".yaml")
		o, err := render.ParseOverrides(text)
		if err != nil {
			t.Fatalf("%s: %v", model, err)
		}
		same(t, model, o.Warnings, nil)
		m, err := hsm.Lookup(model)
		if err != nil {
			t.Fatal(err)
		}
		if o.HSM.Model != model || o.Images[model].Repository != "mycluster.icp:8500/ibmcom/"+m.Image || (o.HSM.SlotID == "492971158") != (model == "thales") {
			t.Errorf("%s: %+v", model, o)
		}
		// The note under each sample prints the registry with a blank in it.
		o, err = render.ParseOverrides([]byte(strings.ReplaceAll(string(text), "mycluster.icp:8500/ibmcom/kms-oss-watcher", "docker- registry.default.svc:5000/ibmcom/kms-oss-watcher")))
		if err != nil {
			t.Fatalf("%s: %v", model, err)
		}
		same(t, model, o.Warnings, []string{"has a blank in it"})
		if o.Images["watcher"].Repository != "docker-registry.default.svc:5000/ibmcom/kms-oss-watcher" {
			t.Errorf("%s: %+v", model, o.Images["watcher"])
		}
	}
	o, err := render.ParseOverrides(sample(t, "clear_data.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	same(t, "clear_data", o.Warnings, []string{"hsm.hsm_pw: moved into the Secret"})
	if !o.HSM.ClearData || string(o.Password.Reveal()) != "password" {
		t.Errorf("%+v", o.HSM)
	}
}

func same(t *testing.T, name string, got, want []string) {
	t.Helper()
	ok := len(got) == len(want)
	for i := range got {
		ok = ok && strings.Contains(got[i], want[i])
	}
	if !ok {
		t.Errorf("%s: warnings %q, want %q", name, got, want)
	}
}

// TestManualUnfilled: a sample whose placeholders were left as they are is
// refused, and says which.
func TestManualUnfilled(t *testing.T) {
	b, err := os.ReadFile("../../testdata/manual/overrides_hsm-softhsm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := render.ParseOverrides(b); err == nil || !strings.Contains(err.Error(), "placeholder") {
		t.Errorf("%v", err)
	}
	b, err = os.ReadFile("../../testdata/manual/hsm-Secret-softhsm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := render.ParseSecret(b); err == nil || !strings.Contains(err.Error(), "data.hsm-pass is not base64") {
		t.Errorf("%v", err)
	}
	// client_certs of another shape gets told the right one.
	_, err = render.ParseOverrides([]byte("hsm: {hsm_model: gemalto}\nclient_certs: {10.0.0.11: {cert: QQ==, key: QQ==}}"))
	if err == nil || !strings.Contains(err.Error()+fault.HintOf(err), "a list of {ip, cert, key}") {
		t.Errorf("%v", err)
	}
}
