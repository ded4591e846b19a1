package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// publishBatch is how many messages of a file are published by one statement.
const publishBatch = 1000

type publishOptions struct {
	file, format     string
	key, headersJSON string
	headers          []string
	at               string
	message          pgstream.NewMessage
	skip             int64
}

func newPublish(a *app) *cobra.Command {
	var o publishOptions
	cmd := &cobra.Command{
		Use:   "publish STREAM [PAYLOAD]",
		Short: "Publish a message, or those of a file or of standard input",
		Long: `Publish a message, or those of a file or of standard input.

Without PAYLOAD the messages come from --file, or from standard input. In a stream of JSON they are JSON values, one after the
other; in one of bytes each line is a message. With --format message each value is an object with the fields payload (or
payload_bytes, in base64), and, if wanted, key, headers and dedupe_key: what tail -o json prints can be published again.

Up to a thousand messages are published by one statement, which is done whole or not at all. When something goes wrong, it is said how
many were published, and --skip passes over them the next time.`,
		Example: `  millrace publish orders '{"id": 1}' --key customer-7 -H source=import
  millrace publish orders --file orders.ndjson
  millrace tail orders --from earliest --no-follow -o json | millrace publish copy --format message`,
		Args: a.arguments("STREAM", 1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.publish(cmd, args, o) },
	}
	f := cmd.Flags()
	f.StringVarP(&o.file, "file", "f", "", "file with the messages; - is standard input")
	f.StringVar(&o.format, "format", "payload", "what a value of the file is: payload or message")
	f.StringVarP(&o.key, "key", "k", "", "key of the messages: those of a key are delivered in order to Ordered groups")
	f.StringArrayVarP(&o.headers, "header", "H", nil, "a header as name=value; repeat it for more")
	f.StringVar(&o.headersJSON, "headers", "", "headers as a JSON object")
	f.DurationVar(&o.message.Delay, "delay", 0, "deliver the messages after this time")
	f.StringVar(&o.at, "at", "", "deliver the messages at this time, as in 2026-01-31T08:00:00Z")
	f.IntVar(&o.message.Priority, "priority", 0, "1 or more goes before messages with less, in a stream that has priorities")
	f.StringVar(&o.message.DedupeKey, "dedupe-key", "", "publish it once, however often this is repeated within the stream's dedupe window; for one message")
	f.BoolVar(&o.message.Serialize, "serialize", false, "wait for open transactions that have published the key with this, too")
	f.Int64Var(&o.skip, "skip", 0, "pass over so many messages of the file")
	cmd.ValidArgsFunction = a.complete("STREAM")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"payload", "message"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// prepare reads the options that are text.
func (o *publishOptions) prepare(cmd *cobra.Command) error {
	if cmd.Flags().Changed("key") {
		o.message.Key = &o.key
	}
	headers, err := parseHeaders(o.headers)
	if err != nil {
		return usage(cmd, "%w", err)
	}
	switch {
	case headers != nil && o.headersJSON != "":
		return usage(cmd, "--header and --headers exclude each other")
	case headers != nil:
		if o.message.Headers, err = json.Marshal(headers); err != nil {
			return usage(cmd, "--header: %w", err)
		}
	case o.headersJSON != "":
		var object map[string]any
		if err := json.Unmarshal([]byte(o.headersJSON), &object); err != nil || object == nil {
			return usage(cmd, "--headers %q is no JSON object", o.headersJSON)
		}
		o.message.Headers = []byte(o.headersJSON)
	}
	if o.at != "" {
		if o.message.DeliverAt, err = time.Parse(time.RFC3339, o.at); err != nil {
			return usage(cmd, "--at %q is no time: write one as in 2026-01-31T08:00:00Z", o.at)
		}
		if o.message.Delay != 0 {
			return usage(cmd, "--delay and --at exclude each other")
		}
	}
	switch {
	case o.format != "payload" && o.format != "message":
		return usage(cmd, "there is no --format %q: write payload or message", o.format)
	case o.message.Delay < 0:
		return usage(cmd, "--delay %s is in the past", o.message.Delay)
	case o.skip < 0:
		return usage(cmd, "--skip %d is negative", o.skip)
	}
	return nil
}

func (a *app) publish(cmd *cobra.Command, args []string, o publishOptions) error {
	ctx := cmd.Context()
	if err := o.prepare(cmd); err != nil {
		return err
	}
	payloadGiven := len(args) == 2 || a.connection.stream != "" && len(args) == 1
	if payloadGiven && (o.file != "" || o.format != "payload" || o.skip > 0) {
		return usage(cmd, "PAYLOAD is the message: --file, --format and --skip go without it")
	}
	if !payloadGiven && o.file == "" {
		if _, is := terminal(a.In); is {
			return usage(cmd, "PAYLOAD is missing. Write it, or --file, or send messages to standard input")
		}
	}
	if !payloadGiven && o.message.DedupeKey != "" {
		return usage(cmd, "--dedupe-key is for one message. For those of a file write --format message, and a dedupe_key into each")
	}
	d, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	n := a.split(d, "STREAM", args)
	info, err := d.info(ctx, n.stream)
	if err != nil {
		return err
	}
	publisher, err := pgstream.NewPublisher(ctx, d, n.stream)
	if err != nil {
		return explain(err)
	}
	if payloadGiven {
		o.message.Payload = []byte(n.rest[0])
		if info.Spec.PayloadType == pgstream.PayloadJSON && !json.Valid(o.message.Payload) {
			return fmt.Errorf("the payload is no JSON, which stream %q takes: %s. Text is written in quotes, as in '\"text\"'", n.stream, plain(cut(n.rest[0], 60)))
		}
		position, err := publisher.Publish(ctx, d, o.message)
		if err != nil {
			return explain(err)
		}
		return a.published(n.stream, 1, position, position)
	}
	return a.publishFile(ctx, d, publisher, info, o)
}

// publishedJSON is what publish prints with -o json. Positions are 0 for messages with a delay, which have none yet.
type publishedJSON struct {
	Stream   string `json:"stream"`
	Messages int64  `json:"messages"`
	First    int64  `json:"first_position"`
	Last     int64  `json:"last_position"`
}

func (a *app) published(stream string, messages, first, last int64) error {
	if a.json() {
		return printJSON(a.Out, publishedJSON{stream, messages, first, last})
	}
	text := count(messages, "message") + " published to " + strconv.Quote(stream)
	switch {
	case messages == 0:
	case last == 0:
		text += ", to be delivered later"
	case messages == 1:
		text += fmt.Sprintf(" at position %d", first)
	default:
		text += fmt.Sprintf(", positions %d to %d", first, last)
	}
	_, err := fmt.Fprintln(a.Out, text)
	return err
}

// publishFile publishes the messages of a file in batches.
func (a *app) publishFile(ctx context.Context, d *database, publisher *pgstream.Publisher, info pgstream.StreamInfo, o publishOptions) error {
	in := a.In
	if o.file != "" && o.file != "-" {
		f, err := os.Open(o.file)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	source := newMessageSource(ctx, in, info.Spec.PayloadType, o)
	tell := a.progress()
	var published, first, last int64
	var batch []pgstream.NewMessage
	flush := func() error {
		positions, err := publisher.PublishBatch(ctx, d, batch)
		if err != nil {
			return fmt.Errorf("messages %d to %d: %w", o.skip+published+1, o.skip+published+int64(len(batch)), explain(err))
		}
		for _, p := range positions {
			if p > 0 && (first == 0 || p < first) {
				first = p
			}
			last = max(last, p)
		}
		published += int64(len(batch))
		batch = batch[:0]
		tell.tell("%s published", count(published, "message"))
		return nil
	}
	var failure error
	for failure == nil {
		var m pgstream.NewMessage
		m, failure = source.next()
		if failure == nil {
			batch = append(batch, m)
		}
		// What is in front of a message that cannot be read is published, too.
		if ended := failure != nil && ctx.Err() == nil; len(batch) == publishBatch || len(batch) > 0 && (ended || source.idle()) {
			if err := flush(); err != nil {
				failure = err
			}
		}
	}
	tell.clear()
	if errors.Is(failure, io.EOF) {
		return a.published(info.Spec.Name, published, first, last)
	}
	if published > 0 {
		a.note("%s published; pass them over with --skip %d", count(published, "message"), o.skip+published)
	}
	return failure
}

// messageSource reads messages one after the other. Reading goes on in the background, because nothing else can end a read of a terminal or a pipe.
type messageSource struct {
	ctx     context.Context
	results chan messageResult
}

type messageResult struct {
	message pgstream.NewMessage
	err     error
}

func newMessageSource(ctx context.Context, in io.Reader, kind pgstream.PayloadType, o publishOptions) *messageSource {
	s := &messageSource{ctx: ctx, results: make(chan messageResult, publishBatch)}
	go s.read(in, kind, o)
	return s
}

// next returns the next message; io.EOF after the last.
func (s *messageSource) next() (pgstream.NewMessage, error) {
	select {
	case r := <-s.results:
		return r.message, r.err
	case <-s.ctx.Done():
		return pgstream.NewMessage{}, s.ctx.Err()
	}
}

// idle says whether the next message would have to be waited for.
func (s *messageSource) idle() bool { return len(s.results) == 0 }

func (s *messageSource) read(in io.Reader, kind pgstream.PayloadType, o publishOptions) {
	values := jsonValues(in)
	if kind == pgstream.PayloadBytes && o.format == "payload" {
		values = lines(in)
	}
	for n := int64(1); ; n++ {
		value, err := values()
		if err == nil && n <= o.skip {
			continue
		}
		m := o.message
		switch {
		case err != nil:
		case o.format == "payload":
			m.Payload = value
		default:
			err = readMessage(value, kind, &m)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			err = fmt.Errorf("message %d: %w", n, err)
		}
		select {
		case s.results <- messageResult{m, err}:
		case <-s.ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

// jsonValues reads JSON values, however they are broken into lines.
func jsonValues(in io.Reader) func() ([]byte, error) {
	d := json.NewDecoder(in)
	return func() ([]byte, error) {
		var value json.RawMessage
		err := d.Decode(&value)
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			err = fmt.Errorf("it is no JSON: %w", err)
		} else if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("the JSON has no end")
		}
		return value, err
	}
}

// lines reads lines without their ends.
func lines(in io.Reader) func() ([]byte, error) {
	r := bufio.NewReader(in)
	return func() ([]byte, error) {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(line) > 0 {
			err = nil
		}
		return bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r")), err
	}
}

// readMessage reads an object of --format message. What it does not say stays as the flags have it.
func readMessage(value []byte, kind pgstream.PayloadType, m *pgstream.NewMessage) error {
	var in messageJSON
	if err := json.Unmarshal(value, &in); err != nil {
		return fmt.Errorf("it is no object with payload, key, headers and dedupe_key: %w", err)
	}
	switch {
	case kind == pgstream.PayloadJSON && in.Payload == nil:
		return errors.New("it has no payload")
	case kind == pgstream.PayloadBytes && in.PayloadBytes == nil:
		return errors.New("it has no payload_bytes")
	case kind == pgstream.PayloadBytes:
		m.Payload = in.PayloadBytes
	default:
		m.Payload = in.Payload
	}
	if in.Key != nil {
		m.Key = in.Key
	}
	if len(in.Headers) > 0 && string(in.Headers) != "null" {
		m.Headers = in.Headers
	}
	if in.DedupeKey != "" {
		m.DedupeKey = in.DedupeKey
	}
	return nil
}
