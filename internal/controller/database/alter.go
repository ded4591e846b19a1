package database

import (
	"context"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Alter is Do for a change of structure, such as a new stream. The engine makes these one after another in a database (apply_stream.sql). One that came
// second would wait for the first in the server, on a connection that others could use; so it waits here, and no longer than for a connection.
func (d *Database) Alter(ctx context.Context, f func(ctx context.Context, db pgstream.DB) error) error {
	select {
	case d.altering <- struct{}{}:
	default:
		timer := time.NewTimer(turnWait)
		defer timer.Stop()
		select {
		case d.altering <- struct{}{}:
		case <-timer.C:
			return busy(d)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer func() { <-d.altering }()
	return d.Do(ctx, f)
}
