package pgstream_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func (e *engine) memory(spec pgstream.MemorySpec) *pgstream.Memory {
	e.t.Helper()
	m, err := pgstream.CreateMemory(e.ctx, e.Pool, spec)
	must(e.t, err)
	return m
}

// write writes a state that must be taken.
func (e *engine) write(m *pgstream.Memory, subject string, w pgstream.MemoryWrite) int64 {
	e.t.Helper()
	if w.State == nil {
		w.State = []byte(`{}`)
	}
	version, err := m.Write(e.ctx, e.Pool, subject, w)
	must(e.t, err)
	return version
}

func (e *engine) readMemory(m *pgstream.Memory, subject string) pgstream.Workflow {
	e.t.Helper()
	w, err := m.Read(e.ctx, e.Pool, subject)
	must(e.t, err)
	return w
}

func subjects(ws []pgstream.Workflow) string {
	var names []string
	for _, w := range ws {
		names = append(names, w.Subject)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func TestAWriteNeedsTheExpectedVersion(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	if w := e.readMemory(m, "o-1"); w.Version != 0 || w.State != nil || w.Root != "" {
		t.Errorf("a workflow that nobody has written is %+v", w)
	}
	state := func(n int) []byte { return fmt.Appendf(nil, `{"n": %d}`, n) }
	for i, c := range []struct{ expected, conflict int64 }{
		{pgstream.ExistingVersion, 0}, {3, 0}, {pgstream.NoVersion, -1}, {pgstream.NoVersion, 1}, {2, 1}, {1, -1}, {1, 2},
		{pgstream.ExistingVersion, -1}, {pgstream.AnyVersion, -1}, {4, -1}, {4, 5},
	} {
		before := e.readMemory(m, "o-1")
		version, err := m.Write(e.ctx, e.Pool, "o-1", pgstream.MemoryWrite{State: state(i), Expected: c.expected})
		after := e.readMemory(m, "o-1")
		present, conflict := pgstream.IsVersionError(err)
		switch {
		case c.conflict >= 0 && (!conflict || present != c.conflict || before.Version != after.Version || string(before.State) != string(after.State)):
			t.Errorf("write %d: version %d, error %v, %+v became %+v", i, version, err, before, after)
		case c.conflict < 0 && (err != nil || version != before.Version+1 || after.Version != version || string(after.State) != string(state(i))):
			t.Errorf("write %d: version %d, error %v, %+v became %+v", i, version, err, before, after)
		}
	}
	if w := e.readMemory(m, "o-1"); w.Root != "o-1" || w.Parent != "" {
		t.Errorf("a workflow without a parent is its own root: %+v", w)
	}
}

// Whoever loses reads again and decides anew, so no increment is lost, and none counts twice.
func TestManyCountInOneWorkflow(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "counters"})
	const workers, each = 8, 25
	if lost := count(e, m, workers, each); lost != 0 {
		t.Errorf("%d of %d were lost", lost, workers*each)
	}
	if w := e.readMemory(m, "c"); w.Version != workers*each {
		t.Errorf("version %d after %d writes", w.Version, workers*each)
	}
}

func TestManyCountIsSeenBrokenWithoutTheVersion(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.mutate("millrace_engine.write_memory_pattern", "p_expected is null or x.version = p_expected", "true")
	m := e.memory(pgstream.MemorySpec{Name: "counters"})
	if lost := count(e, m, 8, 25); lost == 0 {
		t.Error("nothing was seen without it")
	}
}

// count lets workers add one to the same workflow as often as they are told to, and returns how many are missing.
func count(e *engine, m *pgstream.Memory, workers, each int) int {
	var working sync.WaitGroup
	for range workers {
		working.Go(func() {
			for range each {
				for {
					w, err := m.Read(e.ctx, e.Pool, "c")
					if err != nil {
						e.t.Error(err)
						return
					}
					n, _ := strconv.Atoi(string(w.State))
					_, err = m.Write(e.ctx, e.Pool, "c", pgstream.MemoryWrite{State: []byte(strconv.Itoa(n + 1)), Expected: w.Version})
					if _, lost := pgstream.IsVersionError(err); lost {
						continue
					}
					if err != nil {
						e.t.Error(err)
						return
					}
					break
				}
			}
		})
	}
	working.Wait()
	n, _ := strconv.Atoi(string(e.readMemory(m, "c").State))
	return workers*each - n
}

