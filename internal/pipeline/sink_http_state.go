package pipeline

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"hash/maphash"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/expression"
)

// statefulHTTPSink is an HTTPSink whose receiver handles messages of workflows and keeps no state itself. The event's data are
//
//	{"message": …, "memory": {"subject": "o-1", "version": 3, "state": {…}}}
//
// where message is what the data would be without a memory, and memory what the memory knows of the message's workflow, with parent, metadata and completed where it has
// them; version 0 and no state when it knows nothing. The answer may have a JSON object with the new state:
//
//	{"memory": {"state": {…}, "completed": true, "parent": "o-0", "metadata": {…}}}
//
// What it leaves out stays as it is, and without memory all of it does. States are written in the transaction of the ack, each upon the version that its request has shown. When
// another pod has written the workflow meanwhile, nothing is written for it, and the event is sent again with the state of then: the receiver sees an event again, its
// state has it once.
type statefulHTTPSink struct {
	*HTTPSink
	pool    *pgxpool.Pool
	memory  *pgstream.Memory
	subject *expression.Program // nil: the key of the source's message
	source  TxSource
	seed    maphash.Seed
}

func newStatefulHTTPSink(o SinkOptions, memory *pgstream.Memory) (*statefulHTTPSink, error) {
	plain, err := NewHTTPSink(o.Config, o.Metrics)
	if err != nil {
		return nil, err
	}
	plain.replies = true
	s := &statefulHTTPSink{HTTPSink: plain, pool: o.Pool, memory: memory, seed: maphash.MakeSeed()}
	if text := o.Config.Memory.Subject; text != "" {
		if s.subject, err = expression.Compile(text, expression.Text, expression.AfterMapping); err != nil {
			return nil, NewConfigurationError("memory.subject: %v", err)
		}
	}
	return s, nil
}

// SettleWith implements SettlingSink.
func (s *statefulHTTPSink) SettleWith(source TxSource) { s.source = source }

// Shard implements Sharder: messages of one workflow go to one writer.
func (s *statefulHTTPSink) Shard(it *Item) uint64 {
	subject, err := s.subjectOf(it)
	if err != nil {
		return 0
	}
	return maphash.String(s.seed, subject)
}

// subjectOf returns the workflow of an item. Its error is about the item.
func (s *statefulHTTPSink) subjectOf(it *Item) (string, error) {
	subject := ""
	if s.subject != nil {
		var err error
		if subject, _, err = s.subject.EvalText(it.Variables(s.columns)); err != nil {
			return "", &httpError{ClassRow, "memory.subject: " + err.Error()}
		}
	} else if it.Key != nil {
		subject = *it.Key
	}
	const most = 1024 // bytes; what the engine takes
	if subject == "" || len(subject) > most {
		return "", &httpError{ClassRow, "the message belongs to no workflow: its subject has to be a text of 1 to 1024 bytes"}
	}
	return subject, nil
}

// stateful is what a write knows of one item.
type stateful struct {
	subject  string
	err      error              // why it has none
	workflow *pgstream.Workflow // of the subject; shared by its items, as the answers before have left it
	write    *pgstream.MemoryWrite
}

// Write implements Sink.
func (s *statefulHTTPSink) Write(ctx context.Context, b *Batch) ([]Outcome, error) {
	to, err := s.target.now()
	if err != nil {
		return nil, err
	}
	if !s.rest.wait(ctx) {
		return nil, ctx.Err()
	}
	items, err := s.read(ctx, b)
	if err != nil {
		return nil, err
	}
	at := make(map[*Item]*string, len(items))
	for i := range items {
		at[b.Items[i]] = &items[i].subject
	}
	os, err := s.writeEach(ctx, b, lanesOf(b, func(it *Item) *string { return at[it] }), func(i int) error { return s.send(ctx, to, b.Items[i], &items[i]) })
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	return settledWrite(ctx, conn.Conn(), s.source, b, func(tx pgx.Tx) ([]Outcome, error) { return os, s.remember(ctx, tx, b, items, os) })
}

