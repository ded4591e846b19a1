-- Projections make documents, or whatever a function writes, of a stream's messages. An inline one runs inside the append, in its transaction: what it writes is there when the
-- message is, and an error of its refuses the append. One with a consumer group runs where that group's messages are handled (millrace.project), and may lag behind.
--
-- millrace.create_projection(stream, name, function, documents, document_id, group) returns void
-- Creates or replaces a projection. Inline ones, without a group, need a stream with versions; they run in the order of their names, for each message of each append, with the
-- rights of whoever appends. A group has to be Ordered, and runs one projection.
-- Without documents, the function does everything:
--   function(stream text, key text, version bigint, position bigint, payload jsonb, headers jsonb)
-- With documents, a table (key text primary key, document jsonb not null, version bigint not null), which is made when it is missing, the function turns the present document
-- and a message into the next document; null in the beginning; a result of null deletes it:
--   function(document jsonb, payload jsonb, headers jsonb) returns jsonb
-- The document has the message's key, or the text at the path document_id in its payload, so that one document can be made of many entities; a payload without it
-- is not projected. version counts the changes of the document.
-- What was appended before is not projected; millrace.rebuild_projection does that.
-- Raises: 42501 need_owner; MR002 no such stream or group; MR004 a stream, group, function or table that cannot be; MR007 a Kubernetes resource declares it.
create or replace function millrace.create_projection(p_stream text, p_name text, p_function text, p_documents text default null,
    p_document_id text[] default null, p_group text default null) returns void
language plpgsql volatile as $$
declare
    p millrace_engine.projection;
begin
    perform millrace_engine.need_owner();
    p := millrace_engine.checked_projection(p_stream, p_name, p_function, p_documents, p_document_id, p_group);
    perform millrace_engine.refuse_declared(p);
    perform millrace_engine.make_documents(p.documents);
    insert into millrace_engine.projection (stream_id, name, function, documents, document_id, group_id)
        values (p.stream_id, p.name, p.function, p.documents, p.document_id, p.group_id)
        on conflict on constraint projection_pkey do update set function = excluded.function, documents = excluded.documents,
            document_id = excluded.document_id, group_id = excluded.group_id, live = true,
            rebuilt_position = null, next_function = null, next_documents = null, next_document_id = null, next_group_id = null, next_revision = null;
    delete from millrace_engine.building b using millrace_engine.projection x
        where x.stream_id = p.stream_id and x.name = p.name and b.projection_id = x.id;
end $$;
comment on function millrace.create_projection(text, text, text, text, text[], text) is
    'Creates or replaces a projection that runs with every append to a stream, or with a consumer group.';

-- millrace_engine.checked_projection(stream, name, function, documents, document_id, group) returns projection
-- The row of a projection, not stored. Names are resolved and get their schema; a table of documents that does not exist yet is named as make_documents would make it.
-- Raises: as create_projection.
create or replace function millrace_engine.checked_projection(p_stream text, p_name text, p_function text, p_documents text, p_document_id text[], p_group text)
returns millrace_engine.projection
language plpgsql stable as $$
declare
    s millrace_engine.stream;
    g millrace_engine.consumer_group;
    p millrace_engine.projection;
    arguments constant text := case when p_documents is null then '(text,text,bigint,bigint,jsonb,jsonb)' else '(jsonb,jsonb,jsonb)' end;
    f regprocedure;
    t text;
    d regclass;
