-- Event stores. In a stream with versions the messages of a key are the history of one entity, numbered 1, 2, 3 … An append names the version that it was decided
-- upon, and is refused when somebody else has appended meanwhile. (Emmett and EventStoreDB call the key a stream, and versions stream positions.)
--
-- millrace.append(stream, key, payloads, expected_version, headers) returns (version, position)
-- Appends messages to the history of the key inside the caller's transaction, in the order of the array, runs the stream's projections (projection.sql), and returns the
-- version and the position of the last. A consumer group of the stream gets them as any other message.
--   expected_version   the version of the key's newest message; 0: the key must have none; -1: it must have some; null: not looked at.
-- Order:  of one key, versions, positions and commits are in one order.
-- Locks:  the key's row of millrace_engine.entity until the end of the transaction, before the position is allocated, so that who waits holds no reader back. Transactions
--         that append to several keys should do it in the order of the keys: two that cross end in a deadlock error for one.
-- Raises: MR011 the version is another, with the present one as the error's detail; nothing is appended. MR002 no such stream; MR004 a stream without versions, no key or
--         one of more than 2,048 bytes, no payload, a key of a tenant that the stream does not have (tenant.sql), or as publish; 40001 in REPEATABLE READ and SERIALIZABLE when the key has changed since the snapshot.
-- Cost:   in a stream without tenants two statements: one finds the stream, compares and advances, the other inserts. Whatever is refused goes a longer way, which says what
--         is wrong.
create or replace function millrace.append(p_stream text, p_key text, p_payloads jsonb[], p_expected_version bigint default null,
    p_headers jsonb[] default null, out version bigint, out "position" bigint)
language plpgsql volatile as $$
declare
    n constant integer := coalesce(cardinality(p_payloads), 0);
    largest integer;
    malformed jsonb;
    s millrace_engine.stream;
    target integer;
    last bigint;
    present bigint;
    positions bigint[];
    tenant text;
begin
    if (p_key <> '' and octet_length(p_key) <= millrace_engine.longest_key()) is not true then
        raise exception 'an append needs a key of 1 to % bytes', millrace_engine.longest_key() using errcode = 'MR004',
            hint = 'Pass the id of the entity whose history it is.';
    end if;
    if n = 0 or n > 10000 then
        raise exception 'cannot append % messages at once', n using errcode = 'MR004', hint = 'Append 1 to 10000; several calls in one transaction are as atomic as one.';
    end if;
    if p_expected_version < -1 then
        raise exception 'version % cannot be expected', p_expected_version using errcode = 'MR004',
            hint = 'Pass the version of the newest message, 0 when the key must be new, -1 when it must exist, null for any.';
    end if;
    -- Most appends are one message. Expressions without a query cost a tenth of what one costs.
    if n = 1 then
        largest := pg_column_size(p_payloads[1]);
    elsif array_ndims(p_payloads) > 1 then
        raise exception 'the payloads are arrays themselves' using errcode = 'MR004', hint = 'Pass one array with an element for each message.';
    elsif array_position(p_payloads, null) is null then
        largest := (select max(pg_column_size(x)) from unnest(p_payloads) x);
    end if;
    if p_headers is not null then
        perform millrace_engine.check_batch(n, null, cardinality(p_headers), null);
        malformed := (select x from unnest(p_headers) x where jsonb_typeof(x) <> 'object' limit 1);
    end if;
    -- ON CONFLICT finds the row by its index, whatever the planner believes of the table: an UPDATE scanned it whole in sessions that had planned while it was small.
    if malformed is null then
        insert into millrace_engine.entity as e (stream_id, key, version)
            select x.id, p_key, n from millrace_engine.stream x
                where x.name = p_stream and x.versions and not x.has_tenants and x.max_message_bytes >= largest
            on conflict on constraint entity_pkey do update set version = e.version + n
                where p_expected_version is null or p_expected_version = -1 or e.version = p_expected_version
            returning e.version, e.stream_id into last, target;
    end if;
    if last is null then
        s := millrace_engine.check_publish(p_stream, 'JSON', largest, malformed);
        target := s.id;
        if not s.versions then
            raise exception 'stream "%" has no versions', p_stream using errcode = 'MR004',
                hint = 'Declare them (versions: true in the Stream, or millrace.create_stream with p_versions), or publish.';
        end if;
        if s.has_tenants then
            tenant := millrace_engine.tenant_of(s, p_key);
            insert into millrace_engine.entity as e (stream_id, key, version) values (s.id, p_key, n)
                on conflict on constraint entity_pkey do update set version = e.version + n
                    where p_expected_version is null or p_expected_version = -1 or e.version = p_expected_version
                returning e.version into last;
        end if;
    end if;
    if last is null then
        present := millrace_engine.entity_version(target, p_key);   -- sees what the statements above have met
    elsif last = n and p_expected_version <> 0 then
        present := 0;   -- the key was new, and must not be
    end if;
    if present is not null then
        raise exception 'key "%" of stream "%" has %, not %', p_key, p_stream,
            case present when 0 then 'no message' else 'version ' || present end,
            case p_expected_version when 0 then 'none' when -1 then 'any' else 'version ' || p_expected_version end
            using errcode = 'MR011', detail = present::text, hint = 'Somebody else may have appended. Read the entity again and decide anew.';
    end if;
    if tenant is null then
        execute 'select millrace_engine.append_' || target || '($1, $2, $3, $4)' into positions using p_key, p_payloads, p_headers, last - n + 1;
    else
        execute format('with m as (insert into millrace.%I (key, headers, payload, version)
                select $1, x.headers, x.payload, $4 + x.n - 1 from unnest($2, $3) with ordinality x(payload, headers, n) order by x.n returning "position")
            select array_agg(m."position" order by m."position") from m', s.name || '.' || tenant) into positions using p_key, p_payloads, p_headers, last - n + 1;
        perform millrace_engine.project(s.id, p_key, p_payloads, p_headers, last - n + 1, positions);
    end if;
    version := last;
    "position" := positions[n];
