-- millrace_engine.horizon(stream id) returns bigint
-- The highest position that is safe to read: every position up to it is committed or will never exist.
--
-- H, the last allocated position, is read first; then the lowest L among the publishers that are still open. An open publisher whose
-- position is at most H already held its lock when H was read, because it locks before it allocates; and locks are released only
-- after the commit is visible. Hence horizon = least(H, min L). The order of the two reads matters, and the caller must read the log
-- in a later statement, in READ COMMITTED.
--
-- Listing the locks costs as much as there are locks in the whole server, 6 ms with 10,000 of them. Mostly nobody is writing, and then it can be done without
-- (nobody_writes).
--
-- The lock's key is 24 bits of stream and the low 40 bits of L, decoded relative to H (L may also be a little above H).
-- Only locks of this database, granted, in share mode count.
create or replace function millrace_engine.horizon(p_stream integer) returns bigint
language plpgsql volatile as $$
declare
    h bigint;
    l bigint;
begin
    if pg_is_in_recovery() then
        raise exception 'the horizon cannot be read on a standby: the publishers'' locks are only on the primary'
            using errcode = 'MR003', hint = 'Connect to the primary.';
    end if;
    h := coalesce(pg_sequence_last_value(('millrace_engine.position_' || p_stream)::regclass), 0);
    if millrace_engine.nobody_writes() then
        return h;
    end if;
    select min(h - (((h - (((k.classid::bigint & 255) << 32) | k.objid::bigint) + 549755813888) & 1099511627775) - 549755813888))
        into l
        from pg_locks k
        where k.locktype = 'advisory' and k.objsubid = 1 and k.mode = 'ShareLock' and k.granted
          and k.classid::bigint >> 8 = p_stream
          and k.database = (select d.oid from pg_database d where d.datname = current_database());
    return least(h, l);
end $$;
comment on function millrace_engine.horizon(integer) is
    'Highest position of a stream that is safe to read: everything up to it is committed or will never exist.';

-- millrace_engine.horizon_from(stream id, known) returns bigint
-- The same for a caller that has a horizon from before, or null; never lower than that. When not much was published since, it does not list the locks but tries those that may be there.
--
-- No publisher that is open, and no later one, carries an L more than 7 below a horizon that was ever handed out (publish_guard_template.sql): after it had its lock it read the
-- last position again, and found L that recent. A horizon that was computed from a last position read before that is no higher than it; one computed later has seen the lock. So the
-- locks that matter are those of the positions from known - 7 to H, and H was read first.
-- That holds in streams with fresh_locks (stream_state.sql), which is read after H too. A transaction that may have published itself would not be kept out by its own lock, so it lists.
--
-- To try is to take the lock exclusively, as a session, and to give it back in the same expression, in which nothing can interrupt: so no lock is left behind, and
-- neither a transaction's end nor a pooler matters. A publisher whose L is a moment old may have to wait for that moment. Another reader's try looks like a publisher, hence three tries.
create or replace function millrace_engine.horizon_from(p_stream integer, p_known bigint) returns bigint
language plpgsql volatile as $$
declare
    h bigint;
    k bigint;
    fresh boolean;
begin
    h := coalesce(pg_sequence_last_value(('millrace_engine.position_' || p_stream)::regclass), 0);
    if h - p_known between 0 and 64 then
        if pg_current_xact_id_if_assigned() is null and not pg_is_in_recovery() then
            select x.fresh_locks into fresh from millrace_engine.stream x where x.id = p_stream;
            if fresh then
                for i in greatest(-7, -p_known) .. h - p_known - 1 loop
                    k := (p_stream::bigint << 40) | ((p_known + i) & 1099511627775);
                    if not (case when pg_try_advisory_lock(k) then pg_advisory_unlock(k) else false end)
                            and not (case when pg_try_advisory_lock(k) then pg_advisory_unlock(k) else false end)
                            and not (case when pg_try_advisory_lock(k) then pg_advisory_unlock(k) else false end) then
                        return greatest(p_known, p_known + i);
                    end if;
                end loop;
                return h;
            end if;
        end if;
    end if;
    return greatest(p_known, millrace_engine.horizon(p_stream));
end $$;
comment on function millrace_engine.horizon_from(integer, bigint) is 'The horizon of a stream for a caller that has one from before: mostly without listing the locks.';

-- millrace_engine.nobody_writes() returns boolean
-- Whether no transaction of the server that has an id is open; false also when that is not known. A publisher gets its id before it allocates a position
-- (publish_guard_template.sql). So whoever reads the last position first, and hears then that nobody writes, knows that every position up to it is committed or will never exist,
-- and that later statements see it.
-- A snapshot lists the open transactions below its xmax. That none has begun since is what pg_xact_status says by its error: xmax has not been handed out. (age() would say so without
-- an error, but only once per transaction.) A caller that has an id itself may have published.
create or replace function millrace_engine.nobody_writes() returns boolean
language plpgsql volatile as $$
declare
    s pg_snapshot := pg_current_snapshot();
begin
    if right(s::text, 1) <> ':' or pg_current_xact_id_if_assigned() is not null then
        return false;
    end if;
    perform pg_xact_status(pg_snapshot_xmax(s));
    return false;
exception when invalid_parameter_value then
    return true;
end $$;
comment on function millrace_engine.nobody_writes() is 'Whether no transaction of the server that has an id is open.';
