package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// tailBatch is how many messages are read at a time.
const tailBatch = 500

type tailOptions struct {
	from     string
	noFollow bool
	limit    int64
	timeout  time.Duration
	priority int
	filters  filterFlags
}

func newTail(a *app) *cobra.Command {
	var o tailOptions
	cmd := &cobra.Command{
		Use:   "tail STREAM",
		Short: "Print messages as they are published, or from a place on",
		Long: `Print messages as they are published, or from a place on, until it is interrupted. No consumer group is involved: nothing is claimed
or acked. Messages are printed in order of position, and none before the transactions in front of it have ended.

Of a stream with priorities all are followed, with a column that says which; a position is one of --priority.`,
		Example: `  millrace tail orders
  millrace tail orders --from 15m --key customer-7
  millrace tail orders --from earliest --no-follow -o json`,
		Args: a.arguments("STREAM", 0),
		RunE: func(cmd *cobra.Command, args []string) error { return a.tail(cmd, args, o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.from, "from", "latest", "where to begin: "+placeHelp)
	f.BoolVar(&o.noFollow, "no-follow", false, "end when everything is printed that is there")
	f.Int64Var(&o.limit, "limit", 0, "end after so many messages; 0: no limit")
	f.DurationVar(&o.timeout, "timeout", 0, "end when no message came for so long, with exit code 4 if none came at all; 0: never")
	f.IntVar(&o.priority, "priority", -1, "only messages of this priority (default: all, or 0 with a position)")
	f.Lookup("priority").DefValue = "0" // help says it in words
	o.filters.add(cmd)
	cmd.ValidArgsFunction = a.complete("STREAM")
	return cmd
}

// lane is a stream to be read, which is one priority of a stream with several.
type lane struct {
	name     string
	priority int
}

// lanes are what is to be read of a stream.
func lanes(cmd *cobra.Command, info pgstream.StreamInfo, place pgstream.Place, priority int) ([]lane, error) {
	n := max(info.Spec.Priorities, 1)
	if priority >= n {
		return nil, usage(cmd, "stream %q has no priority %d: it has 0 to %d", info.Spec.Name, priority, n-1)
	}
	if priority < 0 && place.From == pgstream.StartPosition {
		priority = 0
	}
	var all []lane
	for p := n - 1; p >= 0; p-- {
		if priority < 0 || p == priority {
			all = append(all, lane{laneName(info.Spec.Name, p), p})
		}
	}
	return all, nil
}

// laneName is the name under which a priority of a stream is read.
func laneName(stream string, priority int) string {
	if priority == 0 {
		return stream
	}
	return stream + ".p" + strconv.Itoa(priority)
}

func (a *app) tail(cmd *cobra.Command, args []string, o tailOptions) error {
	ctx := cmd.Context()
	filter, err := o.filters.filter(cmd)
	if err != nil {
		return err
	}
	if o.limit < 0 || o.timeout < 0 {
		return usage(cmd, "--limit and --timeout are not negative")
	}
	d, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	now, err := d.now(ctx)
	if err != nil {
		return err
	}
	place, err := parsePlace(o.from, now)
	if err != nil {
		return usage(cmd, "--from: %w", err)
	}
	stream := a.split(d, "STREAM", args).stream
	info, err := d.info(ctx, stream)
	if err != nil {
		return err
	}
	all, err := lanes(cmd, info, place, o.priority)
	if err != nil {
		return err
	}
	t := &tailing{a: a, d: d, stream: stream, o: o, filter: filter, heard: make(chan struct{}, 1),
		printer: &messagePrinter{a: a, kind: info.Spec.PayloadType, lanes: info.Spec.Priorities > 1}}
	err = t.run(ctx, all, place)
	switch {
	case err != nil && !errors.Is(err, errEnough) && ctx.Err() == nil:
		return explain(err)
	case t.printed == 0 && t.late:
		return &exitError{code: ExitNothing, err: fmt.Errorf("no message came within %s", o.timeout)}
	}
	return nil // a signal is how a tail ends
}

// errEnough ends a tail that has printed what was asked for.
var errEnough = errors.New("enough")

// tailing is a tail under way. Its lanes are read side by side, and print one at a time.
type tailing struct {
	a       *app
	d       *database
	stream  string
	o       tailOptions
	filter  filter
	heard   chan struct{} // a message has come
	late    bool          // the timeout has ended it
	mu      sync.Mutex    // guards what follows
	printer *messagePrinter
	printed int64
}

func (t *tailing) run(ctx context.Context, all []lane, place pgstream.Place) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	var listener *pgstream.Listener
	var running sync.WaitGroup
	if !t.o.noFollow {
		listener = pgstream.NewListener(t.d.config.ConnConfig)
		running.Go(func() { _ = listener.Run(ctx) }) // without it readers poll
	}
	var reading sync.WaitGroup
	for _, l := range all {
		reader, err := t.reader(ctx, l, place, listener)
		if err != nil {
			end(err)
			break
		}
		read := func() {
			if err := t.read(ctx, reader, l.priority); err != nil {
				end(err)
			}
		}
		if t.o.noFollow {
			read() // one after the other, the highest priority first
		} else {
			reading.Go(read)
		}
	}
	if t.o.timeout > 0 {
		running.Go(func() { t.watch(ctx, end) })
	}
	reading.Wait()
	err := context.Cause(ctx)
	end(nil)
	running.Wait()
	return err
}

// watch ends the tail when nothing came for too long.
func (t *tailing) watch(ctx context.Context, end context.CancelCauseFunc) {
	timer := time.NewTimer(t.o.timeout)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.heard:
			timer.Reset(t.o.timeout)
		case <-timer.C:
			t.late = true
			end(errEnough)
			return
		}
	}
}

