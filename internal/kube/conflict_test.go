package kube_test

import (
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

func conflict() error {
	return apierrors.NewConflict(schema.GroupResource{Resource: "secrets"}, "s", nil)
}
