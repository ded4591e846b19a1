// Package schema holds the engine's SQL and brings a database to it.
package schema

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Options of Migrate.
type Options struct {
	// RuntimeRole, when set, is a role that gets what publishing and consuming need, and no DDL.
	RuntimeRole string
}

// Migrate brings the database to this binary's version and returns the versions it applied. Any number of processes
// may call it at once: each version is applied once. The error is ErrNewer when the database is newer than the binary.
func Migrate(ctx context.Context, conn *pgx.Conn, opts Options) ([]int, error) { panic("todo") }
