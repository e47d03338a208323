package install_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/iam"
	"github.com/kmsctl/kmsctl/internal/install"
	"github.com/kmsctl/kmsctl/internal/pki"
)

// world is a cluster and a releaser in memory. internal/kube and
// internal/release have their own tests on the real libraries, and make e2e
// runs this job on a real cluster; here are the rules of the job alone.
type world struct {
	namespaces map[string]bool
	secrets    map[string]cluster.Secret
	pods       []cluster.Pod
	podsNow    func() []cluster.Pod // instead of pods, where they change
	workloads  []cluster.Workload
	release    cluster.Release
	version    string
	values     map[string]any
	history    []cluster.Release
	locked     bool
	undone     []string
	install    func(ctx context.Context) error
	applied    []string
	lines      []string
	helm2      []string
}

func (w *world) Helm2(context.Context) ([]string, error) { return w.helm2, nil }

func newWorld() *world {
	return &world{namespaces: map[string]bool{}, secrets: map[string]cluster.Secret{}, version: "1.0.0", values: map[string]any{"hsm": map[string]any{"hsm_model": "softhsm"}},
		workloads: []cluster.Workload{{Name: "oss", Want: 1, Ready: 1, Updated: 1, Seen: true}}, pods: []cluster.Pod{{Name: "oss-0", Ready: true}}}
}

func (w *world) EnsureNamespace(_ context.Context, name string) (bool, error) {
	made := !w.namespaces[name]
	w.namespaces[name] = true
	return made, nil
}

func (w *world) Secret(_ context.Context, namespace, name string) (cluster.Secret, error) {
	s, ok := w.secrets[namespace+"/"+name]
	if !ok {
		return s, fault.Newf(fault.NotFound, "read Secret", name, "it is not there")
	}
	return s, nil
}

func (w *world) ApplySecret(_ context.Context, s cluster.Secret) (bool, error) {
	w.applied = append(w.applied, s.Name)
	w.secrets[s.Namespace+"/"+s.Name] = s
	return true, nil
}

func (w *world) Pods(context.Context, string, string) ([]cluster.Pod, error) {
	if w.podsNow != nil {
		return w.podsNow(), nil
	}
	return w.pods, nil
}

func (w *world) Workloads(context.Context, string, string) ([]cluster.Workload, error) {
	return w.workloads, nil
}

func (w *world) Get(name string) (cluster.Release, error) {
	if w.release.Name == "" {
		return w.release, fault.Newf(fault.NotFound, "find release", name, "there is none")
	}
	return w.release, nil
}

func (w *world) Install(ctx context.Context, name string) (cluster.Release, error) {
	if w.release.Name != "" {
		old := w.release
		if old.Status == cluster.Deployed {
			old.Status = cluster.Superseded
		}
		w.history = append(w.history, old)
	}
	if w.install != nil {
		if err := w.install(ctx); err != nil {
			w.release = cluster.Release{Name: name, Revision: w.release.Revision + 1, Status: cluster.Failed, Version: w.version, Values: w.values, Updated: time.Now()}
			return w.release, err
		}
	}
	w.release = cluster.Release{Name: name, Revision: w.release.Revision + 1, Status: cluster.Deployed, Version: w.version, Values: w.values, Updated: time.Now()}
	return w.release, nil
}

func (w *world) Upgrade(ctx context.Context, name string) (cluster.Release, error) {
	return w.Install(ctx, name)
}

func (w *world) Rollback(_ context.Context, name string, revision int) error {
	w.undone = append(w.undone, fmt.Sprintf("rollback %d", revision))
	w.history = append(w.history, w.release)
	w.release = cluster.Release{Name: name, Revision: w.release.Revision + 1, Status: cluster.Deployed, Version: w.history[revision-1].Version, Updated: time.Now()}
	return nil
}

func (w *world) Uninstall(context.Context, string) error {
	w.undone = append(w.undone, "uninstall")
	w.release = cluster.Release{}
	return nil
}

func (w *world) History(name string) ([]cluster.Release, error) {
	if w.release.Name == "" {
		return nil, fault.Newf(fault.NotFound, "find release", name, "there is none")
	}
	return append(slices.Clone(w.history), w.release), nil
}

