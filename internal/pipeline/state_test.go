package pipeline

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"
	"weak"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

func stateOf(t testing.TB, maxKeys int) *State {
	t.Helper()
	_, c := transformOf(t, "JSON", "name: device, path: d, type: text, required: true", "name: ts, path: t, type: timestamptz, required: true")
	c.State = &config.State{Key: "device", Time: "ts", MaxKeys: maxKeys}
	return NewState(c)
}

func seen(device string, second int64) *Item {
	return &Item{Row: []Value{textValue("id"), textValue(device), intValue(second * 1e6)}}
}

// LRU, last position, last_seen = max(previous, ts), session count, evictions counted. I6.
func TestSeed_T04_StatePerDevice(t *testing.T) {
	s := stateOf(t, 2)
	s.Update([]*Item{seen("a", 10), seen("a", 30), seen("a", 20)})
	r, ok := s.Get("a")
	if !ok || r.Count != 3 || !r.LastSeen.Equal(time.Unix(30, 0)) || r.Last[2].N != 30e6 {
		t.Fatalf("an old record set the state back: %+v", r)
	}
	s.Update([]*Item{seen("b", 1), seen("a", 30), seen("c", 1)})
	if _, ok := s.Get("b"); ok {
		t.Error("b was used least recently and is still there")
	}
	if r, ok := s.Get("a"); !ok || r.Count != 4 {
		t.Errorf("a was used after b: %+v, %v", r, ok)
	}
	if keys, evicted := s.Size(); keys != 2 || evicted != 1 {
		t.Errorf("%d keys, %d evicted", keys, evicted)
	}
}

// The list and the map stay one, whatever is evicted.
func TestStateEvictsInOrderOfUse(t *testing.T) {
	s := stateOf(t, 100)
	for n := range 1000 {
		s.Update([]*Item{seen(fmt.Sprint(n%150), int64(n))})
	}
	keys, evicted := s.Size()
	if keys != 100 || evicted != 900 {
		t.Fatalf("%d keys, %d evicted", keys, evicted)
	}
	n := 0
	for r := s.newest; r != nil; r = r.older {
		if s.records[r.Key] != r || (r.older != nil && r.older.newer != r) {
			t.Fatalf("broken at %s", r.Key)
		}
		n++
	}
	if n != 100 {
		t.Errorf("the list holds %d", n)
	}
}

// Of a key that has become silent nothing is in memory but its own row: neither the rows that were decoded with it nor its
// document.
func TestStateOfASilentKeyKeepsNoBatchInMemory(t *testing.T) {
	s := stateOf(t, 10)
	update := func(device string) (rows weak.Pointer[Value], document weak.Pointer[byte]) {
		text := strings.Repeat(device, 1000)
		slab := make([]Value, 3000)
		copy(slab, []Value{textValue(text[4:6]), textValue(text[:len(device)]), intValue(1e6)})
		s.Update([]*Item{{Row: slab[:3:3]}})
		return weak.Make(&slab[0]), weak.Make(unsafe.StringData(text))
	}
	rows, document := update("device-a")
	for n := range recentRows {
		if before, _ := s.Get("device-a"); &before.Last[0] != rows.Value() {
			t.Fatalf("copied after %d other rows", n)
		}
		s.Update([]*Item{seen("busy", int64(n))})
	}
	runtime.GC()
	if rows.Value() != nil || document.Value() != nil {
		t.Errorf("rows are in memory: %v; the document is: %v", rows.Value() != nil, document.Value() != nil)
	}
	if r, ok := s.Get("device-a"); !ok || r.Last[0].S != "ce" || r.Last[1].S != "device-a" || r.Last[2].N != 1e6 {
		t.Errorf("%+v", r)
	}
}