// The same with locks: the version is not looked at, so it is the lock alone that keeps them apart.
func TestManyCountUnderALock(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "counters"})
	const workers, each = 5, 8
	var working sync.WaitGroup
	tokens := make([][]int64, workers)
	for i := range workers {
		working.Go(func() {
			for range each {
				l, err := m.Lock(e.ctx, e.Pool, "c", pgstream.LockOptions{TTL: time.Minute, InitialDelay: time.Millisecond, MaxDelay: 10 * time.Millisecond})
				if err != nil {
					t.Error(err)
					return
				}
				tokens[i] = append(tokens[i], l.Token)
				n, _ := strconv.Atoi(string(l.Workflow.State))
				_, err = m.Write(e.ctx, e.Pool, "c", pgstream.MemoryWrite{State: []byte(strconv.Itoa(n + 1)), Expected: pgstream.AnyVersion, Lock: l, Unlock: true})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	working.Wait()
	if w := e.readMemory(m, "c"); string(w.State) != strconv.Itoa(workers*each) || !w.LockedUntil.IsZero() {
		t.Errorf("%d workers counted to %s; locked until %v", workers, w.State, w.LockedUntil)
	}
	all := slices.Concat(tokens...)
	slices.Sort(all)
	if len(slices.Compact(all)) != workers*each {
		t.Error("two locks have one token")
	}
	for _, own := range tokens {
		if !slices.IsSorted(own) {
			t.Errorf("a later lock has a smaller token: %v", own)
		}
	}
}

// The first owner stalls past its time, the second locks: from then on the first one's token is good for nothing, and does not harm the second.
func TestAStaleOwnerIsFenced(t *testing.T) {
	t.Parallel()
	for _, written := range []bool{true, false} {
		t.Run(fmt.Sprintf("written=%t", written), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			m := e.memory(pgstream.MemorySpec{Name: "orders"})
			expected := pgstream.NoVersion
			if written {
				expected = e.write(m, "o-1", pgstream.MemoryWrite{})
			}
			first, err := m.TryLock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{TTL: time.Minute, Holder: "first"})
			must(t, err)
			if _, err := m.TryLock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{Holder: "second"}); !errors.Is(err, pgstream.ErrLocked) || !strings.Contains(err.Error(), "first until ") {
				t.Errorf("a second lock: %v", err)
			}
			if _, err := m.Write(e.ctx, e.Pool, "o-1", pgstream.MemoryWrite{State: []byte(`1`), Expected: pgstream.AnyVersion}); !errors.Is(err, pgstream.ErrLocked) {
				t.Errorf("a write by another: %v", err)
			}
			if _, err := m.Delete(e.ctx, e.Pool, "o-1", pgstream.AnyVersion, nil); !errors.Is(err, pgstream.ErrLocked) {
				t.Errorf("removed by another: %v", err)
			}
			if w := e.readMemory(m, "o-1"); w.LockHolder != "first" || !w.LockedUntil.Equal(first.Expires) {
				t.Errorf("locked by %q until %v", w.LockHolder, w.LockedUntil)
			}
			e.jump(2 * time.Minute)
			if w := e.readMemory(m, "o-1"); !w.LockedUntil.IsZero() || w.LockHolder != "" {
				t.Errorf("an expired lock is shown: %+v", w)
			}
			second, err := m.TryLock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{TTL: time.Minute, Holder: "second"})
			must(t, err)
			if second.Token <= first.Token {
				t.Errorf("token %d after %d", second.Token, first.Token)
			}
			_, err = m.Write(e.ctx, e.Pool, "o-1", pgstream.MemoryWrite{State: []byte(`1`), Expected: expected, Lock: first})
			for what, err := range map[string]error{"write": err, "unlock": first.Unlock(e.ctx, e.Pool), "extend": first.Extend(e.ctx, e.Pool, time.Hour)} {
				if !errors.Is(err, pgstream.ErrLockEnded) {
					t.Errorf("%s with a stale token: %v", what, err)
				}
			}
			if w := e.readMemory(m, "o-1"); w.LockHolder != "second" || w.Version != expected {
				t.Errorf("the stale owner has left %+v", w)
			}
			must(t, second.Extend(e.ctx, e.Pool, time.Hour))
			e.jump(30 * time.Minute)
			if _, err := m.TryLock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{}); !errors.Is(err, pgstream.ErrLocked) {
				t.Errorf("locked although it was extended: %v", err)
			}
			if _, err := m.Write(e.ctx, e.Pool, "o-1", pgstream.MemoryWrite{State: []byte(`2`), Expected: expected, Lock: second}); err != nil {
				t.Error(err)
			}
			must(t, second.Unlock(e.ctx, e.Pool))
			if err := second.Unlock(e.ctx, e.Pool); !errors.Is(err, pgstream.ErrLockEnded) {
				t.Errorf("given up twice: %v", err)
			}
			third, err := m.TryLock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{})
			must(t, err)
			if string(third.Workflow.State) != "2" || third.Workflow.Version != expected+1 || third.Token <= second.Token {
				t.Errorf("the third lock has %+v", third)
			}
		})
	}
}

// An expired lock that nobody has taken is still its owner's, as a claim is.
func TestAnExpiredLockThatNobodyTook(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	l, err := m.TryLock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{TTL: time.Second})
	must(t, err)
	e.jump(time.Minute)
	if v := e.write(m, "o-1", pgstream.MemoryWrite{Expected: pgstream.NoVersion, Lock: l}); v != 1 {
		t.Errorf("version %d", v)
	}
	must(t, l.Extend(e.ctx, e.Pool, time.Minute))
	must(t, l.Unlock(e.ctx, e.Pool))
	// What was only locked leaves nothing, and its token is not good for what comes after it.
	l, err = m.TryLock(e.ctx, e.Pool, "o-2", pgstream.LockOptions{})
	must(t, err)
	must(t, l.Unlock(e.ctx, e.Pool))
	if n := one[int](e, `select count(*) from millrace."orders.memory" where subject = 'o-2'`); n != 0 {
		t.Error("a lock was left behind")
	}
	if _, err := m.Write(e.ctx, e.Pool, "o-2", pgstream.MemoryWrite{State: []byte(`1`), Lock: l}); !errors.Is(err, pgstream.ErrLockEnded) {
		t.Errorf("a write with a token that was given up: %v", err)
	}
}

