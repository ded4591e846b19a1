-- The signatures of earlier versions. They go in the transaction that brings their successors, so that publishing never fails in between.
drop function if exists millrace.publish(text, jsonb, text, jsonb);
drop function if exists millrace.publish_bytes(text, bytea, text, jsonb);
drop function if exists millrace_engine.check_message(text, text, integer, jsonb);
drop function if exists millrace.publish(text, jsonb, text, jsonb, double precision, timestamptz, integer, text, boolean);
drop function if exists millrace.publish_bytes(text, bytea, text, jsonb, double precision, timestamptz, integer, text, boolean);
drop function if exists millrace_engine.append(text, text, anyelement, integer, text, jsonb, double precision, timestamptz, integer, text, boolean);

-- millrace.publish(stream, payload, key, headers, delay_seconds, deliver_at, priority, dedupe_key, serialize, throttle_seconds, next_slot) returns bigint
-- Appends one message inside the caller's transaction and returns its position. If the transaction rolls back, it never happened.
--   delay_seconds, deliver_at   not before then: the message waits outside the log, and the result is null. A time in the past is now.
--   priority                    1 and up: goes before what has a lower one, in a stream that has priorities.
--   dedupe_key                  appends nothing when this key was published within the stream's dedupe window, and returns the position of that
--                               message (null when it was delayed). Waits for an open transaction that has published the key.
--   throttle_seconds            appends at most one message of the dedupe key in each slot of so many seconds, instead of the stream's window: of any other the
--                               result is the position of the first. Slots are counted from the epoch.
--   next_slot                   a message that finds its slot taken is delivered at the beginning of the next one, unless one waits for that already: then
--                               nothing is appended. The result is null either way.
--   serialize                   waits for open transactions that published this message's key with serialize: positions of the key are in the
--                               order of commits.
-- Order:  messages of one key are delivered in position order to Ordered groups.
-- Locks:  with serialize, the key's advisory lock, and with a dedupe key that key's row, both to the end of the transaction and before the
--         position is allocated, so that who waits holds no reader back.
-- Raises: MR002 no such stream; MR004 payload null or too large, headers not an object, or options that cannot be; 40001 in REPEATABLE READ and
--         SERIALIZABLE when the dedupe key was published by a transaction that the snapshot does not see.
-- Plain INSERT and COPY into millrace.<stream> append without options and without the checks of size.
create or replace function millrace.publish(p_stream text, p_payload jsonb, p_key text default null, p_headers jsonb default null,
    p_delay_seconds double precision default null, p_deliver_at timestamptz default null, p_priority integer default 0,
    p_dedupe_key text default null, p_serialize boolean default false, p_throttle_seconds integer default null, p_next_slot boolean default false)
returns bigint
language plpgsql volatile as $$
declare
    target integer;
    result bigint;
begin
    -- Most messages have no options: one condition, one look that checks as well, one call. Whatever does not pass, append looks at again and says why.
    if p_priority = 0 and p_delay_seconds is null and p_deliver_at is null and p_dedupe_key is null and not p_serialize
            and p_throttle_seconds is null and not p_next_slot then
        select x.id into target from millrace_engine.stream x
            where x.name = p_stream and x.parent_id is null and x.payload_type = 'JSON' and x.max_message_bytes >= pg_column_size(p_payload);
        if p_headers is not null then
            if jsonb_typeof(p_headers) <> 'object' then
                target := null;
            end if;
        end if;
        if target is not null then
            execute 'select millrace_engine.publish_' || target || '($1, $2, $3)' into result using p_payload, p_key, p_headers;
            return result;
        end if;
    end if;
    return millrace_engine.append(p_stream, 'JSON', p_payload, pg_column_size(p_payload), p_key, p_headers, p_delay_seconds, p_deliver_at,
        p_priority, p_dedupe_key, p_serialize, p_throttle_seconds, p_next_slot);
end $$;
comment on function millrace.publish(text, jsonb, text, jsonb, double precision, timestamptz, integer, text, boolean, integer, boolean) is
    'Appends one JSON message to a stream in the caller''s transaction and returns its position; null for a delayed message.';

-- millrace.publish_bytes(stream, payload, key, headers, delay_seconds, deliver_at, priority, dedupe_key, serialize, throttle_seconds, next_slot) returns bigint
-- The same for streams with payload type Bytes.
create or replace function millrace.publish_bytes(p_stream text, p_payload bytea, p_key text default null, p_headers jsonb default null,
    p_delay_seconds double precision default null, p_deliver_at timestamptz default null, p_priority integer default 0,
    p_dedupe_key text default null, p_serialize boolean default false, p_throttle_seconds integer default null, p_next_slot boolean default false)
