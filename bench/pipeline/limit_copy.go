package pipeline

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// limitCopy is the system that only writes: COPY in binary, of rows that were encoded before, by two connections, with no copies among
// them. Nothing that fills this table can be faster.
const limitCopy = "limit-copy"

// copyBatch rows go with one COPY, which is about where larger ones stop being faster.
const copyBatch = 10_000

// copyAll returns rows per second.
func (r *runner) copyAll(ctx context.Context, b *Backlog) (float64, error) {
	for _, sql := range []string{"drop table if exists positions", "checkpoint", createTable} {
		if _, err := r.db.Exec(ctx, sql); err != nil {
			return 0, err
		}
	}
	var batches [][]byte
	for rest := distinct(b); len(rest) > 0; {
		part := rest[:min(copyBatch, len(rest))]
		rest = rest[len(part):]
		slices.SortFunc(part, func(x, y *Entry) int {
			if x.Device != y.Device {
				return x.Device - y.Device
			}
			return int(x.Seq - y.Seq)
		})
		batches = append(batches, encode(part))
	}
	const connections = 2
	start := time.Now()
	g, copying := errgroup.WithContext(ctx)
	for c := range connections {
		conn, err := pgx.Connect(ctx, r.DSN())
		if err != nil {
			return 0, err
		}
		g.Go(func() error {
			defer conn.Close(context.WithoutCancel(ctx))
			for i := c; i < len(batches); i += connections {
				if _, err := conn.PgConn().CopyFrom(copying, bytes.NewReader(batches[i]), "copy positions from stdin (format binary)"); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	took := time.Since(start)
	return float64(b.Distinct) / took.Seconds(), r.check(ctx, b.Distinct, b.Sum)
}

// distinct leaves the copies out.
func distinct(b *Backlog) []*Entry {
	seen := make(map[int64]bool, b.Distinct)
	var entries []*Entry
	for i := range b.Entries {
		e := &b.Entries[i]
		if !seen[e.Seq] {
			seen[e.Seq] = true
			entries = append(entries, e)
		}
	}
	return entries
}

// encode writes rows in the binary format of COPY.
func encode(rows []*Entry) []byte {
	be := binary.BigEndian
	postgresEpoch := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	buf := append([]byte("PGCOPY\n\xff\r\n\x00"), 0, 0, 0, 0, 0, 0, 0, 0)
	text := func(s string) {
		buf = be.AppendUint32(buf, uint32(len(s)))
		buf = append(buf, s...)
	}
	wide := func(v uint64) { buf = be.AppendUint64(be.AppendUint32(buf, 8), v) }
	for _, e := range rows {
		buf = be.AppendUint16(buf, 10)
		text(e.DeviceID())
		wide(uint64(e.Time().Sub(postgresEpoch).Microseconds()))
		wide(uint64(e.Seq))
		wide(math.Float64bits(e.Latitude))
		wide(math.Float64bits(e.Longitude))
		buf = be.AppendUint32(be.AppendUint32(buf, 4), uint32(e.Altitude))
		buf = be.AppendUint32(be.AppendUint32(buf, 4), uint32(e.Angle))
		wide(math.Float64bits(e.Speed))
		buf = be.AppendUint16(be.AppendUint32(buf, 2), uint16(e.Satellites))
		text("\x01" + e.Attributes())
	}
	return be.AppendUint16(buf, 0xffff)
}
