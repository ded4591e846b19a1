package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// receiveBatch is how many messages one claim has at most.
const receiveBatch = 100

// settleTimeout bounds what is still done after a signal: to settle what was printed, and to leave the group.
const settleTimeout = 10 * time.Second

type receiveOptions struct {
	limit                         int
	ack, nack, deadLetter, follow bool
	wait, delay, lease            time.Duration
	reason, member                string
}

func newReceive(a *app) *cobra.Command {
	var o receiveOptions
	cmd := &cobra.Command{
		Use:   "receive STREAM GROUP",
		Short: "Take messages as a member of a consumer group, print and settle them",
		Long: `Take messages as a member of a consumer group, print and settle them.

Without --ack, --nack or --dead-letter the messages are given back after they were printed, and no attempt is counted: the group's other
members get them at once. Messages are settled after they were printed, so one that was not printed is never lost.

When it ends, also by a signal, nothing is held any more. Exit code 4 says that there was no message.`,
		Example: `  millrace receive orders billing
  millrace receive orders billing --limit 10 --wait 5s --ack -o json
  millrace receive orders billing --follow --ack -o json | ./work`,
		Args: a.arguments("STREAM GROUP", 0),
		RunE: func(cmd *cobra.Command, args []string) error { return a.receive(cmd, args, o) },
	}
	f := cmd.Flags()
	f.IntVar(&o.limit, "limit", 1, "at most so many messages; 0 with --follow: no limit, which is the default there")
	f.BoolVar(&o.ack, "ack", false, "the messages are done")
	f.BoolVar(&o.nack, "nack", false, "they have failed, and come again after --delay")
	f.BoolVar(&o.deadLetter, "dead-letter", false, "they can never succeed: set them aside")
	f.DurationVar(&o.delay, "delay", -1, "with --nack: when they come again (default: the group's backoff)")
	f.StringVar(&o.reason, "reason", "by millrace receive", "with --nack and --dead-letter: the error that is kept")
	f.DurationVar(&o.wait, "wait", 0, "how long to wait for the first message")
	f.BoolVar(&o.follow, "follow", false, "take more messages until it is interrupted")
	f.DurationVar(&o.lease, "lease", 0, "how long messages are held at most (default: the group's ack wait)")
	f.StringVar(&o.member, "member", "", "name as a member of the group (default: the host's, and something random)")
	f.Lookup("delay").DefValue = "0s" // help says it in words
	cmd.ValidArgsFunction = a.complete("STREAM GROUP")
	return cmd
}

func (o *receiveOptions) check(cmd *cobra.Command) error {
	settles := o.ack || o.nack || o.deadLetter
	several := o.ack && o.nack || o.ack && o.deadLetter || o.nack && o.deadLetter
	if o.follow && !cmd.Flags().Changed("limit") {
		o.limit = 0
	}
	switch {
	case several:
		return usage(cmd, "--ack, --nack and --dead-letter exclude each other")
	case o.follow && o.wait > 0:
		return usage(cmd, "--follow waits as long as it takes: leave --wait out")
	case o.follow && !settles:
		return usage(cmd, "--follow needs --ack, --nack or --dead-letter: messages that are given back would come again and again")
	case o.limit < 0 || o.limit == 0 && !o.follow:
		return usage(cmd, "--limit %d: write 1 or more", o.limit)
	case o.limit > receiveBatch && !o.follow:
		return usage(cmd, "--limit %d: at most %d are taken at a time. Use --follow, too", o.limit, receiveBatch)
	case o.wait < 0 || o.lease < 0:
		return usage(cmd, "--wait and --lease are not negative")
	}
	return nil
}

