package database

import (
	"context"
	"sync"
	"time"

	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Maintainer runs the engine's upkeep (retention, ledgers) in every database of a registry. Publishing and consuming do not
// need it: without it only disk space grows.
type Maintainer struct {
	Registry *Registry
	Interval time.Duration
}

// maintainLimit bounds one round in one database. What it leaves undone is for the next.
const maintainLimit = 5 * time.Minute

// Run maintains until ctx ends, and returns when the last round has. A slow database delays no other.
func (m *Maintainer) Run(ctx context.Context) error {
	var mu sync.Mutex
	busy := map[ID]bool{}
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(m.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, d := range m.Registry.Active() {
			mu.Lock()
			started := busy[d.ID()]
			busy[d.ID()] = true
			mu.Unlock()
			if started {
				continue
			}
			wg.Go(func() {
				m.once(ctx, d)
				mu.Lock()
				delete(busy, d.ID())
				mu.Unlock()
			})
		}
	}
}

func (m *Maintainer) once(ctx context.Context, d *Database) {
	if !d.Reachable() {
		return // whoever needs it probes it; upkeep can wait
	}
	log := logf.FromContext(ctx).WithName("maintenance")
	err := d.do(ctx, maintainLimit, false, func(ctx context.Context, db pgstream.DB) error {
		did, err := pgstream.Maintain(ctx, db)
		for _, action := range did {
			log.Info("maintained", "database", d.String(), "action", action)
		}
		return err
	})
	if err == nil {
		d.noteMaintained(m.Registry.opts.Clock.Now())
	}
	if err != nil && !phase.IsAgain(err) && ctx.Err() == nil {
		log.Info("maintenance failed; it is tried again", "database", d.String(), "cause", err.Error())
	}
}
