package pgstream_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func (e *engine) report(stream, group string) pgstream.GroupReport {
	e.t.Helper()
	all, err := pgstream.GroupReports(e.ctx, e)
	must(e.t, err)
	for _, r := range all {
		if r.Stream == stream && r.Group == group {
			return r
		}
	}
	e.t.Fatalf("no report of group %s of stream %s", group, stream)
	return pgstream.GroupReport{}
}

// The report of a group has what its statistics have, who holds what, how often the worst message was tried, and what it died of.
func TestTheReportOfAGroupNamesHoldersAndErrors(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.stream("orders")
		e.stream("quiet")
		spec := pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Minute}
		if mode == pgstream.ModeOrdered {
			spec.FailurePolicy = pgstream.FailurePark
		}
		e.group(spec)
		e.group(pgstream.GroupSpec{Stream: "quiet", Name: "g", Mode: mode})
		check := func(when string, settled int64, deliveries int, fault string, holders ...pgstream.Holder) {
			t.Helper()
			r := e.report("orders", "g")
			if r.Settled() != settled || r.Deliveries != deliveries || r.Error != fault || r.ErrorAt.IsZero() != (fault == "") || !slices.Equal(r.Holders, holders) {
				t.Errorf("%s: settled %d, %d deliveries, holders %v, error %q at %s; want %d, %d, %v, %q", when, r.Settled(), r.Deliveries, r.Holders, r.Error,
					r.ErrorAt, settled, deliveries, holders, fault)
			}
			s := e.stats("orders", "g")
			if r.Lag != s.Lag || r.InFlight != s.InFlight || r.Retrying != s.Retrying || r.DeadLetters != s.DeadLetters || len(r.Members) != len(s.Members) {
				t.Errorf("%s: the report %+v differs from the statistics %+v", when, r, s)
			}
		}
		check("empty", 0, 0, "")
		e.publish("orders", 20)
		check("published", 0, 0, "")
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "worker-1", MaxMessages: 8})
		claim := mustReceive(e, c)
		check("claimed", 0, 1, "", pgstream.Holder{Name: "worker-1", Messages: 8})
		must(t, c.DeadLetter(e.ctx, claim.Token, []int64{1}, "broken for good"))
		check("one set aside", 1, 1, "broken for good", pgstream.Holder{Name: "worker-1", Messages: 7})
		e.jump(time.Second)
		must(t, c.Nack(e.ctx, claim.Token, []int64{2}, time.Hour, "try later"))
		check("one nacked", 1, 1, "try later", pgstream.Holder{Name: "worker-1", Messages: 6})
		must(t, c.Ack(e.ctx, claim.Token))
		check("the others acked", 7, 1, "try later")
		e.jump(2 * time.Hour)
		if mode == pgstream.ModeShared {
			claim = mustReceive(e, c)
			check("the nacked one again", 7, 2, "try later", pgstream.Holder{Name: "worker-1", Messages: 1})
			must(t, c.Ack(e.ctx, claim.Token))
		}
		drain(e, c)
		check("drained", 20, 0, "broken for good")
		if r := e.report("quiet", "g"); len(r.Holders) != 0 || r.Error != "" || r.LastPosition != 0 {
			t.Errorf("another group: %+v", r)
		}
	})
}

// Of many holders the ten with the most are named; priorities count together.
func TestTheReportOfAGroupIsBounded(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.prioritized(pgstream.ModeShared)
	for n := range 12 {
		e.publishAt(n%2, make([]int, n+1)...)
		e.mustReceiveSQL("worker-"+strings.Repeat("i", n+1), 100, "")
	}
	r := e.report("orders", "g")
	if len(r.Holders) != 10 || r.Holders[0].Messages != 12 || r.Holders[9].Messages != 3 || r.LastPosition != 78 || r.Settled() != 0 {
		t.Errorf("%+v", r)
	}
}