// A lock is answered at once, also while the workflow's row is in somebody's hands, and is of no use to others before it is committed.
func TestALockIsAnsweredAtOnce(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	e.write(m, "o-1", pgstream.MemoryWrite{})
	ctx, cancel := context.WithTimeout(e.ctx, patience)
	defer cancel()
	for what, hold := range map[string]func(pgx.Tx) error{
		"a write": func(tx pgx.Tx) error {
			_, err := m.Write(e.ctx, tx, "o-1", pgstream.MemoryWrite{State: []byte(`1`), Expected: pgstream.AnyVersion})
			return err
		},
		"a lock": func(tx pgx.Tx) error {
			_, err := m.TryLock(e.ctx, tx, "o-1", pgstream.LockOptions{})
			return err
		},
	} {
		tx, err := e.Begin(e.ctx)
		must(t, err)
		must(t, hold(tx))
		if _, err := m.TryLock(ctx, e.Pool, "o-1", pgstream.LockOptions{}); !errors.Is(err, pgstream.ErrLocked) {
			t.Errorf("during %s: %v", what, err)
		}
		// Tried again until it is free.
		done := make(chan error, 1)
		go func() {
			l, err := m.Lock(ctx, e.Pool, "o-1", pgstream.LockOptions{InitialDelay: time.Millisecond})
			if err == nil {
				err = l.Unlock(ctx, e.Pool)
			}
			done <- err
		}()
		must(t, tx.Rollback(e.ctx))
		must(t, <-done)
	}
	l, err := m.TryLock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{})
	must(t, err)
	if _, err := m.Lock(ctx, e.Pool, "o-1", pgstream.LockOptions{Retries: 2, InitialDelay: time.Millisecond}); !errors.Is(err, pgstream.ErrLocked) {
		t.Errorf("after two retries: %v", err)
	}
	short, stop := context.WithCancel(ctx)
	stop()
	if _, err := m.Lock(short, e.Pool, "o-1", pgstream.LockOptions{}); err == nil || !errors.Is(err, context.Canceled) {
		t.Errorf("after ctx: %v", err)
	}
	must(t, l.Unlock(e.ctx, e.Pool))
}

// A crash of the server would forget a token that was committed asynchronously, and give it to the next. Who gets none commits as the session wants.
func TestATokenIsCommittedSynchronously(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	for _, want := range []string{"on", "off"} { // the second finds it locked
		tx := e.begin()
		exec(e, tx, "set local synchronous_commit = off")
		_, err := m.TryLock(e.ctx, tx, "o-1", pgstream.LockOptions{})
		if got := errors.Is(err, pgstream.ErrLocked); got != (want == "off") {
			t.Fatalf("lock: %v", err)
		}
		var got string
		must(t, tx.QueryRow(e.ctx, "show synchronous_commit").Scan(&got))
		if got != want {
			t.Errorf("synchronous_commit is %s after the lock, want %s", got, want)
		}
		commit(e, tx)
	}
}

// A takeover that meets the write of the former owner: one of them happens first, and the loser knows.
func TestATakeoverMeetsAWrite(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	for i := range 20 {
		subject := fmt.Sprintf("o-%d", i)
		e.write(m, subject, pgstream.MemoryWrite{State: []byte(`0`)})
		old, err := m.TryLock(e.ctx, e.Pool, subject, pgstream.LockOptions{TTL: time.Microsecond})
		must(t, err)
		var wrote error
		var working sync.WaitGroup
		working.Go(func() {
			_, wrote = m.Write(e.ctx, e.Pool, subject, pgstream.MemoryWrite{State: []byte(`1`), Expected: pgstream.AnyVersion, Lock: old})
		})
		taken, err := m.Lock(e.ctx, e.Pool, subject, pgstream.LockOptions{TTL: time.Minute, InitialDelay: time.Millisecond})
		working.Wait()
		must(t, err)
		now := string(e.readMemory(m, subject).State)
		switch {
		case wrote == nil && (string(taken.Workflow.State) != "1" || now != "1"):
			t.Errorf("written, but the new owner was given %s", taken.Workflow.State)
		case wrote != nil && (!errors.Is(wrote, pgstream.ErrLockEnded) || now != "0"):
			t.Errorf("not written: %v, and the state is %s", wrote, now)
		}
	}
}

