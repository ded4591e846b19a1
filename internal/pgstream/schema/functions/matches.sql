-- millrace_engine.matches(filter, key, headers) returns boolean
-- Whether a message passes a group's filter; never null. A null filter lets everything pass. All given parts must hold:
--   headers     an object: each of its members is in the message's headers with that value
--   keys        an array: the message's key is one of them
--   key_prefix  the message's key begins with it
-- A message without a key or headers does not pass a part that asks for them. Inlined into the queries that use it.
create or replace function millrace_engine.matches(p_filter jsonb, p_key text, p_headers jsonb) returns boolean
language sql immutable parallel safe
return p_filter is null or coalesce(
    (p_filter -> 'headers' is null or p_headers @> (p_filter -> 'headers'))
    and (p_filter -> 'keys' is null or p_filter -> 'keys' ? p_key)
    and (p_filter -> 'key_prefix' is null or starts_with(p_key, p_filter ->> 'key_prefix')), false);
comment on function millrace_engine.matches(jsonb, text, jsonb) is 'Whether a message passes the filter of a consumer group.';

-- millrace_engine.checked_filter(filter) returns jsonb
-- The filter as it is kept: null when it lets everything pass, and without the parts that do.
-- Raises: MR004 when it is not a filter, with what is allowed.
create or replace function millrace_engine.checked_filter(p_filter jsonb) returns jsonb
language plpgsql immutable as $$
declare
    allowed constant text := 'A filter has headers (an object of strings, numbers, booleans and null), keys (1 to 1000 strings) and key_prefix '
        '(a string), and a message must pass each of them that is given.';
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
        if part.key not in ('headers', 'keys', 'key_prefix') then
            raise exception 'a filter has no part "%"', left(part.key, 100) using errcode = 'MR004', hint = allowed;
        end if;
        if jsonb_typeof(part.value) <> (case part.key when 'headers' then 'object' when 'keys' then 'array' else 'string' end) then
            raise exception 'the part "%" of a filter cannot be of type %', part.key, jsonb_typeof(part.value) using errcode = 'MR004', hint = allowed;
        end if;
        if part.value <> '{}' and part.value <> '""' then
            result := result || jsonb_build_object(part.key, part.value);
        end if;
    end loop;
    if exists (select from jsonb_each(result -> 'headers') x where jsonb_typeof(x.value) in ('object', 'array')) then
        raise exception 'a filter compares headers with single values only' using errcode = 'MR004', hint = allowed;
    end if;
    if exists (select from jsonb_array_elements(result -> 'keys') x where jsonb_typeof(x) <> 'string')
            or jsonb_array_length(result -> 'keys') not between 1 and 1000 then
        raise exception 'the keys of a filter are 1 to 1000 strings' using errcode = 'MR004', hint = allowed;
    end if;
    return nullif(result, '{}');
end $$;
