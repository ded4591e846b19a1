package lag

import (
	"time"

	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Figures are the progress of one consumer group.
type Figures struct {
	// Known is false when the last attempt to measure failed; the rest is then the last measurement, or zero.
	Known bool
	// Err says why Known is false; nil when nothing has been measured yet.
	Err error

	Lag, InFlight, Retrying, DeadLetters int64
	Members                              int32
	Paused                               bool
	// Lapsed is why the group receives nothing any more; empty while it does.
	Lapsed string
	// Oldest is when the oldest unsettled message was published; zero when there is none.
	Oldest time.Time
}

// oldestTolerance is how far two readings of the same message's age may lie apart: the database reports an age, and the time
// that passes on the way makes it a slightly different moment each time.
const oldestTolerance = 2 * time.Second

// figuresOf turns one row of statistics, taken at a time, into figures. before is the previous reading: a moment that has
// not really moved is kept as it was.
func figuresOf(s pgstream.GroupStats, at time.Time, before Figures) Figures {
	f := Figures{
		Known: true, Lag: s.Lag, InFlight: s.InFlight, Retrying: s.Retrying, DeadLetters: s.DeadLetters,
		Members: int32(len(s.Members)), Paused: s.Paused, Lapsed: s.Lapsed,
	}
	if s.OldestAge > 0 {
		f.Oldest = at.Add(-s.OldestAge).Truncate(time.Second)
		if d := f.Oldest.Sub(before.Oldest); !before.Oldest.IsZero() && d.Abs() <= oldestTolerance {
			f.Oldest = before.Oldest
		}
	}
	return f
}

// equal says whether two readings look the same to a person. Of errors the reason counts: the wording may hold a number that
// changes each time.
func (f Figures) equal(o Figures) bool {
	return f.Known == o.Known && phase.Reason(f.Err, "") == phase.Reason(o.Err, "") && f.Lag == o.Lag && f.InFlight == o.InFlight && f.Retrying == o.Retrying &&
		f.DeadLetters == o.DeadLetters && f.Members == o.Members && f.Paused == o.Paused && f.Lapsed == o.Lapsed && f.Oldest.Equal(o.Oldest)
}

// StreamFigures are what a stream holds, and how it fares.
type StreamFigures struct {
	// Known is false until the first measurement.
	Known bool

	Messages, Bytes, Delayed int64
	// HeldBy is the open transaction that has kept consumers from reading on for longer than the interval between two readings of
	// streams, "pid 123" or "prepared transaction <gid>"; empty when there is none.
	HeldBy string
	// HeldFor is for how long at most.
	HeldFor time.Duration
}

// streamFiguresOf turns one row of statistics into figures. A transaction that has been open for less than patience is none of
// anybody's business.
func streamFiguresOf(s pgstream.StreamStats, patience time.Duration) StreamFigures {
	f := StreamFigures{Known: true, Messages: s.Messages, Bytes: s.Bytes, Delayed: s.Delayed, HeldFor: s.StalledFor}
	if s.StalledFor >= patience {
		f.HeldBy = s.StalledBy
	}
	return f
}