func (w *world) Lock(ctx context.Context, _, name string) (context.Context, func(), error) {
	if w.locked {
		return ctx, nil, fault.Newf(fault.Conflict, "take lock", name, "another holds it")
	}
	w.locked = true
	return ctx, func() { w.locked = false }, nil
}

func (w *world) MarkFailed(_, why string) error {
	w.release.Status, w.release.Note = cluster.Failed, why
	return nil
}

func (w *world) Target() (string, map[string]any) { return w.version, w.values }

func (w *world) job() install.Job {
	return install.Job{Cluster: w, Releases: w, Changer: w, Now: time.Now, NewKey: iam.NewAPIKey,
		WriteFile: func(p string, b []byte) error { return os.WriteFile(p, b, 0o600) },
		Line:      func(did string, more ...string) { w.lines = append(w.lines, did+" "+strings.Join(more, " ")) }}
}

func options(t *testing.T) install.Options {
	t.Helper()
	return install.Options{Release: "kms", Namespace: "site", HSMSecretName: "hsm-secret", SANs: []string{"kms.example"},
		HSMSecret:    &cluster.Secret{Namespace: "site", Name: "hsm-secret", Data: map[string][]byte{"hsm-pass": []byte("canary-pin")}},
		AdminKeyFile: filepath.Join(t.TempDir(), "admin.key"), Wait: true, Timeout: time.Minute}.Named(nil)
}

func TestInstall(t *testing.T) {
	w, o := newWorld(), options(t)
	res, err := w.job().Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !res.Changed || res.Release.Status != cluster.Deployed || !w.namespaces["site"] {
		t.Errorf("%+v", res)
	}
	// The administrator's key is in the file alone; the cluster has its hash.
	key, err := os.ReadFile(o.AdminKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	var h struct{ ID, Hash string }
	if err := json.Unmarshal(w.secrets["site/kms-admin-key-hash"].Data["admin.json"], &h); err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(key); hex.EncodeToString(sum[:]) != h.Hash || len(h.ID) != 32 {
		t.Errorf("hash %q is not the key's", h.Hash)
	}
	for name, s := range w.secrets {
		for k, v := range s.Data {
			if strings.Contains(string(v), string(key)) {
				t.Errorf("%s %s has the administrator's key", name, k)
			}
		}
	}
	// The certificates serve the names that clients use, and no others do.
	ca := w.secrets["site/kms-ca"]
	api := w.secrets["site/kms-api-tls"]
	hosts := []string{"kms-api", "kms-api.site", "kms-api.site.svc", "kms-api.site.svc.cluster.local", "localhost", "127.0.0.1", "kms.example"}
	if err := pki.Valid(ca.Data["ca.crt"], pki.Pair{Cert: api.Data["tls.crt"], Key: api.Data["tls.key"]}, hosts, time.Now(), 300*24*time.Hour); err != nil {
		t.Error(err)
	}
	if api.Type != "kubernetes.io/tls" || len(api.Data["ca.key"]) > 0 {
		t.Errorf("type %q, or the CA's key is in it", api.Type)
	}
	storage := w.secrets["site/kms-storage-tls"]
	if err := pki.Valid(ca.Data["ca.crt"], pki.Pair{Cert: storage.Data["tls.crt"], Key: storage.Data["tls.key"]}, []string{"kms-storage-0.kms-storage.site.svc.cluster.local"}, time.Now(), 0); err != nil {
		t.Error(err)
	}
	for _, n := range install.SecretNames("kms", "hsm-secret") {
		if _, ok := w.secrets["site/"+n]; !ok {
			t.Errorf("no Secret %s", n)
		}
	}
	if all := strings.Join(w.lines, "\n"); strings.Contains(all, "canary") || strings.Contains(all, string(key)) {
		t.Errorf("progress shows a secret:\n%s", all)
	}
}

// TestInstallAgain: a second run changes nothing.
func TestInstallAgain(t *testing.T) {
	w, o := newWorld(), options(t)
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	w.applied = nil
	o.HSMSecret = nil // it is in the cluster now
	o.AdminKeyFile = ""
	res, err := w.job().Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if res.Changed || res.Release.Revision != 1 || len(w.applied) > 0 {
		t.Errorf("changed %v, revision %d, applied %q", res.Changed, res.Release.Revision, w.applied)
	}
	// Another version or other values are upgrade's affair.
	w.version = "1.1.0"
	_, err = w.job().Run(t.Context(), o)
	if fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "kmsctl upgrade") {
		t.Errorf("%v", err)
	}
}

