-- millrace_engine.matches_lists(filter, headers) returns boolean
-- The parts one_of and without_headers of a filter. Without a query: it is called for each message.
create or replace function millrace_engine.matches_lists(p_filter jsonb, p_headers jsonb) returns boolean
language plpgsql immutable parallel safe as $$
declare
    n integer := coalesce(jsonb_array_length(p_filter -> 'one_of'), 0);
    part jsonb;
begin
    while n > 0 loop
        n := n - 1;
        part := p_filter -> 'one_of' -> n;
        -- An array contains a single value, and other arrays; a header that is an array is none of the values.
        if (part -> 1 @> (p_headers -> (part ->> 0)) and jsonb_typeof(p_headers -> (part ->> 0)) not in ('array', 'object')) is not true then
            return false;
        end if;
    end loop;
    n := coalesce(jsonb_array_length(p_filter -> 'without_headers'), 0);
    while n > 0 loop
        n := n - 1;
        if p_headers ? (p_filter -> 'without_headers' ->> n) then
            return false;
        end if;
    end loop;
    return true;
end $$;

-- millrace_engine.matches(filter, key, headers) returns boolean
-- Whether a message passes a group's filter; never null. A null filter lets everything pass. All given parts must hold:
--   headers          an object: each of its members is in the message's headers with that value
--   one_of           pairs [header, values]: the message's header has one of the values. In checked_filter's terms, a header whose value is a list
--   without_headers  an array: the message has none of these headers
--   keys             an array: the message's key is one of them
--   key_prefix       the message's key begins with it
--   unrouted         no other group of the stream has a filter that takes the message: not seen here, but when it is enqueued (enqueue.sql)
-- A message without a key or headers does not pass a part that asks for them. Inlined into the queries that use it; what would need a loop is not, and
-- is looked at last.
create or replace function millrace_engine.matches(p_filter jsonb, p_key text, p_headers jsonb) returns boolean
language sql immutable parallel safe
return p_filter is null or coalesce(
    (p_filter -> 'headers' is null or p_headers @> (p_filter -> 'headers'))
    and (p_filter -> 'keys' is null or p_filter -> 'keys' ? p_key)
    and (p_filter -> 'key_prefix' is null or starts_with(p_key, p_filter ->> 'key_prefix'))
    and (p_filter -> 'one_of' is null and p_filter -> 'without_headers' is null or millrace_engine.matches_lists(p_filter, p_headers)), false);
comment on function millrace_engine.matches(jsonb, text, jsonb) is 'Whether a message passes the filter of a consumer group.';

-- millrace_engine.checked_filter(filter) returns jsonb
-- The filter as it is kept: null when it lets everything pass, without the parts that do, and with the lists of headers in one_of.
-- Raises: MR004 when it is not a filter, with what is allowed.
create or replace function millrace_engine.checked_filter(p_filter jsonb) returns jsonb
language plpgsql immutable as $$
declare
    allowed constant text := 'A filter has headers (an object of strings, numbers, booleans and null, or of lists of them), without_headers (1 to 32 '
        'names), keys (1 to 1000 strings), key_prefix (a string) and unrouted (true), and a message must pass each of them that is given.';
    part record;
    result jsonb := '{}';
begin
    if p_filter is null or p_filter = 'null' then
        return null;
    end if;
    if jsonb_typeof(p_filter) <> 'object' then
        raise exception 'a filter is a JSON object, not %', jsonb_typeof(p_filter) using errcode = 'MR004', hint = allowed;
    end if;
    for part in select x.key, x.value from jsonb_each(p_filter) x where x.value <> 'null' loop
        if part.key not in ('headers', 'without_headers', 'keys', 'key_prefix', 'unrouted') then
            raise exception 'a filter has no part "%"', left(part.key, 100) using errcode = 'MR004', hint = allowed;
        end if;
        if jsonb_typeof(part.value) <> (case part.key when 'headers' then 'object' when 'keys' then 'array' when 'without_headers' then 'array'
                when 'unrouted' then 'boolean' else 'string' end) then
            raise exception 'the part "%" of a filter cannot be of type %', part.key, jsonb_typeof(part.value) using errcode = 'MR004', hint = allowed;
        end if;
        if part.value <> '{}' and part.value <> '""' and part.value <> 'false' then
            result := result || jsonb_build_object(part.key, part.value);
        end if;
    end loop;
    if exists (select from jsonb_each(result -> 'headers') x where jsonb_typeof(x.value) = 'object'
            or jsonb_typeof(x.value) = 'array' and (jsonb_array_length(x.value) not between 1 and 100
                or exists (select from jsonb_array_elements(x.value) y where jsonb_typeof(y) in ('object', 'array')))) then
        raise exception 'a filter compares a header with one value, or with a list of 1 to 100 values' using errcode = 'MR004', hint = allowed;
    end if;
    if exists (select from jsonb_array_elements(result -> 'without_headers') x where jsonb_typeof(x) <> 'string')
            or jsonb_array_length(result -> 'without_headers') not between 1 and 32 then
        raise exception 'without_headers of a filter are 1 to 32 names' using errcode = 'MR004', hint = allowed;
    end if;
    if exists (select from jsonb_array_elements(result -> 'keys') x where jsonb_typeof(x) <> 'string')
            or jsonb_array_length(result -> 'keys') not between 1 and 1000 then
        raise exception 'the keys of a filter are 1 to 1000 strings' using errcode = 'MR004', hint = allowed;
    end if;
    -- Single values are compared at once, lists one after the other: whoever has none pays nothing for them.
    if exists (select from jsonb_each(result -> 'headers') x where jsonb_typeof(x.value) = 'array') then
        result := result - 'headers'
            || jsonb_build_object('one_of', (select jsonb_agg(jsonb_build_array(x.key, x.value)) from jsonb_each(result -> 'headers') x
                where jsonb_typeof(x.value) = 'array'))
            || coalesce((select jsonb_build_object('headers', jsonb_object_agg(x.key, x.value)) from jsonb_each(result -> 'headers') x
                where jsonb_typeof(x.value) <> 'array' having count(*) > 0), '{}');
    end if;
    return nullif(result, '{}');
end $$;

-- millrace_engine.written_filter(filter) returns jsonb
-- A filter that checked_filter made, as it was written.
create or replace function millrace_engine.written_filter(p_filter jsonb) returns jsonb
language sql immutable
return case when p_filter ? 'one_of' then p_filter - 'one_of' || jsonb_build_object('headers', coalesce(p_filter -> 'headers', '{}')
        || (select jsonb_object_agg(x ->> 0, x -> 1) from jsonb_array_elements(p_filter -> 'one_of') x)) else p_filter end;
