package seeds

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// The memory of machines: read, write with an optimistic version, lock, unlock, clean up, root and children; its structure is validated, and its table is one's own.
func TestSeed_A10_WorkflowMemory(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("create schema shop; grant usage on schema shop to " + runtimeRole)
	d.admin("select millrace.create_memory('orders', p_table => 'shop.order_state')")

	d.same("nobody has written it", []string{"null|0"}, "select state::text, version from millrace.read_memory('orders', 'o-1')")
	d.same("written", []string{"1"}, `select millrace.write_memory('orders', 'o-1', '{"step": "reserve"}', 0)`)
	d.same("written upon version 1", []string{"2"}, `select millrace.write_memory('orders', 'o-1', '{"step": "pay"}', 1, p_metadata => '{"by": "billing"}')`)
	d.fails("MR011", `select millrace.write_memory('orders', 'o-1', '{"step": "reserve again"}', 1)`)
	d.fails("MR011", `select millrace.write_memory('orders', 'o-1', '{"step": "begin again"}', 0)`)
	d.same("read", []string{`{"step": "pay"}|2|{"by": "billing"}`}, "select state::text, version, metadata::text from millrace.read_memory('orders', 'o-1')")

	token := value[int64](d, "select token from millrace.lock_memory('orders', 'o-1', 60, 'worker-1')")
	d.same("locked", []string{"true|worker-1"}, "select token is null, holder from millrace.lock_memory('orders', 'o-1', 60, 'worker-2')")
	d.fails("MR013", `select millrace.write_memory('orders', 'o-1', '{}', 2)`)
	d.same("written by the owner", []string{"3"}, `select millrace.write_memory('orders', 'o-1', '{"step": "ship"}', 2, p_token => $1)`, token)
	d.rows("select millrace.unlock_memory('orders', 'o-1', $1)", token)
	d.same("given up", []string{"true"}, "select locked_until is null from millrace.read_memory('orders', 'o-1')")

	// Three generations. Each row knows its root, so the tree of a root is one look.
	for _, w := range [][2]string{{"pay-1", "o-1"}, {"ship-1", "o-1"}, {"parcel-1", "ship-1"}} {
		d.rows("select millrace.write_memory('orders', $1, '{}', 0, p_parent => $2)", w[0], w[1])
	}
	d.same("children", []string{"pay-1", "ship-1"}, "select subject from millrace.memory_children('orders', 'o-1')")
	d.same("all below the root", []string{"pay-1", "ship-1", "parcel-1"}, "select subject from millrace.memory_descendants('orders', 'o-1')")
	d.same("root and parent", []string{"o-1|ship-1"}, "select root, parent from millrace.read_memory('orders', 'parcel-1')")
	d.same("removed with what is below", []string{"2"}, "select millrace.delete_memory('orders', 'ship-1')")
	d.same("its own table", []string{"o-1", "pay-1"}, "select subject from shop.order_state order by subject")

	d.admin("alter table shop.order_state alter column version type integer")
	for _, verb := range []string{"check_memory('orders')", "read_memory('orders', 'o-1')", "write_memory('orders', 'o-1', '{}')", "lock_memory('orders', 'o-1')"} {
		_, err := query(d.ctx, d.app, "select millrace."+verb)
		if err == nil || !strings.Contains(err.Error(), "column version is of type integer, not bigint") {
			t.Errorf("%s on an altered table: %v", verb, err)
		}
	}
	d.admin("alter table shop.order_state alter column version type bigint")
	d.same("mended", []string{"2"}, "select count(*) from shop.order_state where subject in ('o-1', 'pay-1')")
	d.rows("select millrace.check_memory('orders')")
}

