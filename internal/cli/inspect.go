package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// shownRetries is how many waiting messages of a group are shown.
const shownRetries = 10

func newInspect(a *app) *cobra.Command {
	var position int64
	var priority int
	cmd := &cobra.Command{
		Use:   "inspect STREAM [GROUP]",
		Short: "Show everything about a stream, a group or a message",
		Long: `Show everything about a stream, a consumer group or a message.

Of a stream: settings, owner, positions, which open transaction holds readers back, segments and groups. Of a group: settings, progress,
members and who holds what, retries and dead letters. Of a message, with --position: what is in it, and where each group is with it, also
when it was removed already.`,
		Example: `  millrace inspect orders
  millrace inspect orders billing
  millrace inspect orders --position 17`,
		Args: a.arguments("STREAM", 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
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
			now, err := d.now(ctx)
			if err != nil {
				return err
			}
			i := &inspection{a: a, d: d, w: &description{w: a.Out}, now: now, stream: n.stream}
			switch {
			case cmd.Flags().Changed("position") && len(n.rest) > 0:
				return usage(cmd, "--position shows all groups: leave GROUP out")
			case cmd.Flags().Changed("position"):
				if priority < 0 || priority >= max(info.Spec.Priorities, 1) {
					return usage(cmd, "stream %q has no priority %d: it has 0 to %d", n.stream, priority, max(info.Spec.Priorities, 1)-1)
				}
				return explain(i.message(ctx, info, position, priority))
			case len(n.rest) > 0:
				return explain(i.group(ctx, n.rest[0]))
			}
			return explain(i.describeStream(ctx))
		},
	}
	cmd.Flags().Int64Var(&position, "position", 0, "show the message at this position, and where each group is with it")
	cmd.Flags().IntVar(&priority, "priority", 0, "with --position: the priority that the message was published with")
	cmd.ValidArgsFunction = a.complete("STREAM GROUP")
	return cmd
}

// inspection is one look at a stream.
type inspection struct {
	a      *app
	d      *database
	w      *description
	now    time.Time
	stream string
}

// description prints fields with aligned values, and tables, as kubectl describe does.
type description struct {
	w   io.Writer
	err error
}

func (d *description) print(text string) {
	if d.err == nil {
		_, d.err = io.WriteString(d.w, text)
	}
}

func (d *description) field(name, format string, args ...any) {
	d.print(fmt.Sprintf("%-14s ", name+":") + fmt.Sprintf(format, args...) + "\n")
}

// table prints a table under a title, or that there is nothing to show.
func (d *description) table(title string, t table, more string) {
	if len(t) < 2 {
		d.field(title, none)
		return
	}
	d.print(title + ":\n")
	var text strings.Builder
	_ = t.print(&text) // a builder takes everything
	for line := range strings.Lines(text.String()) {
		d.print("  " + line)
	}
	if more != "" {
		d.print("  " + more + "\n")
	}
}

// streamJSON is a stream as inspect prints it with -o json.
type streamJSON struct {
	Stream        string        `json:"stream"`
	PayloadType   string        `json:"payload_type"`
	Partitions    int           `json:"partitions"`
	Priorities    int           `json:"priorities"`
	Versions      bool          `json:"versions"`
	DedupeWindow  float64       `json:"dedupe_window_seconds"`
	MaxBytes      int           `json:"max_message_bytes"`
	Retention     retentionJSON `json:"retention"`
	Owner         *ownerJSON    `json:"owner"`
	Messages      int64         `json:"messages"`
	FirstPosition int64         `json:"first_position"`
	LastPosition  int64         `json:"last_position"`
	Horizon       int64         `json:"horizon"`
	Bytes         int64         `json:"bytes"`
	Delayed       int64         `json:"delayed"`
	Published     float64       `json:"published_per_second"`
	Stallers      []stallerJSON `json:"stallers"`
	Segments      []segmentJSON `json:"segments"`
	Groups        []lagJSON     `json:"groups"`
}

type retentionJSON struct {
	Policy      pgstream.RetentionPolicy `json:"policy"`
	MaxAge      float64                  `json:"max_age_seconds"`
	MaxBytes    int64                    `json:"max_bytes"`
	MaxMessages int64                    `json:"max_messages"`
}

