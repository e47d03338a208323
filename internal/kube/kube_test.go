package kube_test

import (
	"context"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	ktesting "k8s.io/client-go/testing"
	"k8s.io/utils/ptr"

	"github.com/kmsctl/kmsctl/internal/cluster"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
)

func secretOf(data ...string) cluster.Secret {
	s := cluster.Secret{Namespace: "n", Name: "hsm-secret", Data: map[string][]byte{}}
	for i := 0; i < len(data); i += 2 {
		s.Data[data[i]] = []byte(data[i+1])
	}
	return s
}

func TestApplySecret(t *testing.T) {
	client := fake.NewClientset()
	c := kube.NewFor(client)
	for _, step := range []struct {
		s       cluster.Secret
		changed bool
	}{
		{secretOf("hsm-pass", "a"), true},
		{secretOf("hsm-pass", "a"), false},
		{secretOf("hsm-pass", "b", "10.0.0.1", "c"), true},
		{secretOf("hsm-pass", "b"), true}, // an entry goes
	} {
		changed, err := c.ApplySecret(t.Context(), step.s)
		if err != nil || changed != step.changed {
			t.Errorf("%v: changed %v, %v", step.s.Data, changed, err)
		}
		got, err := c.Secret(t.Context(), "n", "hsm-secret")
		if err != nil || len(got.Data) != len(step.s.Data) || string(got.Data["hsm-pass"]) != string(step.s.Data["hsm-pass"]) || got.Type != "Opaque" {
			t.Errorf("%+v, %v", got, err)
		}
	}
	// The type of a Secret cannot change.
	other := secretOf("a", "b")
	other.Type = "kubernetes.io/tls"
	if _, err := c.ApplySecret(t.Context(), other); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "kubectl delete secret") {
		t.Errorf("%v", err)
	}
	if err := c.DeleteSecret(t.Context(), "n", "hsm-secret"); err != nil {
		t.Error(err)
	}
	if err := c.DeleteSecret(t.Context(), "n", "hsm-secret"); err != nil {
		t.Errorf("the second time: %v", err)
	}
	if _, err := c.Secret(t.Context(), "n", "hsm-secret"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
}

// TestApplySecretVerifies: something that changes what we applied is noticed.
func TestApplySecretVerifies(t *testing.T) {
	client := fake.NewClientset()
	reads := 0
	client.PrependReactor("get", "secrets", func(ktesting.Action) (bool, runtime.Object, error) {
		if reads++; reads == 1 {
			return false, nil, nil
		}
		return true, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "hsm-secret", Namespace: "n"}, Type: "Opaque", Data: map[string][]byte{"hsm-pass": []byte("other")}}, nil
	})
	_, err := kube.NewFor(client).ApplySecret(t.Context(), secretOf("hsm-pass", "a"))
	if fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "other data than was applied") {
		t.Errorf("%v", err)
	}
}

func pod(name string, change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "n", Labels: map[string]string{"app.kubernetes.io/instance": "kms"}}}
	change(p)
	return p
}

func waiting(reason, message string, restarts int32) corev1.ContainerStatus {
	return corev1.ContainerStatus{Name: "hsm", RestartCount: restarts, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}
}

// TestPods: each way in which a pod is not ready gets its reason and cure.
func TestPods(t *testing.T) {
	client := fake.NewClientset(
		pod("a-ready", func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		}),
		pod("b-unschedulable", func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable",
				Message: "pod has unbound immediate PersistentVolumeClaims"}}
		}),
		pod("c-image", func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{waiting("ImagePullBackOff", "Back-off pulling image", 0)}
		}),
		pod("d-crash", func(p *corev1.Pod) {
			s := waiting("CrashLoopBackOff", "back-off", 4)
			s.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 2, Reason: "Error"}
			p.Status.ContainerStatuses = []corev1.ContainerStatus{s}
		}),
		pod("e-config", func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{waiting("CreateContainerConfigError", `secret "hsm-secret" not found`, 0)}
		}),
		pod("f-mount", func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{waiting("ContainerCreating", "", 0)}
		}),
		pod("g-going", func(p *corev1.Pod) {
			now := metav1.Now()
			p.DeletionTimestamp, p.Finalizers = &now, []string{"x"}
		}),
		&corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e", Namespace: "n"}, InvolvedObject: corev1.ObjectReference{Name: "f-mount"}, Type: "Warning",
			Reason: "FailedMount", Message: `MountVolume.SetUp failed: secret "kms-ca" not found`},
	)
	pods, err := kube.NewFor(client).Pods(t.Context(), "n", "kms")
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		name, reason, cure string
		final              bool
	}{
		{"a-ready", "", "", false},
		{"b-unschedulable", "Unschedulable", "--host-path", false},
		{"c-image", "ImagePullBackOff", "kmsctl load", true},
		{"d-crash", "CrashLoopBackOff", "log line", true},
		{"e-config", "CreateContainerConfigError", "kmsctl install", true},
		{"f-mount", "FailedMount", "kmsctl install", false},
	}
	if len(pods) != len(want) {
		t.Fatalf("%d pods: %+v", len(pods), pods)
	}
	for i, w := range want {
		p := pods[i]
		switch {
		case p.Name != w.name || p.Ready != (w.reason == ""):
			t.Errorf("%+v", p)
		case w.reason == "" && p.Trouble != nil:
			t.Errorf("%s: %+v", p.Name, p.Trouble)
		case w.reason != "" && (p.Trouble == nil || p.Trouble.Reason != w.reason || !strings.Contains(p.Trouble.Cure, w.cure) || p.Trouble.Final != w.final):
			t.Errorf("%s: %+v", p.Name, p.Trouble)
		}
	}
	if pods[3].Trouble.Message != "exited with 2 (Error)" || pods[3].Trouble.Log != "fake logs" || pods[3].Restarts != 4 {
		t.Errorf("%+v", pods[3])
	}
}