// Locks end by themselves, are retried with a growing pause, and belong to whoever has the token. In arvo unlock removes whatever lock there is: here a late owner's
// unlock and write are refused, and the next owner's lock stays.
func TestSeed_A11_LocksWithAnOwner(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_memory('orders')")
	lock := "select token from millrace.lock_memory('orders', 'o-1', $1, $2)"
	first := value[int64](d, lock, 0.2, "first")
	d.rows("select millrace.write_memory('orders', 'o-1', '0', 0, p_token => $1)", first)
	// Nobody gives it up. The second gets it when its time is over, by the database's clock.
	var second int64
	d.eventually("the lock of a dead owner expires", func() (bool, string) {
		token := value[*int64](d, lock, 60, "second")
		if token != nil {
			second = *token
		}
		return token != nil, "locked"
	})
	if second <= first {
		t.Errorf("token %d after %d", second, first)
	}
	d.fails("MR012", "select millrace.unlock_memory('orders', 'o-1', $1)", first)
	d.fails("MR012", "select millrace.extend_memory('orders', 'o-1', $1, 60)", first)
	d.fails("MR012", "select millrace.write_memory('orders', 'o-1', '1', p_token => $1)", first)
	d.same("still the second's", []string{"second|0"}, "select lock_holder, state::text from millrace.read_memory('orders', 'o-1')")
	d.rows("select millrace.unlock_memory('orders', 'o-1', $1)", second)

	// Many want it. Each tries again, with pauses that grow and are in part random, and counts under its lock: the version is not looked at.
	const workers, each = 5, 6
	var working sync.WaitGroup
	for i := range workers {
		working.Go(func() {
			for range each {
				for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
					counted, err := query(d.ctx, d.app, "select token, state::text from millrace.lock_memory('orders', 'o-1', 60, $1)", fmt.Sprint("worker-", i))
					if err != nil {
						t.Error(err)
						return
					}
					token, n, _ := strings.Cut(counted[0], "|")
					if token != "null" {
						if _, err := query(d.ctx, d.app, "select millrace.write_memory('orders', 'o-1', to_jsonb($1::text::integer + 1), p_token => $2::text::bigint, p_unlock => true)", n, token); err != nil {
							t.Error(err)
						}
						break
					}
					time.Sleep(pause/2 + time.Duration(time.Now().UnixNano())%(pause/2+1))
				}
			}
		})
	}
	working.Wait()
	d.same("counted", []string{fmt.Sprint(workers * each)}, "select state::text from millrace.read_memory('orders', 'o-1')")
}

// Completed workflows are removed after the time that their memory keeps them, whole trees at once; what is open stays.
func TestSeed_A14_CompletedWorkflowsAreRemoved(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_memory('orders', p_keep_completed_seconds => 1)")
	d.admin("select millrace.create_memory('kept')")
	for _, memory := range []string{"orders", "kept"} {
		for _, w := range [][2]string{{"done", ""}, {"done-child", "done"}, {"half", ""}, {"half-child", "half"}, {"open", ""}} {
			d.rows("select millrace.write_memory($1, $2, '{}', 0, p_parent => nullif($3, ''), p_completed => $4)", memory, w[0], w[1], w[0] != "half-child" && w[0] != "open")
		}
	}
	d.eventually("maintenance removes what is completed", func() (bool, string) {
		if _, err := pgstream.Maintain(d.ctx, d.owner); err != nil {
			t.Error(err)
		}
		left := strings.Join(d.rows(`select subject from millrace."orders.memory" order by subject`), " ")
		return left == "half half-child open", left
	})
	d.rows("select millrace.write_memory('orders', 'half-child', '{}', 1, p_completed => true)")
	d.eventually("the tree goes when its last child is completed", func() (bool, string) {
		if _, err := pgstream.Maintain(d.ctx, d.owner); err != nil {
			t.Error(err)
		}
		left := strings.Join(d.rows(`select subject from millrace."orders.memory" order by subject`), " ")
		return left == "open", left
	})
	d.same("without a policy all of it stays", []string{"5"}, `select count(*) from millrace."kept.memory"`)
}
