-- The signatures of earlier versions, as in publish.sql.
drop function if exists millrace.publish_batch(text, jsonb[], text[], jsonb[]);
drop function if exists millrace.publish_batch_bytes(text, bytea[], text[], jsonb[]);
drop function if exists millrace_engine.check_batch(integer, integer, integer);
drop function if exists millrace.publish_batch(text, jsonb[], text[], jsonb[], double precision, timestamptz, integer, text[], boolean);
drop function if exists millrace.publish_batch_bytes(text, bytea[], text[], jsonb[], double precision, timestamptz, integer, text[], boolean);
drop function if exists millrace_engine.append_batch(text, text, anyarray, integer, text[], jsonb[], double precision, timestamptz, integer, text[], boolean);
drop function if exists millrace_engine.append_chosen(millrace_engine.stream, integer, anyarray, text[], jsonb[], timestamptz, text[]);

-- millrace.publish_batch(stream, payloads, keys, headers, delay_seconds, deliver_at, priority, dedupe_keys, serialize, throttle_seconds) returns setof bigint
-- Appends many JSON messages in the order of the array and returns their positions in that order. keys, headers and dedupe_keys are null, or
-- arrays of the same length with null where a message has none; the other options hold for all messages. At most 100,000 messages in one call.
-- A dedupe key that the batch has twice is appended once, and both have its position.
-- Locks:  as publish. Keys are locked in one order, so two batches cannot deadlock; two transactions with several calls can.
-- Raises: as publish; nothing is appended when one message is refused.
create or replace function millrace.publish_batch(p_stream text, p_payloads jsonb[], p_keys text[] default null, p_headers jsonb[] default null,
    p_delay_seconds double precision default null, p_deliver_at timestamptz default null, p_priority integer default 0,
    p_dedupe_keys text[] default null, p_serialize boolean default false, p_throttle_seconds integer default null) returns setof bigint
language plpgsql volatile as $$
begin
    return query select * from millrace_engine.append_batch(p_stream, 'JSON', p_payloads, (select max(pg_column_size(x)) from unnest(p_payloads) x),
        p_keys, p_headers, p_delay_seconds, p_deliver_at, p_priority, p_dedupe_keys, p_serialize, p_throttle_seconds);
end $$;
comment on function millrace.publish_batch(text, jsonb[], text[], jsonb[], double precision, timestamptz, integer, text[], boolean, integer) is
    'Appends many JSON messages in order and returns their positions.';

-- millrace.publish_batch_bytes(stream, payloads, keys, headers, delay_seconds, deliver_at, priority, dedupe_keys, serialize, throttle_seconds) returns setof bigint
-- publish_batch for streams with payload type Bytes.
create or replace function millrace.publish_batch_bytes(p_stream text, p_payloads bytea[], p_keys text[] default null, p_headers jsonb[] default null,
    p_delay_seconds double precision default null, p_deliver_at timestamptz default null, p_priority integer default 0,
    p_dedupe_keys text[] default null, p_serialize boolean default false, p_throttle_seconds integer default null) returns setof bigint
language plpgsql volatile as $$
begin
    return query select * from millrace_engine.append_batch(p_stream, 'Bytes', p_payloads, (select max(octet_length(x)) from unnest(p_payloads) x),
        p_keys, p_headers, p_delay_seconds, p_deliver_at, p_priority, p_dedupe_keys, p_serialize, p_throttle_seconds);
end $$;
comment on function millrace.publish_batch_bytes(text, bytea[], text[], jsonb[], double precision, timestamptz, integer, text[], boolean, integer) is
    'Appends many messages of bytes to a stream in order and returns their positions.';

-- millrace_engine.append_batch(stream, payload type, payloads, size of the largest, …) returns setof bigint
-- The one text behind both.
create or replace function millrace_engine.append_batch(p_stream text, p_type text, p_payloads anyarray, p_largest integer, p_keys text[],
    p_headers jsonb[], p_delay_seconds double precision, p_deliver_at timestamptz, p_priority integer, p_dedupe_keys text[], p_serialize boolean,
    p_throttle_seconds integer)
returns setof bigint
language plpgsql volatile as $$
declare
    s millrace_engine.stream;
    target integer;
    due timestamptz;
    bad jsonb;
    slot_end timestamptz;
begin
    if cardinality(p_payloads) = 0 then
        return;
    end if;
    perform millrace_engine.check_batch(cardinality(p_payloads), cardinality(p_keys), cardinality(p_headers), cardinality(p_dedupe_keys));
    if array_ndims(p_payloads) > 1 then
        raise exception 'the payloads of a batch are arrays themselves' using errcode = 'MR004', hint = 'Pass one array with an element for each message.';
    end if;
    if p_headers is not null then
        select x into bad from unnest(p_headers) x where jsonb_typeof(x) <> 'object' limit 1;
    end if;
    s := millrace_engine.check_publish(p_stream, p_type, case when array_position(p_payloads, null) is null then p_largest end, bad);
    target := s.id;
    if s.versions then
        perform millrace_engine.check_entity_keys(p_keys);
    end if;
    if p_priority <> 0 then
        target := millrace_engine.priority_stream(p_stream, p_priority);
    end if;
    if p_delay_seconds is not null or p_deliver_at is not null then
        due := millrace_engine.due(p_delay_seconds, p_deliver_at, p_serialize);
    end if;
    if p_serialize then
        perform millrace_engine.serialize(s.id, p_keys);
    end if;
    if p_throttle_seconds is not null then
        perform millrace_engine.check_throttle(p_dedupe_keys, p_throttle_seconds, false, due is not null, p_serialize);
        slot_end := millrace_engine.slot_start(p_throttle_seconds) + make_interval(secs => p_throttle_seconds);
        p_dedupe_keys := millrace_engine.slot_keys(p_dedupe_keys, p_throttle_seconds, slot_end - make_interval(secs => p_throttle_seconds));
    end if;
    if due is null and p_dedupe_keys is null then
        return query execute 'select * from millrace_engine.publish_batch_' || target || '($1, $2, $3)' using p_payloads, p_keys, p_headers;
    else
        return query select unnest(millrace_engine.append_chosen(s, target, p_payloads, p_keys, p_headers, due, p_dedupe_keys, slot_end));
    end if;
