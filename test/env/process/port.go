package process

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
)

// Ports are taken from below the range that the kernel gives to outgoing connections and Kubernetes to node ports, so
// that a server finds its port still free when a test starts it again.
const (
	portMin = 15000
	portMax = 29999
)

// FreePort returns a port that is free on all the addresses. Somebody else may take it before the caller does; callers
// try again with another one when their server cannot bind.
func FreePort(addresses ...string) (int, error) {
	var last error
	for range 100 {
		port := portMin + rand.IntN(portMax-portMin+1)
		if last = free(port, addresses); last == nil {
			return port, nil
		}
	}
	return 0, fmt.Errorf("find a free port on %v: %w", addresses, last)
}

func free(port int, addresses []string) error {
	for _, address := range addresses {
		l, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(port)))
		if err != nil {
			return err
		}
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
	}
	return nil
}