// TestPodsOfAnotherVersion: what ails a pod that is about to be replaced does
// not last, as after an upgrade to an image that nobody has.
func TestPodsOfAnotherVersion(t *testing.T) {
	stuck := func(name, kind, owner, hash string) *corev1.Pod {
		return pod(name, func(p *corev1.Pod) {
			p.OwnerReferences = []metav1.OwnerReference{{Kind: kind, Name: owner, Controller: ptr.To(true)}}
			p.Labels[appsv1.ControllerRevisionHashLabelKey] = hash
			p.Status.ContainerStatuses = []corev1.ContainerStatus{waiting("ImagePullBackOff", "Back-off pulling image", 0)}
		})
	}
	replicas := func(name, deployment, revision string) *appsv1.ReplicaSet {
		return &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: name, Annotations: map[string]string{"deployment.kubernetes.io/revision": revision},
			OwnerReferences: []metav1.OwnerReference{{Kind: "Deployment", Name: deployment, Controller: ptr.To(true)}}}}
	}
	client := fake.NewClientset(
		&appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "set", Generation: 2}, Status: appsv1.StatefulSetStatus{ObservedGeneration: 2, UpdateRevision: "new"}},
		&appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "unseen", Generation: 3}, Status: appsv1.StatefulSetStatus{ObservedGeneration: 2, UpdateRevision: "new"}},
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "deployment", Annotations: map[string]string{"deployment.kubernetes.io/revision": "4"}}},
		replicas("old", "deployment", "3"), replicas("new", "deployment", "4"),
		stuck("a-set-old", "StatefulSet", "set", "old"), stuck("b-set-new", "StatefulSet", "set", "new"), stuck("c-set-unseen", "StatefulSet", "unseen", "new"),
		stuck("d-deployment-old", "ReplicaSet", "old", ""), stuck("e-deployment-new", "ReplicaSet", "new", ""), stuck("f-owner-gone", "ReplicaSet", "gone", ""),
	)
	pods, err := kube.NewFor(client).Pods(t.Context(), "n", "kms")
	if err != nil || len(pods) != 6 {
		t.Fatalf("%+v, %v", pods, err)
	}
	for i, final := range []bool{false, true, false, false, true, true} {
		if p := pods[i]; p.Trouble == nil || p.Trouble.Reason != "ImagePullBackOff" || p.Trouble.Final != final {
			t.Errorf("%s: %+v, want final %t", p.Name, p.Trouble, final)
		}
	}
}