func TestFencingIsSeenBrokenWithoutTheToken(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.mutate("millrace_engine.write_memory_pattern", "else x.lock_token = p_token end", "else true end")
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	e.write(m, "o-1", pgstream.MemoryWrite{})
	old, err := m.TryLock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{TTL: time.Microsecond})
	must(t, err)
	_, err = m.Lock(e.ctx, e.Pool, "o-1", pgstream.LockOptions{InitialDelay: time.Millisecond})
	must(t, err)
	if _, err := m.Write(e.ctx, e.Pool, "o-1", pgstream.MemoryWrite{State: []byte(`1`), Expected: pgstream.AnyVersion, Lock: old}); err != nil {
		t.Errorf("nothing was seen without it: %v", err)
	}
}

// family makes root → a, b; a → a1, a2; a1 → a11, and another root.
func (e *engine) family(m *pgstream.Memory) {
	e.t.Helper()
	for _, w := range [][2]string{{"root", ""}, {"a", "root"}, {"b", "root"}, {"a1", "a"}, {"a2", "a"}, {"a11", "a1"}, {"other", ""}} {
		e.write(m, w[0], pgstream.MemoryWrite{Parent: w[1], Expected: pgstream.NoVersion, Metadata: []byte(`{"by": "test"}`)})
	}
}