// TestRenewal: a broken, foreign or old certificate is made anew, others stay.
// TestPartOfSecret: a password or a pair that came in a values file takes
// nothing else away from hsm-secret, and does not make one that is not whole.
func TestPartOfSecret(t *testing.T) {
	w, o := newWorld(), options(t)
	w.values = map[string]any{"hsm": map[string]any{"hsm_model": "gemalto"}}
	o.HSMSecretPart = true
	if _, err := w.job().Run(t.Context(), o); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "gemalto needs certificates") || len(w.applied) > 0 {
		t.Errorf("%v, applied %v", err, w.applied)
	}
	w.secrets["site/hsm-secret"] = cluster.Secret{Namespace: "site", Name: "hsm-secret", Data: map[string][]byte{"hsm-pass": []byte("old"), "ServerCAFile": []byte("ca"),
		"10.0.0.11": []byte("cert"), "10.0.0.11-key": []byte("key")}}
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	got := w.secrets["site/hsm-secret"].Data
	if string(got["hsm-pass"]) != "canary-pin" || string(got["ServerCAFile"]) != "ca" || string(got["10.0.0.11-key"]) != "key" || len(got) != 4 {
		t.Errorf("%q", got)
	}
}

func TestRenewal(t *testing.T) {
	w, o := newWorld(), options(t)
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	before := w.secrets["site/kms-storage-tls"]
	broken := w.secrets["site/kms-api-tls"]
	broken.Data = map[string][]byte{"tls.crt": []byte("x"), "tls.key": []byte("y")}
	w.secrets["site/kms-api-tls"] = broken
	w.applied = nil
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(w.applied, "kms-api-tls") || slices.Contains(w.applied, "kms-storage-tls") || slices.Contains(w.applied, "kms-ca") {
		t.Errorf("applied %q", w.applied)
	}
	if string(before.Data["tls.crt"]) != string(w.secrets["site/kms-storage-tls"].Data["tls.crt"]) {
		t.Error("a good certificate was made anew")
	}
	// A new name needs a new certificate.
	o.SANs = []string{"other.example"}
	w.applied = nil
	if _, err := w.job().Run(t.Context(), o); err != nil || !slices.Contains(w.applied, "kms-api-tls") {
		t.Errorf("applied %q, %v", w.applied, err)
	}
}