end $$;

-- millrace_engine.append_chosen(stream, id of the stream to append to, payloads, keys, headers, due, dedupe keys, until when they are remembered) returns bigint[]
-- The part of append_batch that is for delayed messages and for those with dedupe keys.
create or replace function millrace_engine.append_chosen(p_stream millrace_engine.stream, p_target integer, p_payloads anyarray, p_keys text[],
    p_headers jsonb[], p_due timestamptz, p_dedupe_keys text[], p_until timestamptz) returns bigint[]
language plpgsql volatile
set enable_nestloop = off   -- the planner takes an array of 100,000 for one of ten
set jit = off             -- and two of them for a join of billions of rows
as $$
declare
    known_keys text[];
    known_positions bigint[];
    chosen integer[];        -- which messages to append; null: all
    result bigint[];         -- their positions
begin
    if p_dedupe_keys is not null then
        select coalesce(array_agg(r.key), '{}'), coalesce(array_agg(r."position"), '{}') into known_keys, known_positions
            from millrace_engine.remember(p_stream, p_dedupe_keys, p_until) r;
        -- Of a key that nobody has published yet, the first message in the batch.
        select coalesce(array_agg(x.n order by x.n), '{}') into chosen
            from (select y.n, y.key, row_number() over (partition by y.key order by y.n) as nth from unnest(p_dedupe_keys) with ordinality y(key, n)) x
            where x.key is null or (x.nth = 1 and not exists (select from unnest(known_keys) k(key) where k.key = x.key));
    end if;
    if p_due is not null then
        execute format('insert into millrace_engine.delayed (stream_id, due_at, key, headers, %I) select $1, $2, x.key, x.headers, x.payload
            from unnest($3, $4, $5) with ordinality x(payload, key, headers, n) where $6 is null or x.n in (select unnest($6)) order by x.n',
            case p_stream.payload_type when 'JSON' then 'payload' else 'payload_bytes' end)
            using p_target, p_due, p_payloads, p_keys, p_headers, chosen;
        if p_dedupe_keys is null then
            return array_fill(null::bigint, array[cardinality(p_payloads)]);
        end if;
    elsif cardinality(chosen) > 0 then
        execute format('with m as (insert into millrace.%I (key, headers, payload) select x.key, x.headers, x.payload
                from unnest($1, $2, $3) with ordinality x(payload, key, headers, n) where x.n in (select unnest($4)) order by x.n returning "position")
            select array_agg(m."position") from m', (select t.name from millrace_engine.stream t where t.id = p_target))
            into result using p_payloads, p_keys, p_headers, chosen;
        perform millrace_engine.remember_positions(p_stream.id, array(select k.key from unnest(p_dedupe_keys) with ordinality k(key, n)
            join unnest(chosen) c(n) using (n) order by n), result);
    end if;
    -- A message has the position of its own, of the first in the batch with its key, or of the one that was published before.
    return (select array_agg(coalesce(own."position", f."position", k."position") order by x.n)
        from unnest(p_dedupe_keys) with ordinality x(key, n)
        left join unnest(chosen, result) own(n, "position") on own.n = x.n
        left join (select y.key, c."position" from unnest(chosen, result) c(n, "position")
                   join unnest(p_dedupe_keys) with ordinality y(key, n) on y.n = c.n) f on f.key = x.key
        left join unnest(known_keys, known_positions) k(key, "position") on k.key = x.key);
end $$;

-- millrace_engine.check_batch(number of payloads, keys, headers, dedupe keys) returns void
create or replace function millrace_engine.check_batch(p_payloads integer, p_keys integer, p_headers integer, p_dedupe_keys integer) returns void
language plpgsql immutable as $$
begin
    if p_payloads is null then
        raise exception 'the payloads of a batch are null' using errcode = 'MR004', hint = 'Pass an array, which may be empty.';
    end if;
    if p_payloads > 100000 then
        raise exception '% messages in one batch; at most 100000 are possible', p_payloads using errcode = 'MR004',
            hint = 'Split the batch: several calls in one transaction are as atomic as one.';
    end if;
    if p_keys <> p_payloads or p_headers <> p_payloads or p_dedupe_keys <> p_payloads then
        raise exception 'keys, headers and dedupe keys must be null or as long as payloads' using errcode = 'MR004',
            hint = 'Put null where a message has none.';
    end if;
end $$;
