package scenario

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/redis/rueidis"
)

// Positions produces the positions of devices into a Redis stream, in the form that config/samples reads: one field,
// payload, with a JSON document.
type Positions struct {
	// Count is the number of entries.
	Count int
	// Seed makes the same entries again. It is also part of the devices' names, so that producers with different seeds
	// do not meet.
	Seed uint64
	// Duplicates is the share of entries that repeat an earlier one, byte for byte.
	Duplicates float64
	// Undecodable is the share of entries that cannot become rows, for one of several reasons.
	Undecodable float64
	// PerSecond bounds the rate; zero: as fast as Redis takes them.
	PerSecond int
	// Devices is the number of devices; default 1000.
	Devices int
	// Stream is the key of the Redis stream; default PositionsStream.
	Stream string
}

// PositionsStream is the Redis stream of config/samples.
const PositionsStream = "telemetry:t"

const (
	// repeatWindow is how far back a duplicate reaches: far enough to be in another batch than the original.
	repeatWindow = 10_000
	// page is the number of entries in one round trip to Redis.
	page = 500
)

// position is one entry to add.
type position struct {
	id      string // empty: undecodable
	content string
	fields  [][2]string
}

// Produce adds the entries, and what Redis has taken, to produced. A Redis that goes away is waited for. It returns early
// with what it has done when ctx ends.
func (o Positions) Produce(ctx context.Context, redisURL string, produced *Produced) error {
	client, err := openRedis(redisURL)
	if err != nil {
		return fmt.Errorf("produce positions: %w", err)
	}
	defer client.Close()

	g := o.generator()
	pages := &pages{client: client, stream: g.stream}
	if err := pages.begin(ctx); err != nil {
		return fmt.Errorf("produce positions: %w", err)
	}
	pace := newPace(o.PerSecond)
	for done := 0; done < o.Count; {
		size, err := pace.next(ctx, min(page, o.Count-done))
		if err != nil {
			return nil //nolint:nilerr // the caller has seen enough
		}
		batch := make([]position, size)
		for i := range batch {
			batch[i] = g.next()
		}
		// A page that has begun is finished, so that what was put in is known.
		ids, err := pages.add(context.WithoutCancel(ctx), batch)
		for i, id := range ids {
			if batch[i].id == "" {
				produced.addUndecodable(id)
			} else {
				produced.addValid(batch[i].id, batch[i].content)
			}
		}
		if err != nil {
			return fmt.Errorf("produce positions (seed %d): add to %s: %w", o.Seed, g.stream, err)
		}
		done += size
	}
	return nil
}

// generator makes positions. Equal options make equal positions, but for their times.
type generator struct {
	Positions
	random *rand.Rand
	stream string
	start  time.Time
	n      int
	recent []position // ring of valid ones, for duplicates
}

func (o Positions) generator() *generator {
	g := &generator{Positions: o, random: rand.New(rand.NewPCG(o.Seed, 1)), stream: o.Stream, start: time.Now().UTC().Truncate(time.Microsecond)}
	if g.Devices == 0 {
		g.Devices = 1000
	}
	if g.stream == "" {
		g.stream = PositionsStream
	}
	return g
}

func (g *generator) next() position {
	switch p := g.random.Float64(); {
	case p < g.Undecodable:
		return g.undecodable()
	case p < g.Undecodable+g.Duplicates && len(g.recent) > 0:
		return g.recent[g.random.IntN(len(g.recent))]
	}
	p := g.valid()
	if len(g.recent) < repeatWindow {
		g.recent = append(g.recent, p)
	} else {
		g.recent[g.n%repeatWindow] = p
	}
	return p
}

// document is what a device sends.
type document struct {
	Device     string         `json:"device_id"`
	Timestamp  string         `json:"timestamp"`
	Latitude   json.Number    `json:"latitude"`
	Longitude  json.Number    `json:"longitude"`
	Altitude   int            `json:"altitude"`
	Angle      int            `json:"angle"`
	Speed      int            `json:"speed"`
	Satellites int            `json:"satellites"`
	Attributes map[string]any `json:"attributes"`
}

func (g *generator) valid() position {
	d, id := g.document()
	return position{id: id, content: d.Latitude.String(), fields: [][2]string{{"payload", encode(d)}}}
}

// document makes the next document; one microsecond apart, all ids differ.
func (g *generator) document() (document, string) {
	g.n++
	at := g.start.Add(time.Duration(g.n) * time.Microsecond)
	device := fmt.Sprintf("device-%d-%04d", g.Seed, g.random.IntN(g.Devices))
	d := document{
		Device: device, Timestamp: at.Format("2006-01-02T15:04:05.000000Z07:00"),
		Latitude: degrees(g.random.IntN(180_000) - 90_000), Longitude: degrees(g.random.IntN(360_000) - 180_000),
		Altitude: g.random.IntN(3000), Angle: g.random.IntN(360), Speed: g.random.IntN(140), Satellites: 4 + g.random.IntN(12),
		Attributes: map[string]any{"io": g.random.IntN(1000), "ignition": g.random.IntN(2) == 1},
	}
	return d, positionID(device, at.UnixMicro())
}

// undecodable makes an entry that cannot become a row; each has another reason than the one before.
func (g *generator) undecodable() position {
	d, _ := g.document()
	text := encode(d)
	var fields [][2]string
	switch g.n % 5 {
	case 0: // half a document
		fields = [][2]string{{"payload", text[:len(text)/2]}}
	case 1: // no document
		fields = [][2]string{{"body", text}}
	case 2: // not text
		fields = [][2]string{{"payload", "\x00\xff\xfe" + text}}
	case 3: // a required value is missing
		d.Device = ""
		fields = [][2]string{{"payload", `{"timestamp":` + strconv.Quote(d.Timestamp) + `,"latitude":1}`}}
	default: // not a time
		d.Timestamp = "yesterday"
		fields = [][2]string{{"payload", encode(d)}}
	}
	return position{fields: fields}
}

// positionID is the id of a row in a table of positions.
func positionID(device string, microseconds int64) string {
	return device + "@" + strconv.FormatInt(microseconds, 10)
}

// degrees writes thousandths the way PostgreSQL prints a double precision.
func degrees(thousandths int) json.Number {
	return json.Number(strconv.FormatFloat(float64(thousandths)/1000, 'f', -1, 64))
}

func encode(d document) string {
	text, err := json.Marshal(d)
	if err != nil {
		panic(err) // strings and numbers can be marshalled
	}
	return string(text)
}

func openRedis(url string) (rueidis.Client, error) {
	options, err := rueidis.ParseURL(url)
	if err != nil {
		return nil, fmt.Errorf("the URL of Redis cannot be read") // its own error would repeat the password
	}
	options.DisableCache = true
	return rueidis.NewClient(options)
}