func (a *app) receive(cmd *cobra.Command, args []string, o receiveOptions) error {
	ctx := cmd.Context()
	if err := o.check(cmd); err != nil {
		return err
	}
	d, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	n := a.split(d, "STREAM GROUP", args)
	if _, err := d.group(ctx, n.stream, n.group); err != nil {
		return err
	}
	info, err := d.info(ctx, n.stream)
	if err != nil {
		return err
	}
	cfg := pgstream.ConsumerConfig{Stream: n.stream, Group: n.group, Member: o.member, Lease: o.lease, MaxMessages: receiveBatch}
	if o.limit > 0 {
		cfg.MaxMessages = min(o.limit, receiveBatch)
	}
	if o.follow || o.wait > 0 {
		cfg.Listener = pgstream.NewListener(d.config.ConnConfig)
		listening, stop := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() { defer close(done); _ = cfg.Listener.Run(listening) }() // without it the consumer polls
		defer func() { stop(); <-done }()
	}
	consumer, err := pgstream.NewConsumer(ctx, d.Pool, cfg)
	if err != nil {
		return explain(err)
	}
	defer func() {
		leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
		defer cancel()
		if err := consumer.Leave(leaving); err != nil {
			a.note("the group was not left: %v", err)
		}
	}()
	printer := &messagePrinter{a: a, kind: info.Spec.PayloadType, attempts: true}
	return a.receiveAll(ctx, consumer, printer, o)
}

// receiveAll takes, prints and settles until there is enough, or a signal ends it.
func (a *app) receiveAll(ctx context.Context, consumer *pgstream.Consumer, printer *messagePrinter, o receiveOptions) error {
	for received := 0; ; {
		claim, err := take(ctx, consumer, o)
		switch {
		case ctx.Err() != nil && claim == nil && o.follow:
			return nil // a signal is how it ends
		case err != nil:
			return explain(err)
		case claim == nil:
			return &exitError{code: ExitNothing, err: errors.New("there is no message")}
		}
		left := len(claim.Messages)
		if o.limit > 0 {
			left = min(left, o.limit-received)
		}
		if err := a.handle(ctx, consumer, printer, claim, left, o); err != nil {
			return explain(err)
		}
		if received += left; !o.follow || received == o.limit {
			return nil
		}
	}
}

// take claims messages; nil when there are none in time.
func take(ctx context.Context, consumer *pgstream.Consumer, o receiveOptions) (*pgstream.Claim, error) {
	if o.follow {
		return consumer.Receive(ctx)
	}
	if o.wait == 0 {
		return consumer.TryReceive(ctx)
	}
	waiting, cancel := context.WithTimeout(ctx, o.wait)
	defer cancel()
	claim, err := consumer.Receive(waiting)
	if err != nil && waiting.Err() != nil && ctx.Err() == nil {
		return nil, nil
	}
	return claim, err
}

// printPatience is how long a signal waits for whoever reads what is printed.
const printPatience = time.Second

// printAll prints messages, and returns the positions of those that were printed. After a signal, a reader that does not read is not waited for: nothing counts
// as printed then.
func printAll(ctx context.Context, printer *messagePrinter, messages []pgstream.Message) ([]int64, error) {
	type result struct {
		positions []int64
		err       error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		for _, m := range messages {
			if r.err = printer.print(m, 0); r.err != nil {
				break
			}
			r.positions = append(r.positions, m.Position)
		}
		done <- r
	}()
	select {
	case r := <-done:
		return r.positions, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-done:
		return r.positions, r.err
	case <-time.After(printPatience):
		return nil, &exitError{code: ExitInterrupted, err: errors.New("interrupted while nobody read what was printed; the messages are given back")}
	}
}

// handle prints the first n messages of a claim, settles those that were printed, and gives the others back, also when a signal comes.
func (a *app) handle(signal context.Context, consumer *pgstream.Consumer, printer *messagePrinter, claim *pgstream.Claim, n int, o receiveOptions) error {
	printed, failure := printAll(signal, printer, claim.Messages[:n])
	ctx, cancel := context.WithTimeout(context.WithoutCancel(signal), settleTimeout)
	defer cancel()
	all := len(printed) == len(claim.Messages)
	var err error
	switch {
	case len(printed) == 0 || !o.ack && !o.nack && !o.deadLetter:
		return errors.Join(failure, consumer.Release(ctx, claim.Token))
	case o.ack && all:
		err = consumer.Ack(ctx, claim.Token)
	case o.ack:
		err = consumer.AckMessages(ctx, claim.Token, printed)
	case o.nack:
		err = consumer.Nack(ctx, claim.Token, printed, o.delay, o.reason)
	default:
		err = consumer.DeadLetter(ctx, claim.Token, printed, o.reason)
	}
	if errors.Is(err, pgstream.ErrFenced) {
		err = fmt.Errorf("the messages were held for too long, and come again. Raise --lease: %w", err)
	}
	return errors.Join(failure, err) // what is left of the claim is given back when the group is left
}
