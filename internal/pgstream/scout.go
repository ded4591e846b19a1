package pgstream

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"time"
)

// ScoutConfig configures a scout. Zero values mean the defaults named here.
type ScoutConfig struct {
	Holder string // unique per process; default: host name plus random suffix
	// Interval between two looks while somebody waits for messages. Default 100ms.
	Interval time.Duration
	// IdleInterval is the same while nobody does. Default 500ms. Consumers look for themselves often in their first second.
	IdleInterval time.Duration
	// FollowInterval is how often a scout that does not lead asks whether it can. Default 2s.
	FollowInterval time.Duration
	// Lease is how long a scout leads without renewing. Default 10s.
	Lease time.Duration
	// Term is how long a scout leads before others may take its place. Default 1m.
	Term time.Duration
}

// The scout's slower rounds, and its share of the server.
const (
	scoutFull   = time.Second     // what became due unforeseen
	scoutZombie = 5 * time.Second // transactions that keep a claim for too long
	// scoutShare is how many times longer than a look the scout sleeps after it, so that it never takes more than a small part of a core.
	scoutShare = 20
	// moveBatch bounds how many delayed messages are moved in one transaction, which holds the horizon of their streams back.
	moveBatch = 1000
)

// Scout wakes consumers when nobody's commit does: it moves delayed messages that are due, notifies streams whose horizon has moved because a
// transaction ended, or where a retry, a claim or a membership has become due, and ends sessions that keep a long expired claim.
//
// One scout leads in a database, by a lease; the others stand by. Invariant: nothing depends on there being one, or only one. Consumers look for themselves now and
// then, and everything a scout does is harmless when another does it, too. Only delayed messages need some scout to lead at some time.
type Scout struct {
	cfg    ScoutConfig
	report func(error)

	renew    time.Time // when to ask for the lease again
	leads    bool
	seen     []byte // what the last look saw; opaque. Nil: nothing yet
	full     time.Time
	zombies  time.Time
	holders  []byte // what the last look at the claims' locks saw; opaque
	reported map[string]bool
}

// NewScout returns a scout that hands what people should know to report: errors, and every *Zombie. report may be nil.
func NewScout(cfg ScoutConfig, report func(error)) *Scout {
	cfg.Interval = orDefault(cfg.Interval, 100*time.Millisecond)
	cfg.IdleInterval = orDefault(cfg.IdleInterval, 500*time.Millisecond)
	cfg.FollowInterval = orDefault(cfg.FollowInterval, 2*time.Second)
	cfg.Lease = orDefault(cfg.Lease, 10*time.Second)
	cfg.Term = orDefault(cfg.Term, time.Minute)
	if cfg.Holder == "" {
		cfg.Holder = memberName()
	}
	if report == nil {
		report = func(error) {}
	}
	return &Scout{cfg: cfg, report: report}
}

