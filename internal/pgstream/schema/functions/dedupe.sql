-- The signature of the first release, as in publish.sql.
drop function if exists millrace_engine.remember(millrace_engine.stream, text[]);

-- millrace_engine.remember(stream, dedupe keys, until) returns table (key, position)
-- Remembers the keys for the stream's dedupe window, or until then, and returns those that were remembered already, with the position of their message (null when it
-- was delayed). What is not returned is the caller's to publish, in this transaction: whoever comes with such a key later waits for its end, and
-- publishes it if it rolls back. An expired key is as good as none. Nulls are left out.
-- The unique index does the waiting, so it also holds for two-phase commit and after a savepoint was rolled back, and takes no place in the lock table.
-- Locks:  the rows of the keys, in the order of the keys and to the end of the transaction, also of keys that are returned: nobody purges them.
-- Raises: MR004 the window is 0, or a key is too long; 40001 in REPEATABLE READ and SERIALIZABLE when the snapshot does not see a key's row.
create or replace function millrace_engine.remember(p_stream millrace_engine.stream, p_keys text[], p_until timestamptz default null) returns table (key text, "position" bigint)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_nestloop = on
as $$
#variable_conflict use_column
declare
    keys text[] := array(select distinct x collate "C" from unnest(p_keys) x where x is not null order by 1);
    mine text[];
begin
    if cardinality(keys) = 0 then
        return;
    end if;
    if p_until is null and p_stream.dedupe_window_seconds = 0 then
        raise exception 'stream "%" keeps no dedupe keys', p_stream.name using errcode = 'MR004',
            hint = 'Set its dedupe window, or publish without a dedupe key.';
    end if;
    if exists (select from unnest(keys) x where octet_length(x) > 1024 + case when p_until is null then 0 else 32 end) then
        raise exception 'a dedupe key is longer than 1024 bytes' using errcode = 'MR004', hint = 'Use a hash of it.';
    end if;
    with i as (insert into millrace_engine.dedupe as d (stream_id, key, expires_at)
            select p_stream.id, u.x, coalesce(p_until, millrace_engine.clock() + make_interval(secs => p_stream.dedupe_window_seconds))
            from unnest(keys) with ordinality u(x, n) order by u.n
            on conflict (stream_id, key) do update set "position" = null, expires_at = excluded.expires_at
                where d.expires_at <= millrace_engine.clock()
            returning d.key)
        select array_agg(i.key) into mine from i;
    if cardinality(mine) = cardinality(keys) then
        return;
    end if;
    -- In a statement of its own, whose snapshot has what the insert had to wait for.
    return query select u.x, d."position" from (select unnest(keys) except select unnest(mine)) u(x)
        cross join lateral (select m."position" from millrace_engine.dedupe m where m.stream_id = p_stream.id and m.key = u.x limit 1) d;
end $$;

-- millrace_engine.remember_positions(stream id, dedupe keys, positions) returns void
-- Completes what `remember` has begun in this transaction.
-- The rows exist, so every insert becomes an update: by the unique index, whatever the planner believes about the table. It touches no index.
create or replace function millrace_engine.remember_positions(p_stream integer, p_keys text[], p_positions bigint[]) returns void
language plpgsql volatile as $$
begin
    insert into millrace_engine.dedupe as d (stream_id, key, "position", expires_at)
        select p_stream, u.key, u."position", 'infinity' from unnest(p_keys, p_positions) u(key, "position") where u.key is not null
        on conflict (stream_id, key) do update set "position" = excluded."position";
end $$;

-- millrace_engine.purge_dedupe(max) returns integer
-- Removes up to max expired dedupe keys and returns how many. Nothing depends on it but disk space.
-- Locks:  the rows it removes, and none that a publisher holds.
create or replace function millrace_engine.purge_dedupe(p_max integer) returns integer
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
    n integer;
begin
    with old as materialized (select d.ctid from millrace_engine.dedupe d where d.expires_at <= now_
            order by d.expires_at limit p_max for update skip locked)
        delete from millrace_engine.dedupe d where d.ctid = any (array(select o.ctid from old o));
    get diagnostics n = row_count;
    return n;
end $$;
comment on function millrace_engine.purge_dedupe(integer) is 'Removes expired dedupe keys.';
