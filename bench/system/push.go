package system

import (
	"context"
	"time"
)

// moment is how long a consumer who does not want to wait still gives a client that hands messages over by itself: the next may be on its way.
const moment = time.Millisecond

// handed takes what a client has put into the channel: at least one unless there is none now, and at most batch.
func handed[T any](ctx context.Context, from <-chan T, batch int, wait bool) ([]T, error) {
	var got []T
	for len(got) < batch {
		select {
		case v, open := <-from:
			if !open {
				return got, errClosed
			}
			got = append(got, v)
			continue
		default:
		}
		if len(got) > 0 {
			return got, nil
		}
		var late <-chan time.Time
		if !wait {
			timer := time.NewTimer(moment)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case v, open := <-from:
			if !open {
				return got, errClosed
			}
			got = append(got, v)
		case <-late:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return got, nil
}

type closedError struct{}

func (closedError) Error() string { return "the client has stopped handing over messages" }

var errClosed = closedError{}
