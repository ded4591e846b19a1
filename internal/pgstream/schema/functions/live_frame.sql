-- Best-effort frames are rows of millrace_engine.live_frame, of two rings: unlogged, appended to and never updated or deleted from, so they cost no WAL and leave no
-- dead rows. Each row carries the key's rate and the bound that follows from it; readers look at the newest row of a key and pass over what is beyond its
-- bound. When the current ring has grown, new frames go to the other one; what is still within a bound is carried over, and the old ring is truncated: a
-- copying garbage collector. Without maintenance only disk space grows.

-- millrace_engine.frame_rate(rate, burst, ms, alpha) returns double precision
-- The moving average of a key's frames per second, when a frame comes ms after the millisecond of the one before, in which burst of them came. Frames of one
-- millisecond are one sample, burst frames in ms, taken when the next one comes later: taken one by one, those behind the first would each tell of a rate of zero.
create or replace function millrace_engine.frame_rate(p_rate double precision, p_burst integer, p_ms bigint, p_alpha double precision) returns double precision
language sql immutable
return case when p_ms > 0 then p_alpha * p_burst * 1000 / p_ms + (1 - p_alpha) * p_rate else p_rate end;

-- millrace_engine.frame_bound(rate, settings) returns integer
-- How many best-effort frames of a key are kept: 2 * ceil(rate * ttl), between min_length and max_length.
create or replace function millrace_engine.frame_bound(p_rate double precision, p_frames jsonb) returns integer
language sql immutable
return least(greatest(2 * ceil(p_rate * (p_frames ->> 'ttl_seconds')::double precision), (p_frames ->> 'min_length')::double precision),
    (p_frames ->> 'max_length')::double precision);

-- millrace_engine.rotate_frames(bytes) returns text
-- One round of upkeep; returns what it did, or null. First it empties the ring that is not current: it copies what is within the bound of its key into the
-- current one, unless the key has had no best-effort frame for ten times the ttl, and truncates. Then it moves new frames to the empty ring, when the current
-- one is larger than bytes and than twice what was copied last, so that a frame is copied once on average, however much is live.
-- Locks:  the old ring, for a moment before and after the copying; nobody writes there but who began before the ring was left.
-- Raises: MR003 isolation level; 55P03 when a transaction keeps the old ring busy: call it again later.
create or replace function millrace_engine.rotate_frames(p_bytes bigint) returns text
language plpgsql volatile
set lock_timeout = '50ms' as $$
declare
    cur  integer;
    old  integer;
    used boolean;
    kept bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'maintenance needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all that a TRUNCATE would remove.';
    end if;
    perform pg_advisory_xact_lock(1836019570, 3);   -- one rotation at a time
    cur := pg_sequence_last_value('millrace_engine.live_frame_ring');
    old := 1 - cur;
    execute format('select exists (select from millrace_engine.live_frame_%s)', old) into used;
    if used then
        begin
            -- Whoever would keep us from truncating keeps us from copying, too. The lock is given back: nobody has to wait for the copying.
            execute format('lock table millrace_engine.live_frame_%s in access exclusive mode', old);
            raise exception using errcode = 'MR000';
        exception when sqlstate 'MR000' then
            null;
        end;
        execute format('lock table millrace_engine.live_frame_%s in share mode', old);
        execute format('insert into millrace_engine.live_frame (stream_id, ring, bound, burst, frame, frame_count, live_count, rate, created_at, key, headers, payload, payload_bytes)
            select f.stream_id, %1$s, f.bound, f.burst, f.frame, f.frame_count, f.live_count, f.rate, f.created_at, f.key, f.headers, f.payload, f.payload_bytes
            from (select distinct o.stream_id, o.key from millrace_engine.live_frame_%2$s o) k
            join millrace_engine.stream s on s.id = k.stream_id
            cross join lateral (select n.live_count, n.bound, n.created_at from millrace_engine.live_frame n
                where n.stream_id = k.stream_id and n.key = k.key order by n.frame desc limit 1) n
            join millrace_engine.live_frame_%2$s f on f.stream_id = k.stream_id and f.key = k.key and f.live_count > n.live_count - n.bound
            where n.created_at > millrace_engine.clock() - 10 * make_interval(secs => (s.frames ->> ''ttl_seconds'')::double precision)', cur, old);
        get diagnostics kept = row_count;
        execute format('lock table millrace_engine.live_frame_%s in access exclusive mode', old);
        execute format('truncate millrace_engine.live_frame_%s', old);
        perform setval('millrace_engine.live_frame_kept', pg_relation_size(format('millrace_engine.live_frame_%s', cur)::regclass));
        return format('emptied a ring of best-effort frames, of which %s are kept', kept);
    end if;
    if pg_relation_size(format('millrace_engine.live_frame_%s', cur)::regclass) > greatest(p_bytes, 2 * pg_sequence_last_value('millrace_engine.live_frame_kept')) then
        perform setval('millrace_engine.live_frame_ring', old);
        return 'moved best-effort frames to the next ring';
    end if;
    return null;
end $$;
comment on function millrace_engine.rotate_frames(bigint) is 'One round of upkeep of the rings of best-effort frames.';

-- millrace_engine.purge_frames(max) returns integer
-- Removes up to max summaries that had no patch for the summary_ttl of their stream's frames, and whoever waited for frames and does no more. Returns how many summaries.
-- Locks:  the rows it removes, and none that an append holds.
create or replace function millrace_engine.purge_frames(p_max integer) returns integer
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
    n integer;
begin
    with old as materialized (select x.ctid
            from (select s.id, now_ - make_interval(secs => (s.frames ->> 'summary_ttl_seconds')::double precision) as before
                  from millrace_engine.stream s where (s.frames ->> 'summary_ttl_seconds')::double precision > 0) s
            join millrace_engine.frame_summary x on x.stream_id = s.id and x.hour <= floor(extract(epoch from s.before) / 3600)::integer and x.last_at < s.before
            limit p_max for update of x skip locked)
        delete from millrace_engine.frame_summary x where x.ctid = any (array(select o.ctid from old o));
    get diagnostics n = row_count;
    with old as materialized (select w.ctid from millrace_engine.frame_waiter w where w.until < clock_timestamp() - interval '1 minute' limit p_max for update skip locked)
        delete from millrace_engine.frame_waiter w where w.ctid = any (array(select o.ctid from old o));
    return n;
end $$;
comment on function millrace_engine.purge_frames(integer) is 'Removes summaries of keys that had no patch for long.';
