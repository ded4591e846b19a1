package eventstore

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// waker is a connection that listens on one channel for one follower.
type waker struct {
	wakes  chan struct{} // holds one when something came since the last look
	ended  chan struct{}
	err    error // why the connection ended; set before ended is closed
	cancel context.CancelFunc
}

// listen returns when the server has the subscription.
func listen(ctx context.Context, dsn, channel string) (*waker, error) {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Exec(ctx, "listen "+pgx.Identifier{channel}.Sanitize()); err != nil {
		_ = conn.Close(ctx)
		return nil, err
	}
	w := &waker{wakes: make(chan struct{}, 1), ended: make(chan struct{})}
	ctx, w.cancel = context.WithCancel(ctx)
	go func() {
		defer close(w.ended)
		defer conn.Close(context.WithoutCancel(ctx))
		for {
			if _, w.err = conn.WaitForNotification(ctx); w.err != nil {
				return
			}
			select {
			case w.wakes <- struct{}{}:
			default: // it will look anyway
			}
		}
	}()
	return w, nil
}

// next looks until there is something, and waits for a notification between two looks.
func (w *waker) next(ctx context.Context, look func() ([][]byte, error)) ([][]byte, error) {
	for {
		got, err := look()
		if err != nil || len(got) > 0 {
			return got, err
		}
		select {
		case <-w.wakes:
		case <-w.ended:
			return nil, w.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Close ends the connection.
func (w *waker) Close() error {
	w.cancel()
	<-w.ended
	return nil
}
