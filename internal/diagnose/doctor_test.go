package diagnose_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/url"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/diagnose"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

func pod(name string, labels map[string]string, s corev1.PodStatus) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: meta(name, labels), Spec: corev1.PodSpec{NodeName: "n1"}, Status: s}
}

var (
	ours    = map[string]string{"app.kubernetes.io/instance": "key-management-hsm"}
	isReady = corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
)

func waiting(container, reason, message string) corev1.PodStatus {
	return corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{{Name: container,
		State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}}}
}

// crashed is a world with a pod that ended with a last line of log.
func crashed(pod func(corev1.PodStatus) *corev1.Pod, log string) func(*world) {
	return func(w *world) {
		w.log = log
		w.objects = append(w.objects, pod(corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{Name: "c",
			State:                corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}},
			LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Error", ExitCode: 1}}}}}))
	}
}

func named(name string, labels map[string]string) func(corev1.PodStatus) *corev1.Pod {
	return func(s corev1.PodStatus) *corev1.Pod { return pod(name, labels, s) }
}

func (w *world) doctor(t *testing.T, old func(context.Context) (cluster.Release, error)) diagnose.Report {
	t.Helper()
	return w.doctorOf(t, old, func(context.Context) (cluster.Store, error) { return whole(nil), nil })
}

func (w *world) doctorOf(t *testing.T, old func(context.Context) (cluster.Release, error), store func(context.Context) (cluster.Store, error)) diagnose.Report {
	t.Helper()
	c := w.cluster()
	w.pre.Cluster = c
	return note(diagnose.Run(t.Context(), diagnose.Doctor{Preflight: w.pre, Running: c, Store: store, Old: old, Replicas: w.replicas}.Checks()))
}

// whole is a store of three, of which the second is spoilt.
func whole(spoil func(*cluster.StoreMember)) cluster.Store {
	st := cluster.Store{Quorum: true}
	for _, name := range []string{"s0", "s1", "s2"} {
		st.Members = append(st.Members, cluster.StoreMember{Name: name, ID: "1" + name, Role: cluster.Voter, State: cluster.MemberHealthy, Bytes: 1 << 20, InUse: 1 << 20, Quota: 8 << 30})
	}
	if spoil != nil {
		spoil(&st.Members[1])
	}
	return st
}

// TestDoctorOfTheStore: what is wrong with each member is said, with what to
// type.
func TestDoctorOfTheStore(t *testing.T) {
	const replace = "`kmsctl storage replace s1 -n kube-system`"
	for name, c := range map[string]struct {
		spoil        func(*cluster.StoreMember)
		err          error
		verdict      diagnose.Verdict
		reason, cure string
	}{
		"whole":      {nil, nil, diagnose.OK, "all 3 members are there", ""},
		"empty":      {func(m *cluster.StoreMember) { m.State = cluster.MemberEmpty }, nil, diagnose.Fail, "s1 has lost its data", replace},
		"away":       {func(m *cluster.StoreMember) { m.State, m.Why = cluster.MemberAway, "refused" }, nil, diagnose.Fail, "s1 does not answer: refused", replace},
		"joins":      {func(m *cluster.StoreMember) { m.State, m.Role = cluster.MemberJoining, "" }, nil, diagnose.Warn, "s1 joins the store", "wait"},
		"learns":     {func(m *cluster.StoreMember) { m.Role = cluster.Learner }, nil, diagnose.Warn, "s1 joins the store", "wait"},
		"full":       {func(m *cluster.StoreMember) { m.Alarms = []string{cluster.NoSpace} }, nil, diagnose.Fail, "s1 has no room: its file of 1 MiB has reached what it may hold (8192 MiB)", "kubectl edit pvc etcd-s1 -n kube-system"},
		"corrupt":    {func(m *cluster.StoreMember) { m.Alarms = []string{"CORRUPT"} }, nil, diagnose.Fail, "s1 has raised the alarm CORRUPT", replace},
		"nearly":     {func(m *cluster.StoreMember) { m.InUse = 7 << 30 }, nil, diagnose.Warn, "s1 holds 7168 of the 8192 MiB", "purge"},
		"slow":       {func(m *cluster.StoreMember) { m.Lag = 5000 }, nil, diagnose.Warn, "s1 is 5000 changes behind", "disk"},
		"none":       {nil, fault.Newf(fault.NotFound, "find service", "x", "not there"), diagnose.Skip, "the release has no storage", ""},
		"forbidden":  {nil, fault.Newf(fault.Denied, "run a command in pod", "x", "no"), diagnose.Skip, "may not run a command", ""},
		"no pod":     {nil, fault.Newf(fault.NotReady, "reach service", "x", "none of its 3 pods runs"), diagnose.Fail, "none of its 3 pods runs", "pods"},
		"not looked": {nil, errors.ErrUnsupported, diagnose.Skip, "the store cannot be asked", ""},
	} {
		t.Run(name, func(t *testing.T) {
			look := func(context.Context) (cluster.Store, error) { return whole(c.spoil), c.err }
			if errors.Is(c.err, errors.ErrUnsupported) {
				look = nil
			}
			got := find(running(t).doctorOf(t, none, look), "store")
			if len(got) != 1 || got[0].Verdict != c.verdict || !strings.Contains(got[0].Reason, c.reason) || !strings.Contains(got[0].Cure, c.cure) {
				t.Errorf("want %s %q, cure %q; got %+v", c.verdict, c.reason, c.cure, got)
			}
		})
	}
	got := find(running(t).doctorOf(t, none, func(context.Context) (cluster.Store, error) {
		st := whole(func(m *cluster.StoreMember) { m.State = cluster.MemberEmpty })
		st.Quorum, st.Members[2].State = false, cluster.MemberAway
		return st, nil
	}), "store")
	if len(got) != 3 || !strings.Contains(got[0].Reason, "nothing is written") || !strings.Contains(got[0].Cure, "kmsctl restore FILE") || strings.Contains(got[1].Cure+got[2].Cure, "replace") {
		t.Errorf("without a majority: %+v", got)
	}
}

func running(t *testing.T) *world {
	t.Helper()
	w := good(t)
	data := map[string][]byte{"hsm-pass": w.pre.HSMSecret.Password, "ServerCAFile": w.pre.HSMSecret.ServerCA}
	for ip, c := range w.pre.HSMSecret.Cert {
		data[ip], data[ip+"-key"] = c, w.pre.HSMSecret.Key[ip]
	}
	w.pre.HSMSecret = nil
	says(kmsapi.Health{Ready: true})(w)
	w.pre.Current = func(context.Context) (cluster.Release, error) {
		return cluster.Release{Status: cluster.Deployed, Revision: 1, Version: "1.0.0"}, nil
	}
	w.objects = append(w.objects, &corev1.Secret{ObjectMeta: meta("hsm-secret", nil), Data: data}, pod("key-management-hsm-oss-0", ours, isReady))
	return w
}

// says is a world whose API has two replicas, of which the second says this.
func says(h kmsapi.Health) func(*world) {
	return func(w *world) {
		w.replicas = func(context.Context) ([]diagnose.Replica, error) {
			return []diagnose.Replica{{Pod: "oss-0", Health: kmsapi.Health{Ready: true}}, {Pod: "oss-1", Node: "n2", Health: h}}, nil
		}
	}
}

func clockOff(state string, seconds int64) func(*world) {
	return says(kmsapi.Health{Ready: true, Clock: &kmsapi.ClockHealth{State: state, AheadSeconds: seconds}})
}

func keyUse(near int, furthest float64) func(*world) {
	return says(kmsapi.Health{Ready: true, KeyUse: &kmsapi.KeyUse{Near: near, Furthest: furthest}})
}

func none(context.Context) (cluster.Release, error) {
	return cluster.Release{}, fault.Newf(fault.NotFound, "find release", "key-management", "not there")
}

// TestDoctor: each symptom of the old product's troubleshooting page, and of
// ours, is named with its cause and cure; nothing is wrong with a good one.
func TestDoctor(t *testing.T) {
	if r := running(t).doctor(t, none); r.Failed+r.Warned > 0 {
		t.Errorf("%+v", r.Findings)
	}
	for name, c := range map[string]struct {
		wrong               func(w *world)
		old                 func(context.Context) (cluster.Release, error)
		check, reason, cure string
	}{
		"hsm-secret removed":     {func(w *world) { w.objects = append(w.objects[:5], w.objects[6:]...) }, none, "hsm secret", "kube-system/hsm-secret is not there", "export it before"},
		"upgrade failed":         {func(w *world) { w.pre.Current = status(cluster.Failed, "UPGRADE FAILED") }, none, "release", "is failed: UPGRADE FAILED", "give the overrides file again"},
		"pending":                {func(w *world) { w.pre.Current = status(cluster.PendingUpgrade, "") }, none, "release", "is pending-upgrade", "--repair"},
		"not installed":          {func(w *world) { w.pre.Current = none }, none, "release", "there is no release", "kmsctl install"},
		"501 on rotate":          {nil, func(context.Context) (cluster.Release, error) { return cluster.Release{Version: "3.2.1"}, nil }, "old product", "3.2.1 answers 501 to rotate", "4.1.0"},
		"400 no such API key":    {add(&corev1.Secret{ObjectMeta: meta("key-management-secret", nil), Data: map[string][]byte{"kms-api-key": []byte("default_kms_api_key")}}), none, "old api key", "the placeholder", "delete the pep pod"},
		"500 on every call":      {add(&batchv1.Job{ObjectMeta: meta("key-management-hsm-cleanup", nil)}), none, "old cleanup job", "has not come to its end", "delete the Job"},
		"503":                    {func(w *world) { w.pre.HSMPort = "1" }, none, "hsm reachable", "does not answer", "firewall"},
		"503 in a pod's log":     {crashed(named("key-management-hsm-oss-1", ours), "CKR_DEVICE_ERROR"), none, "pods", "the HSM does not answer", "hsm reachable"},
		"some nodes only":        {add(node("n2", "10.0.0.12", "amd64")), none, "hsm certificates", "n2 (10.0.0.12) has no certificate pair", "luna-cert create"},
		"no import":              {func(w *world) { w.pre.Model, _ = hsm.Lookup("softhsm") }, none, "import of keys", "cannot import root keys", "hsm probe"},
		"no reachable servers":   {crashed(named("key-management-persistence-0", nil), "no reachable servers"), none, "old pods", "the node cannot look up services", "DNS"},
		"pep":                    {add(pod("key-management-pep-0", nil, waiting("pep", "CreateContainerConfigError", "kms-api-key"))), none, "old pods", "kms-api-key is not valid", "secret watcher"},
		"image":                  {add(pod("key-management-hsm-oss-1", ours, waiting("oss", "ImagePullBackOff", "not found"))), none, "pods", "key-management-hsm-oss-1 on node n1, container oss: ImagePullBackOff: not found", "kmsctl load"},
		"hsm-secret empty":       {func(w *world) { w.objects[5].(*corev1.Secret).Data = nil }, none, "hsm secret", "has no hsm-pass", "render secret"},
		"hsm-secret not mounted": {add(pod("key-management-hsm-oss-1", ours, waiting("oss", "CreateContainerConfigError", `secret "hsm-secret" not found`))), none, "pods", "hsm-secret is not there", "install --secret"},
		"namespace going":        {func(w *world) { w.objects[0].(*corev1.Namespace).Status.Phase = corev1.NamespaceTerminating }, none, "namespace", "kube-system is Terminating", "wait until it is gone"},
		"no pods":                {func(w *world) { w.objects = w.objects[:6] }, none, "pods", "the release has no pods", "release"},
		"not yet ready":          {add(pod("key-management-hsm-oss-1", ours, corev1.PodStatus{Phase: corev1.PodRunning})), none, "pods", "is not ready yet (Running)", "kubectl describe pod"},
		"restarts": {add(pod("key-management-hsm-oss-1", ours, corev1.PodStatus{Phase: corev1.PodRunning, Conditions: isReady.Conditions,
			ContainerStatuses: []corev1.ContainerStatus{{Name: "oss", RestartCount: 7}}})), none, "pods", "started again 7 times", "logs --previous"},
		"old of no known version": {nil, func(context.Context) (cluster.Release, error) { return cluster.Release{Version: "next"}, nil }, "old product", "key-management next is beside", ""},
		"no Helm":                 {nil, nil, "old product", "Helm's records are not known", ""},
		"model not known":         {func(w *world) { w.pre.Model = hsm.Model{} }, none, "import of keys", "the HSM model is not known", ""},
		"api not ready":           {says(kmsapi.Health{Reasons: []string{"hsm: CKR_DEVICE_ERROR", "audit: no room"}}), none, "api", "oss-1 on node n2 is not ready: hsm: CKR_DEVICE_ERROR; audit: no room", "goes on by itself"},
		"api not reached": {func(w *world) {
			w.replicas = func(context.Context) ([]diagnose.Replica, error) {
				return []diagnose.Replica{{Pod: "oss-0", Err: errors.New("no route")}}, nil
			}
		}, none, "api", "oss-0 was not asked: no route", "pods"},
		"may not ask the api": {func(w *world) {
			w.replicas = func(context.Context) ([]diagnose.Replica, error) { return nil, errors.New("no right") }
		}, none, "key clock", "the API was not asked: no right", ""},
		"nobody asked":        {func(w *world) { w.replicas = nil }, none, "key use", "the API was not asked", ""},
		"clock ahead":         {clockOff(kmsapi.ClockIsAhead, 7200), none, "key clock", "oss-1 on node n2: the clock is 2h0m0s ahead of the time that passed", "kmsctl clock confirm --in-cluster-service"},
		"clock behind":        {clockOff(kmsapi.ClockBehind, -7200), none, "key clock", "the clock is 2h0m0s behind what was seen before", "set the node's clock right"},
		"clock after a stop":  {clockOff(kmsapi.ClockStarting, 86400), none, "key clock", "24h0m0s ahead, by what may have been a stop", "three minutes"},
		"keys near the limit": {keyUse(2, 0.61), none, "key use", "2 keys have encrypted half as many texts by AES-GCM as they may, or more; the furthest has come to 61 %", "kmsctl keys rotate"},
		"keys at the limit":   {keyUse(2, 1), none, "key use", "of 2 keys that are near", "kmsctl keys rotate"},
		"password":            {crashed(named("key-management-hsm-oss-1", ours), "CKR_PIN_INCORRECT"), none, "pods", "the HSM refused the password", "hsm-secret"},
	} {
		t.Run(name, func(t *testing.T) {
			w := running(t)
			if c.wrong != nil {
				c.wrong(w)
			}
			got := find(w.doctor(t, c.old), c.check)
			seen := false
			for _, f := range got {
				seen = seen || f.Verdict != diagnose.OK && strings.Contains(f.Reason, c.reason) && strings.Contains(f.Cure, c.cure)
			}
			if !seen {
				t.Errorf("want %q, cure %q; got %+v", c.reason, c.cure, got)
			}
		})
	}
}

func status(s, note string) func(context.Context) (cluster.Release, error) {
	return func(context.Context) (cluster.Release, error) {
		return cluster.Release{Status: s, Note: note, Revision: 2}, nil
	}
}

func add(o runtime.Object) func(*world) {
	return func(w *world) { w.objects = append(w.objects, o) }
}

// TestBundleHoldsNoSecret plants canaries in each form in which secrets are
// written: none comes through, and the text around them does.
func TestBundleHoldsNoSecret(t *testing.T) {
	pin := []byte(`canary "pin" 4711\`)
	_, key := pair(t, "10.0.0.11", time.Now())
	var b diagnose.Bundle
	b.Known(pin, append(bytes.Clone(pin), '\n'), key, []byte("x"), nil)
	lines := strings.Split(string(key), "\n")
	forms := []string{string(pin), hex.EncodeToString(pin), url.QueryEscape(string(pin)), lines[3], string(key)}
	for _, around := range []string{"", "a", "ab"} {
		forms = append(forms, base64.StdEncoding.EncodeToString([]byte(around+string(pin)+"\n")))
	}
	for _, f := range forms {
		b.Add("logs/"+hex.EncodeToString([]byte(f))[:12]+".log", []byte("before "+f+" after"))
	}
	if err := b.AddJSON("report.json", map[string]any{"message": string(pin), "other": "kept"}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"jwt":   "Authorization: Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl after",
		"named": `{"hsm_pw": "canary-one", "password":"canary-two", "apikey=canary-three", "token: canary-four"} after`,
		"age":   "AGE-SECRET-KEY-1CANARY after",
		"pem":   "-----BEGIN EC PRIVATE KEY-----\ncanary\n-----END EC PRIVATE KEY-----\n after",
		"torn":  "after -----BEGIN EC PRIVATE KEY-----\ncanary",
	} {
		b.Add(name, []byte(text))
	}
	var out bytes.Buffer
	if err := b.Write(&out, time.Now()); err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(&out)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for r := tar.NewReader(z); ; n++ {
		h, err := r.Next()
		if err == io.EOF { //nolint:errorlint // the package's own word
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		s := strings.ToLower(string(text))
		for _, bad := range []string{"canary", "4711", hex.EncodeToString([]byte("anary")), "y2fuyxj5", "yw5hcn", "fuyxj5", lines[3], "eyj"} {
			if strings.Contains(s, strings.ToLower(bad)) {
				t.Errorf("%s: %q in %s", h.Name, bad, text)
			}
		}
		if !strings.Contains(s, "after") && h.Name != "kmsctl-bundle/report.json" {
			t.Errorf("%s lost its text: %s", h.Name, text)
		}
	}
	if n != len(b.Names()) {
		t.Errorf("%d files, want %d", n, len(b.Names()))
	}
}

func TestAllowed(t *testing.T) {
	chart := map[string]any{"hsm": map[string]any{"hsm_ip": "", "hsm_model": ""}, "podAnnotations": map[string]any{}, "tolerations": []any{}, "oss": map[string]any{"resources": map[string]any{}}}
	got := diagnose.Allowed(map[string]any{"hsm": map[string]any{"hsm_ip": "10.0.0.1", "hsm_pw": "canary"}, "client_certs": []any{"canary"}, "podAnnotations": map[string]any{"a": "canary"},
		"tolerations": []any{"canary"}, "oss": map[string]any{"resources": map[string]any{"x": "canary"}}}, chart)
	b, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	s := string(b)
	if strings.Contains(s, "canary") || !strings.Contains(s, "10.0.0.1") {
		t.Error(s)
	}
}
