package client_test

import (
	"context"
	"testing"

	"github.com/millrace-dev/millrace/client"
	"github.com/millrace-dev/millrace/test/env/pgbouncer"
)

// Behind a pooler by transaction everything works with no other settings; with a direct address for notifications nothing polls.
func TestBehindPgBouncer(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	d.run("create table effect (n text not null)")
	b := pgbouncer.New(t, d.dsn, pgbouncer.Options{})
	var log logs
	c, err := client.Open(d.ctx, b.DSN(), client.Options{Listen: d.Config().ConnConfig, Logger: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	d.consume(c, "q", "g", func(ctx context.Context, m *client.Delivery) error {
		tx, err := m.Tx(ctx)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "insert into effect values ($1)", string(m.Payload))
		return err
	}, client.ConsumeOptions{})
	for range 3 {
		batch := make([]client.NewMessage, 20)
		for i := range batch {
			batch[i] = client.NewMessage{Key: "k", Headers: client.Headers{"a": "b"}, Payload: []byte("1")}
		}
		if _, err := c.PublishBatch(d.ctx, "q", batch); err != nil {
			t.Fatal(err)
		}
		d.becomes("0 0 0 0", state)
	}
	if n := one[int](d, "select count(*) from effect"); n != 60 {
		t.Errorf("%d effects, want 60\n%s", n, log.String())
	}
}
