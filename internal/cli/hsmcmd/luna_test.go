package hsmcmd_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kmsctl/kmsctl/internal/cli"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/cli/hsmcmd"
	"github.com/kmsctl/kmsctl/internal/kube"
)

func node(name, ip, label string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"management": label}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}}}
}

// TestNodesOfTheCluster: without --node the cluster's nodes get pairs, those
// with the label if one is given.
func TestNodesOfTheCluster(t *testing.T) {
	for label, want := range map[string]string{"": "10.0.0.11 10.0.0.12", "management=true": "10.0.0.11", "management": "10.0.0.11 10.0.0.12"} {
		var out, errs bytes.Buffer
		a := app.New("test")
		a.Out, a.Err, a.Now, a.Getenv = &out, &errs, time.Now, func(string) string { return "" }
		a.OpenCluster = func(*app.KubeFlags) (*kube.Cluster, error) {
			return kube.NewFor(fake.NewClientset(node("n1", "10.0.0.11", "true"), node("n2", "10.0.0.12", "false"))), nil
		}
		if code := cli.Main(t.Context(), cli.Program{Name: "kmsctl", Verbs: cli.Verbs{hsmcmd.New}}, a, []string{"hsm", "luna-cert", "create", "--node-label", label, "--output-dir", t.TempDir(), "-o", "json"}); code != 0 {
			t.Fatalf("exit %d: %s", code, &errs)
		}
		var res struct{ Pairs []struct{ Node string } }
		if err := json.Unmarshal(out.Bytes(), &res); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range res.Pairs {
			got = append(got, p.Node)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: %q, want %q", label, got, want)
		}
	}
}
