package scenario

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/redis/rueidis"
)

// pages adds entries to a Redis stream and knows which are in, also when Redis goes away in the middle (I1). It is the only
// one that adds such entries: what it finds in the stream and has sent is its own.
type pages struct {
	client rueidis.Client
	stream string
	last   string // id of the last entry that is known to be in
}

// begin notes where the stream ends.
func (p *pages) begin(ctx context.Context) error {
	last, err := p.client.Do(ctx, p.client.B().Xrevrange().Key(p.stream).End("+").Start("-").Count(1).Build()).AsXRange()
	if err != nil {
		return err
	}
	p.last = "0-0"
	if len(last) > 0 {
		p.last = last[0].ID
	}
	return nil
}

// add adds a page and returns the ids of its entries in Redis. With an error they are those of the first ones.
func (p *pages) add(ctx context.Context, page []position) (ids []string, err error) {
	for len(ids) < len(page) {
		rest := page[len(ids):]
		added, err := p.send(ctx, rest)
		ids = append(ids, added...)
		if err == nil {
			continue
		}
		if _, refused := rueidis.IsRedisErr(err); refused && !strings.HasPrefix(err.Error(), "LOADING") {
			return ids, err
		}
		found, err := p.find(ctx, rest[len(added):])
		ids = append(ids, found...)
		if err != nil {
			return ids, err
		}
	}
	return ids, nil
}

// send adds entries in one round trip, up to the first that failed.
func (p *pages) send(ctx context.Context, entries []position) (ids []string, err error) {
	commands := make(rueidis.Commands, len(entries))
	for i, e := range entries {
		add := p.client.B().Xadd().Key(p.stream).Id("*").FieldValue()
		for _, f := range e.fields {
			add = add.FieldValue(f[0], f[1])
		}
		commands[i] = add.Build()
	}
	for _, answer := range p.client.DoMulti(ctx, commands...) {
		id, err := answer.ToString()
		if err != nil {
			return ids, err
		}
		ids, p.last = append(ids, id), id
	}
	return ids, nil
}

// find waits for a Redis that is away and looks which of these entries are in. Redis takes them in the order in which they
// were sent, so that they are the first ones; the process that could take more has ended.
func (p *pages) find(ctx context.Context, entries []position) (ids []string, err error) {
	const pause, patience = 100 * time.Millisecond, time.Minute
	var found []rueidis.XRangeEntry
	for began := time.Now(); ; {
		found, err = p.client.Do(ctx, p.client.B().Xrange().Key(p.stream).Start("("+p.last).End("+").Build()).AsXRange()
		if err == nil {
			break
		}
		if time.Since(began) > patience {
			return nil, fmt.Errorf("the Redis server has been away for %s: %w", patience, err)
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		case <-time.After(pause):
		}
	}
	for _, e := range found {
		if len(ids) < len(entries) && entries[len(ids)].is(e) {
			ids = append(ids, e.ID)
		}
		p.last = e.ID
	}
	return ids, nil
}

// is tells whether an entry of the stream has the fields of p.
func (p position) is(e rueidis.XRangeEntry) bool {
	if len(p.fields) != len(e.FieldValues) {
		return false
	}
	return !slices.ContainsFunc(p.fields, func(f [2]string) bool {
		value, ok := e.FieldValues[f[0]]
		return !ok || value != f[1]
	})
}