begin
    select * into s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream);
    if p_group is null and not s.versions then
        raise exception 'stream "%" has no versions', p_stream using errcode = 'MR004', hint = 'Declare them, or project with a consumer group.';
    end if;
    if s.payload_type <> 'JSON' or s.priorities > 1 then
        raise exception 'messages of stream "%" cannot be projected', p_stream using errcode = 'MR004',
            hint = 'Projections read JSON payloads by their positions: of a stream with payload type JSON and one priority.';
    end if;
    if p_name is null or p_name !~ '^[a-z][a-z0-9_-]{0,62}$' then
        raise exception 'projection name % is not usable', coalesce(quote_literal(p_name), 'null') using errcode = 'MR004',
            hint = 'Use a lower case letter, then up to 62 lower case letters, digits, dashes or underscores.';
    end if;
    if p_group is not null then
        select * into g from millrace_engine.consumer_group x where x.stream_id = s.id and x.name = p_group;
        if not found then
            perform millrace_engine.no_such_group(p_group);
        end if;
        if g.mode <> 'Ordered' then
            raise exception 'consumer group "%" is Shared, and a projection needs the messages of a key in order', p_group using errcode = 'MR004',
                hint = 'Create another group, with mode Ordered.';
        end if;
        if exists (select from millrace_engine.projection x where (x.group_id = g.id or x.next_group_id = g.id) and x.name <> p_name) then
            raise exception 'consumer group "%" runs another projection', p_group using errcode = 'MR004', hint = 'Create a group for each projection.';
        end if;
    end if;
    f := to_regprocedure(nullif(p_function, '') || arguments);   -- '' is an error before PostgreSQL 16
    if f is null then
        raise exception 'there is no function %', coalesce(p_function, 'null') || arguments using errcode = 'MR004',
            hint = 'Create it first, with exactly these arguments, and name its schema if it is not in the search path.';
    end if;
    if p_documents is not null then
        t := millrace_engine.table_name(p_documents, 'shop.cart');
        d := to_regclass(t);
        if d is not null and (select count(*) from pg_attribute a where a.attrelid = d and (a.attname, a.atttypid) in
                (('key', 'text'::regtype), ('document', 'jsonb'::regtype), ('version', 'bigint'::regtype))) < 3 then
            raise exception 'table % cannot hold documents', d using errcode = 'MR004',
                hint = 'It needs the columns key text primary key, document jsonb, version bigint. Name a table that does not exist to have it made.';
        end if;
    elsif p_document_id is not null then
        raise exception 'a document id needs a table of documents' using errcode = 'MR004', hint = 'Name the table in p_documents too.';
    end if;
    p.stream_id := s.id;
    p.name := p_name;
    p.function := millrace_engine.qualified(f);
    p.documents := case when d is not null then millrace_engine.qualified(d)
        when cardinality(parse_ident(t)) = 1 then quote_ident(current_schema()) || '.' || t else t end;
    p.document_id := p_document_id;
    p.group_id := g.id;
    return p;
end $$;

-- millrace_engine.refuse_declared(projection) returns void
-- Raises: MR007 when the resource of the stream declares the projection of that name.
create or replace function millrace_engine.refuse_declared(p millrace_engine.projection) returns void
language plpgsql stable as $$
begin
    if exists (select from millrace_engine.projection x join millrace_engine.stream s on s.id = x.stream_id
            where x.stream_id = p.stream_id and x.name = p.name and x.declared and s.owner is not null) then
        raise exception 'projection "%" is declared by the Stream resource', p.name using errcode = 'MR007', hint = 'Change it there: spec.projections.';
    end if;
end $$;

-- millrace_engine.make_documents(table) returns void
-- Makes a table of documents, with its schema and quoted, when it is missing; for the runtime role too, which projects.
create or replace function millrace_engine.make_documents(p_documents text) returns void
language plpgsql volatile
set client_min_messages = warning as $$
declare
    runtime text;
begin
    if p_documents is null or to_regclass(p_documents) is not null then
        return;
    end if;
    execute format('create table %s (key text primary key, document jsonb not null, version bigint not null)', p_documents);
    select v.value into runtime from millrace_engine.setting v where v.name = 'runtime_role';
    if runtime is not null then
        execute format('grant select, insert, update, delete on %s to %I', p_documents, runtime);
    end if;
end $$;

