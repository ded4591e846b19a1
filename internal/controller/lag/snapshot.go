package lag

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/api/v1alpha1"
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
	// Queued messages wait for a delivery, the first or another.
	Queued  int64
	Members int32
	Paused  bool
	// Lapsed is why the group receives nothing any more; empty while it does.
	Lapsed string
	// Oldest is when the oldest unsettled message was published; zero when there is none.
	Oldest time.Time
	// At is when the figures were read. Active is the newest reading at which something waited, was held or was due for another delivery, or had
	// been settled since the reading before it. Readings that failed count as activity: nobody knows.
	At, Active time.Time
	// Holders are the members that hold something, at most holdersMax, those with the most messages first.
	Holders []Holder
	// Deliveries of the unsettled message that was handed out most often; 0 when none is held or waits for another delivery.
	Deliveries int32
	// LastError of a message that waits for another delivery or was set aside, and when it came; empty when there is none.
	LastError   string
	LastErrorAt time.Time
	// Trouble says why nothing becomes of what waits; empty while all is well.
	Trouble Trouble
	// Rates is nil until there are two readings to tell them from.
	Rates *Rates

	readings  []reading // the oldest first
	ratesTold *Rates    // when somebody was woken last
}

// Trouble is why nothing becomes of the messages of a group. Its values are reasons of the condition Consuming.
type Trouble string

// Troubles.
const (
	NobodyReceives Trouble = v1alpha1.ReasonNobodyReceives
	MessageFails   Trouble = v1alpha1.ReasonMessageFails
)

// failsAfter is how many deliveries of one message are too many: what fails in passing has had its time by then.
const failsAfter = 5

// Holder is one member of a group.
type Holder struct {
	Name       string
	Partitions string // of an Ordered group, such as "0-3,7"
	Messages   int64
}

// holdersMax bounds how many members are shown: a status is read by people.
const holdersMax = 10

// Rates are messages per second over the last window. Positions that rolled back count.
type Rates struct {
	Published float64
	Settled   float64 // left the group's backlog: settled, set aside, or removed by retention
}

// reading is one measurement of what only grows.
type reading struct {
	at                 time.Time
	published, settled int64
}

// oldestTolerance is how far two readings of the same message's age may lie apart: the database reports an age, and the time
// that passes on the way makes it a slightly different moment each time.
const oldestTolerance = 2 * time.Second

// figuresOf turns one report, taken at a time, into figures. before is the previous reading: a moment that has not really moved is kept
// as it was. Rates are taken over the window.
func figuresOf(r pgstream.GroupReport, at time.Time, before Figures, window time.Duration) Figures {
	f := Figures{
		Known: true, Queued: r.Queued, Lag: r.Lag, InFlight: r.InFlight, Retrying: r.Retrying, DeadLetters: r.DeadLetters,
		Members: int32(len(r.Members)), Paused: r.Paused, Lapsed: r.Lapsed,
		Holders: holdersOf(r), Deliveries: int32(r.Deliveries), LastError: shorten(r.Error), LastErrorAt: r.ErrorAt,
	}
	if r.OldestAge > 0 {
		f.Oldest = at.Add(-r.OldestAge).Truncate(time.Second)
		if d := f.Oldest.Sub(before.Oldest); !before.Oldest.IsZero() && d.Abs() <= oldestTolerance {
			f.Oldest = before.Oldest
		}
	}
	f.At, f.Active = at, before.Active
	if last := len(before.readings) - 1; !before.Known || last < 0 || r.Settled() != before.readings[last].settled || r.Lag+r.InFlight+r.Retrying > 0 {
		f.Active = at
	}
	f.readings = append(slices.Clone(before.readings), reading{at, r.LastPosition, r.Settled()})
	// The newest reading that is as old as the window is where the rates begin.
	for len(f.readings) > 2 && at.Sub(f.readings[1].at) >= window {
		f.readings = f.readings[1:]
	}
	if first := f.readings[0]; at.After(first.at) {
		seconds := at.Sub(first.at).Seconds()
		f.Rates = &Rates{
			Published: max(float64(r.LastPosition-first.published)/seconds, 0),
			Settled:   max(float64(r.Settled()-first.settled)/seconds, 0),
		}
	}
	switch {
	case f.Deliveries >= failsAfter:
		f.Trouble = MessageFails
	// Members are known of Ordered groups. One that is there and holds nothing waits for the time of what it has given back.
	case !f.Paused && f.Lapsed == "" && f.Lag > 0 && f.InFlight == 0 && f.Members == 0 && f.Rates != nil && f.Rates.Settled == 0 &&
		at.Sub(f.readings[0].at) >= window && at.Sub(f.Oldest) >= window:
		f.Trouble = NobodyReceives
	}
	return f
}

