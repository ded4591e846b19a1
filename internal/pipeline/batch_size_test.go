package pipeline

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestBatchSize(t *testing.T) {
	s := newBatchSize(10_000)
	if s.rows != firstBatchRows {
		t.Fatalf("begins with %d", s.rows)
	}
	s.wrote(s.rows-1, time.Millisecond)
	if s.rows != 1000 {
		t.Errorf("a batch that was not full made it %d", s.rows)
	}
	for _, want := range []int{2000, 4000, 8000, 10_000, 10_000} {
		if s.wrote(s.rows, time.Millisecond); s.rows != want {
			t.Errorf("after a quick write %d, want %d", s.rows, want)
		}
	}
	s.tooSlow()
	if s.rows != 5000 {
		t.Errorf("after a timeout %d", s.rows)
	}
	// Neither quick nor slow: the percentile of the last writes decides. One slow write among them does not.
	for i := range recentWrites {
		took := quickWrite / 2
		if i == 3 {
			took = 10 * quickWrite
		}
		if s.rows != 5000 {
			t.Fatalf("grew after %d writes", i)
		}
		s.wrote(s.rows, took)
	}
	if s.rows != 10_000 {
		t.Errorf("after %d writes that are quick enough: %d", recentWrites, s.rows)
	}
	s.tooSlow()
	for range 3 * recentWrites {
		s.wrote(s.rows, quickWrite)
	}
	if s.rows != 5000 {
		t.Errorf("after slow writes %d", s.rows)
	}
	for range 20 {
		s.tooSlow()
	}
	if s.rows != leastBatchRows {
		t.Errorf("the least is %d", s.rows)
	}
	if s = newBatchSize(7); s.rows != 7 {
		t.Errorf("begins with %d where 7 are allowed", s.rows)
	}
	if s.tooSlow(); s.rows != 7 {
		t.Errorf("the least is %d where 7 are allowed", s.rows)
	}
}

func TestIsTimeout(t *testing.T) {
	for _, err := range []error{context.DeadlineExceeded, fmt.Errorf("write: %w", context.DeadlineExceeded), &pgconn.PgError{Code: "57014"}} {
		if !isTimeout(err) {
			t.Errorf("%v is none", err)
		}
	}
	if isTimeout(&pgconn.PgError{Code: "40P01"}) || isTimeout(context.Canceled) {
		t.Error("a deadlock or an end is one")
	}
}
