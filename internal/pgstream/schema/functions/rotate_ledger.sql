-- The ledgers are three rings. Rows go to the current one, whose number is in the sequence millrace_engine.ring; what is still needed from the one before
-- is carried over; the third is truncated.
--
-- Whoever writes asks for the ring under the lock that protects what it writes: the group's receive lock for claims, the claim's lock for settlements.
-- Hence two facts that let the hot path look at one ring only (receive_template.sql):
--   * a lane's rows in the current ring are its newest, because its claims are written one after the other;
--   * what settles a claim whose newest copy is in the current ring is there too, because it was written later.
--
-- millrace_engine.rotate_ledger(bytes) returns boolean
-- Moves to the next ring when the current one is larger than bytes and the next is empty. True when it moved. A writer that still has the old
-- ring in mind does no harm: every reader looks at all three.
create or replace function millrace_engine.rotate_ledger(p_bytes bigint) returns boolean
language plpgsql volatile as $$
declare
    cur smallint;
    next_ smallint;
    used boolean;
begin
    perform pg_advisory_xact_lock(1836019570, 2);   -- one rotation at a time
    cur := pg_sequence_last_value('millrace_engine.ring');
    next_ := (cur + 1) % 3;
    if pg_relation_size(format('millrace_engine.claim_%s', cur)::regclass)
            + pg_relation_size(format('millrace_engine.settlement_%s', cur)::regclass) < p_bytes then
        return false;
    end if;
    select exists (select from millrace_engine.claim c where c.ring = next_) or exists (select from millrace_engine.settlement s where s.ring = next_)
        into used;
    if used then
        return false;
    end if;
    perform setval('millrace_engine.ring', next_);
    return true;
end $$;
comment on function millrace_engine.rotate_ledger(bigint) is 'Moves new ledger rows to the next ring when the current one is large.';

-- millrace_engine.carry_over(group) returns boolean
-- Copies what the group still needs into the current ring: its open claims, and a row that remembers how far it is. An emptied ledger would
-- begin again from the first claim otherwise. False when a claim is being settled this moment; call it again then.
-- Each open claim is locked exclusively, so no settlement can slip into the old ring beside its copy.
-- Nothing to copy is the rule, and is found out without the group's lock, which would keep its members waiting. truncate_ledger looks again.
create or replace function millrace_engine.carry_over(p_group integer) returns boolean
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
declare
    cur smallint := pg_sequence_last_value('millrace_engine.ring');
    needed boolean := false;
    l record;
    last millrace_engine.claim;
    o millrace_engine.claim;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'maintenance needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all that a TRUNCATE would remove.';
    end if;
    for l in select x.id from millrace_engine.lane x where x.group_id = p_group loop
        select c.* into strict last from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1;
        needed := needed or last.ring <> cur or last.stragglers is not null
            or exists (select from millrace_engine.claim c where c.lane_id = l.id and c.claim > last.floor and c.ring <> cur);
    end loop;
    if not needed then
        return true;
    end if;
    perform pg_advisory_xact_lock(536870912 + p_group, 0);
    cur := pg_sequence_last_value('millrace_engine.ring');
    for l in select x.id from millrace_engine.lane x where x.group_id = p_group order by x.id loop
        select c.* into strict last from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1;
        -- First the row that is the newest: a lane's highest row must be in the current ring if any is, also when we stop half-way.
        if last.ring <> cur then
            insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt, ring,
                    stragglers, careful_to, settled)
                select l.id, last.claim + 1, last.frontier, last.frontier, last.frontier, last.horizon, f.new_floor, 0, 'infinity', last.next_check,
                    0, 0, cur, f.new_stragglers, last.careful_to, last.settled
                from millrace_engine.raise_floor(l.id, last.claim, last.floor, last.stragglers) f;
            insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
                values (l.id, last.claim + 1, millrace_engine.clock(), cur, 'A');
        end if;
        for o in select * from millrace_engine.open_claims(l.id, last.floor, last.stragglers) loop
            continue when o.ring = cur;
            if not pg_try_advisory_xact_lock((1073741824 + l.id)::integer, (o.claim & 2147483647)::integer) then
                return false;
            end if;
            insert into millrace_engine.claim select (x).* from (
                select jsonb_populate_record(y, jsonb_build_object('ring', cur, 'copy', y.copy + 1)) as x
                from millrace_engine.open_claim(l.id, o.claim) y) z;
        end loop;
    end loop;
    return true;
end $$;
comment on function millrace_engine.carry_over(integer) is 'Copies the open claims and the progress of a group into the current ring.';

-- millrace_engine.truncate_ledger() returns boolean
-- Empties the ring that is neither current nor previous, when no lane needs it. True when it is empty afterwards.
-- Locks:  the ring: share while it finds out, access exclusive for the moment that TRUNCATE takes.
-- Raises: 55P03 when somebody keeps it busy; call it again later.
create or replace function millrace_engine.truncate_ledger() returns boolean
language plpgsql volatile
set lock_timeout = '50ms'
set enable_seqscan = off
set jit = off
as $$
declare
    cur smallint;
    old smallint;
    needed boolean;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'maintenance needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all that a TRUNCATE would remove.';
    end if;
    cur := pg_sequence_last_value('millrace_engine.ring');
    old := (cur + 1) % 3;
    if not exists (select from millrace_engine.claim c where c.ring = old) and not exists (select from millrace_engine.settlement s where s.ring = old) then
        return true;
    end if;
    -- Readers may come while all lanes are looked at, which takes longer the more there are. Whoever writes had this ring in mind since it was the current one.
    execute format('lock table millrace_engine.claim_%1$s, millrace_engine.settlement_%1$s in share mode', old);
    -- A new statement after the lock: such writers are done now.
    select exists (
        select from millrace_engine.lane l, lateral millrace_engine.lane_progress(l.id) f
        where (select c.ring from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1) = old
           or exists (select from millrace_engine.open_claims(l.id, f.floor, f.stragglers) o where o.ring = old
                and not exists (select from millrace_engine.claim d where d.lane_id = o.lane_id and d.claim = o.claim and d.ring <> old))
    ) into needed;
    if needed then
        return false;
    end if;
    execute format('lock table millrace_engine.claim_%1$s, millrace_engine.settlement_%1$s in access exclusive mode', old);
    execute format('truncate millrace_engine.claim_%1$s, millrace_engine.settlement_%1$s', old);
    return true;
end $$;
comment on function millrace_engine.truncate_ledger() is 'Empties the oldest ledger ring once nothing in it is needed.';
