-- A rebuild makes the documents of a projection anew from the whole stream, in the table building beside the live ones, which go on and which readers see until they are replaced in one
-- transaction. It goes on from where it stands whoever was interrupted.
--
-- millrace.rebuild_projection(stream, name) returns bigint
-- Makes the documents of a projection anew and returns how many messages that were. For a function that has changed, and for a projection that came later than the messages.
-- It goes on with a rebuild that is under way (rebuild_step).
-- Cost:   one transaction, as long as it takes to project everything. For a large stream call millrace.rebuild_step again and again.
-- Locks, raises: as rebuild_step.
create or replace function millrace.rebuild_projection(p_stream text, p_name text) returns bigint
language plpgsql volatile as $$
declare
    step record;
    n bigint := 0;
begin
    loop
        step := millrace.rebuild_step(p_stream, p_name, 10000);
        n := n + step.messages;
        exit when step.finished;
    end loop;
    return n;
end $$;
comment on function millrace.rebuild_projection(text, text) is 'Makes the documents of a projection anew from the whole stream.';

-- millrace.rebuild_step(stream, name, max) returns (messages, rebuilt, horizon, finished)
-- One step of a rebuild, which it begins when none is under way: at most max messages, of those up to the horizon, are projected beside the live documents, and rebuilt is the position up to which
-- that is done. The step that finds fewer than max is the last: it catches up with the few that are left, replaces what differs in the live documents, and finished is true. Each
-- step is whole or not there at all, so call it until it has finished, from wherever and whenever you like.
-- A projection with a consumer group moves that group: its open claims end, as with reset_group, and it goes on behind what was rebuilt.
-- Locks:  the projection's row. The last step: appends wait, for a moment, when the projection is inline; millrace.project waits when it is not.
--         Readers never wait, and see the documents from before until it commits.
-- Raises: MR002 no such stream; MR003 isolation level; MR004 no such projection, one without documents, or retention has removed messages; 55P03 as
--         reset_group; what the function raises, and then nothing of this step has happened.
create or replace function millrace.rebuild_step(p_stream text, p_name text, p_max integer default 1000, out messages bigint, out rebuilt bigint, out horizon bigint,
    out finished boolean)