type ownerJSON struct {
	Cluster   string `json:"cluster"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func newOwnerJSON(o pgstream.Owner) *ownerJSON {
	if o == (pgstream.Owner{}) {
		return nil
	}
	return &ownerJSON{o.Cluster, o.Namespace, o.Name}
}

type stallerJSON struct {
	Priority    int        `json:"priority"`
	Holder      string     `json:"holder"`
	Since       *time.Time `json:"since"`
	User        string     `json:"user"`
	Application string     `json:"application"`
	Client      string     `json:"client"`
	State       string     `json:"state"`
}

type segmentJSON struct {
	Priority int   `json:"priority"`
	Number   int   `json:"number"`
	First    int64 `json:"first_position"` // 0: empty
	Last     int64 `json:"last_position"`
	Bytes    int64 `json:"bytes"`
	Current  bool  `json:"current"`
}

func timePointer(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func (i *inspection) describeStream(ctx context.Context) error {
	info, err := pgstream.DescribeStream(ctx, i.d, i.stream)
	if err != nil {
		return err
	}
	all, err := pgstream.AllStreamStats(ctx, i.d)
	if err != nil {
		return err
	}
	var stats pgstream.StreamStats
	for _, s := range all {
		if s.Stream == i.stream {
			stats = s
		}
	}
	stallers, err := pgstream.Stallers(ctx, i.d, i.stream)
	if err != nil {
		return err
	}
	due, scouted, err := pgstream.Delays(ctx, i.d, i.stream)
	if err != nil {
		return err
	}
	segments, err := pgstream.Segments(ctx, i.d, i.stream)
	if err != nil {
		return err
	}
	groups, err := groupsOf(ctx, i.d, i.stream)
	if err != nil {
		return err
	}
	if i.a.json() {
		return printJSON(i.a.Out, newStreamJSON(info, stats, stallers, segments, groups))
	}
	s := info.Spec
	i.w.field("Stream", "%s", s.Name)
	i.owner(s.Owner)
	i.w.field("Payload", "%s, at most %s", s.PayloadType, bytesText(int64(s.MaxMessageBytes)))
	i.w.field("Partitions", "%d", s.Partitions)
	i.w.field("Priorities", "%d", max(s.Priorities, 1))
	i.w.field("Versions", "%s", yesNo(s.Versions))
	i.w.field("Dedupe", "%s", dedupeText(s.DedupeWindow))
	i.w.field("Retention", "%s", retentionText(s.Retention))
	i.w.field("Positions", "%d to %d, readable up to %d", stats.FirstPosition, stats.LastPosition, stats.Horizon)
	i.w.field("Messages", "%s, %s", number(stats.Messages), bytesText(stats.Bytes))
	i.w.field("Published", "%.1f/s over the last minute", stats.PublishedPerSecond)
	i.w.field("Delayed", "%s", delayedText(stats.Delayed, due, scouted, i.now))
	unseen := false
	t := table{{"HOLDER", "PRIORITY", "SINCE", "USER", "APPLICATION", "CLIENT", "STATE"}}
	for _, h := range stallers {
		unseen = unseen || h.Since.IsZero()
		t.row(i.transactionRow(h)...)
	}
	i.w.table("Open transactions that readers wait for", t, "Readers go on when it has ended. Ask its owner, or: select pg_terminate_backend(<pid>)"+unseenText(unseen))
	t = table{{"SEGMENT", "PRIORITY", "FIRST", "LAST", "SIZE", "CURRENT"}}
	for _, g := range segments {
		first, last := none, none
		if g.First > 0 {
			first, last = strconv.FormatInt(g.First, 10), strconv.FormatInt(g.Last, 10)
		}
		t.row(strconv.Itoa(g.Number), strconv.Itoa(g.Priority), first, last, bytesText(g.Bytes), yesNo(g.Current))
	}
	i.w.table("Segments", t, "")
	t = lagTable(groups, false, i.a.wide())
	for n := range t {
		t[n] = t[n][1:] // the stream is known
	}
	i.w.table("Groups", t, "")
	return i.w.err
}

// overdue is how late a delayed message may be before somebody should know: a scout looks ten times a second, or twice while nobody waits.
const overdue = 10 * time.Second

func delayedText(n int64, due time.Time, scouted bool, now time.Time) string {
	text := number(n)
	switch late := now.Sub(due); {
	case due.IsZero():
		return text
	case late < 0:
		return text + ", the first is due in " + age(-late)
	case late < overdue:
		return text
	case scouted:
		return fmt.Sprintf("%s, the first was due %s ago", text, age(late))
	default:
		return fmt.Sprintf("%s, the first was due %s ago: no scout runs. Start the manager, a Processor, or: manager schema serve", text, age(late))
	}
}

// transactionRow is the cells of a transaction that others wait for, from HOLDER to STATE.
func (i *inspection) transactionRow(o pgstream.OpenTransaction) []string {
	return []string{o.Holder, strconv.Itoa(o.Priority), ageSince(o.Since, i.now), orNone(o.User), orNone(plain(o.Application)), orNone(o.Client), orNone(o.State)}
}

// unseenText says what a role needs to see more of others' sessions.
func unseenText(unseen bool) string {
	if !unseen {
		return ""
	}
	return ". To see since when, and its state, a role needs pg_read_all_stats"
}

func newStallerJSON(o pgstream.OpenTransaction) stallerJSON {
	return stallerJSON{o.Priority, o.Holder, timePointer(o.Since), o.User, o.Application, o.Client, o.State}
}

func newStreamJSON(info pgstream.StreamInfo, stats pgstream.StreamStats, stallers []pgstream.OpenTransaction, segments []pgstream.Segment, groups []lagJSON) streamJSON {
	s := info.Spec
	out := streamJSON{Stream: s.Name, PayloadType: string(s.PayloadType), Partitions: s.Partitions, Priorities: max(s.Priorities, 1), Versions: s.Versions,
		DedupeWindow: max(s.DedupeWindow, 0).Seconds(), MaxBytes: s.MaxMessageBytes,
		Retention: retentionJSON{s.Retention.Policy, s.Retention.MaxAge.Seconds(), s.Retention.MaxBytes, s.Retention.MaxMessages},
		Owner:     newOwnerJSON(s.Owner), Messages: stats.Messages, FirstPosition: stats.FirstPosition, LastPosition: stats.LastPosition, Horizon: stats.Horizon,
		Bytes: stats.Bytes, Delayed: stats.Delayed, Published: stats.PublishedPerSecond, Stallers: []stallerJSON{}, Segments: []segmentJSON{}, Groups: groups}
	for _, h := range stallers {
		out.Stallers = append(out.Stallers, newStallerJSON(h))
	}
	for _, g := range segments {
		out.Segments = append(out.Segments, segmentJSON(g))
	}
	return out
}

func (i *inspection) owner(o pgstream.Owner) {
	if o == (pgstream.Owner{}) {
		i.w.field("Owner", none)
		return
	}
	i.w.field("Owner", "%s", ownerText(o))
}

func dedupeText(window time.Duration) string {
	if window <= 0 {
		return "off"
	}
	return "for " + durationText(window)
}

func retentionText(r pgstream.Retention) string {
	text := string(r.Policy)
	if r.MaxAge > 0 {
		text += ", at most " + durationText(r.MaxAge)
	}
	if r.MaxBytes > 0 {
		text += ", at most " + bytesText(r.MaxBytes)
	}
	if r.MaxMessages > 0 {
		text += ", at most " + count(r.MaxMessages, "message")
	}
	return text
}

// groupJSON is a group as inspect prints it with -o json.
type groupJSON struct {
	lagJSON
	Start         string          `json:"start"`
	AckWait       float64         `json:"ack_wait_seconds"`
	MaxAttempts   int             `json:"max_attempts"`
	BackoffFirst  float64         `json:"backoff_initial_seconds"`
	BackoffMax    float64         `json:"backoff_max_seconds"`
	FailurePolicy string          `json:"failure_policy"`
	QueuePolicy   string          `json:"queue_policy"`
	Filter        json.RawMessage `json:"filter"`
	Owner         *ownerJSON      `json:"owner"`
	Receivers     []receiverJSON  `json:"receivers"`
	Waiting       []retryJSON     `json:"waiting"`
	Dead          []deadJSON      `json:"dead"`
}

type receiverJSON struct {
	stallerJSON
	Waiting int `json:"waiting"`
}

type retryJSON struct {
	Priority int        `json:"priority"`
	Position int64      `json:"position"`
	Key      *string    `json:"key"`
	Attempt  int        `json:"attempt"`
	Member   string     `json:"member,omitempty"`
	Parked   bool       `json:"parked"`
	Due      *time.Time `json:"due"`
	Error    string     `json:"error,omitempty"`
}

type deadJSON struct {
	Priority int                    `json:"priority"`
	Position int64                  `json:"position"`
	Key      *string                `json:"key"`
	Attempts int                    `json:"attempts"`
	DeadAt   time.Time              `json:"dead_at"`
	Reason   string                 `json:"reason"`
	Errors   []pgstream.FailedEntry `json:"errors"`
}

func (i *inspection) group(ctx context.Context, name string) error {
	info, err := i.d.group(ctx, i.stream, name)
	if err != nil {
		return err
	}
	groups, err := groupsOf(ctx, i.d, i.stream)
	if err != nil {
		return err
	}
	var g lagJSON
	for _, x := range groups {
		if x.Group == name {
			g = x
		}
	}
	receivers, err := pgstream.Receivers(ctx, i.d, i.stream, name)
	if err != nil {
		return err
	}
	retries, err := pgstream.Retries(ctx, i.d, i.stream, name, shownRetries)
	if err != nil {
		return err
	}
	letters, err := pgstream.DeadLetters(ctx, i.d, i.stream, name, pgstream.DeadLetterFilter{}, shownDeadLetters)
	if err != nil {
		return err
	}
	filter, err := filterText(info.Spec.Filter)
	if err != nil {
		return err
	}
	if i.a.json() {
		return printJSON(i.a.Out, newGroupJSON(g, info, filter, receivers, retries, letters))
	}
	s := info.Spec
	i.w.field("Group", "%s of stream %s", s.Name, s.Stream)
	i.owner(s.Owner)
	i.w.field("State", "%s", stateText(g))
	i.w.field("Mode", "%s", modeText(s))
	i.w.field("Start", "%s", startText(s))
	i.w.field("Filter", "%s", orNone(filter))
	i.w.field("Ack wait", "%s", durationText(s.AckWait))
	i.w.field("Attempts", "%s", attemptsText(s))
	if hasQueue(s) {
		i.w.field("Lag", "%s, queued up to position %d", number(g.Lag), g.AckFloor)
	} else {
		i.w.field("Lag", "%s, settled up to position %d", number(g.Lag), g.AckFloor)
	}
	i.w.field("In flight", "%s", number(g.InFlight))
	if n := g.report.Deliveries; n > 1 {
		i.w.field("Deliveries", "%d of the message that was handed out most often", n)
	}
	i.w.field("Oldest", "%s", oldestText(g))
	i.w.field("Error", "%s", orNone(plain(g.Error)))
	t := table{{"MEMBER", "PARTITIONS", "EXPIRES"}}
	for _, m := range g.report.Members {
		t.row(plain(m.Name), partitionsText(m.Partitions), "in "+age(max(m.ExpiresAt.Sub(i.now), 0)))
	}
	i.w.table("Members", t, "")
	t = table{{"MEMBER", "MESSAGES"}}
	for _, h := range g.Holders {
		t.row(plain(h.Name), number(h.Messages))
	}
	i.w.table("Holders", t, "")
	if len(receivers) > 0 {
		unseen := false
		t = table{{"HOLDER", "PRIORITY", "SINCE", "USER", "APPLICATION", "CLIENT", "STATE", "WAITING"}}
		for _, r := range receivers {
			unseen = unseen || r.Since.IsZero()
			t.row(append(i.transactionRow(r.OpenTransaction), strconv.Itoa(r.Waiting))...)
		}
		i.w.table("Received, and left the transaction open", t, "Nobody else of the group receives until it has ended. Receive in autocommit, or commit at once. End it: select pg_terminate_backend(<pid>)"+
			unseenText(unseen))
	}
	t = table{{"POSITION", "KEY", "ATTEMPTS", "STATE", "DUE", "ERROR"}}
	for _, r := range retries {
		t.row(strconv.FormatInt(r.Position, 10), keyText(r.Key), strconv.Itoa(r.Attempt), retryState(r, hasQueue(s)), dueText(r.Due, i.now), orNone(cut(plain(r.Error), 60)))
	}
	if hasQueue(s) {
		i.w.table("Queue", t, moreText(g.report.Queued+g.report.Active, len(retries)))
	} else {
		i.w.table("Retries", t, moreText(g.Retrying, len(retries)))
	}
	i.w.table("Dead letters", deadLetterTable(letters, i.now), moreText(g.DeadLetters, len(letters)))
	return i.w.err
}

func newGroupJSON(g lagJSON, info pgstream.GroupInfo, filter string, receivers []pgstream.Receiver, retries []pgstream.Retry, letters []pgstream.DeadLetter) groupJSON {
	s := info.Spec
	out := groupJSON{lagJSON: g, Start: startText(s), AckWait: s.AckWait.Seconds(), MaxAttempts: s.MaxAttempts, BackoffFirst: s.BackoffInitial.Seconds(),
		BackoffMax: s.BackoffMax.Seconds(), FailurePolicy: string(s.FailurePolicy), QueuePolicy: cmp.Or(string(s.QueuePolicy), string(pgstream.QueueStandard)),
		Owner: newOwnerJSON(s.Owner), Receivers: []receiverJSON{}, Waiting: []retryJSON{}, Dead: []deadJSON{}}
	if filter != "" {
		out.Filter = json.RawMessage(filter)
	}
	for _, r := range receivers {
		out.Receivers = append(out.Receivers, receiverJSON{newStallerJSON(r.OpenTransaction), r.Waiting})
	}
	for _, r := range retries {
		out.Waiting = append(out.Waiting, retryJSON{r.Priority, r.Position, r.Key, r.Attempt, r.Member, r.Parked, timePointer(r.Due), r.Error})
	}
	for _, l := range letters {
		out.Dead = append(out.Dead, deadJSON{l.Priority, l.Position, l.Key, l.Attempt, l.DeadAt, l.Reason, l.Errors})
	}
	return out
}

// moreText says how many are not shown.
func moreText(all int64, shown int) string {
	if all <= int64(shown) {
		return ""
	}
	return fmt.Sprintf("… and %s more", number(all-int64(shown)))
}

func stateText(g lagJSON) string {
	if g.Lapsed != "" {
		return "Lapsed: " + g.Lapsed + ". It receives nothing until it is reset: millrace reset"
	}
	return g.state()
}

func modeText(s pgstream.GroupSpec) string {
	if s.Mode == pgstream.ModeOrdered {
		return fmt.Sprintf("%s, failure policy %s", s.Mode, s.FailurePolicy)
	}
	if s.QueuePolicy != "" && s.QueuePolicy != pgstream.QueueStandard {
		return fmt.Sprintf("%s, queue policy %s", s.Mode, s.QueuePolicy)
	}
	return string(s.Mode)
}

func startText(s pgstream.GroupSpec) string {
	switch s.StartFrom {
	case pgstream.StartPosition:
		return fmt.Sprintf("Position %d", s.StartPosition)
	case pgstream.StartTime:
		return "Time " + s.StartTime.UTC().Format(time.RFC3339)
	}
	return string(s.StartFrom)
}

func attemptsText(s pgstream.GroupSpec) string {
	text := "no limit"
	if s.MaxAttempts > 0 {
		text = fmt.Sprintf("at most %d", s.MaxAttempts)
	}
	return fmt.Sprintf("%s, %s to %s apart", text, durationText(s.BackoffInitial), durationText(s.BackoffMax))
}

func oldestText(g lagJSON) string {
	if g.OldestAge == 0 {
		return none
	}
	return age(g.report.OldestAge)
}

func filterText(f pgstream.Filter) (string, error) {
	text, err := json.Marshal(f)
	if string(text) == "{}" {
		return "", err
	}
	return string(text), err
}

// partitionsText writes partitions with ranges: 0-3, 6.
func partitionsText(partitions []int32) string {
	var parts []string
	for n := 0; n < len(partitions); {
		last := n
		for last+1 < len(partitions) && partitions[last+1] == partitions[last]+1 {
			last++
		}
		part := strconv.Itoa(int(partitions[n]))
		if last > n {
			part += "-" + strconv.Itoa(int(partitions[last]))
		}
		parts = append(parts, part)
		n = last + 1
	}
	return list(parts)
}

// hasQueue says whether a group copies messages into a queue of its own before their first delivery.
func hasQueue(s pgstream.GroupSpec) bool {
	return s.Filter.Unrouted || s.QueuePolicy != "" && s.QueuePolicy != pgstream.QueueStandard
}

func retryState(r pgstream.Retry, queue bool) string {
	switch {
	case r.Held:
		return "held by " + plain(r.Member)
	case queue && r.Attempt == 0:
		return pgstream.WhereQueued
	case r.Parked:
		return pgstream.WhereParked
	}
	return "waiting"
}

// dueText is a time to come.
func dueText(at, now time.Time) string {
	switch {
	case at.IsZero():
		return none
	case at.After(now):
		return "in " + age(at.Sub(now))
	}
	return "now"
}

// whereJSON is a message and its groups as inspect --position prints them with -o json.
type whereJSON struct {
	Stream  string           `json:"stream"`
	Message *messageJSON     `json:"message"` // null: it was removed, or never there
	Groups  []groupWhereJSON `json:"groups"`
}

type groupWhereJSON struct {
	Group    string     `json:"group"`
	State    string     `json:"state"`
	Attempts int        `json:"attempts,omitempty"`
	Member   string     `json:"member,omitempty"`
	Until    *time.Time `json:"until,omitempty"`
	DeadAt   *time.Time `json:"dead_at,omitempty"`
	Error    string     `json:"error,omitempty"`
}

func (i *inspection) message(ctx context.Context, info pgstream.StreamInfo, position int64, priority int) error {
	lane := laneName(i.stream, priority)
	message, groups, err := pgstream.Locate(ctx, i.d, lane, position)
	if err != nil {
		return err
	}
	described, err := pgstream.DescribeStream(ctx, i.d, lane)
	if err != nil {
		return err
	}
	if message == nil && (position < 1 || position > described.LastPosition) {
		return fmt.Errorf("position %d of stream %q does not exist: the last is %d", position, lane, described.LastPosition)
	}
	kind := info.Spec.PayloadType
	if i.a.json() {
		out := whereJSON{Stream: i.stream, Groups: []groupWhereJSON{}}
		if message != nil {
			m := newMessageJSON(*message, priority, kind)
			out.Message = &m
		}
		for _, g := range groups {
			out.Groups = append(out.Groups, groupWhereJSON{g.Group, g.State, g.Attempts, g.Member, timePointer(g.Until), timePointer(g.DeadAt), g.Error})
		}
		return printJSON(i.a.Out, out)
	}
	i.w.field("Position", "%d of stream %s", position, lane)
	switch {
	case message == nil && position < described.FirstPosition:
		i.w.field("Message", "removed by retention or a trim; the first that is left is %d", described.FirstPosition)
	case message == nil:
		i.w.field("Message", "%s: its transaction rolled back, or is still open", none)
	default:
		i.w.field("Key", "%s", keyText(message.Key))
		i.w.field("Created", "%s (%s ago)", message.CreatedAt.Local().Format(time.RFC3339), ageSince(message.CreatedAt, i.now))
		i.w.field("Readable", "%s", yesNo(position <= described.Horizon))
		i.w.field("Headers", "%s", headersText(message.Headers))
		text := payloadText(message.Payload, kind)
		if kind == pgstream.PayloadJSON {
			text = indented(message.Payload, strings.Repeat(" ", 15))
		}
		i.w.field("Payload", "%s", text)
	}
	t := table{{"GROUP", "STATE", "ATTEMPTS", "MEMBER", "UNTIL", "ERROR"}}
	for _, g := range groups {
		t.row(g.Group, g.State, strconv.Itoa(g.Attempts), orNone(plain(g.Member)), dueText(g.Until, i.now), orNone(cut(plain(g.Error), 60)))
	}
	i.w.table("Groups", t, "")
	return i.w.err
}