func TestTreesOfWorkflows(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	e.family(m)
	for subject, want := range map[string][2]string{
		"root": {"a b", "a a1 a11 a2 b"}, "a": {"a1 a2", "a1 a11 a2"}, "a1": {"a11", "a11"}, "a11": {"", ""}, "other": {"", ""}, "nobody": {"", ""},
	} {
		children, err := m.Children(e.ctx, e.Pool, subject)
		must(t, err)
		below, err := m.Descendants(e.ctx, e.Pool, subject)
		must(t, err)
		if got := [2]string{subjects(children), subjects(below)}; got != want {
			t.Errorf("of %s: %q, want %q", subject, got, want)
		}
		for _, w := range below {
			if w.Parent == "" || w.Version != 1 || string(w.State) != "{}" || string(w.Metadata) != `{"by": "test"}` || w.CreatedAt.IsZero() || w.UpdatedAt.IsZero() {
				t.Errorf("%+v", w)
			}
		}
	}
	if w := e.readMemory(m, "a11"); w.Parent != "a1" || w.Root != "root" {
		t.Errorf("%+v", w)
	}
	// The parent is said once; saying it again is harmless, and another is refused.
	e.write(m, "a11", pgstream.MemoryWrite{Expected: 1, Parent: "a1"})
	for what, w := range map[string]pgstream.MemoryWrite{
		"another parent":       {Expected: pgstream.AnyVersion, Parent: "b"},
		"oneself as parent":    {Expected: pgstream.AnyVersion, Parent: "a11"},
		"a parent of a root":   {Expected: pgstream.AnyVersion, Parent: "root"},
		"a parent that is not": {Expected: pgstream.NoVersion, Parent: "nobody"},
	} {
		subject := map[string]string{"a parent of a root": "other", "a parent that is not": "new"}[what]
		w.State = []byte(`{}`)
		if _, err := m.Write(e.ctx, e.Pool, max(subject, "a11"), w); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// A child that was locked before its first write becomes a child all the same, and a lock alone is neither parent nor workflow.
	l, err := m.TryLock(e.ctx, e.Pool, "b1", pgstream.LockOptions{})
	must(t, err)
	if _, err := m.Write(e.ctx, e.Pool, "b11", pgstream.MemoryWrite{State: []byte(`{}`), Parent: "b1"}); !errors.Is(err, pgstream.ErrRefused) {
		t.Errorf("a lock became a parent: %v", err)
	}
	e.write(m, "b1", pgstream.MemoryWrite{Parent: "b", Expected: pgstream.NoVersion, Lock: l, Unlock: true})
	if w := e.readMemory(m, "b1"); w.Parent != "b" || w.Root != "root" || !w.LockedUntil.IsZero() {
		t.Errorf("%+v", w)
	}
	// By hand: with all below it.
	if n, err := m.Delete(e.ctx, e.Pool, "a", 7, nil); n != 0 {
		t.Errorf("removed %d, error %v", n, err)
	} else if present, ok := pgstream.IsVersionError(err); !ok || present != 1 {
		t.Errorf("removed in version 7: %v", err)
	}
	held, err := m.TryLock(e.ctx, e.Pool, "a11", pgstream.LockOptions{})
	must(t, err)
	if _, err := m.Delete(e.ctx, e.Pool, "a", pgstream.AnyVersion, nil); !errors.Is(err, pgstream.ErrLocked) {
		t.Errorf("removed although a child is locked: %v", err)
	}
	must(t, held.Unlock(e.ctx, e.Pool))
	if n, err := m.Delete(e.ctx, e.Pool, "a", 1, nil); err != nil || n != 4 {
		t.Errorf("removed %d, error %v", n, err)
	}
	if n, err := m.Delete(e.ctx, e.Pool, "nobody", pgstream.AnyVersion, nil); err != nil || n != 0 {
		t.Errorf("removed %d, error %v", n, err)
	}
	below, err := m.Descendants(e.ctx, e.Pool, "root")
	must(t, err)
	if got := subjects(below); got != "b b1" {
		t.Errorf("left: %s", got)
	}
}

// No index holds what changes while a workflow runs, so its updates stay in their page.
func TestUpdatesOfAWorkflowStayInTheirPage(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders", Table: "public.order_state"})
	e.family(m)
	conn := e.connect()
	for range 40 {
		l, err := m.TryLock(e.ctx, conn, "a", pgstream.LockOptions{})
		must(t, err)
		_, err = m.Write(e.ctx, conn, "a", pgstream.MemoryWrite{State: []byte(`{"x": 1}`), Expected: pgstream.AnyVersion, Lock: l, Unlock: true})
		must(t, err)
	}
	must(t, conn.Close(e.ctx)) // its counts are sent by now
	var updates, inPage int
	e.eventually("the statistics know every update", func() bool {
		must(t, e.QueryRow(e.ctx, "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relid = 'public.order_state'::regclass").Scan(&updates, &inPage))
		return updates == 80
	})
	// What cleans a page keeps away while anybody reads the database with an older snapshot, such as an analyze, or has the page in hand, such as a checkpoint. Then the page
	// runs full, and an update goes to the next. An index on anything that a lock or a write changes would send half of them there, or all.
	if inPage < 70 {
		t.Errorf("%d of %d updates stayed in their page", inPage, updates)
	}
}

// Whoever removes part of a tree waits for a child that is just being made there, and removes it too.
func TestARemovalMeetsANewChild(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	e.family(m)
	tx := e.begin()
	_, err := m.Write(e.ctx, tx, "new", pgstream.MemoryWrite{State: []byte(`{}`), Parent: "a11"})
	must(t, err)
	conn := e.connect()
	type result struct {
		removed int64
		err     error
	}
	done := make(chan result, 1)
	go func() {
		n, err := m.Delete(e.ctx, conn, "a", pgstream.AnyVersion, nil)
		done <- result{n, err}
	}()
	e.eventually("the removal waits, or is done", func() bool {
		return len(done) == 1 || one[bool](e, `select exists (select from pg_stat_activity where pid = $1 and wait_event_type = 'Lock')`, conn.PgConn().PID())
	})
	commit(e, tx)
	got := <-done
	must(t, got.err)
	if w := e.readMemory(m, "new"); got.removed != 5 || w.Version != 0 {
		t.Errorf("%d were removed, want a, a1, a2, a11 and the new child, which has version %d", got.removed, w.Version)
	}
}

// Trees go as a whole, when all of them is completed and was for long enough; nothing that somebody has in hand.
func TestCompletedTreesAreRemoved(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run("alter function millrace_engine.clean_memory set lock_timeout = '5s'") // it waits for nobody
	m := e.memory(pgstream.MemorySpec{Name: "orders", KeepCompleted: time.Hour})
	e.family(m)
	clean := func(want string) {
		t.Helper()
		e.run("select millrace_engine.clean_memory(id, 1000) from millrace_engine.memory")
		if got := one[string](e, `select coalesce(string_agg(subject, ' ' order by subject), '') from millrace."orders.memory"`); got != want {
			t.Errorf("left are %q, not %q", got, want)
		}
	}
	complete := func(subjects ...string) {
		t.Helper()
		for _, s := range subjects {
			e.write(m, s, pgstream.MemoryWrite{Expected: pgstream.ExistingVersion, Completed: true})
		}
	}
	complete("root", "a", "b", "a1", "a2", "other")
	e.jump(50 * time.Minute)
	clean("a a1 a11 a2 b other root")
	e.jump(20 * time.Minute)
	clean("a a1 a11 a2 b root") // a11 is open
	complete("a11")
	clean("a a1 a11 a2 b root") // not for long enough
	e.jump(50 * time.Minute)
	complete("a11") // it was completed 50 minutes ago, and that is what counts
	if w := e.readMemory(m, "a11"); w.CompletedAt.IsZero() {
		t.Error("it is not completed")
	}
	e.write(m, "b", pgstream.MemoryWrite{Expected: pgstream.AnyVersion, Reopen: true})
	e.jump(20 * time.Minute)
	clean("a a1 a11 a2 b root") // b is open again
	complete("b")
	e.jump(2 * time.Hour)
	l, err := m.TryLock(e.ctx, e.Pool, "a1", pgstream.LockOptions{})
	must(t, err)
	clean("a a1 a11 a2 b root") // somebody has locked a1
	must(t, l.Unlock(e.ctx, e.Pool))
	tx := e.begin()
	_, err = m.Write(e.ctx, tx, "new", pgstream.MemoryWrite{State: []byte(`{}`), Parent: "a1"})
	must(t, err)
	clean("a a1 a11 a2 b root") // somebody is just making a child
	must(t, tx.Rollback(e.ctx))
	clean("")
	if _, err := m.Write(e.ctx, e.Pool, "new", pgstream.MemoryWrite{State: []byte(`{}`), Parent: "a1"}); !errors.Is(err, pgstream.ErrRefused) {
		t.Errorf("a child of what was removed: %v", err)
	}
	// Locks of what never got a state.
	_, err = m.TryLock(e.ctx, e.Pool, "only locked", pgstream.LockOptions{TTL: time.Second})
	must(t, err)
	clean("only locked")
	e.jump(30 * time.Minute)
	clean("only locked") // whoever has the token may still write
	e.jump(2 * time.Hour)
	tx = e.begin()
	_, err = m.TryLock(e.ctx, tx, "only locked", pgstream.LockOptions{})
	must(t, err)
	clean("only locked") // somebody is just locking it
	must(t, tx.Rollback(e.ctx))
	_, err = pgstream.Maintain(e.ctx, e.Pool)
	must(t, err)
	clean("")
}

// A call ends with the tree that reaches its limit, and the next goes on.
func TestCleaningUpGoesInSteps(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.memory(pgstream.MemorySpec{Name: "orders", KeepCompleted: time.Hour})
	e.run(`insert into millrace."orders.memory" (subject, version, state, root, parent, completed_at)
		select i || c, 1, '{}', i || 'a', nullif(i || 'a', i || c), now() - interval '2 hours' from generate_series(1, 10) i, unnest(array['a', 'b', 'c']) c`)
	e.run(`insert into millrace."orders.memory" (subject, version, state, root, completed_at)
		select 'stuck' || i, 1, '{}', 'stuck' || i, now() - interval '3 hours' from generate_series(1, 10) i`)
	e.run(`insert into millrace."orders.memory" (subject, version, state, root, parent)
		select 'open' || i, 1, '{}', 'stuck' || i, 'stuck' || i from generate_series(1, 10) i`)
	var removed []int
	for range 5 {
		removed = append(removed, one[int](e, "select millrace_engine.clean_memory(1, 8)"))
	}
	if fmt.Sprint(removed) != "[9 9 9 3 0]" {
		t.Errorf("removed %v", removed)
	}
	did, err := pgstream.Maintain(e.ctx, e.Pool)
	if err != nil || len(did) > 0 {
		t.Errorf("did %v, error %v", did, err)
	}
}

func TestCleaningUpIsSeenBrokenWithoutItsChecks(t *testing.T) {
	t.Parallel()
	for name, change := range map[string][2]string{
		"open children":  {"and not exists (select from millrace.memory_pattern y where y.root = x.subject and y.completed_at is null)", ""},
		"the whole tree": {"continue when n <> cardinality(mine);", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			if name == "open children" {
				// The look under the lock would still see it: that is what it is for.
				e.mutate("millrace_engine.clean_memory_pattern", "continue when n <> cardinality(mine);", "mine := array(select x.subject from millrace.memory_pattern x where x.root = tree.subject);")
			}
			e.mutate("millrace_engine.clean_memory_pattern", change[0], change[1])
			m := e.memory(pgstream.MemorySpec{Name: "orders", KeepCompleted: time.Hour})
			e.family(m)
			for _, s := range []string{"root", "a", "b", "a1", "a2", "a11"} {
				e.write(m, s, pgstream.MemoryWrite{Expected: pgstream.AnyVersion, Completed: name != "open children" || s != "a11"})
			}
			e.jump(2 * time.Hour)
			if name == "the whole tree" {
				_, err := m.TryLock(e.ctx, e.Pool, "a11", pgstream.LockOptions{})
				must(t, err)
			}
			_, err := pgstream.Maintain(e.ctx, e.Pool)
			must(t, err)
			if n := one[int](e, `select count(*) from millrace."orders.memory" where root = 'root'`); n == 6 {
				t.Error("nothing was seen without it")
			}
		})
	}
}

