-- millrace_engine.publish_template(payload, key, headers) returns bigint
-- Copied once per stream with the table's name filled in (install_functions.sql): appends one message and returns its position. The copy keeps its
-- plan, where EXECUTE of the INSERT plans again at every call. Calling the copy by EXECUTE costs the server 25 µs a message instead of 43, and a batch of
-- one message 70 instead of 120.
create or replace function millrace_engine.publish_template(p_payload anyelement, p_key text, p_headers jsonb) returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    -- with versions: if octet_length(p_key) > millrace_engine.longest_key() then perform millrace_engine.check_entity_keys(array[p_key]); end if;
    insert into millrace.stream_template (key, headers, payload) values (p_key, p_headers, p_payload) returning "position" into result;
    return result;
end $$;
comment on function millrace_engine.publish_template(anyelement, text, jsonb) is 'Appends one message to one stream. Called by millrace.publish.';

-- millrace_engine.publish_batch_template(payloads, keys, headers) returns setof bigint
-- The same for many messages, in the order of the arrays.
create or replace function millrace_engine.publish_batch_template(p_payloads anyarray, p_keys text[], p_headers jsonb[]) returns setof bigint
language plpgsql volatile as $$
begin
    return query insert into millrace.stream_template (key, headers, payload) select x.key, x.headers, x.payload
        from unnest(p_payloads, p_keys, p_headers) with ordinality x(payload, key, headers, n) order by x.n returning "position";
end $$;
comment on function millrace_engine.publish_batch_template(anyarray, text[], jsonb[]) is
    'Appends many messages to one stream. Called by millrace.publish_batch.';