// read looks up the workflows of a batch, in one round trip.
func (s *statefulHTTPSink) read(ctx context.Context, b *Batch) ([]stateful, error) {
	items := make([]stateful, len(b.Items))
	workflows := map[string]*pgstream.Workflow{}
	var subjects []string
	for i, it := range b.Items {
		st := &items[i]
		if st.subject, st.err = s.subjectOf(it); st.err != nil {
			continue
		}
		if workflows[st.subject] == nil {
			workflows[st.subject] = &pgstream.Workflow{}
			subjects = append(subjects, st.subject)
		}
		st.workflow = workflows[st.subject]
	}
	if len(subjects) == 0 {
		return items, nil
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	known, err := s.memory.ReadMany(ctx, s.pool, subjects)
	if err != nil {
		return nil, memoryError(err)
	}
	for _, w := range known {
		*workflows[w.Subject] = w
	}
	return items, nil
}

// send posts one event and takes the state out of the answer.
func (s *statefulHTTPSink) send(ctx context.Context, to *destination, it *Item, st *stateful) error {
	if st.err != nil {
		return st.err
	}
	message, err := s.payload(it)
	if err != nil {
		return &httpError{ClassRow, "sink.http.data: " + err.Error()}
	}
	w := st.workflow
	memory, err := json.Marshal(struct {
		Subject   string          `json:"subject"`
		Version   int64           `json:"version"`
		State     json.RawMessage `json:"state,omitempty"`
		Parent    string          `json:"parent,omitempty"`
		Metadata  json.RawMessage `json:"metadata,omitempty"`
		Completed bool            `json:"completed,omitempty"`
	}{st.subject, w.Version, w.State, w.Parent, w.Metadata, !w.CompletedAt.IsZero()})
	if err != nil {
		return &httpError{ClassRow, "memory: " + err.Error()}
	}
	data := slices.Concat([]byte(`{"message":`), message, []byte(`,"memory":`), memory, []byte{'}'})
	reply, err := s.post(ctx, to, it, s.eventID(it), "application/cloudevents+json", s.appendEnvelope(nil, it, data))
	if err != nil {
		return err
	}
	return st.take(reply)
}

// take reads an answer, and shows what it says to the next item of the workflow. An answer that is no JSON object, such as an empty one, says nothing.
func (st *stateful) take(reply []byte) error {
	var answer struct {
		Memory json.RawMessage `json:"memory"`
	}
	if json.Unmarshal(reply, &answer) != nil || len(answer.Memory) == 0 || string(answer.Memory) == "null" {
		return nil
	}
	var memory struct {
		State     json.RawMessage `json:"state"`
		Parent    string          `json:"parent"`
		Metadata  json.RawMessage `json:"metadata"`
		Completed *bool           `json:"completed"`
	}
	decoder := json.NewDecoder(bytes.NewReader(answer.Memory))
	decoder.DisallowUnknownFields() // a misspelt state would be lost without a word
	if err := decoder.Decode(&memory); err != nil {
		return &httpError{ClassConfiguration, `the memory of the answer cannot be read; make the receiver answer {"memory": {"state": {…}, "completed": false}}: ` + err.Error()}
	}
	w := st.workflow
	state := []byte(memory.State)
	if state == nil {
		state = w.State
	}
	if state == nil {
		return &httpError{ClassConfiguration, "the memory of the answer has no state, and the workflow has none yet; make the receiver answer with one"}
	}
	st.write = &pgstream.MemoryWrite{State: state, Expected: w.Version, Parent: memory.Parent, Metadata: memory.Metadata}
	w.State = state
	w.Version++
	w.Parent = cmp.Or(memory.Parent, w.Parent)
	if memory.Metadata != nil {
		w.Metadata = memory.Metadata
	}
	if memory.Completed != nil {
		st.write.Completed, st.write.Reopen = *memory.Completed, !*memory.Completed
		w.CompletedAt = time.Time{}
		if *memory.Completed {
			w.CompletedAt = time.Now()
		}
	}
	return nil
}

// remember writes the states that were answered, and takes back the outcome of what cannot be written, with what follows from it.
func (s *statefulHTTPSink) remember(ctx context.Context, tx pgx.Tx, b *Batch, items []stateful, os []Outcome) error {
	order := make([]int, len(items))
	for i := range order {
		order[i] = i
	}
	if !b.InOrder {
		// Two that write the same workflows do not wait for each other.
		slices.SortStableFunc(order, func(i, j int) int { return cmp.Compare(items[i].subject, items[j].subject) })
	}
	stopped := map[string]bool{}
	for _, i := range order {
		st := &items[i]
		lane := st.subject
		if b.InOrder {
			lane = ""
		}
		switch {
		case os[i].Result != Written:
			stopped[lane] = stopped[lane] || b.InOrder
			continue
		case stopped[lane]:
			os[i] = Outcome{Result: Retry, Reason: "a state before it was not written"}
			continue
		case st.write == nil:
			continue
		}
		// A conflict undoes its own write and no other.
		err := pgx.BeginFunc(ctx, tx, func(savepoint pgx.Tx) error {
			_, err := s.memory.Write(ctx, savepoint, st.subject, *st.write)
			return err
		})
		if err == nil {
			continue
		}
		_, conflict := pgstream.IsVersionError(err)
		switch {
		case conflict || errors.Is(err, pgstream.ErrLocked):
			os[i] = Outcome{Result: Retry, Reason: clip(err.Error())}
		case errors.Is(err, pgstream.ErrRefused):
			os[i] = Outcome{Result: Rejected, Reason: clip(err.Error())}
		default:
			return err
		}
		stopped[lane] = true
	}
	return nil
}