// A memory whose table was altered is refused with what differs, by every verb, and does not keep maintenance from the others.
func TestAnAlteredMemoryIsRefused(t *testing.T) {
	t.Parallel()
	for change, want := range map[string]string{
		"alter table public.s drop column completed_at cascade":                                  "column completed_at timestamp with time zone is missing",
		"alter table public.s alter column metadata type text":                                   "column metadata is of type text, not jsonb",
		"alter table public.s rename column state to data":                                       "column state jsonb is missing",
		"alter table public.s drop constraint s_pkey":                                            "no primary key (subject)",
		"alter table public.s alter column parent set not null":                                  "column parent is not null",
		"alter table public.s add column tenant text not null":                                   "column tenant, which is none of ours, is not null and has no default",
		"drop table public.s":                                                                    "table public.s is missing",
		"alter table public.s add column tenant text not null default 't', add column note text": "",
	} {
		t.Run(change, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			m := e.memory(pgstream.MemorySpec{Name: "orders", Table: "public.s", KeepCompleted: time.Hour})
			other := e.memory(pgstream.MemorySpec{Name: "others", KeepCompleted: time.Hour})
			e.run(change)
			_, opened := pgstream.OpenMemory(e.ctx, e.Pool, "orders")
			_, created := pgstream.CreateMemory(e.ctx, e.Pool, pgstream.MemorySpec{Name: "orders"})
			_, read := m.Read(e.ctx, e.Pool, "o-1")
			_, written := m.Write(e.ctx, e.Pool, "o-1", pgstream.MemoryWrite{State: []byte(`1`)})
			_, locked := m.TryLock(e.ctx, e.Pool, "o-2", pgstream.LockOptions{})
			problem := one[string](e, "select coalesce(problem, '') from millrace.memories() where name = 'orders'")
			if want == "table public.s is missing" {
				must(t, created) // it is made anew
				return
			}
			for what, err := range map[string]error{"open": opened, "create": created, "read": read, "write": written, "lock": locked} {
				if want == "" && err != nil || want != "" && (!errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), want)) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if (problem == "") != (want == "") || !strings.Contains(problem, want) {
				t.Errorf("memories() says %q", problem)
			}
			e.write(other, "x", pgstream.MemoryWrite{Completed: true})
			e.jump(2 * time.Hour)
			did, err := pgstream.Maintain(e.ctx, e.Pool)
			if (err == nil) != (want == "") || !slices.Contains(did, "removed 1 completed workflows of memory others") {
				t.Errorf("maintenance did %v, error %v", did, err)
			}
		})
	}
}