language plpgsql volatile as $$
declare
    s millrace_engine.stream;
    p millrace_engine.projection;
    g text;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'documents are rebuilt at isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all messages up to the horizon.';
    end if;
    if p_max is null or p_max not between 1 and 100000 then
        raise exception 'cannot rebuild % messages at once', coalesce(p_max::text, 'null') using errcode = 'MR004', hint = 'Pass 1 to 100000.';
    end if;
    select * into s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream);
    select * into p from millrace_engine.projection x where x.stream_id = s.id and x.name = p_name for no key update;
    if not found or coalesce(p.next_documents, p.documents) is null then
        raise exception 'projection % of stream "%" cannot be rebuilt', coalesce(quote_literal(p_name), 'null'), p_stream using errcode = 'MR004',
            hint = 'Name a projection with documents. What a function without documents has written, only its author knows how to make anew.';
    end if;
    if s.first_position > 1 then
        raise exception 'messages of stream "%" below position % have been removed', p_stream, s.first_position using errcode = 'MR004',
            hint = 'Documents cannot be made anew without all messages. Keep event stores without limits of age, size or number.';
    end if;
    if p.rebuilt_position is null then
        perform millrace_engine.begin_rebuild(p, p);
        select * into p from millrace_engine.projection x where x.id = p.id;
    end if;

    horizon := millrace_engine.horizon(s.id);
    select b.messages, b.rebuilt into messages, rebuilt from millrace_engine.build(s, p, p.rebuilt_position, horizon, p_max) b;
    finished := messages < p_max;
    if not finished then
        update millrace_engine.projection x set rebuilt_position = rebuild_step.rebuilt where x.id = p.id;
        return;
    end if;

    -- The last step. Nobody projects and nobody appends, as far as this projection has to do with it, and what they did before is seen by the next statements.
    perform pg_advisory_xact_lock(1836019573, p.id);
    if p.group_id is null and p.live or p.next_group_id is null then
        execute format('lock table millrace.%I in share mode', s.name);
        -- Every position that was ever given is final now. Not the horizon: a transaction that ends lets go of this table before it lets go of the lock that the horizon looks at, and its
        -- messages would be in neither.
        horizon := coalesce(pg_sequence_last_value(('millrace_engine.position_' || s.id)::regclass), 0);
    else
        -- Not below what is built: a publisher that carries an older position may have begun since, and the group must not be given again what is in the documents.
        horizon := millrace_engine.horizon_from(s.id, rebuilt);
    end if;
    for g in select x.name from millrace_engine.consumer_group x where x.id in (p.group_id, p.next_group_id) order by x.id loop
        perform millrace.reset_group(p_stream, g, 'Position', horizon + 1);
    end loop;
    messages := messages + (select b.messages from millrace_engine.build(s, p, rebuilt, horizon, null) b);
    rebuilt := horizon;
    -- Only what differs is written: readers of an older snapshot lose nothing, and unchanged documents leave no dead rows.
    execute format('delete from %s d where not exists (select from millrace_engine.building b where b.projection_id = $1 and b.key = d.key collate "C")',
        p.next_documents) using p.id;
    execute format('insert into %s as d (key, document, version) select b.key, b.document, b.version from millrace_engine.building b where b.projection_id = $1
        on conflict (key) do update set document = excluded.document, version = excluded.version
            where (d.document, d.version) is distinct from (excluded.document, excluded.version)', p.next_documents) using p.id;
    delete from millrace_engine.building b where b.projection_id = p.id;
    update millrace_engine.projection x set live = true, function = p.next_function, documents = p.next_documents, document_id = p.next_document_id,
            group_id = p.next_group_id, revision = p.next_revision,
            rebuilt_position = null, next_function = null, next_documents = null, next_document_id = null, next_group_id = null, next_revision = null
        where x.id = p.id;
end $$;
comment on function millrace.rebuild_step(text, text, integer) is 'One step of making the documents of a projection anew.';

-- millrace_engine.begin_rebuild(projection, what it is to become) returns void
-- Another rebuild that was under way is given up.
create or replace function millrace_engine.begin_rebuild(p millrace_engine.projection, p_next millrace_engine.projection) returns void
language sql volatile as $$
    delete from millrace_engine.building b where b.projection_id = p.id;
    update millrace_engine.projection x set rebuilt_position = 0, next_function = p_next.function, next_documents = p_next.documents,
            next_document_id = p_next.document_id, next_group_id = p_next.group_id, next_revision = p_next.revision
        where x.id = p.id;
$$;

-- millrace_engine.build(stream, projection, after, to, max) returns (messages, rebuilt)
-- Projects messages behind one position up to another, at most max (null: all), into the documents that a rebuild makes. rebuilt is up to where.
create or replace function millrace_engine.build(s millrace_engine.stream, p millrace_engine.projection, p_after bigint, p_to bigint, p_max integer,
    out messages bigint, out rebuilt bigint)
language plpgsql volatile
set enable_seqscan = off
set jit = off as $$
declare
    most integer;   -- at once
    filter constant jsonb := (select g.filter from millrace_engine.consumer_group g where g.id = p.next_group_id);
    m record;
    c record;
    old record;
    new record;
begin
    messages := 0;
    rebuilt := p_after;
    loop
        most := least(10000, p_max - messages);
        execute format('select array_agg(m.key order by m."position") as keys, array_agg(m.payload order by m."position") as payloads,
                array_agg(m.headers order by m."position") as headers, max(m."position") as last
            from (select m."position", m.key, m.payload, m.headers from millrace.%I m where m."position" > $1 and m."position" <= $2 and %s
                  order by m."position" limit $3) m', s.name,
                case when p.next_group_id is null then 'm.version is not null' else 'millrace_engine.matches($4, m.key, m.headers)' end)
            into m using rebuilt, p_to, most, filter;
        for c in select * from millrace_engine.changes(p.next_document_id, m.keys, m.payloads, m.headers) loop
            if octet_length(c.id) > millrace_engine.longest_key() then
                perform millrace_engine.refuse_document_key();
            end if;
            select b.document, b.version into old from millrace_engine.building b where b.projection_id = p.id and b.key = c.id;
            new := millrace_engine.evolve(p.next_function, c.payloads, c.headers, old.document, old.version);
            if new.document is null then
                delete from millrace_engine.building b where b.projection_id = p.id and b.key = c.id;
            else
                insert into millrace_engine.building as b (projection_id, key, document, version) values (p.id, c.id, new.document, new.version)
                    on conflict on constraint building_pkey do update set document = excluded.document, version = excluded.version;
            end if;
        end loop;
        messages := messages + coalesce(cardinality(m.keys), 0);
        if coalesce(cardinality(m.keys), 0) < most then
            rebuilt := greatest(p_to, rebuilt);
            return;
        end if;
        rebuilt := m.last;
        exit when messages >= p_max;
    end loop;
end $$;

-- millrace.projections(stream) returns a row per projection
-- What there is and where a rebuild stands: rebuilt of last_position, null when none is under way. Null as the stream: of all streams.
-- Raises: MR002 no such stream.
create or replace function millrace.projections(p_stream text default null)
returns table (stream text, name text, function text, documents text, document_id text[], "group" text, revision text, live boolean, declared boolean,
    rebuilt bigint, last_position bigint)
language plpgsql stable as $$
begin
    return query select s.name, p.name, p.function, p.documents, p.document_id, g.name, p.revision, p.live, p.declared, p.rebuilt_position,
        coalesce(pg_sequence_last_value(('millrace_engine.position_' || s.id)::regclass), 0)
    from millrace_engine.projection p
    join millrace_engine.stream s on s.id = p.stream_id
    left join millrace_engine.consumer_group g on g.id = p.group_id
    where p_stream is null or s.id = millrace_engine.stream_id(p_stream)
    order by s.name, p.name;
end $$;
comment on function millrace.projections(text) is 'The projections of a stream, and where their rebuilds stand.';