returns bigint
language plpgsql volatile as $$
declare
    target integer;
    result bigint;
begin
    -- As in publish.
    if p_priority = 0 and p_delay_seconds is null and p_deliver_at is null and p_dedupe_key is null and not p_serialize
            and p_throttle_seconds is null and not p_next_slot then
        select x.id into target from millrace_engine.stream x
            where x.name = p_stream and x.parent_id is null and x.payload_type = 'Bytes' and x.max_message_bytes >= octet_length(p_payload);
        if p_headers is not null then
            if jsonb_typeof(p_headers) <> 'object' then
                target := null;
            end if;
        end if;
        if target is not null then
            execute 'select millrace_engine.publish_' || target || '($1, $2, $3)' into result using p_payload, p_key, p_headers;
            return result;
        end if;
    end if;
    return millrace_engine.append(p_stream, 'Bytes', p_payload, octet_length(p_payload), p_key, p_headers, p_delay_seconds, p_deliver_at,
        p_priority, p_dedupe_key, p_serialize, p_throttle_seconds, p_next_slot);
end $$;
comment on function millrace.publish_bytes(text, bytea, text, jsonb, double precision, timestamptz, integer, text, boolean, integer, boolean) is
    'Appends one message of bytes to a stream in the caller''s transaction and returns its position; null for a delayed message.';

-- millrace_engine.append(stream, payload type, payload, its size in bytes, …) returns bigint
-- The one text behind publish and publish_bytes for messages with options, and for those that are refused.
create or replace function millrace_engine.append(p_stream text, p_type text, p_payload anyelement, p_size integer, p_key text, p_headers jsonb,
    p_delay_seconds double precision, p_deliver_at timestamptz, p_priority integer, p_dedupe_key text, p_serialize boolean, p_throttle_seconds integer,
    p_next_slot boolean) returns bigint
language plpgsql volatile as $$
declare
    s millrace_engine.stream;
    target integer;
    due timestamptz;
    result bigint;
    throttled text;          -- the dedupe key of a throttled message
    slot timestamptz;
    slot_end timestamptz;
begin
    s := millrace_engine.check_publish(p_stream, p_type, p_size, p_headers);
    target := s.id;
    if s.versions then
        perform millrace_engine.check_entity_keys(array[p_key]);
    end if;
    if p_priority <> 0 then
        target := millrace_engine.priority_stream(p_stream, p_priority);
    end if;
    if p_delay_seconds is not null or p_deliver_at is not null then
        due := millrace_engine.due(p_delay_seconds, p_deliver_at, p_serialize);
    end if;
    if p_serialize then
        perform millrace_engine.serialize(s.id, array[p_key]);
    end if;
    if p_throttle_seconds is not null or p_next_slot then
        perform millrace_engine.check_throttle(array[p_dedupe_key], p_throttle_seconds, p_next_slot, p_delay_seconds is not null or p_deliver_at is not null, p_serialize);
        slot := millrace_engine.slot_start(p_throttle_seconds);
        slot_end := slot + make_interval(secs => p_throttle_seconds);
        throttled := p_dedupe_key;
        p_dedupe_key := (millrace_engine.slot_keys(array[throttled], p_throttle_seconds, slot))[1];
    end if;
    if p_dedupe_key is not null then
        select r."position" into result from millrace_engine.remember(s, array[p_dedupe_key], slot_end) r;
        if found and p_next_slot then
            due := slot_end;
            p_dedupe_key := (millrace_engine.slot_keys(array[throttled], p_throttle_seconds, due))[1];
            perform from millrace_engine.remember(s, array[p_dedupe_key], due + make_interval(secs => p_throttle_seconds)) r;
            result := null;
        end if;
        if found then
            return result;
        end if;
    end if;
    if due is not null then
        execute format('insert into millrace_engine.delayed (stream_id, due_at, key, headers, %I) values ($1, $2, $3, $4, $5)',
            case p_type when 'JSON' then 'payload' else 'payload_bytes' end) using target, due, p_key, p_headers, p_payload;
        return null;
    end if;
    execute 'select millrace_engine.publish_' || target || '($1, $2, $3)' into result using p_payload, p_key, p_headers;
    if p_dedupe_key is not null then
        perform millrace_engine.remember_positions(s.id, array[p_dedupe_key], array[result]);
    end if;
    return result;
