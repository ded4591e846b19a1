package pgstream_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// What a group or a caller may ask of receive: only some messages, settled at once, the urgent ones first.

// publishKinds publishes n messages whose header "kind" is a, b, c, a, b, c, … and returns the positions by kind.
func publishKinds(e *engine, n int) map[string][]int64 {
	e.t.Helper()
	ms := make([]pgstream.NewMessage, n)
	for i := range ms {
		key := fmt.Sprintf("k%d", i%7)
		headers, _ := json.Marshal(map[string]string{"kind": string("abc"[i%3])})
		ms[i] = pgstream.NewMessage{Key: &key, Headers: headers, Payload: []byte(`{}`)}
	}
	all, err := pgstream.PublishBatch(e.ctx, e.Pool, "orders", ms)
	must(e.t, err)
	kinds := map[string][]int64{}
	for i, p := range all {
		kind := string("abc"[i%3])
		kinds[kind] = append(kinds[kind], p)
	}
	return kinds
}

func TestAFilteredGroupIsGivenWhatItWantsAndNothingElse(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, Filter: pgstream.Filter{Headers: map[string]any{"kind": "b"}}})
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 40})
		want := publishKinds(e, 3000)["b"]
		got := drain(e, c)
		same(t, "delivered", got, want)
		e.publish("orders", 2500) // nothing for this group
		if claim := receive(e, c); claim != nil {
			t.Errorf("%v does not pass the filter", positions(claim))
		}
		if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.OldestAge != 0 {
			t.Errorf("nothing is left for the group: %+v", s)
		}
		want = publishKinds(e, 30)["b"]
		same(t, "delivered after a long stretch of others", drain(e, c), want)
	})
}

func TestAFilteredClaimIsSettledByItsOwnMessages(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Minute, Filter: pgstream.Filter{Headers: map[string]any{"kind": "b"}}})
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 5})
		want := publishKinds(e, 30)["b"]
		claim := mustReceive(e, c)
		same(t, "delivered", positions(claim), want[:5])
		must(t, c.AckMessages(e.ctx, claim.Token, want[:2]))
		e.jump(2 * time.Minute) // expired: only what is left of the group's own messages comes again
		claim = mustReceive(e, c)
		same(t, "after an expiry", positions(claim), want[2:5])
		e.jump(2 * time.Minute)
		var again []int64
		for len(again) < 3 { // one by one from here
			claim = mustReceive(e, c)
			again = append(again, positions(claim)...)
			must(t, c.Ack(e.ctx, claim.Token))
		}
		same(t, "after another expiry", again, want[2:5])
		rest := drain(e, c)
		same(t, "the rest", rest, want[5:])
		must(t, c.Leave(e.ctx))
		if s := e.stats("orders", "g"); s.InFlight != 0 || s.Retrying != 0 || s.Lag != 0 {
			t.Errorf("at the end: %+v", s)
		}
	})
}

func TestAutoAckSettlesWhatItHandsOut(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Minute})
		want := e.publish("orders", 100)
		acked := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 10})
		auto := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 10, AutoAck: true})
		first := mustReceive(e, acked)
		claim, err := auto.AckAndTryReceive(e.ctx, first.Token) // acks one and settles the next
		must(t, err)
		same(t, "the second claim", positions(claim), want[10:20])
		mustBeFenced(t, "ack of what is settled", auto.Ack(e.ctx, claim.Token))
		e.jump(time.Hour)
		same(t, "the rest, nothing twice", drain(e, acked), want[20:])
		if mode == pgstream.ModeShared { // a retry is settled at once, too
			more := e.publish("orders", 1)
			claim = mustReceive(e, acked)
			must(t, acked.Nack(e.ctx, claim.Token, more, 0, "again"))
			same(t, "the retry", positions(mustReceive(e, auto)), more)
		}
		e.jump(time.Hour)
		if claim := receive(e, acked); claim != nil {
			t.Errorf("%v came again", positions(claim))
		}
		if s := e.stats("orders", "g"); s.InFlight != 0 || s.Retrying != 0 || s.Lag != 0 {
			t.Errorf("at the end: %+v", s)
		}
	})
}

func TestAConsumerTakesUrgentMessagesFirstAlsoWhenPrioritiesAreNew(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run("select millrace.create_stream('orders', p_priorities => 2)")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 10})
	for priority := range 2 {
		e.run("select millrace.publish('orders', '{}', p_priority => $1::integer, p_key => $2) from generate_series(1, 3)", priority, fmt.Sprint(priority))
	}
	token := ""
	var keys []string
	for {
		claim, err := c.AckAndTryReceive(e.ctx, token)
		must(t, err)
		if claim == nil {
			break
		}
		token = claim.Token
		for _, m := range claim.Messages {
			keys = append(keys, *m.Key)
		}
	}
	same(t, "keys", keys, []string{"1", "1", "1", "0", "0", "0"})
	if s := e.stats("orders", "g"); s.InFlight != 0 || s.Lag != 0 {
		t.Errorf("at the end: %+v", s)
	}
}

func TestANackedMessageSurvivesAFilterThatNoLongerWantsIt(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	spec := pgstream.GroupSpec{Stream: "orders", Name: "g"}
	e.group(spec)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	publishKinds(e, 3)
	claim := mustReceive(e, c)
	spec.Filter = pgstream.Filter{Headers: map[string]any{"kind": "b"}}
	e.group(spec)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "again"))
	same(t, "the retry", positions(mustReceive(e, c)), []int64{1})
}