// TestNames: a certificate that is made anew keeps the names that it was given,
// however it came to be made anew, until one is dropped by its name.
func TestNames(t *testing.T) {
	w, o := newWorld(), options(t)
	names := func() string {
		t.Helper()
		w.applied = nil
		if _, err := w.job().Upgrade(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		hosts, err := pki.Hosts(w.secrets["site/kms-api-tls"].Data["tls.crt"])
		if err != nil {
			t.Fatal(err)
		}
		var given []string
		for _, h := range hosts {
			if !strings.HasPrefix(h, "kms-api") && !strings.HasPrefix(h, "kms-oss") && h != "localhost" && h != "127.0.0.1" {
				given = append(given, h)
			}
		}
		return strings.Join(given, " ")
	}
	o.SANs = []string{"kms.example", "192.0.2.7", "2001:DB8:0::7"}
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	o.SANs = nil
	if got := names(); got != "kms.example 192.0.2.7 2001:db8::7" || len(w.applied) > 1 { // hsm-secret alone
		t.Errorf("after a change without names: %s, applied %q", got, w.applied)
	}
	for name, change := range map[string]func(map[string][]byte){
		"its key is broken": func(d map[string][]byte) { d["tls.key"] = []byte("x") },
		"another CA":        func(d map[string][]byte) { d["ca.crt"] = []byte("x") },
	} {
		s := w.secrets["site/kms-api-tls"]
		s.Data = maps.Clone(s.Data)
		change(s.Data)
		w.secrets["site/kms-api-tls"] = s
		if got := names(); got != "kms.example 192.0.2.7 2001:db8::7" || !slices.Contains(w.applied, "kms-api-tls") {
			t.Errorf("%s: %s, applied %q", name, got, w.applied)
		}
	}
	o.SANs, o.DropSANs = []string{"new.example", "KMS.example"}, []string{"2001:db8:0:0::7"}
	if got := names(); got != "kms.example new.example 192.0.2.7" {
		t.Errorf("one dropped, one added: %s", got)
	}
	if got := names(); got != "kms.example new.example 192.0.2.7" || slices.Contains(w.applied, "kms-api-tls") {
		t.Errorf("dropped again: %s, applied %q", got, w.applied)
	}
	for want, o := range map[string]install.Options{
		`"A.example" is in both`:                             {SANs: []string{"a.example"}, DropSANs: []string{"A.example"}},
		`"kms-api.site.svc" is a name of the API's own Serv`: {DropSANs: []string{"kms-api.site.svc"}},
	} {
		o.Release, o.Namespace, w.applied = "kms", "site", nil
		o = o.Named(nil)
		_, err := w.job().Upgrade(t.Context(), o)
		if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), want) || fault.HintOf(err) == "" || len(w.applied) > 0 {
			t.Errorf("%v, hint %q, applied %q", err, fault.HintOf(err), w.applied)
		}
	}
	// What cannot be read is not passed over in silence.
	s := w.secrets["site/kms-api-tls"]
	s.Data = map[string][]byte{"tls.crt": []byte("x")}
	w.secrets["site/kms-api-tls"] = s
	o.SANs, o.DropSANs = nil, nil
	if got := names(); got != "" || !strings.Contains(strings.Join(w.lines, "\n"), "give them again") {
		t.Errorf("%s, said %q", got, w.lines)
	}
}

// TestNamesOfTheService: the certificate is for the Service and the domain that
// the values name.
func TestNamesOfTheService(t *testing.T) {
	w, o := newWorld(), options(t)
	w.values = map[string]any{"clusterDomain": "site.local", "service": map[string]any{"name": "keys"}}
	if _, err := w.job().Run(t.Context(), o.Named(w.values)); err != nil {
		t.Fatal(err)
	}
	hosts, err := pki.Hosts(w.secrets["site/kms-api-tls"].Data["tls.crt"])
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"keys", "keys.site.svc", "keys.site.svc.site.local", "kms-oss.site.svc"} {
		if !slices.Contains(hosts, want) {
			t.Errorf("%q is not among %q", want, hosts)
		}
	}
}

// TestRefusals: what would fail half-way is said before anything is done.
func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*world, *install.Options)
		kind   fault.Kind
		want   string
	}{
		"no file for the key": {func(_ *world, o *install.Options) { o.AdminKeyFile = "" }, fault.Usage, "--admin-key-file: missing"},
		"file is there": {func(_ *world, o *install.Options) {
			if err := os.WriteFile(o.AdminKeyFile, []byte("old"), 0o600); err != nil {
				panic(err)
			}
		}, fault.Conflict, "the file is there already"},
		"no hsm-secret": {func(_ *world, o *install.Options) { o.HSMSecret = nil }, fault.NotFound, "hsm-secret"},
		"of Helm 2":     {func(w *world, _ *install.Options) { w.helm2 = []string{"kms"} }, fault.Conflict, "Helm 2 has a release of this name"},
		"pending": {func(w *world, _ *install.Options) {
			w.release = cluster.Release{Name: "kms", Revision: 1, Status: cluster.PendingInstall, Updated: time.Now()}
		}, fault.Conflict, "is pending-install"},
	} {
		w, o := newWorld(), options(t)
		c.change(w, &o)
		_, err := w.job().Run(t.Context(), o)
		if fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.want) || fault.HintOf(err) == "" {
			t.Errorf("%s: %v (%v), hint %q", name, err, fault.KindOf(err), fault.HintOf(err))
		}
		if len(w.applied) > 0 || (w.release.Status == cluster.Deployed) {
			t.Errorf("%s: something was done: %q", name, w.applied)
		}
	}
}