end $$;

-- millrace_engine.check_publish(stream, payload type, size in bytes or null, headers) returns the stream
create or replace function millrace_engine.check_publish(p_stream text, p_type text, p_size integer, p_headers jsonb) returns millrace_engine.stream
language plpgsql stable as $$
declare
    s millrace_engine.stream;
begin
    select x.* into s from millrace_engine.stream x where x.name = p_stream;
    if not found then
        raise exception 'stream % does not exist', coalesce('"' || p_stream || '"', 'null') using errcode = 'MR002',
            hint = 'Create it with a Stream resource or with millrace.create_stream.';
    end if;
    if s.parent_id is not null then
        raise exception '"%" is a priority lane', p_stream using errcode = 'MR004',
            hint = format('Publish to stream "%s" with p_priority => %s.', split_part(p_stream, '.', 1), s.priority);
    end if;
    if s.payload_type <> p_type then
        raise exception 'stream "%" has payloads of type %', p_stream, s.payload_type using errcode = 'MR004',
            hint = case s.payload_type when 'JSON' then 'Use millrace.publish or publish_batch.' else 'Use millrace.publish_bytes or publish_batch_bytes.' end;
    end if;
    if p_size is null then
        raise exception 'a payload is null' using errcode = 'MR004', hint = case p_type when 'JSON' then 'Publish the JSON value null as ''null''::jsonb.'
            else 'Publish a message without bytes as ''''::bytea.' end;
    end if;
    if p_size > s.max_message_bytes then
        raise exception 'a message of % bytes is larger than the % allowed in stream "%"', p_size, s.max_message_bytes, p_stream
            using errcode = 'MR004', hint = 'Store large payloads elsewhere and publish a reference, or raise max_message_bytes of the stream, maxMessageBytes in a resource.';
    end if;
    if jsonb_typeof(p_headers) <> 'object' then
        raise exception 'headers must be a JSON object, not %', jsonb_typeof(p_headers) using errcode = 'MR004',
            hint = 'Pass an object such as {"trace": "abc"}, or null.';
    end if;
    return s;
end $$;

-- millrace_engine.priority_stream(stream, priority) returns integer
-- The id of the lane that holds the messages of a priority above 0: a child stream, named <stream>.p<priority>.
-- Raises: MR004 the stream has no such priority.
create or replace function millrace_engine.priority_stream(p_stream text, p_priority integer) returns integer
language plpgsql stable as $$
declare
    result integer;
begin
    select x.id into result from millrace_engine.stream x where x.name = p_stream || '.p' || p_priority;
    if not found then
        select s.priorities - 1 into result from millrace_engine.stream s where s.name = p_stream;
        raise exception 'priority % is not possible in stream "%"', p_priority, p_stream using errcode = 'MR004',
            hint = case result when 0 then 'The stream has only priority 0. Raise its number of priorities.'
                else format('Use 0 to %s; the highest goes first.', result) end;
    end if;
    return result;
end $$;

-- millrace_engine.serialize(stream id, keys) returns void
-- Waits until no other open transaction has published one of these keys with serialize. Called before a position is allocated, so that positions
-- of a key are in the order of commits.
-- Locks:  one exclusive advisory lock per key until the end of the transaction, in the order of their hashes, so that two batches cannot
--         deadlock: (-stream id, hash of the key). Two keys of one hash wait for each other without need, which is rare.
-- Raises: MR004 a message has no key, or too many keys: locks live in shared memory.
create or replace function millrace_engine.serialize(p_stream integer, p_keys text[]) returns void
language plpgsql volatile as $$
declare
    hashes integer[];
begin
    if p_keys is null or array_position(p_keys, null) is not null then
        raise exception 'a message without a key cannot be serialized' using errcode = 'MR004',
            hint = 'Give it a key, or publish it without p_serialize: it has no order to keep.';
    end if;
    select array_agg(distinct hashtext(k) order by hashtext(k)) into hashes from unnest(p_keys) k;
    if cardinality(hashes) > 1000 then
        raise exception '% different keys in one batch; at most 1000 can be serialized', cardinality(hashes) using errcode = 'MR004',
            hint = 'Publish them in several transactions.';
    end if;
    for i in 1 .. cardinality(hashes) loop
        perform pg_advisory_xact_lock(-p_stream, hashes[i]);
    end loop;
end $$;
