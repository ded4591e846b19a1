package eventstore

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/bench/report"
)

// careless is an event store and a log of frames that has mistakes to be found. What it keeps is in the table of a limitTable.
type careless struct {
	limitTable
	fault string
}

func (careless) Name() string { return "careless" }

func (c careless) Cannot(string) string { return "" }

func (c careless) Open(ctx context.Context, place Place) (Store, error) {
	s, err := c.limitTable.Open(ctx, place)
	if err != nil {
		return nil, err
	}
	return &carelessStore{tableStore: s.(*tableStore), fault: c.fault}, nil
}

type carelessStore struct {
	*tableStore
	fault string
	mu    sync.Mutex
	calls int
}

// third tells whether the fault is this one, once in a while.
func (s *carelessStore) third(fault string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	return s.fault == fault && s.calls%3 == 0
}

func (s *carelessStore) Perform(ctx context.Context, t Task) (Outcome, error) {
	return perform(ctx, s, t)
}

func (s *carelessStore) append(ctx context.Context, entity string, expected int64, events [][]byte) (int64, error) {
	if s.third("loses") {
		return expected + int64(len(events)), nil
	}
	if s.third("mixes up") {
		events = [][]byte{event(1 << 30)}
	}
	return s.tableStore.append(ctx, entity, expected, events)
}

func (s *carelessStore) read(ctx context.Context, entity string, from int64) ([][]byte, error) {
	got, err := s.tableStore.read(ctx, entity, from)
	if s.fault == "loses" && len(got) > 0 {
		got = got[1:]
	}
	return got, err
}

func (s *carelessStore) AppendFrame(ctx context.Context, run string, payload []byte) error {
	if s.third("loses") {
		return nil
	}
	if s.third("mixes up") {
		payload = event(1 << 30)
	}
	return s.tableStore.AppendFrame(ctx, run, payload)
}

func (s *carelessStore) AppendLive(ctx context.Context, run string, payload []byte) error {
	return s.AppendFrame(ctx, run, payload)
}

func (s *carelessStore) Merge(ctx context.Context, run string, patch []byte) (int64, error) {
	if s.third("loses") {
		return 0, nil
	}
	return s.tableStore.Merge(ctx, run, patch)
}

func (s *carelessStore) Frames(ctx context.Context, run string) (int, error) {
	n, err := s.tableStore.Frames(ctx, run)
	if s.fault == "loses" && run == "run" {
		n /= 4
	}
	return n, err
}

// checked are the works that find each fault; the others cannot have it, or are these with other numbers.
var checked = map[string][]string{
	"loses":    {"append-1", "append-conflict", "read-entity", "aggregate", "frame-append", "frame-append-run", "summary-append", "summary-read", "live-append"},
	"mixes up": {"append-1", "append-conflict", "tail-200"},
}

func TestNoFigureWithoutACheck(t *testing.T) {
	server := start(t)
	measured := func(fault, work string) error {
		_, err := run(t.Context(), server, Options{Works: []string{work}, N: 40, Runs: 1, Short: true, Log: func(string) {}}, []System{product{careless{fault: fault}}})
		return err
	}
	for _, fault := range slices.Sorted(maps.Keys(checked)) {
		for _, work := range checked[fault] {
			t.Run(work+" fails with a store that "+fault, func(t *testing.T) {
				if err := measured(fault, work); err == nil || !strings.Contains(err.Error(), work) {
					t.Errorf("run gives %v", err)
				}
			})
		}
	}
}

// TestEveryWork runs every work with a few calls on every system that needs nothing from elsewhere; a plain table is under the stores with mistakes. The figures mean nothing;
// that they are there and were checked does.
func TestEveryWork(t *testing.T) {
	systems := []System{millrace{name: "millrace"}, millrace{name: "millrace-sql", inDatabase: true}, flowFabric{partitions: 2}}
	var works []string
	for _, w := range Works() {
		if !strings.HasSuffix(w.Name, "-clients-8") { // the same with more clients
			works = append(works, w.Name)
		}
	}
	samples, err := run(t.Context(), start(t), Options{Works: works, N: 40, Runs: 1, Short: true, Log: func(string) {}}, systems)
	if err != nil {
		t.Fatal(err)
	}
	// No refused append, no dead row and no growth are figures too.
	mayBeZero := []string{"append-conflict-refused", "live-append-dead-rows", "live-append-size"}
	for _, s := range samples {
		if s.Note == "" && (len(s.Values) != 1 || s.Values[0] <= 0 && !slices.Contains(mayBeZero, s.Work)) || strings.Contains(s.Note, "failed") {
			t.Errorf("%s of %s gives %v; %s", s.Work, s.System, s.Values, s.Note)
		}
	}
	if handled := samples[slices.IndexFunc(samples, func(s report.Samples) bool { return s.Work == "append-conflict-handled" })]; handled.Values[0] != 1 {
		t.Errorf("of the conflicts %v were handled as they must be", handled.Values)
	}
}

