-- millrace_engine.read_template(from, max, to, filter, safe) returns messages, each with the horizon that was used
-- Copied once per stream with the names filled in (install_functions.sql); millrace.read and the Go client call the copy.
-- safe is a horizon that the caller was told before, or null: what it covers is read without looking at the locks again.
-- The plan settings keep the one good plan, an ordered index scan, whatever the statistics said when a segment was empty.
create or replace function millrace_engine.read_template(p_from bigint, p_max integer, p_to bigint, p_filter jsonb, p_safe bigint)
returns table ("position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, horizon bigint)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    c_stream constant integer := /* stream id */ 0;
    from_  bigint := greatest(p_from, 1);
    to_    bigint;
    safe   bigint := p_safe;
    fresh  boolean := false;
    filter constant jsonb := millrace_engine.checked_filter(p_filter);
    s      record;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'read needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot would pass over messages. Call read in a READ COMMITTED transaction.';
    end if;
    if pg_is_in_recovery() then
        raise exception 'a stream cannot be read on a standby: the publishers'' locks are only on the primary' using errcode = 'MR003',
            hint = 'Connect to the primary.';   -- not even up to a horizon of the primary, which may be ahead of what was replayed
    end if;
    if p_from is null then
        raise exception 'the position to read from is missing' using errcode = 'MR004', hint = 'Pass the first position to read; positions begin with 1.';
    end if;
    if filter ? 'unrouted' then
        raise exception 'read knows no unrouted messages' using errcode = 'MR004', hint = 'Make a consumer group with this filter and receive from it.';
    end if;
    if p_max is null or p_max not between 1 and 10000 then
        raise exception 'cannot read % messages', coalesce(p_max::text, 'null') using errcode = 'MR004', hint = 'Ask for 1 to 10000.';
    end if;
    select x.name, x.first_position into strict s from millrace_engine.stream x where x.id = c_stream;
    if from_ >= s.first_position then
        loop
            if safe is null or safe < from_ then
                safe := millrace_engine.horizon_from(c_stream, p_safe);
                fresh := true;
            end if;
            to_ := least(safe, p_to);
            -- A new statement: its snapshot is younger than the horizon.
            if filter is null then
                return query select m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, safe
                    from millrace.stream_template m
                    where m."position" >= from_ and m."position" <= to_ order by m."position" limit p_max;
            else
                return query select m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, safe
                    from millrace.stream_template m
                    where m."position" >= from_ and m."position" <= to_ and millrace_engine.matches(filter, m.key, m.headers)
                    order by m."position" limit p_max;
            end if;
            exit when found or fresh or p_to <= safe;
            safe := null;
        end loop;
        -- TRUNCATE empties a segment for older snapshots too, so look at the mark once more: it moves in the same transaction.
        select x.name, x.first_position into strict s from millrace_engine.stream x where x.id = c_stream;
    end if;
    if from_ < s.first_position then
        raise exception 'position out of range: position % of stream "%" has been removed, the first that is left is %', from_, s.name, s.first_position
            using errcode = 'MR008', hint = format('Read from position %s on.', s.first_position);
    end if;
end $$;

-- millrace.read(stream, from, max, to, filter) returns messages
-- Reads the log without a consumer group: the first max messages from position `from` to position `to` (null: to the end) that pass the filter
-- (null: all, matches.sql), committed and final. Nothing is claimed and nothing is written.
-- payload is set in JSON streams, payload_bytes in Bytes streams.
-- Order:   by position.
-- Tail:    the next call begins at the last row's position + 1, and never anywhere else.
-- Cost:    a look at the publishers' locks for each call, and an index scan. With a filter it reads until max messages have passed it.
-- Locks:   none but those of any reader; a long transaction around it keeps segments from being truncated.
-- Raises:  MR002 no such stream; MR003 isolation level, or a standby; MR004 bad argument; MR008 messages from `from` on were removed, before the call
--          or during it: never fewer than there were.
create or replace function millrace.read(p_stream text, p_from bigint, p_max integer default 100, p_to bigint default null, p_filter jsonb default null)
returns table ("position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz)
language plpgsql volatile as $$
begin
    return query execute format('select r."position", r.key, r.headers, r.payload, r.payload_bytes, r.created_at
        from millrace_engine.read_%s($1, $2, $3, $4, null) r', millrace_engine.stream_id(p_stream)) using p_from, p_max, p_to, p_filter;
end $$;
comment on function millrace.read(text, bigint, integer, bigint, jsonb) is 'Reads messages of a stream by position, without a consumer group.';
