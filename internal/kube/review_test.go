package kube_test

import (
	"slices"
	"testing"

	authv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/kmsctl/kmsctl/internal/kube"
)

func TestReviewToken(t *testing.T) {
	orders := authv1.UserInfo{Username: "system:serviceaccount:shop:orders"}
	ours := []string{"kms-api", "kms"}
	for token, c := range map[string]struct {
		status    authv1.TokenReviewStatus
		want      string
		audiences []string
	}{
		"good":    {authv1.TokenReviewStatus{Authenticated: true, User: orders}, "shop:orders", nil},
		"invalid": {authv1.TokenReviewStatus{User: orders}, "", nil},
		"person":  {authv1.TokenReviewStatus{Authenticated: true, User: authv1.UserInfo{Username: "admin"}}, "", nil},
		"for us":  {authv1.TokenReviewStatus{Authenticated: true, User: orders, Audiences: []string{"kms"}}, "shop:orders", ours},
		// An authenticator that knows no audiences says yes to any.
		"did not look": {authv1.TokenReviewStatus{Authenticated: true, User: orders}, "", ours},
		"for others":   {authv1.TokenReviewStatus{Authenticated: true, User: orders, Audiences: []string{"vault"}}, "", ours},
	} {
		client := fake.NewClientset()
		client.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
			r := a.(k8stesting.CreateAction).GetObject().(*authv1.TokenReview).DeepCopy()
			if r.Spec.Token != token {
				t.Errorf("asked about %q", r.Spec.Token)
			}
			if !slices.Equal(r.Spec.Audiences, c.audiences) {
				t.Errorf("%s: asked for the audiences %q", token, r.Spec.Audiences)
			}
			r.Status = c.status
			return true, r, nil
		})
		if got, err := kube.NewFor(client).ReviewToken(t.Context(), token, c.audiences...); err != nil || got != c.want {
			t.Errorf("%s: %q %v, want %q", token, got, err, c.want)
		}
	}
}
