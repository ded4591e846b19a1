package pgstream

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Listener holds the one LISTEN connection of a process and wakes its consumers.
type Listener struct{}

// NewListener returns a listener that connects with cfg, which must reach PostgreSQL directly and not through a
// transaction-pooling proxy.
func NewListener(cfg *pgx.ConnConfig) *Listener { panic("todo") }

// Run listens until ctx ends; it reconnects with backoff and every reconnect wakes all waiters.
func (l *Listener) Run(ctx context.Context) error { panic("todo") }