func TestFillSecret(t *testing.T) {
	client := fake.NewClientset(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "n"}})
	c := kube.NewFor(client)
	conflicts := 0
	client.PrependReactor("update", "secrets", func(ktesting.Action) (bool, runtime.Object, error) {
		if conflicts++; conflicts == 1 {
			return true, nil, conflict()
		}
		return false, nil, nil
	})
	if set, err := c.FillSecret(t.Context(), "n", "s", "kms-instance", []byte("id")); err != nil || !set {
		t.Errorf("%v, %v", set, err)
	}
	if set, err := c.FillSecret(t.Context(), "n", "s", "kms-instance", []byte("other")); err != nil || set {
		t.Errorf("overwritten: %v, %v", set, err)
	}
	if s, err := c.Secret(t.Context(), "n", "s"); err != nil || string(s.Data["kms-instance"]) != "id" {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestWatchAnnotated: a Secret that is there and one that comes later are both
// found; others are not.
func TestWatchAnnotated(t *testing.T) {
	annotated := func(name string) *corev1.Secret {
		return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "n", Annotations: map[string]string{"a/b": "entry"}}}
	}
	client := fake.NewClientset(annotated("early"), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "plain", Namespace: "n"}})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	found := make(chan cluster.Annotated, 10)
	done := make(chan error, 1)
	go func() {
		done <- kube.NewFor(client).WatchAnnotated(ctx, []string{"n"}, "a/b", func(a cluster.Annotated) { found <- a })
	}()
	if a := <-found; a.Name != "early" || a.Value != "entry" || a.Has {
		t.Errorf("%+v", a)
	}
	late := annotated("late")
	late.Data = map[string][]byte{"entry": []byte("id")}
	if _, err := client.CoreV1().Secrets("n").Create(ctx, late, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if a := <-found; a.Name != "late" || !a.Has {
		t.Errorf("%+v", a)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestLead: one leads, and the next one takes over when it goes.
func TestLead(t *testing.T) {
	client := fake.NewClientset()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	led := make(chan string, 2)
	run := func(ctx context.Context, who string) chan error {
		done := make(chan error, 1)
		go func() {
			done <- kube.NewFor(client).Lead(ctx, "n", "l", who, func(ctx context.Context) {
				led <- who
				<-ctx.Done()
			})
		}()
		return done
	}
	first, stop := context.WithCancel(ctx)
	one := run(first, "one")
	if who := <-led; who != "one" {
		t.Errorf("%s leads", who)
	}
	two := run(ctx, "two")
	stop()
	if err := <-one; err != nil {
		t.Error(err)
	}
	if who := <-led; who != "two" {
		t.Errorf("%s leads", who)
	}
	cancel()
	if err := <-two; err != nil {
		t.Error(err)
	}
}

func TestOpenWithoutKubeconfig(t *testing.T) {
	if _, err := kube.Open(kube.Config{Kubeconfig: "/nowhere/kubeconfig"}); fault.KindOf(err) != fault.Usage || !strings.Contains(fault.HintOf(err), "KUBECONFIG") {
		t.Errorf("%v", err)
	}
}

// TestLock: one holds it, the next is told who, a dead one's lock runs out.
func TestLock(t *testing.T) {
	client := fake.NewClientset()
	c := kube.NewFor(client)
	locked, unlock, err := c.Lock(t.Context(), "n", "kms-kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = c.Lock(t.Context(), "n", "kms-kmsctl")
	if fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "process") || !strings.Contains(fault.HintOf(err), "runs out in") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	unlock()
	if locked.Err() == nil {
		t.Error("the context outlives the lock")
	}
	_, unlock, err = c.Lock(t.Context(), "n", "kms-kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	l, err := client.CoordinationV1().Leases("n").Get(t.Context(), "kms-kmsctl", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	old := metav1.NewMicroTime(time.Now().Add(-time.Minute))
	l.Spec.RenewTime = &old
	if _, err := client.CoordinationV1().Leases("n").Update(t.Context(), l, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	_, again, err := c.Lock(t.Context(), "n", "kms-kmsctl")
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// TestLastSaid: what a container said last, in our own programs' forms and in
// others'.
func TestLastSaid(t *testing.T) {
	for _, c := range []struct {
		lines []string
		want  [3]string
	}{
		{nil, [3]string{}},
		{[]string{"one", "two ", ""}, [3]string{"two", "", ""}},
		{[]string{"kms-connector: error: no such library", "kms-connector: hint: check --module"}, [3]string{"kms-connector: error: no such library", "check --module", ""}},
		{[]string{`{"level":"INFO","msg":"listening"}`, `{"level":"WARN","msg":"not ready","error":"log in: refused before","kind":"denied","hint":"correct hsm-pass"}`},
			[3]string{"not ready: log in: refused before", "correct hsm-pass", "denied"}},
		{[]string{"kmsctl: hint: old", `{"msg":"ready"}`}, [3]string{"ready", "", ""}},
	} {
		text, hint, kind := kube.LastSaid(c.lines...)
		if got := [3]string{text, hint, kind}; got != c.want {
			t.Errorf("%q: %q, want %q", c.lines, got, c.want)
		}
	}
}

// TestForwardNeedsAPod: a service that is absent, and one without a ready pod.
func TestForwardNeedsAPod(t *testing.T) {
	client := fake.NewClientset(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "kms-oss", Namespace: "n"}, Spec: corev1.ServiceSpec{Selector: map[string]string{"app.kubernetes.io/instance": "kms"}}},
		pod("starting", func(*corev1.Pod) {}))
	if _, _, err := kube.NewFor(client).Forward(t.Context(), "n", "none", 1); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
	if _, _, err := kube.NewFor(client).Forward(t.Context(), "n", "kms-oss", 1); fault.KindOf(err) != fault.NotReady || !strings.Contains(err.Error(), "none of its 1 pods is ready") {
		t.Errorf("%v", err)
	}
}

// TestHelm2: a release counts while one of its records is neither deleted nor
// superseded, whichever way Tiller keeps them.
func TestHelm2(t *testing.T) {
	record := func(name, release, status string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Name: name, Namespace: "kube-system", Labels: map[string]string{"OWNER": "TILLER", "NAME": release, "STATUS": status}}
	}
	client := fake.NewClientset(&corev1.ConfigMap{ObjectMeta: record("a.v1", "a", "SUPERSEDED")}, &corev1.ConfigMap{ObjectMeta: record("a.v2", "a", "DEPLOYED")},
		&corev1.ConfigMap{ObjectMeta: record("b.v1", "b", "SUPERSEDED")}, &corev1.ConfigMap{ObjectMeta: record("b.v2", "b", "DELETED")},
		&corev1.Secret{ObjectMeta: record("c.v1", "c", "FAILED")}, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "other", Namespace: "kube-system"}})
	got, err := kube.NewFor(client).Helm2(t.Context())
	if err != nil || strings.Join(got, " ") != "a c" {
		t.Errorf("%v %v", got, err)
	}
}