func TestRepair(t *testing.T) {
	w, o := newWorld(), options(t)
	w.release = cluster.Release{Name: "kms", Revision: 1, Status: cluster.PendingInstall, Updated: time.Now().Add(-time.Hour)}
	o.Repair = true
	res, err := w.job().Run(t.Context(), o)
	if err != nil || res.Release.Status != cluster.Deployed {
		t.Errorf("%+v, %v", res, err)
	}
}

// TestHopelessPod: a pod that never will be ready ends the wait early, and the
// fault names pod, container, reason, message, log line and cure.
func TestHopelessPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, o := newWorld(), options(t)
		o.Timeout = 10 * time.Minute
		w.pods = []cluster.Pod{{Name: "kms-oss-0", Trouble: &cluster.Trouble{Pod: "kms-oss-0", Container: "hsm", Reason: "CrashLoopBackOff", Message: "exited with 1",
			Log: "no such library", Cure: "the log line tells", Final: true}}}
		w.install = func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}
		start := time.Now()
		_, err := w.job().Run(t.Context(), o)
		if fault.KindOf(err) != fault.NotReady || fault.HintOf(err) != "the log line tells" {
			t.Errorf("%v (%v), hint %q", err, fault.KindOf(err), fault.HintOf(err))
		}
		for _, want := range []string{"kms-oss-0", "container hsm", "CrashLoopBackOff", "exited with 1", "no such library"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v lacks %q", err, want)
			}
		}
		if d := time.Since(start); d > time.Minute {
			t.Errorf("it waited %s", d)
		}
	})
}

// TestCorrectedSecret: a pod that says no gets the time that a corrected
// Secret needs to reach it, and not much more.
func TestCorrectedSecret(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for heals, want := range map[time.Duration]bool{90 * time.Second: true, 5 * time.Minute: false} {
			w, o := newWorld(), options(t)
			o.Timeout = 10 * time.Minute
			trouble := &cluster.Trouble{Pod: "kms-oss-0", Container: "oss", Reason: cluster.NotReady, Log: "refused", Final: true}
			w.pods = []cluster.Pod{{Name: "kms-oss-0", Trouble: trouble}}
			w.install = func(ctx context.Context) error {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(heals):
					return nil
				}
			}
			if _, err := w.job().Run(t.Context(), o); (err == nil) != want {
				t.Errorf("healed after %s: %v", heals, err)
			}
		}
	})
}

// TestPodOfTheOldVersion: a pod that is about to be replaced ends nothing, and
// the one that takes its name gets the whole patience.
func TestPodOfTheOldVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, o := newWorld(), options(t)
		o.Timeout = 10 * time.Minute
		var replaced atomic.Bool
		w.podsNow = func() []cluster.Pod {
			return []cluster.Pod{{Name: "kms-oss-0", Trouble: &cluster.Trouble{Pod: "kms-oss-0", Container: "oss", Reason: "ImagePullBackOff", Final: replaced.Load()}}}
		}
		var gaveUp time.Duration
		w.install = func(ctx context.Context) error {
			time.Sleep(time.Minute) // the old one is there for long
			if ctx.Err() != nil {
				t.Error("gave up for a pod that is on its way out")
			}
			replaced.Store(true)
			from := time.Now()
			<-ctx.Done()
			gaveUp = time.Since(from)
			return ctx.Err()
		}
		if _, err := w.job().Run(t.Context(), o); fault.KindOf(err) != fault.NotReady {
			t.Errorf("%v", err)
		}
		if gaveUp < 15*time.Second || gaveUp > time.Minute {
			t.Errorf("gave up after %s", gaveUp)
		}
	})
}

// TestTimeout: what is merely slow gets the whole time, and then the same words.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, o := newWorld(), options(t)
		w.pods = []cluster.Pod{{Name: "kms-oss-0", Trouble: &cluster.Trouble{Pod: "kms-oss-0", Reason: "Unschedulable", Message: "no volume", Cure: "give --host-path"}}}
		w.install = func(ctx context.Context) error {
			<-ctx.Done()
			return fault.New(fault.NotReady, "install release", "kms", ctx.Err())
		}
		start := time.Now()
		_, err := w.job().Run(t.Context(), o)
		if d := time.Since(start); d < o.Timeout {
			t.Errorf("gave up after %s", d)
		}
		if fault.KindOf(err) != fault.NotReady || !strings.Contains(fmt.Sprint(err), "Unschedulable") || fault.HintOf(err) != "give --host-path" {
			t.Errorf("%v, hint %q", err, fault.HintOf(err))
		}
	})
}

