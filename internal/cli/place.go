package cli

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// placeHelp says what a place may be.
const placeHelp = "earliest, latest, a position, a time as in 2026-01-31T08:00:00Z, or how long ago as in 90m"

// parsePlace reads a place in a stream, as a person writes it.
func parsePlace(text string, now time.Time) (pgstream.Place, error) {
	switch text {
	case "earliest":
		return pgstream.Place{From: pgstream.StartEarliest}, nil
	case "latest":
		return pgstream.Place{From: pgstream.StartLatest}, nil
	}
	if n, err := strconv.ParseInt(text, 10, 64); err == nil && n > 0 {
		return pgstream.Place{From: pgstream.StartPosition, Position: n}, nil
	}
	if at, err := parseTime(text, now); err == nil {
		return pgstream.Place{From: pgstream.StartTime, Time: at}, nil
	}
	return pgstream.Place{}, fmt.Errorf("%q is no place: write %s", text, placeHelp)
}

// parseTime reads a time, or how long ago it was.
func parseTime(text string, now time.Time) (time.Time, error) {
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		return at, nil
	}
	if ago, err := time.ParseDuration(text); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time: write one as in 2026-01-31T08:00:00Z, or how long ago as in 90m", text)
}

// now is the time of the database, from which a person's "ago" counts.
func (d *database) now(ctx context.Context) (time.Time, error) {
	var now time.Time
	err := d.QueryRow(ctx, "select clock_timestamp()").Scan(&now)
	return now, explain(err)
}
