package kube

import (
	"context"
	"strings"

	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ReviewToken asks the cluster whose a token is, and gives a ServiceAccount as
// namespace:name; "" for a token that is not valid or not a ServiceAccount's.
func (c *Cluster) ReviewToken(ctx context.Context, token string) (string, error) {
	r := &authv1.TokenReview{Spec: authv1.TokenReviewSpec{Token: token}}
	got, err := c.client.AuthenticationV1().TokenReviews().Create(ctx, r, metav1.CreateOptions{})
	if err != nil {
		return "", c.fault("review", "token", err)
	}
	account, ok := strings.CutPrefix(got.Status.User.Username, "system:serviceaccount:")
	if !got.Status.Authenticated || !ok {
		return "", nil
	}
	return account, nil
}
