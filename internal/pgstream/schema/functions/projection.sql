-- Projections that run inside the append, in its transaction: what they write is there when the message is, and an error of theirs refuses the append. For those that may lag
-- behind, use a consumer group and a Processor.
--
-- millrace.create_projection(stream, name, function, documents, document_id) returns void
-- Creates or replaces a projection of a stream with versions. Projections run in the order of their names, for each message of each append, with the rights of whoever appends.
-- Without documents, the function does everything:
--   function(stream text, key text, version bigint, position bigint, payload jsonb, headers jsonb)
-- With documents, a table (key text primary key, document jsonb not null, version bigint not null), which is made when it is missing, the function turns the present document
-- and a message into the next document; null in the beginning; a result of null deletes it:
--   function(document jsonb, payload jsonb, headers jsonb) returns jsonb
-- The document has the message's key, or the text at the path document_id in its payload, so that one document can be made of many entities; a payload without it
-- is not projected. version counts the changes of the document.
-- What was appended before is not projected; millrace.rebuild_projection does that.
-- Raises: MR002 no such stream; MR004 a stream without versions, or a function or table that cannot be.
create or replace function millrace.create_projection(p_stream text, p_name text, p_function text, p_documents text default null,
    p_document_id text[] default null) returns void
language plpgsql volatile
set client_min_messages = warning as $$
declare
    s millrace_engine.stream;
    arguments constant text := case when p_documents is null then '(text,text,bigint,bigint,jsonb,jsonb)' else '(jsonb,jsonb,jsonb)' end;
    f regprocedure;
    d regclass;
begin
    select * into s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream);
    if not s.versions then
        raise exception 'stream "%" has no versions', p_stream using errcode = 'MR004', hint = 'Declare them, or project with a consumer group.';
    end if;
    if p_name is null or p_name !~ '^[a-z][a-z0-9_-]{0,62}$' then
        raise exception 'projection name % is not usable', coalesce(quote_literal(p_name), 'null') using errcode = 'MR004',
            hint = 'Use a lower case letter, then up to 62 lower case letters, digits, dashes or underscores.';
    end if;
    f := to_regprocedure(p_function || arguments);
    if f is null then
        raise exception 'there is no function %', p_function || arguments using errcode = 'MR004',
            hint = 'Create it first, with exactly these arguments, and name its schema if it is not in the search path.';
    end if;
    if p_documents is not null then
        if to_regclass(p_documents) is null then
            execute format('create table %s (key text primary key, document jsonb not null, version bigint not null)',
                array_to_string(array(select quote_ident(x) from unnest(parse_ident(p_documents)) x), '.'));
        end if;
        d := p_documents::regclass;
        if (select count(*) from pg_attribute a where a.attrelid = d and (a.attname, a.atttypid) in
                (('key', 'text'::regtype), ('document', 'jsonb'::regtype), ('version', 'bigint'::regtype))) < 3 then
            raise exception 'table % cannot hold documents', d using errcode = 'MR004',
                hint = 'It needs the columns key text primary key, document jsonb, version bigint. Name a table that does not exist to have it made.';
        end if;
    elsif p_document_id is not null then
        raise exception 'a document id needs a table of documents' using errcode = 'MR004', hint = 'Name the table in p_documents too.';
    end if;
    insert into millrace_engine.projection as p (stream_id, name, function, documents, document_id)
        values (s.id, p_name, millrace_engine.qualified(f), millrace_engine.qualified(d), p_document_id)
        on conflict on constraint projection_pkey do update set function = excluded.function, documents = excluded.documents, document_id = excluded.document_id;
end $$;
comment on function millrace.create_projection(text, text, text, text, text[]) is 'Creates or replaces a projection that runs with every append to a stream.';

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
-- Raises: MR002 no such stream.
create or replace function millrace.drop_projection(p_stream text, p_name text) returns boolean
language plpgsql volatile as $$
begin
    delete from millrace_engine.projection p where p.stream_id = millrace_engine.stream_id(p_stream) and p.name = p_name;
    return found;
end $$;
comment on function millrace.drop_projection(text, text) is 'Ends a projection; what it has written stays.';

-- millrace_engine.project(stream id, key, payloads, headers, first version, positions) returns void
-- Runs the projections of a stream for what was just appended.
create or replace function millrace_engine.project(p_stream integer, p_key text, p_payloads jsonb[], p_headers jsonb[], p_first bigint, p_positions bigint[])
returns void
language plpgsql volatile as $$
declare
    p millrace_engine.projection;
    stream text;
