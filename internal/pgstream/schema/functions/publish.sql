-- millrace.publish(stream, payload, key, headers) returns bigint
-- Appends one message inside the caller's transaction and returns its position. If the transaction rolls back, it never happened.
-- Order:  messages of one key are delivered in position order to Ordered groups.
-- Raises: MR002 no such stream; MR004 payload null or too large, or headers not an object.
-- Plain INSERT and COPY into millrace.<stream> do the same without the checks of size.
create or replace function millrace.publish(p_stream text, p_payload jsonb, p_key text default null, p_headers jsonb default null)
returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    perform millrace_engine.check_message(p_stream, 'JSON', pg_column_size(p_payload), p_headers);
    execute format('insert into millrace.%I (key, headers, payload) values ($1, $2, $3) returning "position"', p_stream)
        into result using p_key, p_headers, p_payload;
    return result;
end $$;
comment on function millrace.publish(text, jsonb, text, jsonb) is
    'Appends one JSON message to a stream in the caller''s transaction and returns its position.';

-- millrace.publish_bytes(stream, payload, key, headers) returns bigint
-- The same for streams with payload type Bytes.
create or replace function millrace.publish_bytes(p_stream text, p_payload bytea, p_key text default null, p_headers jsonb default null)
returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    perform millrace_engine.check_message(p_stream, 'Bytes', pg_column_size(p_payload), p_headers);
    execute format('insert into millrace.%I (key, headers, payload) values ($1, $2, $3) returning "position"', p_stream)
        into result using p_key, p_headers, p_payload;
    return result;
end $$;
comment on function millrace.publish_bytes(text, bytea, text, jsonb) is
    'Appends one message of bytes to a stream in the caller''s transaction and returns its position.';

-- millrace.publish_batch(stream, payloads, keys, headers) returns setof bigint
-- Appends many JSON messages in the order of the array and returns their positions in that order. keys and headers are null, or arrays
-- of the same length with null where a message has none. At most 100,000 messages in one call.
-- Raises: as publish; nothing is appended when one message is refused.
create or replace function millrace.publish_batch(p_stream text, p_payloads jsonb[], p_keys text[] default null, p_headers jsonb[] default null)
returns setof bigint
language plpgsql volatile as $$
declare
    largest integer;
    bad jsonb;
begin
    if cardinality(p_payloads) = 0 then
        return;
    end if;
    perform millrace_engine.check_batch(cardinality(p_payloads), cardinality(p_keys), cardinality(p_headers));
    select max(pg_column_size(x)) into largest from unnest(p_payloads) x;
    select x into bad from unnest(p_headers) x where jsonb_typeof(x) <> 'object' limit 1;
    perform millrace_engine.check_message(p_stream, 'JSON', case when array_position(p_payloads, null) is null then largest end, bad);
    return query execute format(
        'insert into millrace.%I (key, headers, payload) select x.key, x.headers, x.payload
         from unnest($1, $2, $3) with ordinality x(payload, key, headers, n) order by x.n returning "position"', p_stream)
        using p_payloads, p_keys, p_headers;
end $$;
comment on function millrace.publish_batch(text, jsonb[], text[], jsonb[]) is
    'Appends many JSON messages in order and returns their positions.';

-- millrace_engine.check_message(stream, payload type, size in bytes or null, headers) returns void
create or replace function millrace_engine.check_message(p_stream text, p_type text, p_size integer, p_headers jsonb) returns void
language plpgsql stable as $$
declare
    s record;
begin
    select x.payload_type, x.max_message_bytes into s from millrace_engine.stream x where x.name = p_stream;
    if not found then
        raise exception 'stream "%" does not exist', p_stream using errcode = 'MR002',
            hint = 'Create it with a Stream resource or with millrace.create_stream.';
    end if;
    if s.payload_type <> p_type then
        raise exception 'stream "%" has payloads of type %', p_stream, s.payload_type using errcode = 'MR004',
            hint = case s.payload_type when 'JSON' then 'Use millrace.publish.' else 'Use millrace.publish_bytes.' end;
    end if;
    if p_size is null then
        raise exception 'a payload is null' using errcode = 'MR004', hint = 'Publish the JSON value null as ''null''::jsonb.';
    end if;
    if p_size > s.max_message_bytes then
        raise exception 'a message of % bytes is larger than the % allowed in stream "%"', p_size, s.max_message_bytes, p_stream
            using errcode = 'MR004', hint = 'Store large payloads elsewhere and publish a reference, or raise maxMessageBytes.';
    end if;
    if jsonb_typeof(p_headers) <> 'object' then
        raise exception 'headers must be a JSON object, not %', jsonb_typeof(p_headers) using errcode = 'MR004';
    end if;
end $$;

-- millrace_engine.check_batch(number of payloads, keys, headers) returns void
create or replace function millrace_engine.check_batch(p_payloads integer, p_keys integer, p_headers integer) returns void
language plpgsql immutable as $$
begin
    if p_payloads > 100000 then
        raise exception '% messages in one batch; at most 100000 are possible', p_payloads using errcode = 'MR004',
            hint = 'Split the batch: several calls in one transaction are as atomic as one.';
    end if;
    if p_keys <> p_payloads or p_headers <> p_payloads then
        raise exception 'keys and headers must be null or as long as payloads' using errcode = 'MR004';
    end if;
end $$;
