package redis_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/test/env/redis"
)

func TestMain(m *testing.M) { os.Exit(redis.Main(m, redis.Options{})) }

func TestSharedServerAnswers(t *testing.T) {
	t.Parallel()
	if err := set(t, redis.Shared(t).URL(), "a"); err != nil {
		t.Fatal(err)
	}
}

func TestEachNewServerIsEmpty(t *testing.T) {
	t.Parallel()
	for range 2 {
		s := redis.New(t)
		if got := get(t, s.URL(), "key"); got != "" {
			t.Fatalf("a new server holds %q", got)
		}
		if err := set(t, s.URL(), "a"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestThePasswordIsAskedFor(t *testing.T) {
	t.Parallel()
	s := redis.NewServer(t, redis.Options{Password: `spa ce"quote#hash@:/`})
	if err := set(t, s.URL(), "a"); err != nil {
		t.Fatalf("with the password: %v", err)
	}
	if err := set(t, "redis://"+s.Addr(), "a"); err == nil || !strings.Contains(err.Error(), "NOAUTH") {
		t.Fatalf("without a password: %v; want NOAUTH", err)
	}
}

func TestRestartAfterKill(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		persist bool
		want    string
	}{
		{"brings back the data of a server that persists", true, "a"},
		{"brings back an empty server otherwise", false, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := redis.NewServer(t, redis.Options{Persist: c.persist})
			addr := s.Addr()
			if err := set(t, s.URL(), "a"); err != nil {
				t.Fatal(err)
			}
			if err := s.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := set(t, s.URL(), "b"); err == nil {
				t.Fatal("a killed server took a write")
			}
			if err := s.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := get(t, s.URL(), "key"); got != c.want || s.Addr() != addr {
				t.Fatalf("got %q at %s, want %q at %s", got, s.Addr(), c.want, addr)
			}
		})
	}
}

func TestAPausedServerIsSilentUntilItResumes(t *testing.T) {
	t.Parallel()
	s := redis.New(t)
	client := connect(t, s.URL())
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() { answered <- client.Do(context.Background(), client.B().Ping().Build()).Error() }()
	select {
	case err := <-answered:
		t.Fatalf("a paused server answered: %v", err)
	case <-time.After(200 * time.Millisecond): // long for a server on loopback that runs
	}
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err != nil {
		t.Fatalf("the command that waited through the pause: %v", err)
	}
}

func TestStopLeavesNothing(t *testing.T) {
	t.Parallel()
	s, err := redis.Start(t.Context(), redis.Options{})
	if err != nil {
		t.Fatal(err)
	}
	client := connect(t, s.URL())
	dir, err := client.Do(t.Context(), client.B().ConfigGet().Parameter("dir").Build()).AsStrMap()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatalf("stop a paused server: %v", err)
	}
	if _, err := os.Stat(dir["dir"]); !os.IsNotExist(err) {
		t.Errorf("the server's directory is still there: %v", err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Errorf("a second Stop: %v", err)
	}
}

func connect(t *testing.T, url string) rueidis.Client {
	t.Helper()
	client, err := tryConnect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

func tryConnect(url string) (rueidis.Client, error) {
	options, err := rueidis.ParseURL(url)
	if err != nil {
		return nil, err
	}
	options.DisableRetry = true
	options.DisableCache = true
	return rueidis.NewClient(options)
}

// set writes the key that get reads, or tells why it could not.
func set(t *testing.T, url, value string) error {
	t.Helper()
	client, err := tryConnect(url)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.Do(t.Context(), client.B().Set().Key("key").Value(value).Build()).Error()
}

func get(t *testing.T, url, key string) string {
	t.Helper()
	client := connect(t, url)
	value, err := client.Do(t.Context(), client.B().Get().Key(key).Build()).ToString()
	if err != nil && !rueidis.IsRedisNil(err) {
		t.Fatal(err)
	}
	return value
}

func TestEveryNodeOfAClusterServes(t *testing.T) {
	t.Parallel()
	c := redis.NewCluster(t, 3, redis.Options{Password: "p"})
	for _, n := range c.Nodes {
		client := connect(t, n.URL()) // follows the redirections
		if err := client.Do(t.Context(), client.B().Set().Key("key").Value("a").Build()).Error(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSentinelsFailOver(t *testing.T) {
	t.Parallel()
	s := redis.NewSentinels(t, redis.Options{})
	if err := s.Servers[0].Kill(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := set(t, s.Servers[1].URL(), "a")
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the replica is not the master: %v", err)
		}
	}
}