// A memory takes over a table that has what it needs, brings its indexes, refuses one that has not, and keeps it when it is dropped.
func TestAMemoryOfOnesOwnTable(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run(`create schema "App"`)
	m := e.memory(pgstream.MemorySpec{Name: "orders", Table: `"App".state`})
	e.family(m)
	if n := one[int](e, `select count(*) from "App".state`); n != 7 {
		t.Errorf("%d workflows", n)
	}
	if !one[bool](e, "select millrace.drop_memory('orders')") || one[bool](e, "select millrace.drop_memory('orders')") {
		t.Error("dropped otherwise than once")
	}
	if n := one[int](e, "select count(*) from pg_proc where proname ~ '_memory_[0-9]+$'"); n != 0 {
		t.Errorf("%d functions are left", n)
	}
	e.run(`drop index "App".state_root_completed_at_idx`)
	m = e.memory(pgstream.MemorySpec{Name: "orders2", Table: `"App".state`})
	if w := e.readMemory(m, "a11"); w.Root != "root" {
		t.Errorf("taken over: %+v", w)
	}
	e.run(`drop index "App".state_root_completed_at_idx`)
	if _, err := pgstream.OpenMemory(e.ctx, e.Pool, "orders2"); !errors.Is(err, pgstream.ErrRefused) || !strings.Contains(err.Error(), `create index on "App".state (root, completed_at)`) {
		t.Errorf("without an index: %v", err)
	}
	e.memory(pgstream.MemorySpec{Name: "orders2"})
	_, err := pgstream.OpenMemory(e.ctx, e.Pool, "orders2")
	must(t, err)
	e.run("create table public.plain (id text primary key)")
	for what, spec := range map[string]pgstream.MemorySpec{
		"another structure":     {Name: "plain", Table: "public.plain"},
		"another table":         {Name: "orders2", Table: "public.elsewhere"},
		"another memory's":      {Name: "third", Table: `"App".state`},
		"a name that is none":   {Name: "Third"},
		"no time to keep":       {Name: "third", KeepCompleted: 2e6 * time.Hour},
		"a schema that is none": {Name: "third", Table: "nowhere.state"},
	} {
		if _, err := pgstream.CreateMemory(e.ctx, e.Pool, spec); err == nil || !errors.Is(err, pgstream.ErrRefused) && sqlState(err) != "3F000" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if !one[bool](e, "select millrace.drop_memory('orders2', true)") || one[*string](e, `select to_regclass('"App".state')::text`) != nil {
		t.Error("the table is still there")
	}
	if _, err := pgstream.OpenMemory(e.ctx, e.Pool, "orders2"); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("opened after it was dropped: %v", err)
	}
}

func TestWhatAMemoryRefuses(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.memory(pgstream.MemorySpec{Name: "orders"})
	for sql, state := range map[string]string{
		"select millrace.read_memory('nothing', 's')":                             "MR002",
		"select millrace.read_memory(null, 's')":                                  "MR002",
		"select millrace.read_memory('orders', '')":                               "MR004",
		"select millrace.read_memory('orders', null)":                             "MR004",
		"select millrace.read_memory('orders', repeat('x', 1025))":                "MR004",
		"select millrace.write_memory('orders', 's', null)":                       "MR004",
		"select millrace.write_memory('orders', 's', '1', -2)":                    "MR004",
		"select millrace.write_memory('orders', 's', '1', p_parent => 's')":       "MR004",
		"select millrace.write_memory('orders', 's', '1', p_unlock => true)":      "MR004",
		"select millrace.write_memory('orders', 's', '1', p_token => 1)":          "MR012",
		"select millrace.lock_memory('orders', 's', 0)":                           "MR004",
		"select millrace.lock_memory('orders', 's', 86401)":                       "MR004",
		"select millrace.lock_memory('orders', 's', null)":                        "MR004",
		"select millrace.extend_memory('orders', 's', 1, 0)":                      "MR004",
		"select millrace.extend_memory('orders', 's', 1)":                         "MR012",
		"select millrace.extend_memory('orders', 's', null)":                      "MR012",
		"select millrace.unlock_memory('orders', 's', 1)":                         "MR012",
		"select millrace.unlock_memory('orders', 's', null)":                      "MR012",
		"select millrace.delete_memory('orders', 's', p_token => 1)":              "MR012",
		"select millrace.delete_memory('orders', 's', 1)":                         "MR011",
		"select * from millrace.memory_children('orders', null)":                  "MR004",
		"select * from millrace.memory_descendants('nothing', 's')":               "MR002",
		"select millrace.create_memory('orders', p_keep_completed_seconds => -1)": "MR004",
	} {
		if _, err := e.Exec(e.ctx, sql); sqlState(err) != state {
			t.Errorf("%s: %v, not %s", sql, err, state)
		}
	}
	if n := one[int](e, `select count(*) from millrace."orders.memory"`); n != 0 {
		t.Errorf("%d workflows were made", n)
	}
}

