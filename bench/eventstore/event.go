package eventstore

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strconv"

	"github.com/millrace-dev/millrace/bench/engine"
)

// distinct is how many different bodies there are.
const distinct = 997

// bodies are what events hold besides their number: JSON of about 230 bytes without its opening brace. Event n has body n modulo distinct. The same everywhere.
var bodies, amounts = func() (bodies [distinct][]byte, amounts [distinct]int64) {
	random := rand.New(rand.NewPCG(engine.Seed, 4))
	const letters = "abcdefghijklmnopqrstuvwxyz     "
	for i := range bodies {
		note := make([]byte, 112)
		for j := range note {
			note[j] = letters[random.IntN(len(letters))]
		}
		amounts[i] = int64(random.IntN(1000))
		bodies[i] = fmt.Appendf(nil, `"amount": %d, "note": "%s", "currency": "EUR", "channel": "transfer", "booked_at": "2026-11-21T%02d:%02d:%02dZ"}`,
			amounts[i], note, random.IntN(24), random.IntN(60), random.IntN(60))
	}
	return bodies, amounts
}()

// event is the payload of event n.
func event(n int) []byte {
	body := bodies[n%distinct]
	text := make([]byte, 0, len(body)+20)
	text = append(text, `{"n": `...)
	text = strconv.AppendInt(text, int64(n), 10)
	text = append(text, ", "...)
	return append(text, body...)
}

// number is the number of an event, without parsing the rest.
func number(payload []byte) (int, error) {
	rest, found := bytes.CutPrefix(payload, []byte(`{"n": `))
	end := bytes.IndexByte(rest, ',')
	if !found || end < 0 {
		return 0, fmt.Errorf("read %q, which nobody appended", payload)
	}
	return strconv.Atoi(string(rest[:end]))
}

// amount is what evolving a state takes from an event, parsed as a program would.
func amount(payload []byte) (int64, error) {
	var e struct {
		Amount int64 `json:"amount"`
	}
	err := json.Unmarshal(payload, &e)
	return e.Amount, err
}
