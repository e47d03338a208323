package kube

import (
	"context"
	"slices"
	"strings"

	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ReviewToken asks the cluster whose a token is, and gives a ServiceAccount as
// namespace:name; "" for a token that is not valid, not a ServiceAccount's, or
// made for none of the audiences. Without audiences it must be made for the
// cluster's own API server.
func (c *Cluster) ReviewToken(ctx context.Context, token string, audiences ...string) (string, error) {
	r := &authv1.TokenReview{Spec: authv1.TokenReviewSpec{Token: token, Audiences: audiences}}
	got, err := c.client.AuthenticationV1().TokenReviews().Create(ctx, r, metav1.CreateOptions{})
	if err != nil {
		return "", c.fault("review", "token", err)
	}
	account, ok := strings.CutPrefix(got.Status.User.Username, "system:serviceaccount:")
	if !got.Status.Authenticated || !ok {
		return "", nil
	}
	// Who answers without naming one of ours has looked at its own alone.
	ours := func(a string) bool { return slices.Contains(audiences, a) }
	if len(audiences) > 0 && !slices.ContainsFunc(got.Status.Audiences, ours) {
		return "", nil
	}
	return account, nil
}