begin
    for p in select * from millrace_engine.projection x where x.stream_id = p_stream order by x.name loop
        if p.documents is null and stream is null then
            select s.name into stream from millrace_engine.stream s where s.id = p_stream;
        end if;
        for i in 1 .. cardinality(p_payloads) loop
            if p.documents is null then
                execute format('select %s($1, $2, $3, $4, $5, $6)', p.function)
                    using stream, p_key, p_first + i - 1, p_positions[i], p_payloads[i], p_headers[i];
            else
                perform millrace_engine.project_document(p, p_key, p_payloads[i], p_headers[i]);
            end if;
        end loop;
    end loop;
end $$;

-- millrace_engine.project_document(projection, key, payload, headers) returns void
-- Locks: the document's row. Two appends that make the same new document meet at its key, and the second goes on from what the first has written.
create or replace function millrace_engine.project_document(p millrace_engine.projection, p_key text, p_payload jsonb, p_headers jsonb) returns void
language plpgsql volatile as $$
declare
    id constant text := case when p.document_id is null then p_key else p_payload #>> p.document_id end;
    old jsonb;
    new jsonb;
    n bigint;
begin
    if id is null then
        return;
    end if;
    loop
        execute format('select document, version from %s where key = $1 for update', p.documents) into old, n using id;
        execute format('select %s($1, $2, $3)', p.function) into new using old, p_payload, p_headers;
        if n is not null and new is null then
            execute format('delete from %s where key = $1', p.documents) using id;
        elsif n is not null then
            execute format('update %s set document = $2, version = version + 1 where key = $1', p.documents) using id, new;
        elsif new is not null then
            execute format('insert into %s (key, document, version) values ($1, $2, 1) on conflict (key) do nothing', p.documents) using id, new;
            get diagnostics n = row_count;
            if n = 0 then
                n := null;
                continue;   -- another append has made it meanwhile
            end if;
        end if;
        return;
    end loop;
end $$;

-- millrace.rebuild_projection(stream, name) returns bigint
-- Makes the documents of a projection anew from the whole stream, and returns how many messages that were. It builds a table beside the live one, which goes on, and replaces what
-- is in the live one at the end. For a function that has changed, and for a projection that came later than the messages.
-- Locks:  appends wait, and so do readers of the documents, while the last messages are caught up and the documents are replaced.
-- Cost:   one transaction, as long as it takes to project everything.
-- Raises: MR002 no such stream; MR003 isolation level; MR004 no such projection, one without documents, or retention has removed messages.
create or replace function millrace.rebuild_projection(p_stream text, p_name text) returns bigint
language plpgsql volatile
set client_min_messages = warning as $$
declare
    s millrace_engine.stream;
    p millrace_engine.projection;
    building millrace_engine.projection;
    m record;
    safe bigint := 0;
    done bigint := 0;
    n bigint := 0;
    before bigint;
    last boolean := false;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        perform millrace_engine.refuse_isolation();
    end if;
    select * into s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream);
    select * into p from millrace_engine.projection x where x.stream_id = s.id and x.name = p_name for update;
    if not found or p.documents is null then
        raise exception 'projection % of stream "%" cannot be rebuilt', coalesce(quote_literal(p_name), 'null'), p_stream using errcode = 'MR004',
            hint = 'Name a projection with documents. What a function without documents has written, only its author knows how to make anew.';
    end if;
    if s.first_position > 1 then
        raise exception 'messages of stream "%" below position % have been removed', p_stream, s.first_position using errcode = 'MR004',
            hint = 'Documents cannot be made anew without all messages. Keep event stores without limits of age, size or number.';
    end if;
    building := p;
    building.documents := 'pg_temp.millrace_rebuild';
    execute format('create temporary table millrace_rebuild (like %s including defaults including indexes) on commit drop', p.documents);
    loop
        -- Messages that are committed and final, while appends go on; at last the few that are left, when nobody can append.
        if n - before < 1000 then
            execute format('lock table millrace.%I in share mode', s.name);
            last := true;
        end if;
        safe := millrace_engine.horizon(s.id);
        before := n;
        for m in execute format('select m."position", m.key, m.payload, m.headers from millrace.%I m where m."position" > $1 and m."position" <= $2
                and m.version is not null order by m."position"', s.name) using done, safe loop
            perform millrace_engine.project_document(building, m.key, m.payload, m.headers);
            n := n + 1;
        end loop;
        done := safe;
        exit when last;
    end loop;
    execute format('truncate %s', p.documents);
    execute format('insert into %s (key, document, version) select key, document, version from pg_temp.millrace_rebuild', p.documents);
    return n;
end $$;
comment on function millrace.rebuild_projection(text, text) is 'Makes the documents of a projection anew from the whole stream.';