// TestStopped: Ctrl-C is not a trouble of a pod.
func TestStopped(t *testing.T) {
	w, o := newWorld(), options(t)
	ctx, cancel := context.WithCancel(t.Context())
	w.install = func(ctx context.Context) error {
		cancel()
		<-ctx.Done()
		return fault.New(fault.NotReady, "install release", "kms", ctx.Err())
	}
	if _, err := w.job().Run(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestLook(t *testing.T) {
	w, o := newWorld(), options(t)
	if _, err := w.job().Look(t.Context(), o); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if s, err := w.job().Look(t.Context(), o); err != nil || !s.Healthy {
		t.Errorf("%+v, %v", s, err)
	}
	w.workloads[0].Ready = 0
	if s, err := w.job().Look(t.Context(), o); err != nil || s.Healthy {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestUpgrade: a change makes a revision, no change makes none.
func TestUpgrade(t *testing.T) {
	w, o := newWorld(), options(t)
	if _, err := w.job().Upgrade(t.Context(), o); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), "kmsctl install") {
		t.Errorf("%v", err)
	}
	w, o = newWorld(), options(t)
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if res, err := w.job().Upgrade(t.Context(), o); err != nil || res.Changed || res.Release.Revision != 1 {
		t.Errorf("%+v, %v", res, err)
	}
	w.version = "1.1.0"
	if res, err := w.job().Upgrade(t.Context(), o); err != nil || !res.Changed || res.Release.Revision != 2 || res.Release.Version != "1.1.0" {
		t.Errorf("%+v, %v", res, err)
	}
	if w.locked {
		t.Error("the lock is still held")
	}
}

// TestAtomic: a change that fails goes back, and the fault says so; a first
// installation goes away.
func TestAtomic(t *testing.T) {
	w, o := newWorld(), options(t)
	o.Atomic = true
	failing := func(context.Context) error {
		return fault.Newf(fault.NotReady, "upgrade release", "kms", "pods are not ready")
	}
	w.install = failing
	_, err := w.job().Run(t.Context(), o)
	if fault.KindOf(err) != fault.NotReady || !strings.Contains(err.Error(), "taken away") || w.release.Name != "" {
		t.Errorf("%v, release %+v", err, w.release)
	}
	w.install, w.history = nil, nil
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	w.install, w.version = failing, "1.1.0"
	_, err = w.job().Upgrade(t.Context(), o)
	if fault.KindOf(err) != fault.NotReady || !strings.Contains(err.Error(), "rolled back to revision 1") {
		t.Errorf("%v", err)
	}
	if w.release.Status != cluster.Deployed || w.release.Version != "1.0.0" {
		t.Errorf("%+v", w.release)
	}
	// Without --atomic it stays failed, and install says what to do.
	o.Atomic = false
	if _, err := w.job().Upgrade(t.Context(), o); err == nil || w.release.Status != cluster.Failed {
		t.Errorf("%v, %+v", err, w.release)
	}
	if _, err := w.job().Run(t.Context(), o); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "kmsctl rollback") {
		t.Errorf("%v", err)
	}
}

func TestRollback(t *testing.T) {
	w, o := newWorld(), options(t)
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if _, err := w.job().Rollback(t.Context(), o, 0); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), "1 (deployed)") {
		t.Errorf("%v, %q", err, fault.HintOf(err))
	}
	w.version = "1.1.0"
	if _, err := w.job().Upgrade(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if _, err := w.job().Rollback(t.Context(), o, 9); fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "no revision 9") {
		t.Errorf("%v", err)
	}
	w.applied = nil
	res, err := w.job().Rollback(t.Context(), o, 0)
	if err != nil || res.Release.Version != "1.0.0" || !slices.Equal(w.undone, []string{"rollback 1"}) || len(w.applied) > 0 {
		t.Errorf("%+v, %v, undone %q, applied %q", res, err, w.undone, w.applied)
	}
}