// product is a system whose failure ends the run.
type product struct{ System }

func (product) Name() string { return "millrace-careless" }

func TestARivalThatFailsHasNoFigure(t *testing.T) {
	samples, err := run(t.Context(), start(t), Options{Works: []string{"append-1"}, N: 40, Runs: 2, Log: func(string) {}}, []System{careless{fault: "loses"}, limitTable{}})
	if err != nil || len(samples) != 2 || len(samples[0].Values) != 0 || !strings.Contains(samples[0].Note, "failed in run 1") || len(samples[1].Values) != 2 {
		t.Errorf("run gives %+v, %v", samples, err)
	}
}

func TestUnknownNamesAreRefused(t *testing.T) {
	for _, o := range []Options{{Works: []string{"append-2"}}, {Systems: []string{"emmet"}}} {
		if _, err := Run(t.Context(), nil, o); err == nil || !strings.Contains(err.Error(), "there is no") {
			t.Errorf("%+v gives %v", o, err)
		}
	}
}

// Clients that are refused come to the end, and nobody is refused without a reason.
func TestContendersAllGetTheirTurn(t *testing.T) {
	v := &memory{}
	o, err := perform(t.Context(), v, Task{Verb: Contend, Prefix: "e", Entities: 2, Rounds: 50, Events: 1, Clients: 4})
	if err != nil || len(o.Accepted) != 200 || o.Calls != 200+o.Refused || o.Unfounded != 0 || len(v.histories["e-0"])+len(v.histories["e-1"]) != 200 {
		t.Errorf("perform gives %d accepted of %d calls, %d refused, %d of them without a reason; %v", len(o.Accepted), o.Calls, o.Refused, o.Unfounded, err)
	}
}

// memory is an event store in memory.
type memory struct {
	mu        sync.Mutex
	histories map[string][][]byte
}

func (m *memory) append(_ context.Context, entity string, expected int64, events [][]byte) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.histories == nil {
		m.histories = map[string][][]byte{}
	}
	if int64(len(m.histories[entity])) != expected {
		return 0, errConflict
	}
	m.histories[entity] = append(m.histories[entity], events...)
	return int64(len(m.histories[entity])), nil
}

func (m *memory) read(_ context.Context, entity string, from int64) ([][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.histories[entity][from-1:], nil
}

func (m *memory) aggregate(context.Context, string) (int64, error) { return 0, errors.New("not here") }

func TestEmmettThatIsMissingIsNamed(t *testing.T) {
	t.Setenv("MILLRACE_CACHE", t.TempDir())
	var missing engine.Unavailable
	if _, err := (emmett{}).Open(t.Context(), Place{}); !errors.As(err, &missing) || !strings.Contains(err.Error(), "bench/peers.sh") {
		t.Errorf("Open gives %v", err)
	}
}

func TestMergePatches(t *testing.T) {
	target := map[string]any{"a": "x", "b": map[string]any{"c": 1.0, "d": 2.0}}
	got := mergePatch(target, map[string]any{"a": nil, "b": map[string]any{"c": nil, "e": map[string]any{"f": nil}}, "g": []any{nil}})
	want := map[string]any{"b": map[string]any{"d": 2.0, "e": map[string]any{}}, "g": []any{nil}}
	if !equal(got, want) {
		t.Errorf("the document is %v", got)
	}
}

func equal(a, b any) bool {
	x, ok := a.(map[string]any)
	y, also := b.(map[string]any)
	if ok && also {
		return maps.EqualFunc(x, y, equal)
	}
	v, ok := a.([]any)
	w, also := b.([]any)
	if ok && also {
		return slices.EqualFunc(v, w, equal)
	}
	return a == b
}

func TestEventsAreNumbered(t *testing.T) {
	for _, n := range []int{0, 1, distinct - 1, distinct, 1 << 30} {
		got, err := number(event(n))
		sum, failed := amount(event(n))
		if err != nil || failed != nil || got != n || sum != amounts[n%distinct] {
			t.Errorf("event %s has number %d (%v), amount %d (%v)", event(n), got, err, sum, failed)
		}
		if size := len(event(n)); size < 220 || size > 270 {
			t.Errorf("event %s has %d bytes", strconv.Itoa(n), size)
		}
	}
}

func start(t *testing.T) *engine.Server {
	t.Helper()
	server, err := engine.Start(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return server
}
