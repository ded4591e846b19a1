package client

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Memory keeps the state of workflows between their messages: a JSON document by subject, with a version, a place in a tree and a lock. docs/workflow-memory.md
// explains it.
type Memory struct {
	s Session
	m *pgstream.Memory
}

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

// WorkflowWrite is what Memory.Write writes.
type WorkflowWrite struct {
	State    []byte // JSON
	Expected int64  // the version that the state was decided upon; NoVersion, ExistingVersion or AnyVersion, too
	Parent   string // with the first write of a child; never changes
	Metadata []byte // JSON; nil leaves them
	// Completed says that the workflow has ended, or, when Reopen is set, that it has not after all. With neither it stays as it is.
	Completed, Reopen bool
	// Lock is the caller's, so that the write is refused when somebody else has locked the workflow meanwhile; nil: nobody may have.
	Lock *Lock
	// Unlock gives the lock up with the write.
	Unlock bool
}

// OpenMemory returns a memory that exists. ErrNotFound when it does not, ErrRefused when its table was altered, with what differs.
func (c *Client) OpenMemory(ctx context.Context, name string) (*Memory, error) {
	ctx, cancel := c.limit(ctx)
	defer cancel()
	m, err := pgstream.OpenMemory(ctx, c.db, name)
	if err != nil {
		return nil, err
	}
	return &Memory{c.Session, m}, nil
}

// In returns the memory's verbs within the caller's transaction, such as a delivery's.
func (m *Memory) In(tx pgx.Tx) *Memory { return &Memory{m.s.c.In(tx), m.m} }

// Read returns what is known of a workflow. One that nobody has written has version 0.
func (m *Memory) Read(ctx context.Context, subject string) (Workflow, error) {
	ctx, cancel := m.s.c.limit(ctx)
	defer cancel()
	w, err := m.m.Read(ctx, m.s.db, subject)
	return Workflow(w), err
}

// Write writes the state of a workflow and returns its new version. A *VersionError says which version it has instead of the expected one; ErrLockEnded that w.Lock is not
// the caller's any more, ErrLocked that somebody else has locked the workflow.
func (m *Memory) Write(ctx context.Context, subject string, w WorkflowWrite) (version int64, err error) {
	ctx, cancel := m.s.c.limit(ctx)
	defer cancel()
	version, err = m.m.Write(ctx, m.s.db, subject, pgstream.MemoryWrite{
		State: w.State, Expected: w.Expected, Parent: w.Parent, Metadata: w.Metadata, Completed: w.Completed, Reopen: w.Reopen, Lock: w.Lock.engine(), Unlock: w.Unlock,
	})
	return version, versioned(err, m.m.Name(), subject, w.Expected)
}

// Delete removes a workflow with all below it, and returns how many that were. expected is as in WorkflowWrite; lock is nil or the caller's. ErrLocked when somebody has
// locked one of them.
func (m *Memory) Delete(ctx context.Context, subject string, expected int64, lock *Lock) (n int64, err error) {
	ctx, cancel := m.s.c.limit(ctx)
	defer cancel()
	n, err = m.m.Delete(ctx, m.s.db, subject, expected, lock.engine())
	return n, versioned(err, m.m.Name(), subject, expected)
}

// Children returns the workflows that a workflow has started, in the order in which they began.
func (m *Memory) Children(ctx context.Context, subject string) ([]Workflow, error) {
	return m.list(ctx, m.m.Children, subject)
}

// Descendants returns all workflows below a workflow, in the order in which they began.
func (m *Memory) Descendants(ctx context.Context, subject string) ([]Workflow, error) {
	return m.list(ctx, m.m.Descendants, subject)
}

func (m *Memory) list(ctx context.Context, read func(context.Context, pgstream.DB, string) ([]pgstream.Workflow, error), subject string) ([]Workflow, error) {
	ctx, cancel := m.s.c.limit(ctx)
	defer cancel()
	found, err := read(ctx, m.s.db, subject)
	workflows := make([]Workflow, len(found))
	for i, w := range found {
		workflows[i] = Workflow(w)
	}
	return workflows, err
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

// Lock is a lock of one workflow. It is safe to write with after it has expired: the write is refused if somebody else has locked the workflow meanwhile.
type Lock struct {
	Workflow Workflow // state and version when it was locked; nobody else changes them
	Token    int64    // a fencing number, too: a later lock of the subject has a greater one

	c *Client
	l *pgstream.MemoryLock
}

func (l *Lock) engine() *pgstream.MemoryLock {
	if l == nil {
		return nil
	}
	return l.l
}

// Lock locks a workflow, on the client's pool, also of a Memory within a transaction: others see the lock at once. While somebody else has it, Lock tries again; ErrLocked when
// it has tried often enough.
func (m *Memory) Lock(ctx context.Context, subject string, o LockOptions) (*Lock, error) {
	c := m.s.c
	l, err := m.m.Lock(ctx, boundedDB{c.pool, c}, subject, pgstream.LockOptions(o))
	return c.lock(l, err)
}

// TryLock locks a workflow as Lock does, or returns ErrLocked at once when somebody else has.
func (m *Memory) TryLock(ctx context.Context, subject string, o LockOptions) (*Lock, error) {
	c := m.s.c
	l, err := m.m.TryLock(ctx, boundedDB{c.pool, c}, subject, pgstream.LockOptions(o))
	return c.lock(l, err)
}

func (c *Client) lock(l *pgstream.MemoryLock, err error) (*Lock, error) {
	if err != nil {
		return nil, err
	}
	return &Lock{Workflow: Workflow(l.Workflow), Token: l.Token, c: c, l: l}, nil
}

// Expires is when the lock ends, by the database's clock.
func (l *Lock) Expires() time.Time { return l.l.Expires }

// Extend keeps the lock for ttl from now. ErrLockEnded when it is not the caller's any more.
func (l *Lock) Extend(ctx context.Context, ttl time.Duration) error {
	ctx, cancel := l.c.limit(ctx)
	defer cancel()
	return l.l.Extend(ctx, l.c.pool, ttl)
}

// Unlock gives the lock up. ErrLockEnded when it is not the caller's any more: then it is somebody else's, or nobody's, and stays so.
func (l *Lock) Unlock(ctx context.Context) error {
	ctx, cancel := l.c.limit(ctx)
	defer cancel()
	return l.l.Unlock(ctx, l.c.pool)
}

// boundedDB bounds each query for a row, for a verb that waits between its calls.
type boundedDB struct {
	pgstream.DB
	c *Client
}

func (b boundedDB) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	ctx, cancel := b.c.limit(ctx)
	return boundedRow{b.DB.QueryRow(ctx, sql, args...), cancel}
}

type boundedRow struct {
	pgx.Row
	cancel context.CancelFunc
}

func (r boundedRow) Scan(dest ...any) error {
	defer r.cancel()
	return r.Row.Scan(dest...)
}