// RunScout scouts until ctx ends, and then gives the lease up. A hundred processes may run it on one database: one leads at a time.
func RunScout(ctx context.Context, db DB, cfg ScoutConfig, report func(error)) {
	s := NewScout(cfg, report)
	defer func() {
		leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		s.Leave(leaving, db)
	}()
	last := ""
	for {
		pause, err := s.Round(ctx, db)
		switch {
		case err == nil:
			last = ""
		case ctx.Err() == nil && !IsTransient(err) && err.Error() != last:
			last = err.Error()
			s.report(err)
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

// Leads says whether the last round was a leader's.
func (s *Scout) Leads() bool { return s.leads }

// Leave gives up the lease if this scout has it, so that another need not wait for its end.
func (s *Scout) Leave(ctx context.Context, db DB) {
	s.forget()
	_, _ = db.Exec(ctx, "select millrace_engine.scout_leave($1)", s.cfg.Holder) // else it expires
}

// forget makes the next look a first one. It notifies whoever may have missed something, so nothing is lost by forgetting.
func (s *Scout) forget() {
	s.leads, s.seen, s.holders = false, nil, nil
	s.renew, s.full, s.zombies = time.Time{}, time.Time{}, time.Time{}
}

// Round does one round and returns how long to pause before the next. It is for callers that hold no connection in between; others call RunScout.
func (s *Scout) Round(ctx context.Context, db DB) (pause time.Duration, err error) {
	// A connection that hangs must not end the scouting. Another scout leads meanwhile.
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Lease)
	defer cancel()
	defer func() {
		if err != nil {
			s.forget() // the server may have restarted, with what we remember undone
			pause, err = s.cfg.FollowInterval, fmt.Errorf("scout: %w", translate(err))
		}
	}()
	if !time.Now().Before(s.renew) {
		if pause, err := s.lease(ctx, db); err != nil || !s.leads {
			return pause, err
		}
	}
	pause, err = s.look(ctx, db)
	if err == nil && !time.Now().Before(s.zombies) {
		s.zombies = time.Now().Add(scoutZombie)
		err = s.endZombies(ctx, db)
	}
	return max(0, min(pause, time.Until(s.renew))), err
}

func (s *Scout) lease(ctx context.Context, db DB) (time.Duration, error) {
	var leads bool
	var again float64
	asked := time.Now()
	err := db.QueryRow(ctx, "select leads, again_seconds from millrace_engine.scout_lease($1, $2, $3)",
		s.cfg.Holder, s.cfg.Lease.Seconds(), s.cfg.Term.Seconds()).Scan(&leads, &again)
	if err != nil {
		return 0, err
	}
	if !leads {
		s.forget()
		// With some chance in it, so that those who wait for one lease do not all ask at once.
		pause := min(seconds(again), s.cfg.FollowInterval)
		return pause + rand.N(pause/4+time.Millisecond), nil
	}
	s.leads = true
	s.renew = asked.Add(seconds(again))
	return 0, nil
}

// look does what a leader does in every round.
func (s *Scout) look(ctx context.Context, db DB) (time.Duration, error) {
	full := !time.Now().Before(s.full)
	var waiting int
	var due bool
	var next *float64
	var cost float64
	err := db.QueryRow(ctx, "select seen::text, waiting, due, next_seconds, cost_seconds from millrace_engine.scout($1::text::jsonb, $2)",
		text(s.seen), full).Scan(&s.seen, &waiting, &due, &next, &cost)
	if err != nil {
		return 0, err
	}
	if full {
		s.full = time.Now().Add(scoutFull)
	}
	pause := s.cfg.IdleInterval
	if waiting > 0 {
		pause = s.cfg.Interval
	}
	if next != nil {
		pause = min(pause, seconds(*next))
	}
	if due {
		// By itself: it publishes, and its own open transaction would hold back the horizon. Its commit notifies.
		var streams []int32
		if err := db.QueryRow(ctx, "select coalesce(millrace_engine.move_due($1), '{}')", moveBatch).Scan(&streams); err != nil {
			return 0, fmt.Errorf("move delayed messages that are due: %w", err)
		}
		if len(streams) > 0 {
			return 0, nil // there may be more
		}
		pause = max(pause, s.cfg.Interval) // others are at it
	}
	return max(pause, scoutShare*seconds(cost), time.Millisecond), nil
}

// Zombie is a transaction that keeps a claim from being taken over long after it has expired, or everybody else of a group from receiving. It is an error for whoever
// gets reports of a scout.
type Zombie struct {
	PID         int       `json:"pid"` // 0: a prepared transaction
	GID         string    `json:"gid"` // of a prepared transaction
	User        string    `json:"user"`
	Application string    `json:"application"`
	Stream      string    `json:"stream"`
	Group       string    `json:"group"`
	Receiving   bool      `json:"receiving"`  // it has received, and nobody else of the group can before it ends
	ExpiredAt   time.Time `json:"expired_at"` // when its claim ended; zero when it is receiving
	Ended       bool      `json:"ended"`      // its session was ended, and its transaction rolled back
	Problem     string    `json:"problem"`    // why not, and what to do
}

func (z *Zombie) Error() string {
	who := fmt.Sprintf("session %d", z.PID)
	if z.PID == 0 {
		who = fmt.Sprintf("the prepared transaction %q", z.GID)
	}
	what := fmt.Sprintf("%s (user %q, application %q) held a claim of group %q of stream %q in an open transaction, expired since %s",
		who, z.User, z.Application, z.Group, z.Stream, z.ExpiredAt.UTC().Format(time.RFC3339))
	wait := ": its messages wait; "
	if z.Receiving {
		what = fmt.Sprintf("%s (user %q, application %q) has received from group %q of stream %q in a transaction that it left open", who, z.User, z.Application, z.Group, z.Stream)
		wait = ": nobody else of the group can receive; "
	}
	if z.Ended {
		return what + ": the session was ended, and its transaction rolled back"
	}
	return what + wait + z.Problem
}

func (s *Scout) endZombies(ctx context.Context, db DB) error {
	var found []byte
	err := db.QueryRow(ctx, "select seen::text, zombies::text from millrace_engine.end_zombies($1::text::jsonb)", text(s.holders)).Scan(&s.holders, &found)
	if err != nil {
		return fmt.Errorf("end sessions that keep expired claims: %w", err)
	}
	var zombies []*Zombie
	if err := json.Unmarshal(found, &zombies); err != nil {
		return fmt.Errorf("end sessions that keep expired claims: %w", err)
	}
	before := s.reported
	s.reported = map[string]bool{}
	for _, z := range zombies {
		name := z.Error()
		s.reported[name] = true
		if !before[name] { // one that cannot be ended is found again and again
			s.report(z)
		}
	}
	return nil
}

func text(b []byte) *string {
	if b == nil {
		return nil
	}
	s := string(b)
	return &s
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
