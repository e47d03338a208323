package kube_test

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/kube"
)

// TestRunPicksAPodWhoseContainersRun: a ready one before others, and none that
// is ending or starting.
func TestRunPicksAPodWhoseContainersRun(t *testing.T) {
	pod := func(name string, isReady, runs, ending bool) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "n", Labels: map[string]string{"app": "oss"}}, Status: corev1.PodStatus{Phase: corev1.PodRunning},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "hsm", Args: []string{"--no"}}, {Name: "oss", Args: []string{"--audit-dir=/audit/$(POD_NAME)"}}}}}
		if isReady {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		}
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "oss", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}}}}
		if runs {
			p.Status.ContainerStatuses[0].State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
		}
		if ending {
			now := metav1.Now()
			p.DeletionTimestamp = &now
		}
		return p
	}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "oss", Namespace: "n"}, Spec: corev1.ServiceSpec{Selector: map[string]string{"app": "oss"}}}
	only := ""
	find := func(pods ...*corev1.Pod) (string, []string, error) {
		client := fake.NewClientset(svc)
		for _, p := range pods {
			if err := client.Tracker().Add(p); err != nil {
				t.Fatal(err)
			}
		}
		return kube.NewFor(client).RunningPod(t.Context(), kube.Exec{Namespace: "n", Service: "oss", Pod: only, Container: "oss"})
	}
	name, args, err := find(pod("a", true, true, true), pod("b", false, false, false), pod("c", false, true, false), pod("d", true, true, false), pod("e", false, true, false))
	if err != nil || name != "d" || strings.Join(args, " ") != "--audit-dir=/audit/d" {
		t.Errorf("%s %v %v", name, args, err)
	}
	if name, _, err := find(pod("b", false, false, false), pod("c", false, true, false)); err != nil || name != "c" {
		t.Errorf("none is ready: %s %v", name, err)
	}
	if _, _, err := find(pod("a", true, true, true), pod("b", true, false, false)); fault.KindOf(err) != fault.NotReady || fault.HintOf(err) == "" {
		t.Errorf("none runs: %v", err)
	}
	only = "e"
	if name, args, err := find(pod("d", true, true, false), pod("e", false, true, false)); err != nil || name != "e" || strings.Join(args, " ") != "--audit-dir=/audit/e" {
		t.Errorf("one by name: %s %v %v", name, args, err)
	}
}
