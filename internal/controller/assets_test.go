package controller_test

import (
	"context"
	"os"

	"github.com/millrace-dev/millrace/test/env/cluster"
)

// assets is the directory of kube-apiserver, etcd and kubectl. make sets KUBEBUILDER_ASSETS; without it they are built or
// found in the cache.
func assets(ctx context.Context) (string, error) {
	if dir := os.Getenv("KUBEBUILDER_ASSETS"); dir != "" {
		return dir, nil
	}
	return cluster.Assets(ctx)
}