func (t *tailing) reader(ctx context.Context, l lane, place pgstream.Place, listener *pgstream.Listener) (*pgstream.Reader, error) {
	from := pgstream.ReadFirst
	switch place.From {
	case pgstream.StartLatest:
		from = pgstream.ReadNext
	case pgstream.StartPosition:
		from = place.Position
	case pgstream.StartTime:
		at, err := pgstream.PositionAt(ctx, t.d, l.name, place.Time)
		if err != nil {
			return nil, err
		}
		from = at
	}
	return pgstream.NewReader(ctx, t.d.Pool, l.name, from, listener)
}

// read prints one lane until there is enough.
func (t *tailing) read(ctx context.Context, reader *pgstream.Reader, priority int) error {
	next := reader.Next
	if t.o.noFollow {
		next = reader.TryNext
	}
	for {
		messages, err := next(ctx, tailBatch)
		if errors.Is(err, pgstream.ErrOutOfRange) {
			if err := t.skipRemoved(ctx, reader, priority); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		if len(messages) == 0 {
			return nil // without following: that was all
		}
		if err := t.print(messages, priority); err != nil {
			return err
		}
	}
}

// skipRemoved goes on at the first message that is left, and says so.
func (t *tailing) skipRemoved(ctx context.Context, reader *pgstream.Reader, priority int) error {
	info, err := pgstream.DescribeStream(ctx, t.d, laneName(t.stream, priority))
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.a.note("positions %d to %d were removed", reader.Position(), info.FirstPosition-1)
	reader.MoveTo(info.FirstPosition)
	return nil
}

func (t *tailing) print(messages []pgstream.Message, priority int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range messages {
		if t.o.limit > 0 && t.printed == t.o.limit {
			return errEnough // another lane has printed the last
		}
		if !t.filter.passes(m) {
			continue
		}
		select {
		case t.heard <- struct{}{}:
		default:
		}
		if err := t.printer.print(m, priority); err != nil {
			return err
		}
		t.printed++
	}
	if t.o.limit > 0 && t.printed == t.o.limit {
		return errEnough
	}
	return nil
}
