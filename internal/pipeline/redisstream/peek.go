package redisstream

import (
	"context"
	"fmt"

	"github.com/redis/rueidis"
)

// PeekFrom is where Peek begins.
type PeekFrom uint8

// Places to begin.
const (
	PeekNext  PeekFrom = iota // behind what the group was given last; where there is no group, at the first entry
	PeekFirst                 // at the first entry that is left
)

// Peek returns up to max entries of a stream without being a member of the group: nothing moves from the group's place, and nothing becomes
// pending. A stream that does not exist has no entries.
func Peek(ctx context.Context, client rueidis.Client, stream, group string, from PeekFrom, max int) ([]Entry, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	start := "-"
	if from == PeekNext {
		last, err := lastDelivered(ctx, client, stream, group)
		if err != nil {
			return nil, err
		}
		if last != "" {
			start = "(" + last
		}
	}
	raw, err := client.Do(ctx, client.B().Xrange().Key(stream).Start(start).End("+").Count(int64(max)).Build()).AsXRangeSlices()
	if err != nil {
		return nil, fmt.Errorf("read stream %q: %w", stream, err)
	}
	entries, _ := split(raw, 1)
	return entries, nil
}

// lastDelivered is the id of the entry that the group was given last; empty when there is no group.
func lastDelivered(ctx context.Context, client rueidis.Client, stream, group string) (string, error) {
	exists, err := client.Do(ctx, client.B().Exists().Key(stream).Build()).AsInt64()
	if err != nil {
		return "", fmt.Errorf("look for stream %q: %w", stream, err)
	}
	if exists == 0 {
		return "", nil // XINFO would fail
	}
	groups, err := client.Do(ctx, client.B().XinfoGroups().Key(stream).Build()).ToArray()
	if err != nil {
		return "", fmt.Errorf("read the groups of stream %q: %w", stream, err)
	}
	for _, g := range groups {
		info, err := g.AsMap()
		if err != nil {
			return "", fmt.Errorf("read the groups of stream %q: %w", stream, err)
		}
		name, last := info["name"], info["last-delivered-id"]
		if text, _ := name.ToString(); text == group {
			return last.ToString()
		}
	}
	return "", nil
}
