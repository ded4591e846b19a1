package engine

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// careless is a system in memory that loses a message, or hands one out twice.
type careless struct {
	mu         sync.Mutex
	waiting    [][]byte
	lose, echo bool
	lanes      map[[2]int]*careless // by stream and group
}

func (*careless) Name() string         { return "careless" }
func (*careless) Cannot(string) string { return "" }
func (c *careless) Close() error       { return nil }
func (c *careless) Open(context.Context, *pgxpool.Pool, Shape) (Queue, error) {
	*c = careless{lose: c.lose, echo: c.echo}
	return c, nil
}

func (c *careless) Publish(ctx context.Context, m Message) error {
	return c.PublishBatch(ctx, []Message{m})
}

func (c *careless) PublishBatch(_ context.Context, ms []Message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range ms {
		switch n, _ := number(m.Payload); {
		case c.lose && n == 3:
			// And another one twice, so that the count is right.
			c.waiting = append(c.waiting, messages(0, 1, 0)[0].Payload)
		case c.echo && n == 3:
			c.waiting = append(c.waiting, m.Payload, m.Payload)
		default:
			c.waiting = append(c.waiting, m.Payload)
		}
	}
	return nil
}

func (c *careless) Consumer(context.Context, int) (Consumer, error) { return c, nil }

func (c *careless) Next(ctx context.Context, wait bool) ([][]byte, error) {
	for {
		c.mu.Lock()
		all := c.waiting
		c.waiting = nil
		c.mu.Unlock()
		if len(all) > 0 || !wait {
			return all, nil
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			return nil, err
		}
	}
}

func (c *careless) Settle(context.Context) error { return nil }

func (c *careless) Upkeep(ctx context.Context) (int, error) {
	<-ctx.Done()
	return 1, nil
}

// Lane keeps the messages of each stream for each group.
func (c *careless) Lane(stream, group int) Queue {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lanes == nil {
		c.lanes = map[[2]int]*careless{}
	}
	at := [2]int{stream, group}
	if c.lanes[at] == nil {
		c.lanes[at] = &careless{lose: c.lose, echo: c.echo}
	}
	return carelessLane{c.lanes[at], c, stream}
}

type carelessLane struct {
	*careless
	all    *careless
	stream int
}

func (l carelessLane) PublishBatch(ctx context.Context, ms []Message) error {
	l.all.mu.Lock()
	defer l.all.mu.Unlock()
	for at, lane := range l.all.lanes {
		if at[0] == l.stream {
			if err := lane.PublishBatch(ctx, ms); err != nil {
				return err
			}
		}
	}
	return nil
}

func TestNoFigureWithoutACheck(t *testing.T) {
	server, err := Start(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	for _, w := range Works() {
		for name, system := range map[string]*careless{"a lost message": {lose: true}, "a message that comes twice": {echo: true}} {
			t.Run(w.Name+" fails with "+name, func(t *testing.T) {
				samples, err := Run(t.Context(), server, Options{Works: []string{w.Name}, Systems: []System{system}, N: 20, Runs: 1, Short: true,
					Log: func(string) {}})
				if err == nil || !strings.Contains(err.Error(), "more than once") || samples != nil {
					t.Errorf("Run gives %v, %v", samples, err)
				}
			})
		}
		t.Run(w.Name+" gives figures when all is well", func(t *testing.T) {
			samples, err := Run(t.Context(), server, Options{Works: []string{w.Name}, Systems: []System{&careless{}}, N: 20, Runs: 1, Short: true,
				Log: func(string) {}})
			if err != nil || len(samples) != len(w.Yield) {
				t.Errorf("Run gives %v, %v", samples, err)
			}
		})
	}
}

func TestARivalThatFailsHasNoFigure(t *testing.T) {
	server, err := Start(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	samples, err := Run(t.Context(), server, Options{Works: []string{"consume-batch-10"}, Systems: []System{&careless{echo: true}}, N: 20, Runs: 2,
		Rival: func(name string) bool { return name == "careless" }, Log: func(string) {}})
	if err != nil || len(samples) != 1 || len(samples[0].Values) != 0 || !strings.Contains(samples[0].Note, "failed in run 1") ||
		!strings.Contains(samples[0].Note, "more than once") {
		t.Errorf("Run gives %+v, %v", samples, err)
	}
}

func TestAnUnknownWorkIsRefused(t *testing.T) {
	if _, err := selected([]string{"publish-single", "publish-often"}); err == nil || !strings.Contains(err.Error(), `"publish-often"`) {
		t.Errorf("selected gives %v", err)
	}
	works, err := selected([]string{"latency-500-p99"})
	if err != nil || len(works) != 1 || works[0].Name != "latency-500" {
		t.Errorf("the name of a row gives %v, %v; want its work", works, err)
	}
}
