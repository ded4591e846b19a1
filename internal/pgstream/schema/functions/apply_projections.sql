-- millrace_engine.plan_projections(stream, wanted) returns table (name, summary, statement, problem, problem_code)
-- What has to be done so that the projections that the stream's resource declares are the wanted ones, an array of objects with name, function, documents, document_id, group and revision.
-- A row has a summary and a statement, or the problem that keeps it from being done now, in words and as SQLSTATE. Projections that were made by SQL are left alone, unless one
-- of that name is wanted: then the resource has it from now on. Writes nothing.
create or replace function millrace_engine.plan_projections(p_stream text, p_wanted jsonb)
returns table (name text, summary text, statement text, problem text, problem_code text)
language plpgsql stable as $$
#variable_conflict use_column
declare
    stream constant integer := millrace_engine.stream_id(p_stream);
    w jsonb;
    p millrace_engine.projection;
    has millrace_engine.projection;
    hint text;
begin
    for w in select x from jsonb_array_elements(p_wanted) x loop
        name := w ->> 'name';
        summary := null; statement := null; problem := null; problem_code := null;
        begin
            p := millrace_engine.wanted_projection(p_stream, w);
        exception when sqlstate 'MR002' or sqlstate 'MR004' then
            get stacked diagnostics problem = message_text, hint = pg_exception_hint, problem_code = returned_sqlstate;
            problem := problem || '. ' || hint;
            return next;
            continue;
        end;
        select * into has from millrace_engine.projection x where x.stream_id = stream and x.name = w ->> 'name';
        summary := case
            when not found then 'create projection'
            when (coalesce(has.next_function, has.function), case when has.next_function is null then has.documents else has.next_documents end,
                    case when has.next_function is null then has.document_id else has.next_document_id end,
                    case when has.next_function is null then has.group_id else has.next_group_id end, coalesce(has.next_revision, has.revision))
                is distinct from (p.function, p.documents, p.document_id, p.group_id, p.revision) then 'change projection'
            when not has.declared then 'take over projection'
            when p.documents is not null and to_regclass(p.documents) is null then 'make the documents of projection'
        end;
        if summary is not null then
            summary := summary || ' ' || quote_ident(name);
            statement := format('select millrace_engine.apply_projection(%L, %L)', p_stream, w);
            return next;
        end if;
    end loop;
    problem := null; problem_code := null;
    for has in select * from millrace_engine.projection x where x.stream_id = stream and x.declared
            and not exists (select from jsonb_array_elements(p_wanted) y where y ->> 'name' = x.name) order by x.name loop
        name := has.name;
        summary := 'drop projection ' || quote_ident(has.name) || coalesce('; its documents in ' || has.documents || ' stay', '');
        statement := format('delete from millrace_engine.projection where id = %s', has.id);
        return next;
    end loop;
end $$;
comment on function millrace_engine.plan_projections(text, jsonb) is 'What has to be done so that a stream has the projections that its resource declares.';

-- millrace_engine.wanted_projection(stream, wanted) returns projection
create or replace function millrace_engine.wanted_projection(p_stream text, p_wanted jsonb) returns millrace_engine.projection
language plpgsql stable as $$
declare
    p millrace_engine.projection;
begin
    p := millrace_engine.checked_projection(p_stream, p_wanted ->> 'name', p_wanted ->> 'function', p_wanted ->> 'documents',
        (select array_agg(x order by n) from jsonb_array_elements_text(p_wanted -> 'document_id') with ordinality y(x, n)), p_wanted ->> 'group');
    p.revision := coalesce(p_wanted ->> 'revision', '');
    return p;
end $$;

-- millrace_engine.apply_projection(stream, wanted) returns void
-- Creates a projection that the stream's resource declares, or changes it. With documents, a new one goes live, and a changed one changes, when a rebuild that begins here has
-- finished (millrace.rebuild_step): until then readers have what was there. Without documents it holds at once.
-- Raises: as create_projection.
create or replace function millrace_engine.apply_projection(p_stream text, p_wanted jsonb) returns void
language plpgsql volatile as $$
declare
    p millrace_engine.projection;
    has millrace_engine.projection;
begin
    p := millrace_engine.wanted_projection(p_stream, p_wanted);
    perform millrace_engine.make_documents(p.documents);
    insert into millrace_engine.projection (stream_id, name, function, documents, document_id, group_id, revision, declared, live)
        values (p.stream_id, p.name, p.function, p.documents, p.document_id, p.group_id, p.revision, true, p.documents is null)
        on conflict on constraint projection_pkey do nothing;
    select * into strict has from millrace_engine.projection x where x.stream_id = p.stream_id and x.name = p.name for no key update;
    if not has.declared then
        update millrace_engine.projection x set declared = true where x.id = has.id;
    end if;
    if p.documents is null then
        delete from millrace_engine.building b where b.projection_id = has.id;
        update millrace_engine.projection x set function = p.function, documents = null, document_id = null, group_id = p.group_id, revision = p.revision, live = true,
                rebuilt_position = null, next_function = null, next_documents = null, next_document_id = null, next_group_id = null, next_revision = null
            where x.id = has.id;
    elsif has.live and (has.function, has.documents, has.document_id, has.group_id, has.revision)
            is not distinct from (p.function, p.documents, p.document_id, p.group_id, p.revision) then
        -- What is live is what is wanted: a rebuild to something else is given up.
        delete from millrace_engine.building b where b.projection_id = has.id;
        update millrace_engine.projection x set rebuilt_position = null, next_function = null, next_documents = null, next_document_id = null, next_group_id = null,
                next_revision = null
            where x.id = has.id and x.rebuilt_position is not null;
    else
        perform millrace_engine.begin_rebuild(has, p);
    end if;
end $$;
comment on function millrace_engine.apply_projection(text, jsonb) is 'Creates or changes a projection that the resource of a stream declares.';
