package pgstream

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
)

// MemorySpec is the desired state of a workflow memory.
type MemorySpec struct {
	Name          string        // [a-z][a-z0-9_]{0,47}
	Table         string        // where it keeps its workflows; empty: where it is, or millrace."<name>.memory"; never changes
	KeepCompleted time.Duration // how long maintenance leaves completed workflows, in seconds; 0: as it is, for ever to begin with; KeepForever
}

// KeepForever as MemorySpec.KeepCompleted: maintenance removes no workflows.
const KeepForever time.Duration = -1

// Workflow is what a memory knows of a subject.
type Workflow struct {
	Subject     string
	State       []byte // JSON; nil of a workflow that nobody has written
	Version     int64  // counts the writes, and is what Write expects; 0 of a workflow that nobody has written
	Parent      string // the subject that has started it; empty of a root
	Root        string // the topmost of its tree, itself when it has no parent; empty of a child in a list
	Metadata    []byte // JSON or nil
	CompletedAt time.Time
	CreatedAt   time.Time // in lists
	UpdatedAt   time.Time // in lists
	LockedUntil time.Time // zero: nobody has locked it; never in lists
	LockHolder  string
}

// MemoryWrite is what Write writes.
type MemoryWrite struct {
	State    []byte // JSON
	Expected int64  // the version that the state was decided upon; NoVersion, ExistingVersion or AnyVersion, too
	Parent   string // with the first write of a child; never changes
	Metadata []byte // JSON; nil leaves them
	// Completed says that the workflow has ended, or, when Reopen is set, that it has not after all. With neither it stays as it is.
	Completed, Reopen bool
	// Lock is the caller's, so that the write is refused when somebody else has locked the workflow meanwhile; nil: nobody may have.
	Lock *MemoryLock
	// Unlock gives the lock up with the write.
	Unlock bool
}

// Memory keeps the state of workflows between their messages (docs/workflow-memory.md). Each call is one round trip. Calls with a pgx.Tx take part in that transaction, and like
// every error within a transaction of PostgreSQL theirs leave nothing to do but to roll back. A Memory may be used by several goroutines.
type Memory struct {
	name string
}

// CreateMemory creates a memory, or changes its settings, and returns it. It needs the schema's owner. ErrRefused when its table has another structure than it needs, with what
// differs.
func CreateMemory(ctx context.Context, db DB, spec MemorySpec) (*Memory, error) {
	var table *string
	if spec.Table != "" {
		table = &spec.Table
	}
	var keep *int64
	if spec.KeepCompleted != 0 {
		seconds := int64(max(spec.KeepCompleted, 0).Round(time.Second).Seconds())
		keep = &seconds
	}
	if _, err := db.Exec(ctx, "select millrace.create_memory($1, $2, $3)", spec.Name, table, keep); err != nil {
		return nil, fmt.Errorf("create memory %q: %w", spec.Name, translate(err))
	}
	return &Memory{spec.Name}, nil
}

// OpenMemory returns a memory that exists. ErrNotFound when it does not, ErrRefused when its table is missing or was altered, with what differs.
func OpenMemory(ctx context.Context, db DB, name string) (*Memory, error) {
	if _, err := db.Exec(ctx, "select millrace.check_memory($1)", name); err != nil {
		return nil, fmt.Errorf("open memory %q: %w", name, translate(err))
	}
	return &Memory{name}, nil
}

// Name of the memory.
func (m *Memory) Name() string { return m.name }

// Read returns what is known of a workflow. One that nobody has written has version 0.
func (m *Memory) Read(ctx context.Context, db DB, subject string) (Workflow, error) {
	w := Workflow{Subject: subject}
	row := db.QueryRow(ctx, "select state, version, parent, root, metadata, completed_at, locked_until, lock_holder from millrace.read_memory($1, $2)", m.name, subject)
	if err := scanWorkflow(row, &w); err != nil {
		return Workflow{}, fmt.Errorf("read %q of memory %q: %w", subject, m.name, translate(err))
	}
	return w, nil
}

// ReadMany reads workflows in one round trip, in the order of the subjects.
func (m *Memory) ReadMany(ctx context.Context, db DB, subjects []string) ([]Workflow, error) {
	rows, _ := db.Query(ctx, `select s.subject, m.state, m.version, m.parent, m.root, m.metadata, m.completed_at, m.locked_until, m.lock_holder
		from unnest($2::text[]) with ordinality s(subject, n), lateral millrace.read_memory($1, s.subject) m order by s.n`, m.name, subjects)
	workflows, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Workflow, error) {
		var w Workflow
		err := scanWorkflow(row, &w, &w.Subject)
		return w, err
	})
	if err != nil {
		return nil, fmt.Errorf("read memory %q: %w", m.name, translate(err))
	}
	return workflows, nil
}

