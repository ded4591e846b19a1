package engine

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strconv"
)

// Seed makes the messages of all runs everywhere the same.
const Seed = 20261120

// keys is how many different keys messages have.
const keys = 1000

// Message is what producers publish: a key and a JSON payload of about 250 bytes that begins with the message's number.
type Message struct {
	Key     string
	Payload []byte
}

// The length of the note in a payload of normal size, and the rest of such a payload.
const (
	noteBytes = 96
	restBytes = 154
)

// messages returns n messages, numbered from first, with payloads of about so many bytes, or of the normal size. The same numbers
// always give the same messages.
func messages(first, n, payload int) []Message {
	random := rand.New(rand.NewPCG(Seed, uint64(first)))
	const letters = "abcdefghijklmnopqrstuvwxyz     "
	note := noteBytes
	if payload > 0 {
		note = max(payload-restBytes, 0)
	}
	ms := make([]Message, n)
	for i := range ms {
		device := random.IntN(keys)
		text := make([]byte, note)
		for j := range text {
			text[j] = letters[random.IntN(len(letters))]
		}
		ms[i].Key = "device-" + strconv.Itoa(device)
		ms[i].Payload = fmt.Appendf(nil, `{"n": %d, "note": "%s", "device": "device-%d", "status": "ok", "battery": %d, "latitude": %.6f, "longitude": %.6f, "recorded_at": "2026-11-20T%02d:%02d:%02dZ"}`,
			first+i, text, device, random.IntN(101), random.Float64()*180-90, random.Float64()*360-180, random.IntN(24), random.IntN(60), random.IntN(60))
	}
	return ms
}

func (b *bed) messages(first, n int) []Message { return messages(first, n, b.payload) }

var numberPrefix = []byte(`{"n": `)

// number reads a message's number without parsing the rest, which would measure the parser: jsonb puts the shortest name
// first.
func number(payload []byte) (int, error) {
	rest, found := bytes.CutPrefix(payload, numberPrefix)
	if end := bytes.IndexByte(rest, ','); found && end > 0 {
		return strconv.Atoi(string(rest[:end]))
	}
	// A system that keeps the payload as other than jsonb.
	var m struct {
		N *int `json:"n"`
	}
	if err := json.Unmarshal(payload, &m); err != nil || m.N == nil {
		return 0, fmt.Errorf("received %q, which nobody published", payload)
	}
	return *m.N, nil
}
