package redis

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/test/env/process"
)

const slots = 16384

// Cluster is a Redis Cluster without replicas, each node with its share of the slots.
type Cluster struct{ Nodes []*Server }

// NewCluster starts a Cluster of the test's own, on loopback. It is stopped when the test ends.
func NewCluster(tb testing.TB, nodes int, o Options) *Cluster {
	tb.Helper()
	c := &Cluster{}
	var ports []int // of the nodes among themselves
	for range nodes {
		port, err := process.FreePort("127.0.0.1")
		if err != nil {
			tb.Fatal(err)
		}
		node := o
		node.Settings = map[string]string{"cluster-enabled": "yes", "cluster-port": strconv.Itoa(port), "cluster-node-timeout": "2000"}
		for name, value := range o.Settings {
			node.Settings[name] = value
		}
		c.Nodes = append(c.Nodes, NewServer(tb, node))
		ports = append(ports, port)
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := c.form(ctx, ports); err != nil {
		tb.Fatalf("form a Redis Cluster: %v", err)
	}
	return c
}

// form gives out the slots, introduces the nodes to each other, and waits until each of them serves.
func (c *Cluster) form(ctx context.Context, ports []int) error {
	clients := make([]rueidis.Client, len(c.Nodes))
	for i, n := range c.Nodes {
		client, err := n.open()
		if err != nil {
			return err
		}
		defer client.Close()
		clients[i] = client
		first, last := slots*i/len(c.Nodes), slots*(i+1)/len(c.Nodes)-1
		err = client.Do(ctx, client.B().ClusterAddslotsrange().StartSlotEndSlot().StartSlotEndSlot(int64(first), int64(last)).Build()).Error()
		if err != nil {
			return err
		}
		if i == 0 {
			continue
		}
		meet := client.B().Arbitrary("CLUSTER", "MEET", "127.0.0.1", strconv.Itoa(c.Nodes[0].Port()), strconv.Itoa(ports[0])).Build()
		if err := client.Do(ctx, meet).Error(); err != nil {
			return err
		}
	}
	for _, client := range clients {
		if err := until(ctx, func() error { return serves(ctx, client, len(c.Nodes)) }); err != nil {
			return err
		}
	}
	return nil
}

// serves says whether a node knows all nodes and all slots.
func serves(ctx context.Context, client rueidis.Client, nodes int) error {
	info, err := client.Do(ctx, client.B().ClusterInfo().Build()).ToString()
	if err != nil {
		return err
	}
	if !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, fmt.Sprintf("cluster_known_nodes:%d\r", nodes)) {
		return errors.New(info)
	}
	return nil
}

// URL is a connection string that names every node. It holds the password.
func (c *Cluster) URL() string { return "redis+cluster://" + c.Nodes[0].userinfo() + hosts(c.Nodes) }

// Sentinels watch a server and its replica.
type Sentinels struct {
	Servers   []*Server // the first begins as master, the others follow it
	Sentinels []*Server
}

// masterName is what the Sentinels call the server.
const masterName = "main"

// NewSentinels starts a server with a replica and three Sentinels, on loopback, which fail over after a second.
func NewSentinels(tb testing.TB, o Options) *Sentinels {
	tb.Helper()
	s := &Sentinels{}
	for i := range 2 {
		server := o
		server.Settings = map[string]string{"repl-diskless-sync-delay": "0"}
		if o.Password != "" {
			server.Settings["masterauth"] = fmt.Sprintf("%q", o.Password)
		}
		if i > 0 {
			server.Settings["replicaof"] = "127.0.0.1 " + strconv.Itoa(s.Servers[0].Port())
		}
		s.Servers = append(s.Servers, NewServer(tb, server))
	}
	for range 3 {
		about := map[string]string{
			"sentinel monitor " + masterName:                 fmt.Sprintf("127.0.0.1 %d 2", s.Servers[0].Port()),
			"sentinel down-after-milliseconds " + masterName: "1000",
			"sentinel failover-timeout " + masterName:        "3000",
		}
		if o.Password != "" {
			about["sentinel auth-pass "+masterName] = fmt.Sprintf("%q", o.Password)
		}
		s.Sentinels = append(s.Sentinels, NewServer(tb, Options{sentinel: true, Settings: about}))
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := until(ctx, func() error { return s.complete(ctx) }); err != nil {
		tb.Fatalf("wait for the Sentinels: %v", err)
	}
	return s
}

// complete says whether every Sentinel knows the others and the replica, so that they can fail over.
func (s *Sentinels) complete(ctx context.Context) error {
	for _, sentinel := range s.Sentinels {
		client, err := sentinel.open()
		if err != nil {
			return err
		}
		info, err := client.Do(ctx, client.B().Info().Section("sentinel").Build()).ToString()
		client.Close()
		if err != nil {
			return err
		}
		if !strings.Contains(info, "status=ok") || !strings.Contains(info, "slaves=1,sentinels=3") {
			return errors.New(info)
		}
	}
	return nil
}

// URL is a connection string that names every Sentinel. It holds the server's password.
func (s *Sentinels) URL() string {
	return "redis+sentinel://" + s.Servers[0].userinfo() + hosts(s.Sentinels) + "/" + masterName + "/0"
}

func hosts(servers []*Server) string {
	var addrs []string
	for _, s := range servers {
		addrs = append(addrs, net.JoinHostPort(s.listen[0], strconv.Itoa(s.port)))
	}
	return strings.Join(addrs, ",")
}

// open connects to this one server, whatever it belongs to.
func (s *Server) open() (rueidis.Client, error) {
	return rueidis.NewClient(rueidis.ClientOption{
		InitAddress: []string{s.Addr()}, Password: s.password, ForceSingleClient: true, DisableCache: true, AlwaysRESP2: s.sentinel,
	})
}

// until tries again until there is no error, or returns the last one when ctx ends.
func until(ctx context.Context, try func() error) error {
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-poll.C:
		}
	}
}
