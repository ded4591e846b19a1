package pgstream

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"time"
)

//go:embed queries/retention_losses.sql
var retentionLossesSQL string

// Loss is something that a change destroys.
type Loss struct {
	// Kind is a word that stays the same while the numbers move.
	Kind string
	// Summary is for a person, with numbers as they are now.
	Summary string
}

// Kinds of losses.
const (
	LossMessages = "messages" // retention removes messages that it would keep otherwise
	LossPlace    = "place"    // a group lapses and has to be reset
)

// StreamLosses says what a plan destroys, which is nothing for a new stream. The figures are those of this moment.
func StreamLosses(ctx context.Context, db DB, plan Plan) ([]Loss, error) {
	name := plan.Spec.Name
	info, err := DescribeStream(ctx, db, name)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	has, want := info.Spec.spec(), plan.Spec.spec()
	settings := map[string]any{}
	changed := false
	for _, k := range []string{"retention_policy", "max_age_seconds", "max_bytes", "max_messages"} {
		settings[k] = want[k]
		changed = changed || has[k] != want[k]
	}
	if !changed {
		return nil, nil
	}
	var segments, messages, bytes int64
	var newest *time.Time
	if err := db.QueryRow(ctx, retentionLossesSQL, name, settings).Scan(&segments, &messages, &bytes, &newest); err != nil {
		return nil, fmt.Errorf("inspect the retention of stream %q: %w", name, translate(err))
	}
	if segments == 0 {
		return nil, nil
	}
	return []Loss{{LossMessages, fmt.Sprintf("up to %d messages published until %s: %d segments with %d bytes will be truncated",
		messages, newest.UTC().Format(time.RFC3339), segments, bytes)}}, nil
}

// GroupLosses says what a change of a group destroys, which is nothing for a new group.
func GroupLosses(ctx context.Context, db DB, spec GroupSpec) ([]Loss, error) {
	info, err := DescribeGroup(ctx, db, spec.Stream, spec.Name)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !info.LapsedAt.IsZero() || spec.LapseAfter == info.Spec.LapseAfter && spec.LapseLag == info.Spec.LapseLag {
		return nil, nil
	}
	all, err := Stats(ctx, db)
	if err != nil {
		return nil, err
	}
	for _, s := range all {
		if s.Stream != spec.Stream || s.Group != spec.Name {
			continue
		}
		// Lapsing by time also needs that nobody works; that no member does is not known here, so the age alone has to do.
		if spec.LapseLag > 0 && s.Lag > spec.LapseLag || spec.LapseAfter > 0 && s.OldestAge > spec.LapseAfter {
			return []Loss{{LossPlace, fmt.Sprintf("the group's place in the stream: it may lapse at once, because %d messages wait, the oldest for %s",
				s.Lag, s.OldestAge.Round(time.Second))}}, nil
		}
	}
	return nil, nil
}