// In an older snapshot a write does not happen upon a version that it cannot see.
func TestAWriteInAnOlderSnapshot(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	e.write(m, "o-1", pgstream.MemoryWrite{})
	for _, subject := range []string{"o-1", "o-2"} {
		tx, err := e.BeginTx(e.ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
		must(t, err)
		_, err = tx.Exec(e.ctx, "select 1")
		must(t, err)
		e.write(m, subject, pgstream.MemoryWrite{Expected: pgstream.AnyVersion})
		if _, err := m.Write(e.ctx, tx, subject, pgstream.MemoryWrite{State: []byte(`2`), Expected: pgstream.AnyVersion}); sqlState(err) != "40001" {
			t.Errorf("%s: %v", subject, err)
		}
		must(t, tx.Rollback(e.ctx))
	}
}

// State, ack and the next message are one transaction. Consumers are cut off in the middle, again and again; every message counts once.
func TestStateAckAndPublishAreOne(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("events")
	e.stream("done")
	e.group(pgstream.GroupSpec{Stream: "events", Name: "g", Mode: pgstream.ModeShared, AckWait: 500 * time.Millisecond, MaxAttempts: 1000, BackoffInitial: time.Millisecond, BackoffMax: time.Millisecond})
	m := e.memory(pgstream.MemorySpec{Name: "orders"})
	const messages, keys = 60, 3
	for i := range messages {
		e.run("select millrace.publish('events', $1, $2)", fmt.Sprintf(`{"n": %d}`, i), fmt.Sprintf("o-%d", i%keys))
	}
	type state struct {
		Seen []int `json:"seen"`
	}
	work := func(worker int, conn *pgx.Conn) error {
		for round := 0; ; round++ {
			if one[int](e, "select count(*) from millrace.done") == messages {
				return nil
			}
			rows, _ := conn.Query(e.ctx, "select claim, position, key, (payload->>'n')::int from millrace.receive('events', 'g', $1, p_max => 2)", strconv.Itoa(worker))
			type message struct {
				Claim    string
				Position int64
				Key      string
				N        int
			}
			batch, err := pgx.CollectRows(rows, pgx.RowToStructByPos[message])
			if err != nil {
				return err
			}
			for i, msg := range batch {
				err := pgx.BeginFunc(e.ctx, conn, func(tx pgx.Tx) error {
					if _, err := tx.Exec(e.ctx, "select millrace.ack_messages($1, $2)", msg.Claim, []int64{msg.Position}); err != nil {
						return err
					}
					w, err := m.Read(e.ctx, tx, msg.Key)
					if err != nil {
						return err
					}
					var s state
					if w.State != nil {
						if err := json.Unmarshal(w.State, &s); err != nil {
							return err
						}
					}
					s.Seen = append(s.Seen, msg.N)
					b, err := json.Marshal(s)
					if err != nil {
						return err
					}
					if _, err := m.Write(e.ctx, tx, msg.Key, pgstream.MemoryWrite{State: b, Expected: w.Version}); err != nil {
						return err
					}
					if _, err := tx.Exec(e.ctx, "select millrace.publish('done', $1)", fmt.Sprint(msg.N)); err != nil {
						return err
					}
					if (round+worker+i)%4 == 3 {
						// Cut off with everything done but the commit.
						e.run("select pg_terminate_backend($1)", conn.PgConn().PID())
					}
					return nil
				})
				var pg *pgconn.PgError
				if _, conflict := pgstream.IsVersionError(err); conflict || errors.Is(err, pgstream.ErrFenced) || errors.As(err, &pg) && pg.Code == "MR001" {
					continue
				}
				if err != nil {
					if conn, err = pgx.Connect(e.ctx, e.dsn); err != nil {
						return err
					}
					break
				}
			}
		}
	}
	var working sync.WaitGroup
	for i := range 2 {
		conn := e.connect()
		working.Go(func() {
			if err := work(i, conn); err != nil {
				t.Error(err)
			}
		})
	}
	working.Wait()
	var all []int
	for i := range keys {
		w := e.readMemory(m, fmt.Sprintf("o-%d", i))
		var s state
		must(t, json.Unmarshal(w.State, &s))
		if w.Version != int64(len(s.Seen)) {
			t.Errorf("version %d for %d messages", w.Version, len(s.Seen))
		}
		all = append(all, s.Seen...)
	}
	slices.Sort(all)
	if len(all) != messages || len(slices.Compact(all)) != messages || one[int](e, "select count(distinct payload) from millrace.done") != messages {
		t.Errorf("of %d messages these were counted: %v", messages, all)
	}
}