// TestModelStays: another model of HSM is refused before anything is done, by
// whatever way it comes, since no key would open any more; and it is taken
// where there is nothing to lose.
func TestModelStays(t *testing.T) {
	w, o := newWorld(), options(t)
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	luna := map[string]any{"hsm": map[string]any{"hsm_model": "gemalto", "hsm_ip": "192.0.2.1"}}
	o.HSMSecret = &cluster.Secret{Namespace: "site", Name: "hsm-secret", Data: map[string][]byte{"hsm-pass": []byte("another")}}
	refused := func(by string, do func() (install.Result, error)) {
		t.Helper()
		w.applied, w.undone = nil, nil
		_, err := do()
		if fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "softhsm HSM alone") || !strings.Contains(fault.HintOf(err), "`kmsctl uninstall`, then `kmsctl install --model ") {
			t.Errorf("%s: %v, hint %q", by, err, fault.HintOf(err))
		}
		if len(w.applied)+len(w.undone) > 0 {
			t.Errorf("%s: applied %q, undone %q", by, w.applied, w.undone)
		}
	}
	w.values = luna
	refused("install", func() (install.Result, error) { return w.job().Run(t.Context(), o) })
	refused("upgrade", func() (install.Result, error) { return w.job().Upgrade(t.Context(), o) })
	refused("apply", func() (install.Result, error) { return w.job().Apply(t.Context(), o) })
	// Helm alone was told to switch, and failed: the data are still the old HSM's.
	w.history = append(w.history, w.release)
	w.release = cluster.Release{Name: "kms", Revision: 2, Status: cluster.Failed, Values: luna}
	refused("upgrade after one that failed", func() (install.Result, error) { return w.job().Upgrade(t.Context(), o) })
	w.release.Status = cluster.Deployed
	w.history[0].Values, w.release.Values = luna, map[string]any{}
	refused("rollback", func() (install.Result, error) { return w.job().Rollback(t.Context(), o, 1) })

	fresh := newWorld()
	fresh.values = luna
	if _, err := fresh.job().Run(t.Context(), options(t)); err != nil {
		t.Errorf("where nothing was: %v", err)
	}
	failed := newWorld()
	failed.values = luna
	failed.release = cluster.Release{Name: "kms", Revision: 1, Status: cluster.Failed}
	if _, err := failed.job().Run(t.Context(), options(t)); err != nil {
		t.Errorf("where nothing ever was whole: %v", err)
	}
}

// TestMembersStay: what would take members of the store away is refused before
// anything is done.
func TestMembersStay(t *testing.T) {
	w, o := newWorld(), options(t)
	if _, err := w.job().Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	w.values = map[string]any{"storage": map[string]any{"replicas": int64(3)}}
	w.applied, o.Atomic = nil, true
	if _, err := w.job().Upgrade(t.Context(), o); fault.KindOf(err) != fault.Usage || !strings.Contains(fault.HintOf(err), "without --atomic") || len(w.applied) > 0 {
		t.Errorf("%v, hint %q, applied %q", err, fault.HintOf(err), w.applied)
	}
	o.Atomic = false
	if _, err := w.job().Upgrade(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if _, err := w.job().Rollback(t.Context(), o, 0); fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "revision 1 has 1 member") || fault.HintOf(err) == "" || len(w.undone) > 0 {
		t.Errorf("%v, hint %q, undone %q", err, fault.HintOf(err), w.undone)
	}
	// As Helm gives them back.
	w.release.Values = map[string]any{"storage": map[string]any{"replicas": float64(3)}}
	o.Atomic = true
	if _, err := w.job().Upgrade(t.Context(), o); err != nil {
		t.Errorf("as many members as before: %v", err)
	}
}

// TestLocked: while another changes the release, nothing is touched.
func TestLocked(t *testing.T) {
	w, o := newWorld(), options(t)
	w.locked = true
	if _, err := w.job().Run(t.Context(), o); fault.KindOf(err) != fault.Conflict || len(w.applied) > 0 {
		t.Errorf("%v, applied %q", err, w.applied)
	}
}
