// Command watermill is a processor as one writes it with Watermill and its Redis Streams subscriber: it reads one entry at a time in each of
// many subscribers, collects what they have in hand into one INSERT, and acknowledges after the commit.
//
// Tuning. A subscriber asks Redis for one entry and reads the next when that is acknowledged, so throughput needs many of them: 256 are
// the fastest here, 64 are a tenth slower and 1,024 a twentieth. Their messages meet in one channel, and two writers take what is there. Rows are sent as arrays
// and sorted by key, because concurrent writers deadlock otherwise. The UUID that Watermill's own publisher adds is not asked for.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		stop()
		os.Exit(1)
	}
}

// writers insert batches at the same time.
const writers = 2

func run(ctx context.Context) error {
	subscribers, err := strconv.Atoi(os.Getenv("SUBSCRIBERS"))
	if err != nil {
		return fmt.Errorf("SUBSCRIBERS: %w", err)
	}
	options, err := redis.ParseURL(os.Getenv("REDIS_URL"))
	if err != nil {
		return err
	}
	options.PoolSize = 2*subscribers + 8 // each has a blocking read and an ack
	client := redis.NewClient(options)
	defer client.Close()
	pool, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		return err
	}
	defer pool.Close()
	subscriber, err := redisstream.NewSubscriber(redisstream.SubscriberConfig{
		Client: client, Unmarshaller: payload{}, Consumer: os.Getenv("CONSUMER"), ConsumerGroup: os.Getenv("GROUP"),
	}, nil)
	if err != nil {
		return err
	}
	defer subscriber.Close()
	all := make(chan *message.Message, subscribers)
	for range subscribers {
		messages, err := subscriber.Subscribe(ctx, os.Getenv("STREAM"))
		if err != nil {
			return err
		}
		go func() {
			for m := range messages {
				all <- m
			}
		}()
	}
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for ctx.Err() == nil {
				batch := collect(ctx, all, subscribers)
				if err := write(ctx, pool, batch); err != nil {
					fmt.Fprintln(os.Stderr, err)
					for _, m := range batch {
						m.Nack()
					}
					continue
				}
				for _, m := range batch {
					m.Ack()
				}
			}
		})
	}
	wg.Wait()
	return nil
}

// payload takes an entry that another publisher has added.
type payload struct{}

func (payload) Unmarshal(values map[string]any) (*message.Message, error) {
	text, _ := values["payload"].(string)
	return message.NewMessage("", []byte(text)), nil
}

// collect waits for a message and takes with it those that are there.
func collect(ctx context.Context, in <-chan *message.Message, most int) []*message.Message {
	var batch []*message.Message
	select {
	case m := <-in:
		batch = append(batch, m)
	case <-ctx.Done():
		return nil
	}
	for len(batch) < most {
		select {
		case m := <-in:
			batch = append(batch, m)
		default:
			return batch
		}
	}
	return batch
}

type position struct {
	Device     string          `json:"device_id"`
	Time       time.Time       `json:"ts"`
	Seq        int64           `json:"seq"`
	Latitude   float64         `json:"latitude"`
	Longitude  float64         `json:"longitude"`
	Altitude   int32           `json:"altitude"`
	Angle      int32           `json:"angle"`
	Speed      float64         `json:"speed"`
	Satellites int16           `json:"satellites"`
	Attributes json.RawMessage `json:"attributes"`
}

const insert = `insert into positions (device_id, ts, seq, latitude, longitude, altitude, angle, speed, satellites, attributes)
select * from unnest($1::text[], $2::timestamptz[], $3::bigint[], $4::float8[], $5::float8[], $6::integer[], $7::integer[], $8::float8[], $9::smallint[], $10::jsonb[])
on conflict (device_id, ts) do nothing`

func write(ctx context.Context, pool *pgxpool.Pool, batch []*message.Message) error {
	if len(batch) == 0 {
		return nil
	}
	rows := make([]position, len(batch))
	for i, m := range batch {
		if err := json.Unmarshal(m.Payload, &rows[i]); err != nil {
			return err
		}
	}
	slices.SortFunc(rows, func(a, b position) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), a.Time.Compare(b.Time))
	})
	_, err := pool.Exec(ctx, insert,
		column(rows, func(p *position) string { return p.Device }), column(rows, func(p *position) time.Time { return p.Time }),
		column(rows, func(p *position) int64 { return p.Seq }), column(rows, func(p *position) float64 { return p.Latitude }),
		column(rows, func(p *position) float64 { return p.Longitude }), column(rows, func(p *position) int32 { return p.Altitude }),
		column(rows, func(p *position) int32 { return p.Angle }), column(rows, func(p *position) float64 { return p.Speed }),
		column(rows, func(p *position) int16 { return p.Satellites }), column(rows, func(p *position) string { return string(p.Attributes) }))
	return err
}

func column[T any](rows []position, of func(*position) T) []T {
	values := make([]T, len(rows))
	for i := range rows {
		values[i] = of(&rows[i])
	}
	return values
}
