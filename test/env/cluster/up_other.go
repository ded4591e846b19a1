//go:build !linux

package cluster

import (
	"context"
	"errors"
)

var errOnlyLinux = errors.New("a node of our own needs Linux; use CLUSTER=current with kind, k3d or another cluster")

type slot struct{}

func (s *slot) logs(int64) string                       { return "" }
func (s *slot) clear(context.Context) error             { return nil }
func create(context.Context, Options) (*Cluster, error) { return nil, errOnlyLinux }
func attach(context.Context, Options) (*Cluster, error) { return nil, errOnlyLinux }
func endKept(context.Context) (int, error)              { return 0, nil }
