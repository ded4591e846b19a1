package pipeline

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Of batchSize.
const (
	firstBatchRows = 1000
	leastBatchRows = 100
	// A larger batch costs less per row, but a poison row, a lost connection and a lock that others wait for cost more.
	quickWrite = 100 * time.Millisecond
	// recentWrites are looked at; the second slowest of them is about the 95th percentile.
	recentWrites = 16
)

// batchSize is how many rows a writer puts into one write at most. It begins small, grows while full batches are written
// quickly, and is halved when a write takes too long. A source without a backlog never fills a batch, so that its latency
// does not depend on it.
type batchSize struct {
	rows, most int
	recent     []time.Duration // of full batches since the last change
}

func newBatchSize(most int) *batchSize {
	return &batchSize{rows: min(firstBatchRows, most), most: most}
}

// wrote learns from a write.
func (s *batchSize) wrote(rows int, took time.Duration) {
	if rows < s.rows || s.rows == s.most {
		return
	}
	// A batch that is far from slow says enough; otherwise a percentile has to.
	if took < quickWrite/4 {
		s.set(s.rows * 2)
		return
	}
	if s.recent = append(s.recent, took); len(s.recent) < recentWrites {
		return
	}
	slices.Sort(s.recent)
	if s.recent[recentWrites-2] < quickWrite {
		s.set(s.rows * 2)
	}
	s.recent = s.recent[:0]
}

// tooSlow learns from a write that was given up.
func (s *batchSize) tooSlow() { s.set(s.rows / 2) }

func (s *batchSize) set(rows int) {
	s.rows = min(max(rows, leastBatchRows), s.most)
	s.recent = s.recent[:0]
}

// isTimeout says whether a write was given up because it took too long: here, or by the server (query_canceled).
func isTimeout(err error) bool {
	var pg *pgconn.PgError
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &pg) && pg.Code == "57014"
}

// errTooSlow is the error of a batch that is to be written in halves, because the whole took too long.
var errTooSlow = errors.New("the batch takes too long to write")