// scanWorkflow reads the columns of read_memory, after others.
func scanWorkflow(row pgx.Row, w *Workflow, before ...any) error {
	var parent, root, holder *string
	var completed, locked *time.Time
	err := row.Scan(append(before, &w.State, &w.Version, &parent, &root, &w.Metadata, &completed, &locked, &holder)...)
	w.Parent, w.Root, w.LockHolder, w.CompletedAt, w.LockedUntil = orZero(parent), orZero(root), orZero(holder), orZero(completed), orZero(locked)
	return err
}

// Write writes the state of a workflow and returns its new version. A *VersionError says which version it has instead of the expected one; ErrLockEnded that w.Lock is no
// longer the caller's, ErrLocked that somebody else has locked the workflow.
func (m *Memory) Write(ctx context.Context, db DB, subject string, w MemoryWrite) (version int64, err error) {
	var expected *int64
	if w.Expected != AnyVersion {
		expected = &w.Expected
	}
	var parent *string
	if w.Parent != "" {
		parent = &w.Parent
	}
	var completed *bool
	if w.Completed || w.Reopen {
		completed = &w.Completed
	}
	err = db.QueryRow(ctx, "select millrace.write_memory($1, $2, $3, $4, $5, $6, $7, $8, $9)", m.name, subject, w.State, expected, parent, w.Metadata, completed,
		w.Lock.token(), w.Unlock).Scan(&version)
	if err != nil {
		return 0, fmt.Errorf("write %q of memory %q: %w", subject, m.name, translate(err))
	}
	return version, nil
}

// Delete removes a workflow with all below it, and returns how many that were. expected is as in MemoryWrite; lock is nil or the caller's. ErrLocked when somebody has locked one of them.
func (m *Memory) Delete(ctx context.Context, db DB, subject string, expected int64, lock *MemoryLock) (n int64, err error) {
	var version *int64
	if expected != AnyVersion {
		version = &expected
	}
	if err := db.QueryRow(ctx, "select millrace.delete_memory($1, $2, $3, $4)", m.name, subject, version, lock.token()).Scan(&n); err != nil {
		return 0, fmt.Errorf("delete %q of memory %q: %w", subject, m.name, translate(err))
	}
	return n, nil
}

// Children returns the workflows that a workflow has started, in the order in which they began.
func (m *Memory) Children(ctx context.Context, db DB, subject string) ([]Workflow, error) {
	return m.list(ctx, db, "memory_children", subject)
}

// Descendants returns all workflows below a workflow, in the order in which they began.
func (m *Memory) Descendants(ctx context.Context, db DB, subject string) ([]Workflow, error) {
	return m.list(ctx, db, "memory_descendants", subject)
}

func (m *Memory) list(ctx context.Context, db DB, function, subject string) ([]Workflow, error) {
	rows, _ := db.Query(ctx, "select subject, parent, version, state, metadata, completed_at, created_at, updated_at from millrace."+function+"($1, $2)", m.name, subject)
	workflows, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Workflow, error) {
		var w Workflow
		var completed *time.Time
		err := row.Scan(&w.Subject, &w.Parent, &w.Version, &w.State, &w.Metadata, &completed, &w.CreatedAt, &w.UpdatedAt)
		w.CompletedAt = orZero(completed)
		return w, err
	})
	if err != nil {
		return nil, fmt.Errorf("list the workflows below %q of memory %q: %w", subject, m.name, translate(err))
	}
	return workflows, nil
}

// LockOptions say how to lock a workflow.
type LockOptions struct {
	TTL    time.Duration // how long the lock holds without Extend, by the database's clock; default 2 minutes, at most a day
	Holder string        // who it is, for people
	// Lock tries again after a pause that grows from InitialDelay, by half each time, up to MaxDelay, half of it at random, until it has tried Retries more times; 0: until ctx
	// ends. Default: 100 ms and 5 s.
	Retries                int
	InitialDelay, MaxDelay time.Duration
}

// MemoryLock is a lock of one workflow. It is safe to write with after it has expired: the write is refused if somebody else has locked the workflow meanwhile.
type MemoryLock struct {
	memory   *Memory
	Subject  string
	Token    int64     // a fencing number, too: a later lock of the subject has a greater one
	Expires  time.Time // by the database's clock
	Workflow Workflow  // state and version when it was locked; nobody else changes them
}

