package pipeline

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
)

// Seed makes the entries of all runs everywhere the same.
const Seed = 20261121

// Of the entries.
const (
	devices = 1000
	// One entry of twenty is a copy of an earlier one.
	duplicateOf = 20
	// A copy is of one of the last so many, unless copies are spread over everything before.
	near = 10_000
)

// firstTime is the time of the first entry; each further one is a millisecond later.
var firstTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// Entry is one position of a device. Its JSON has about 233 bytes, or more with Note.
type Entry struct {
	Device     int
	Seq        int64
	Latitude   float64
	Longitude  float64
	Altitude   int32
	Angle      int32
	Speed      float64
	Satellites int16
	Odometer   int64
	Note       string
}

// Time is the entry's own.
func (e *Entry) Time() time.Time { return firstTime.Add(time.Duration(e.Seq) * time.Millisecond) }

// DeviceID is the text under which the device is known.
func (e *Entry) DeviceID() string { return fmt.Sprintf("device-%04d", e.Device) }

// Attributes is what lands in the column of this name.
func (e *Entry) Attributes() string {
	text := `{"ignition":true,"odometer":` + strconv.FormatInt(e.Odometer, 10)
	if e.Note != "" {
		text += `,"note":"` + e.Note + `"`
	}
	return text + "}"
}

// JSON is the document as a gateway would send it.
func (e *Entry) JSON() string {
	return fmt.Sprintf(`{"device_id":"%s","ts":"%s","seq":%d,"latitude":%.6f,"longitude":%.6f,"altitude":%d,"angle":%d,"speed":%.1f,"satellites":%d,"priority":0,"attributes":%s}`,
		e.DeviceID(), e.Time().Format("2006-01-02T15:04:05.000Z"), e.Seq, e.Latitude, e.Longitude, e.Altitude, e.Angle, e.Speed, e.Satellites, e.Attributes())
}

// Backlog is what a stream holds.
type Backlog struct {
	Entries []Entry // in their order, copies included
	// Distinct entries, and the sum of their numbers: what the table must hold.
	Distinct int
	Sum      int64
}

// NewBacklog makes n entries, of which every twentieth is a copy: of one of the last 10,000, or with spread of any before it. payload is the size
// of a document in bytes; zero is the normal one.
func NewBacklog(n, payload int, spread bool) *Backlog {
	random := rand.New(rand.NewPCG(Seed, 1))
	b := &Backlog{Entries: make([]Entry, 0, n)}
	note := ""
	if payload > normalBytes {
		note = strings.Repeat("x", payload-normalBytes)
	}
	for i := range n {
		if i > 0 && random.IntN(duplicateOf) == 0 {
			first := 0
			if !spread {
				first = max(i-near, 0)
			}
			b.Entries = append(b.Entries, b.Entries[first+random.IntN(i-first)])
			continue
		}
		e := Entry{Device: random.IntN(devices), Seq: int64(i), Latitude: 47 + 7*random.Float64(), Longitude: 6 + 9*random.Float64(), Altitude: random.Int32N(900),
			Angle: random.Int32N(360), Speed: float64(random.IntN(1300)) / 10, Satellites: int16(4 + random.IntN(12)), Odometer: random.Int64N(1_000_000_000), Note: note}
		b.Entries = append(b.Entries, e)
		b.Distinct++
		b.Sum += e.Seq
	}
	return b
}

// normalBytes is the size of a document without a note.
const normalBytes = 233
