package engine

import (
	"encoding/json"
	"reflect"
	"testing"
)

func TestMessagesAreTheSameEveryTime(t *testing.T) {
	if !reflect.DeepEqual(messages(5, 100, 0), messages(5, 100, 0)) {
		t.Error("two calls gave different messages")
	}
}

func TestMessagesAreJSONOfAbout250Bytes(t *testing.T) {
	different := map[string]bool{}
	for i, m := range messages(100, 5000, 0) {
		if size := len(m.Payload); size < 230 || size > 290 {
			t.Fatalf("a payload has %d bytes: %s", size, m.Payload)
		}
		if !json.Valid(m.Payload) {
			t.Fatalf("not JSON: %s", m.Payload)
		}
		if n, err := number(m.Payload); err != nil || n != 100+i {
			t.Fatalf("number of message %d is %d, %v", 100+i, n, err)
		}
		different[m.Key] = true
	}
	if len(different) < keys*9/10 || len(different) > keys {
		t.Errorf("%d different keys, want about %d", len(different), keys)
	}
}

func TestPayloadsAreAsLargeAsAskedFor(t *testing.T) {
	for _, size := range []int{250, 1000, 100_000} {
		for _, m := range messages(0, 20, size) {
			if got := len(m.Payload); got < size-20 || got > size+20 {
				t.Errorf("a payload of %d bytes has %d", size, got)
			}
		}
	}
}

func TestNumber(t *testing.T) {
	for name, c := range map[string]struct {
		payload string
		want    int
		fails   bool
	}{
		"is read from what jsonb returns":     {`{"n": 17, "note": "x"}`, 17, false},
		"is read wherever it stands":          {`{"note":"x","n":18}`, 18, false},
		"cannot be read from another message": {`{"note": "x"}`, 0, true},
		"cannot be read from nothing":         {``, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := number([]byte(c.payload))
			if got != c.want || (err != nil) != c.fails {
				t.Errorf("number(%s) = %d, %v", c.payload, got, err)
			}
		})
	}
}