func (l *MemoryLock) token() *int64 {
	if l == nil {
		return nil
	}
	return &l.Token
}

// TryLock locks a workflow, or returns ErrLocked at once when somebody else has. db must not be a transaction that stays open: others see the lock when it is committed.
func (m *Memory) TryLock(ctx context.Context, db DB, subject string, o LockOptions) (*MemoryLock, error) {
	l := &MemoryLock{memory: m, Subject: subject, Workflow: Workflow{Subject: subject}}
	var token, version *int64
	var holder *string
	err := db.QueryRow(ctx, "select token, expires_at, holder, state, version from millrace.lock_memory($1, $2, $3, $4)", m.name, subject,
		orDefault(o.TTL, 2*time.Minute).Seconds(), o.Holder).Scan(&token, &l.Expires, &holder, &l.Workflow.State, &version)
	if err != nil {
		return nil, fmt.Errorf("lock %q of memory %q: %w", subject, m.name, translate(err))
	}
	if token == nil {
		return nil, fmt.Errorf("lock %q of memory %q: %w: %s until %s", subject, m.name, ErrLocked, orDefault(orZero(holder), "somebody"), l.Expires.Format(time.RFC3339))
	}
	l.Token, l.Workflow.Version, l.Workflow.LockedUntil, l.Workflow.LockHolder = *token, orZero(version), l.Expires, o.Holder
	return l, nil
}

// Lock locks a workflow; while somebody else has, it tries again. ErrLocked when it has tried often enough.
func (m *Memory) Lock(ctx context.Context, db DB, subject string, o LockOptions) (*MemoryLock, error) {
	delay, most := orDefault(o.InitialDelay, 100*time.Millisecond), orDefault(o.MaxDelay, 5*time.Second)
	for tries := 0; ; tries++ {
		l, err := m.TryLock(ctx, db, subject, o)
		if !errors.Is(err, ErrLocked) || o.Retries > 0 && tries >= o.Retries {
			return l, err
		}
		pause := min(delay, most)
		timer := time.NewTimer(pause/2 + rand.N(pause/2+1))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-timer.C:
		}
		delay += delay / 2
	}
}

// Extend keeps the lock for ttl from now. ErrLockEnded when it is no longer the caller's.
func (l *MemoryLock) Extend(ctx context.Context, db DB, ttl time.Duration) error {
	err := db.QueryRow(ctx, "select millrace.extend_memory($1, $2, $3, $4)", l.memory.name, l.Subject, l.Token, ttl.Seconds()).Scan(&l.Expires)
	if err != nil {
		return fmt.Errorf("extend the lock on %q of memory %q: %w", l.Subject, l.memory.name, translate(err))
	}
	return nil
}

// Unlock gives the lock up. ErrLockEnded when it is no longer the caller's: then it is somebody else's, or nobody's, and stays so.
func (l *MemoryLock) Unlock(ctx context.Context, db DB) error {
	if _, err := db.Exec(ctx, "select millrace.unlock_memory($1, $2, $3)", l.memory.name, l.Subject, l.Token); err != nil {
		return fmt.Errorf("unlock %q of memory %q: %w", l.Subject, l.memory.name, translate(err))
	}
	return nil
}

// cleanMemories removes completed workflows. A memory that cannot be used does not keep the others waiting.
func cleanMemories(ctx context.Context, db DB) (did []string, err error) {
	type memory struct {
		ID   int32
		Name string
	}
	rows, _ := db.Query(ctx, "select id, name from millrace_engine.memory order by id")
	memories, err := pgx.CollectRows(rows, pgx.RowToStructByPos[memory])
	if err != nil {
		return nil, fmt.Errorf("list memories: %w", translate(err))
	}
	var failed []error
	for _, m := range memories {
		total := 0
		for range purgeSteps {
			var n int
			if err := db.QueryRow(ctx, "select millrace_engine.clean_memory($1, $2)", m.ID, purgeStep).Scan(&n); err != nil {
				if !IsTransient(err) || ctx.Err() != nil {
					failed = append(failed, fmt.Errorf("clean memory %q: %w", m.Name, translate(err)))
				}
				break
			}
			total += n
			if n < purgeStep {
				break
			}
		}
		if total > 0 {
			did = append(did, fmt.Sprintf("removed %d completed workflows of memory %s", total, m.Name))
		}
	}
	return did, errors.Join(failed...)
}
