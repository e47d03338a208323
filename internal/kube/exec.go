package kube

import (
	"context"
	"errors"
	"io"
	"strings"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"

	"github.com/kmsctl/kmsctl/internal/fault"
)

// Exec is a command in a container of a service's pod.
type Exec struct {
	Namespace, Service, Container string
	Pod                           string // the one; empty: any that runs

	// Command makes the command from the container's own arguments, in which
	// $(POD_NAME) is replaced by the pod's name.
	Command        func(args []string) []string
	Stdin          io.Reader // nil: none
	Stdout, Stderr io.Writer
}

// Run runs the command in a pod that runs, ready or not, and gives its exit
// code.
func (c *Cluster) Run(ctx context.Context, e Exec) (code int, err error) {
	object := e.Namespace + "/" + e.Service
	pod, args, err := c.runningPod(ctx, e)
	if err != nil {
		return 0, err
	}
	cfg, err := c.flags.ToRESTConfig()
	if err != nil {
		return 0, c.fault("run a command in a pod of service", object, err)
	}
	url := c.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(e.Namespace).Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: e.Container, Command: e.Command(args), Stdin: e.Stdin != nil, Stdout: true, Stderr: true}, scheme.ParameterCodec).URL()
	x, err := remotecommand.NewSPDYExecutor(cfg, "POST", url)
	if err != nil {
		return 0, c.fault("run a command in pod", e.Namespace+"/"+pod, err)
	}
	err = x.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: e.Stdin, Stdout: e.Stdout, Stderr: e.Stderr})
	var exit exec.CodeExitError
	if errors.As(err, &exit) {
		return exit.Code, nil
	}
	return 0, c.fault("run a command in pod", e.Namespace+"/"+pod, err)
}

// runningPod picks a pod of the service whose containers all run, a ready one
// before others.
func (c *Cluster) runningPod(ctx context.Context, e Exec) (name string, args []string, err error) {
	pods, err := c.podsOf(ctx, e.Namespace, e.Service)
	if err != nil {
		return "", nil, err
	}
	var found *corev1.Pod
	for i := range pods {
		if p := &pods[i]; running(p) && (found == nil || ready(p)) && (e.Pod == "" || e.Pod == p.Name) {
			found = p
		}
	}
	if found == nil {
		return "", nil, fault.Newf(fault.NotReady, "reach service", e.Namespace+"/"+e.Service, "none of its %d pods runs", len(pods)).WithHint("see `kmsctl status`")
	}
	for _, c := range found.Spec.Containers {
		if c.Name == e.Container {
			for _, a := range c.Args {
				args = append(args, strings.ReplaceAll(a, "$(POD_NAME)", found.Name))
			}
		}
	}
	return found.Name, args, nil
}

func running(p *corev1.Pod) bool {
	for _, s := range p.Status.ContainerStatuses {
		if s.State.Running == nil {
			return false
		}
	}
	return p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning
}

// WhoAmI is who the API server takes this account for; empty before Kubernetes
// 1.28, which does not tell.
func (c *Cluster) WhoAmI(ctx context.Context) string {
	r, err := c.client.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return ""
	}
	return r.Status.UserInfo.Username
}
