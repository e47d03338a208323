package kube_test

import (
	"testing"

	authv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/kmsctl/kmsctl/internal/kube"
)

func TestReviewToken(t *testing.T) {
	for token, c := range map[string]struct {
		status authv1.TokenReviewStatus
		want   string
	}{
		"good":    {authv1.TokenReviewStatus{Authenticated: true, User: authv1.UserInfo{Username: "system:serviceaccount:shop:orders"}}, "shop:orders"},
		"invalid": {authv1.TokenReviewStatus{User: authv1.UserInfo{Username: "system:serviceaccount:shop:orders"}}, ""},
		"person":  {authv1.TokenReviewStatus{Authenticated: true, User: authv1.UserInfo{Username: "admin"}}, ""},
	} {
		client := fake.NewClientset()
		client.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
			r := a.(k8stesting.CreateAction).GetObject().(*authv1.TokenReview).DeepCopy()
			if r.Spec.Token != token {
				t.Errorf("asked about %q", r.Spec.Token)
			}
			r.Status = c.status
			return true, r, nil
		})
		if got, err := kube.NewFor(client).ReviewToken(t.Context(), token); err != nil || got != c.want {
			t.Errorf("%s: %q %v, want %q", token, got, err, c.want)
		}
	}
}
