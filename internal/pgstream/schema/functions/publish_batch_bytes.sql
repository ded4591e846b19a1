-- millrace.publish_batch_bytes(stream, payloads, keys, headers) returns setof bigint
-- publish_batch for streams with payload type Bytes.
create or replace function millrace.publish_batch_bytes(p_stream text, p_payloads bytea[], p_keys text[] default null, p_headers jsonb[] default null)
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
    select max(octet_length(x)) into largest from unnest(p_payloads) x;
    select x into bad from unnest(p_headers) x where jsonb_typeof(x) <> 'object' limit 1;
    perform millrace_engine.check_message(p_stream, 'Bytes', case when array_position(p_payloads, null) is null then largest end, bad);
    return query execute format(
        'insert into millrace.%I (key, headers, payload) select x.key, x.headers, x.payload
         from unnest($1, $2, $3) with ordinality x(payload, key, headers, n) order by x.n returning "position"', p_stream)
        using p_payloads, p_keys, p_headers;
end $$;
comment on function millrace.publish_batch_bytes(text, bytea[], text[], jsonb[]) is
    'Appends many messages of bytes to a stream in order and returns their positions.';