// holdersOf lists who has partitions or messages.
func holdersOf(r pgstream.GroupReport) []Holder {
	var all []Holder
	for _, m := range r.Members {
		all = append(all, Holder{Name: m.Name, Partitions: ranges(m.Partitions)})
	}
	for _, h := range r.Holders {
		i := slices.IndexFunc(all, func(m Holder) bool { return m.Name == h.Name })
		if i < 0 {
			all, i = append(all, Holder{Name: h.Name}), len(all)
		}
		all[i].Messages = h.Messages
	}
	all = slices.DeleteFunc(all, func(h Holder) bool { return h.Partitions == "" && h.Messages == 0 })
	slices.SortFunc(all, func(a, b Holder) int {
		return cmp.Or(cmp.Compare(b.Messages, a.Messages), cmp.Compare(a.Name, b.Name))
	})
	return all[:min(len(all), holdersMax)]
}

// ranges writes sorted numbers as "0-3,7".
func ranges(numbers []int32) string {
	var parts []string
	for i := 0; i < len(numbers); {
		j := i
		for j+1 < len(numbers) && numbers[j+1] == numbers[j]+1 {
			j++
		}
		part := strconv.Itoa(int(numbers[i]))
		if j > i {
			part += "-" + strconv.Itoa(int(numbers[j]))
		}
		parts = append(parts, part)
		i = j + 1
	}
	return strings.Join(parts, ",")
}

// errorMax bounds an error in a status, in bytes.
const errorMax = 300

func shorten(text string) string {
	text = strings.TrimSpace(text)
	if len(text) > errorMax {
		text = strings.ToValidUTF8(text[:errorMax], "") + "…"
	}
	return text
}

// PerMinute rounds a rate to a whole number of messages per minute with two digits that count, as a person reads it. shown is the number shown
// last: one that has moved by less than a fifth is kept, or a steady stream would change its status with every reading.
func PerMinute(perSecond float64, shown *int64) int64 {
	exact := perSecond * 60
	if shown != nil && *shown > 0 && exact > 0 && math.Abs(exact-float64(*shown)) < float64(*shown)/5 {
		return *shown
	}
	unit := 1.0
	for exact/unit >= 100 {
		unit *= 10
	}
	return int64(math.Round(exact/unit) * unit)
}

// equal says whether two readings look the same to a person. Of errors the reason counts: the wording may hold a number that
// changes each time. Rates are not compared here: they move with every message.
func (f Figures) equal(o Figures) bool {
	return f.Known == o.Known && f.Queued == o.Queued && phase.Reason(f.Err, "") == phase.Reason(o.Err, "") && f.Lag == o.Lag && f.InFlight == o.InFlight && f.Retrying == o.Retrying &&
		f.DeadLetters == o.DeadLetters && f.Members == o.Members && f.Paused == o.Paused && f.Lapsed == o.Lapsed && f.Oldest.Equal(o.Oldest) &&
		slices.Equal(f.Holders, o.Holders) && f.Deliveries == o.Deliveries && f.LastError == o.LastError && f.Trouble == o.Trouble
}

// ratesMoved says whether a person would be shown other rates than at the last time somebody was woken: shown is what they were then.
func ratesMoved(shown, now *Rates) bool {
	if now == nil {
		return false
	}
	if shown == nil {
		shown = &Rates{}
	}
	return moved(shown.Published, now.Published) || moved(shown.Settled, now.Settled)
}

func moved(shown, now float64) bool {
	before := PerMinute(shown, nil)
	return PerMinute(now, &before) != before
}

// StreamFigures are what a stream holds, and how it fares.
type StreamFigures struct {
	// Known is false until the first measurement.
	Known bool

	Messages, Bytes, Delayed int64
	// PublishedPerSecond over the last minute.
	PublishedPerSecond float64
	// SegmentsUsed of all segments, from 0 to 1: at 1 retention cannot free any.
	SegmentsUsed float64
	// HeldBy is the open transaction that has kept consumers from reading on for longer than the interval between two readings of
	// streams, "pid 123" or "prepared transaction <gid>"; empty when there is none.
	HeldBy string
	// HeldFor is for how long at most.
	HeldFor time.Duration
}

// streamFiguresOf turns one row of statistics into figures. A transaction that has been open for less than patience is none of
// anybody's business.
func streamFiguresOf(s pgstream.StreamStats, patience time.Duration) StreamFigures {
	f := StreamFigures{Known: true, Messages: s.Messages, Bytes: s.Bytes, Delayed: s.Delayed, HeldFor: s.StalledFor, PublishedPerSecond: s.PublishedPerSecond}
	if s.Segments > 0 {
		f.SegmentsUsed = float64(s.SegmentsUsed) / float64(s.Segments)
	}
	if s.StalledFor >= patience {
		f.HeldBy = s.StalledBy
	}
	return f
}