-- millrace_engine.qualified(function or table) returns text
-- Its name with its schema, whatever the search path.
create or replace function millrace_engine.qualified(p_function regprocedure) returns text
language sql stable
return (select format('%I.%I', n.nspname, p.proname) from pg_proc p join pg_namespace n on n.oid = p.pronamespace where p.oid = p_function);
create or replace function millrace_engine.qualified(p_table regclass) returns text
language sql stable
return (select format('%I.%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = p_table);

-- millrace.drop_projection(stream, name) returns boolean
-- Ends a projection; what it has written stays. False when there was none.
-- Raises: 42501 need_owner; MR002 no such stream; MR007 a Kubernetes resource declares it.
create or replace function millrace.drop_projection(p_stream text, p_name text) returns boolean
language plpgsql volatile as $$
declare
    p millrace_engine.projection;
begin
    perform millrace_engine.need_owner();
    select * into p from millrace_engine.projection x where x.stream_id = millrace_engine.stream_id(p_stream) and x.name = p_name;
    perform millrace_engine.refuse_declared(p);
    delete from millrace_engine.projection x where x.id = p.id;
    return found;
end $$;
comment on function millrace.drop_projection(text, text) is 'Ends a projection; what it has written stays.';

-- millrace_engine.project(stream id, key, payloads, headers, first version, positions) returns void
-- Runs the inline projections of a stream for what was just appended.
create or replace function millrace_engine.project(p_stream integer, p_key text, p_payloads jsonb[], p_headers jsonb[], p_first bigint, p_positions bigint[])
returns void
language plpgsql volatile as $$
declare
    p millrace_engine.projection;
    stream text;
begin
    for p in select * from millrace_engine.projection x where x.stream_id = p_stream and x.group_id is null and x.live order by x.name loop
        if p.documents is not null then
            perform millrace_engine.project_documents(p, array_fill(p_key, array[cardinality(p_payloads)]), p_payloads, p_headers);
            continue;
        end if;
        if stream is null then
            select s.name into stream from millrace_engine.stream s where s.id = p_stream;
        end if;
        for i in 1 .. cardinality(p_payloads) loop
            execute format('select %s($1, $2, $3, $4, $5, $6)', p.function)
                using stream, p_key, p_first + i - 1, p_positions[i], p_payloads[i], p_headers[i];
        end loop;
    end loop;
end $$;

-- millrace.project(stream, group, positions) returns integer
-- Runs the projection of a consumer group for messages that a member has received, in the order of their positions, and returns how many there were. Call it in the transaction that
-- acks them, before the ack: then every message is in the documents exactly once, whoever dies. A Processor with sink.projection does that.
-- What has been removed from the stream meanwhile is left out. While a projection is built for the first time nothing is done: the rebuild covers these messages.
-- Order:  of a key. Documents that are made of several keys get them in the order of the stream only when it has one partition.
-- Locks:  the documents' rows, in the order of their keys; shared, the projection, so that a rebuild replaces documents between two calls.
-- Raises: MR002 no such stream, or no projection runs in the group; what the function raises.
create or replace function millrace.project(p_stream text, p_group text, p_positions bigint[]) returns integer
language plpgsql volatile
set enable_seqscan = off
set jit = off as $$
declare
    s millrace_engine.stream;
    p millrace_engine.projection;
    m record;
    n integer := 0;
begin
    select * into s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream);
    select x.* into p from millrace_engine.projection x join millrace_engine.consumer_group g on g.id = x.group_id
        where g.stream_id = s.id and g.name = p_group;
    if found then
        perform pg_advisory_xact_lock_shared(1836019573, p.id);
        -- A statement of its own sees what a rebuild has changed while this one waited.
        select x.* into p from millrace_engine.projection x join millrace_engine.consumer_group g on g.id = x.group_id
            where x.id = p.id and g.name = p_group;
    end if;
    if not found then
        raise exception 'no projection runs in consumer group % of stream "%"', coalesce('"' || p_group || '"', 'null'), p_stream using errcode = 'MR002',
            hint = 'Declare it in the Stream (spec.projections, with this group), or create it: millrace.create_projection with p_group.';
    end if;
    if not p.live then
        return 0;
    end if;
    if p.documents is null then
        for m in execute format('select m.key, %s as version, m."position", m.payload, m.headers from millrace.%I m where m."position" = any($1) order by m."position"',
                case when s.versions then 'm.version' else 'null::bigint' end, s.name) using p_positions loop
            execute format('select %s($1, $2, $3, $4, $5, $6)', p.function) using s.name, m.key, m.version, m."position", m.payload, m.headers;
            n := n + 1;
        end loop;
        return n;
    end if;
    execute format('select array_agg(m.key order by m."position") as keys, array_agg(m.payload order by m."position") as payloads,
        array_agg(m.headers order by m."position") as headers from millrace.%I m where m."position" = any($1)', s.name) into m using p_positions;
    if m.keys is not null then
        perform millrace_engine.project_documents(p, m.keys, m.payloads, m.headers);
    end if;
    return coalesce(cardinality(m.keys), 0);
end $$;
comment on function millrace.project(text, text, bigint[]) is 'Runs the projection of a consumer group for received messages, in the transaction that acks them.';

-- millrace_engine.changes(document_id path, keys, payloads, headers) returns table
-- Messages by the document that they change, in order; those that change none are left out. Documents are in the order of their keys: whoever locks several locks them in that order.
create or replace function millrace_engine.changes(p_document_id text[], p_keys text[], p_payloads jsonb[], p_headers jsonb[])
returns table (id text, payloads jsonb[], headers jsonb[])
language sql immutable as $$
    select y.id, array_agg(y.payload order by y.n), array_agg(y.headers order by y.n)
    from (select case when p_document_id is null then x.key else x.payload #>> p_document_id end collate "C" as id, x.payload, x.headers, x.n
          from unnest(p_keys, p_payloads, p_headers) with ordinality x(key, payload, headers, n)) y
    where y.id is not null group by y.id order by y.id
$$;

-- millrace_engine.evolve(function, payloads, headers, inout document, inout version) returns record
-- What the function makes of a document (null: there is none) with these messages.
create or replace function millrace_engine.evolve(p_function text, p_payloads jsonb[], p_headers jsonb[], inout document jsonb, inout version bigint)
language plpgsql volatile as $$
declare
    call constant text := format('select %s($1, $2, $3)', p_function);
begin
    for i in 1 .. cardinality(p_payloads) loop
        execute call into document using document, p_payloads[i], p_headers[i];
        version := case when document is null then 0 else coalesce(version, 0) + 1 end;
    end loop;
end $$;

-- millrace_engine.refuse_document_key() returns void
-- Raises: MR004, always.
create or replace function millrace_engine.refuse_document_key() returns void
language plpgsql immutable as $$
begin
    raise exception 'a document cannot have a key of more than % bytes', millrace_engine.longest_key() using errcode = 'MR004',
        hint = 'Leave such messages out with a filter of the group, or give the projection a document id that is shorter.';
end $$;
comment on function millrace_engine.refuse_document_key() is 'Raises that a key is too long for a table of documents.';

-- millrace_engine.project_documents(projection, keys, payloads, headers) returns void
-- Locks:  the documents' rows. Two that make the same new document meet at its key, and the second goes on from what the first has written.
-- Raises: MR004 a key that is too long for an index; what the function raises.
create or replace function millrace_engine.project_documents(p millrace_engine.projection, p_keys text[], p_payloads jsonb[], p_headers jsonb[]) returns void
language plpgsql volatile as $$
declare
    c record;
    old record;
    new record;
    n integer;
begin
    for c in select * from millrace_engine.changes(p.document_id, p_keys, p_payloads, p_headers) loop
        if octet_length(c.id) > millrace_engine.longest_key() then
            perform millrace_engine.refuse_document_key();
        end if;
        loop
            execute format('select document, version from %s where key = $1 for update', p.documents) into old using c.id;
            new := millrace_engine.evolve(p.function, c.payloads, c.headers, old.document, old.version);
            if old.version is not null and new.document is null then
                execute format('delete from %s where key = $1', p.documents) using c.id;
            elsif old.version is not null then
                execute format('update %s set document = $2, version = $3 where key = $1', p.documents) using c.id, new.document, new.version;
            elsif new.document is not null then
                execute format('insert into %s (key, document, version) values ($1, $2, $3) on conflict (key) do nothing', p.documents)
                    using c.id, new.document, new.version;
                get diagnostics n = row_count;
                continue when n = 0;   -- another transaction has made it meanwhile
            end if;
            exit;
        end loop;
    end loop;
end $$;
