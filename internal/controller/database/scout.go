package database

import (
	"context"
	"errors"
	"sync"
	"time"

	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Scouts takes part in scouting (pgstream.Scout) in every database of a registry, so that delayed messages are moved and waiting consumers are woken
// where no processor runs. Where one does, it mostly stands by. It costs one connection per database.
type Scouts struct {
	Registry *Registry
	// Config of each scout. Zero intervals mean a second between two looks while nobody waits, and fifteen between two tries to lead: the manager may
	// have many databases.
	Config pgstream.ScoutConfig
}

// probeInterval is how often a scout looks whether a database that was lost is back. It costs a try to connect, and no worker's time.
const probeInterval = 3 * time.Second

// leaveLimit bounds how long a scout that ends gives its place to others. One that does not come to it keeps it until its lease ends.
const leaveLimit = 5 * time.Second

// scoutsTick is how often new databases are looked for.
const scoutsTick = time.Second

// Run scouts until ctx ends. A slow database delays no other.
func (s *Scouts) Run(ctx context.Context) error {
	setDefault(&s.Config.IdleInterval, time.Second)
	setDefault(&s.Config.FollowInterval, 15*time.Second)
	var wg sync.WaitGroup
	defer wg.Wait()
	running := map[ID]context.CancelFunc{}
	tick := time.NewTicker(scoutsTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil // ends all below
		case <-tick.C:
		}
		active := map[ID]bool{}
		for _, d := range s.Registry.Active() {
			active[d.ID()] = true
			if running[d.ID()] == nil {
				one, cancel := context.WithCancel(ctx)
				running[d.ID()] = cancel
				wg.Go(func() { s.scout(one, d) })
			}
		}
		for id, cancel := range running {
			if !active[id] {
				cancel()
				delete(running, id)
			}
		}
	}
}

func (s *Scouts) scout(ctx context.Context, d *Database) {
	log := logf.FromContext(ctx).WithName("scout").WithValues("database", d.String())
	scout := pgstream.NewScout(s.Config, func(err error) {
		var z *pgstream.Zombie
		if errors.As(err, &z) {
			log.Info("a transaction kept messages from others", "stream", z.Stream, "group", z.Group, "ended", z.Ended, "cause", z.Error())
		}
	})
	defer func() {
		leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveLimit)
		defer cancel()
		_ = d.do(leaving, leaveLimit, false, func(ctx context.Context, db pgstream.DB) error {
			scout.Leave(ctx, db)
			return nil
		})
	}()
	last := ""
	for {
		pause := s.Config.FollowInterval
		if !d.Reachable() {
			d.probe(ctx)
			pause = probeInterval
		} else {
			err := d.Look(ctx, func(ctx context.Context, db pgstream.DB) (err error) {
				pause, err = scout.Round(ctx, db)
				return err
			})
			switch {
			case err == nil:
				last = ""
			case errors.Is(err, ErrNoSchema):
				pause = s.Config.IdleInterval // it is about to be installed, or waits for approval
			case ctx.Err() == nil && !phase.IsAgain(err) && err.Error() != last:
				last = err.Error()
				log.Info("scouting failed; it is tried again", "cause", last)
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}
