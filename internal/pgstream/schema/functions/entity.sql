-- millrace.read_entity(stream, key, from_version, to_version, max) returns messages
-- The history of one key of a stream with versions, from a version to a version (null: the newest), at most max. It sees what any query of the transaction sees, its own
-- appends too, and needs no group.
-- Order:  by version.
-- Cost:   an index scan per segment.
-- Raises: MR002 no such stream; MR004 a stream without versions, or a bad argument; MR008 retention has removed from_version: never fewer than there were.
create or replace function millrace.read_entity(p_stream text, p_key text, p_from_version bigint default 1, p_to_version bigint default null, p_max integer default 1000)
returns table (version bigint, "position" bigint, headers jsonb, payload jsonb, created_at timestamptz)
language plpgsql stable as $$
declare
    first constant bigint := greatest(p_from_version, 1);
    stream integer;
    versions_ boolean;
    present bigint;
    lowest bigint;
    n bigint;
begin
    select x.id, x.versions into stream, versions_ from millrace_engine.stream x where x.name = p_stream;
    if versions_ is not true then
        stream := millrace_engine.stream_id(p_stream);
        raise exception 'stream "%" has no versions', p_stream using errcode = 'MR004', hint = 'Read it by position: millrace.read.';
    end if;
    if (p_max between 1 and 10000 and p_from_version is not null and p_key is not null) is not true then
        raise exception 'cannot read % messages of key % from version %', coalesce(p_max::text, 'null'), coalesce(quote_literal(p_key), 'null'),
            coalesce(p_from_version::text, 'null') using errcode = 'MR004', hint = 'Pass a key, the first version to read, and 1 to 10000 messages.';
    end if;
    return query execute 'select * from millrace_engine.read_entity_' || stream || '($1, $2, $3, $4)' using p_key, first, p_to_version, p_max;
    get diagnostics n = row_count;
    -- What is missing was removed, if the key has got that far. Nothing comes back once it is removed, so an answer that is whole needs no second look.
    present := millrace_engine.entity_version(stream, p_key);
    if n < least(p_to_version, present) - first + 1 then
        execute 'select millrace_engine.lowest_version_' || stream || '($1, $2)' into lowest using p_key, first;
        if lowest is distinct from first then
            raise exception 'version % of key "%" of stream "%" has been removed, the first that is left is %', first, p_key, p_stream,
                coalesce(lowest::text, 'the next to be appended') using errcode = 'MR008', hint = 'Keep event stores without limits of age, size or number.';
        end if;
    end if;
end $$;
comment on function millrace.read_entity(text, text, bigint, bigint, integer) is 'Reads the history of one key of a stream with versions.';

-- millrace_engine.entity_version(stream id, key) returns bigint
-- The version of the key's newest message, 0 when it has none, as its caller's snapshot shows it. By the index, whatever the planner believes of the table.
create or replace function millrace_engine.entity_version(p_stream integer, p_key text) returns bigint
language plpgsql stable
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
    return coalesce((select e.version from millrace_engine.entity e where e.stream_id = p_stream and e.key = p_key), 0);
end $$;

-- millrace_engine.read_entity_template(key, first version, last version or null, max) returns messages
-- Copied once per stream with versions (install_functions.sql).
create or replace function millrace_engine.read_entity_template(p_key text, p_first bigint, p_last bigint, p_max integer)
returns table (version bigint, "position" bigint, headers jsonb, payload jsonb, created_at timestamptz)
language plpgsql stable
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
    return query select m.version, m."position", m.headers, m.payload, m.created_at from millrace.stream_template m
        where m.key = p_key and m.version >= p_first and m.version <= coalesce(p_last, 9223372036854775807) order by m.version limit p_max;
end $$;

-- millrace_engine.lowest_version_template(key, from version) returns bigint
-- The lowest version of the key from there on that is left; null when none is.
create or replace function millrace_engine.lowest_version_template(p_key text, p_first bigint) returns bigint
language plpgsql stable
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
begin
    return (select m.version from millrace.stream_template m where m.key = p_key and m.version >= p_first order by m.version limit 1);
end $$;

-- millrace.aggregate(stream, key, evolve, initial, to_version) returns (state, version)
-- The state of one entity: initial, then evolve(state jsonb, payload jsonb, headers jsonb) returns jsonb for each message of its history, in order. version is that of the last
-- message, 0 when there is none: pass it to millrace.append as the expected version. An aggregate in PL/pgSQL; clients that have the code in their own language read the
-- history with read_entity.
-- Raises: as read_entity; MR004 there is no such function.
create or replace function millrace.aggregate(p_stream text, p_key text, p_evolve text, p_initial jsonb default '{}', p_to_version bigint default null,
    out state jsonb, out version bigint)
language plpgsql stable as $$
declare
    page constant integer := 1000;
    step constant integer := 100;
    f constant regprocedure := to_regprocedure(nullif(p_evolve, '') || '(jsonb,jsonb,jsonb)');   -- '' is an error before PostgreSQL 16
    fold text;
    payloads jsonb[];
    headers jsonb[];
    last bigint;
    n integer;
begin
    if f is null then
        raise exception 'there is no function %(jsonb,jsonb,jsonb)', coalesce(p_evolve, 'null') using errcode = 'MR004',
            hint = 'Create evolve(state jsonb, payload jsonb, headers jsonb) returns jsonb, and name its schema if it is not in the search path.';
    end if;
    -- Recursion calls the function for a hundred messages in one statement, which is planned once, and inlines one that is an SQL expression. No more, because it keeps all states.
    fold := format('with recursive fold(n, state) as (
            select 0, $1 union all select x.n + 1, %s(x.state, ($2)[x.n + 1], ($3)[x.n + 1]) from fold x where x.n < $4)
        select x.state from fold x where x.n = $4', millrace_engine.qualified(f));
    state := p_initial;
    version := 0;
    loop
        -- Without a sort: read_entity returns them in their order.
        select array_agg(m.payload), array_agg(m.headers), max(m.version), count(*) into payloads, headers, last, n
            from millrace.read_entity(p_stream, p_key, aggregate.version + 1, p_to_version, page) m;
        for i in 1 .. n by step loop
            execute fold into state using state, payloads[i:i + step - 1], headers[i:i + step - 1], least(step, n - i + 1);
        end loop;
        version := coalesce(last, version);
        exit when n < page;
    end loop;
end $$;
comment on function millrace.aggregate(text, text, text, jsonb, bigint) is 'The state of one entity, from its history and a function that evolves it.';