end $$;
comment on function millrace.append(text, text, jsonb[], bigint, jsonb[]) is
    'Appends messages to the history of one key of a stream with versions, if the key has the expected version.';

-- millrace_engine.check_entity_keys(keys) returns void
-- In a stream with versions every key is in an index, also that of a message that is published and has no version.
-- Raises: MR004 a key that does not fit.
create or replace function millrace_engine.check_entity_keys(p_keys text[]) returns void
language plpgsql immutable as $$
begin
    if exists (select from unnest(p_keys) k where octet_length(k) > millrace_engine.longest_key()) then
        raise exception 'a key of a stream with versions cannot have more than % bytes', millrace_engine.longest_key() using errcode = 'MR004',
            hint = 'Use a shorter one, such as a hash, or a stream without versions.';
    end if;
end $$;
comment on function millrace_engine.check_entity_keys(text[]) is 'Raises when a key is too long for a stream with versions.';

-- millrace_engine.append_template(key, payloads, headers, first version) returns bigint
-- Copied once per stream with versions (install_functions.sql). Inserts, runs the stream's inline projections, and returns the positions.
-- Whether there are projections is read in the statement that inserts: its snapshot is younger than its lock on the stream, which a rebuild takes before it makes a projection live.
create or replace function millrace_engine.append_template(p_key text, p_payloads jsonb[], p_headers jsonb[], p_first bigint) returns bigint[]
language plpgsql volatile as $$
declare
    result bigint[];
    single bigint;
    projected boolean := true;
begin
    if cardinality(p_payloads) = 1 then
        insert into millrace.stream_template (key, headers, payload, version) values (p_key, p_headers[1], p_payloads[1], p_first)
            returning "position", exists (select from millrace_engine.projection x where x.stream_id = /* stream id */ 0 and x.group_id is null and x.live)
            into single, projected;
        result := array[single];
    else
        with m as (
            insert into millrace.stream_template (key, headers, payload, version)
                select p_key, x.headers, x.payload, p_first + x.n - 1
                from unnest(p_payloads, p_headers) with ordinality x(payload, headers, n) order by x.n returning "position")
        select array_agg(m."position" order by m."position") into result from m;
    end if;
    if projected then
        perform millrace_engine.project(/* stream id */ 0, p_key, p_payloads, p_headers, p_first, result);
    end if;
    return result;
end $$;
comment on function millrace_engine.append_template(text, jsonb[], jsonb[], bigint) is 'Appends messages with versions to one stream. Called by millrace.append.';
