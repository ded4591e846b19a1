-- millrace_engine.install_functions(stream id) returns void
-- Makes the stream's own copy of each function whose name ends in _template. A static table name lets PostgreSQL keep their plans;
-- with EXECUTE every call would plan again, which costs more than the read itself.
create or replace function millrace_engine.install_functions(p_stream integer) returns void
language plpgsql volatile
-- The copies differ from templates that were checked in names only. Checking each again was a third of the time that a new stream takes.
set check_function_bodies = off
as $$
declare
    s millrace_engine.stream;
    f record;
    source text;
    runtime text;
    templates text;
begin
    select * into strict s from millrace_engine.stream x where x.id = p_stream;
    select v.value into runtime from millrace_engine.setting v where v.name = 'runtime_role';
    select v.value into strict templates from millrace_engine.setting v where v.name = 'templates';   -- migrate.go
    for f in select p.oid, p.proname from pg_proc p
             where p.pronamespace = 'millrace_engine'::regnamespace and p.proname = any(string_to_array(templates, ' '))
               and (s.versions or p.proname not in ('append_template', 'read_entity_template', 'lowest_version_template'))
               and (s.frames is not null or p.proname not in ('append_frame_template', 'read_frames_template')) loop
        source := pg_get_functiondef(f.oid);
        source := replace(source, 'millrace.stream_template', format('millrace.%I', s.name));
        source := replace(source, '/* stream id */ 0', p_stream::text);
        source := replace(source, '/* notified stream */ 0', coalesce(s.parent_id, p_stream)::text);
        if s.parent_id is not null then
            -- Who waits for a stream with priorities waits at the parent.
            source := replace(source, '/* waiting */ state', format('pg_sequence_last_value(''millrace_engine.state_%s'')', s.parent_id));
            source := replace(source, 'millrace_engine.notified_template', 'millrace_engine.notified_' || s.parent_id);
        end if;
        source := replace(source, '_template', '_' || p_stream);
        source := millrace_engine.each_ring(source);
        if s.versions then
            source := replace(source, '-- with versions: ', '');
        end if;
        if s.payload_type = 'Bytes' then
            source := replace(source, '/* json, bytes */ m.payload, null::bytea', 'null::jsonb, m.payload');
        end if;
        execute source;
        if runtime is not null then
            execute format('grant execute on function millrace_engine.%I to %I', replace(f.proname, '_template', '_' || p_stream), runtime);
        end if;
    end loop;
end $$;
comment on function millrace_engine.install_functions(integer) is 'Creates or replaces the functions that belong to one stream.';

-- millrace_engine.each_ring(source of a function) returns text
-- What is written once for "each ring" of the ledgers becomes three branches with static names. (Without a regular expression, which was a third of the time.)
create or replace function millrace_engine.each_ring(p_source text) returns text
language plpgsql stable as $$
declare
    source text := p_source;
    block text;
begin
    while strpos(source, '/* each ring */') > 0 loop
        block := split_part(split_part(source, '/* each ring */', 2), '/* end */', 1);
        source := replace(source, '/* each ring */' || block || '/* end */', (
            select string_agg(format('%s ring_ = %s then%s', case ring when 0 then 'if' else 'elsif' end, ring,
                replace(replace(block, 'claim_ring', 'claim_' || ring), 'settlement_ring', 'settlement_' || ring)), '' order by ring) || 'end if;'
            from generate_series(0, 2) ring));
    end loop;
    return source;
end $$;

-- millrace_engine.install_rings() returns void
-- Makes, of each function whose name ends in _rings, the one without that ending, with a branch for each ring.
create or replace function millrace_engine.install_rings() returns void
language plpgsql volatile as $$
declare
    f record;
begin
    for f in select p.oid, p.proname from pg_proc p where p.pronamespace = 'millrace_engine'::regnamespace and p.proname like '%\_rings' and p.proname <> 'install_rings' loop
        execute replace(millrace_engine.each_ring(pg_get_functiondef(f.oid)), f.proname, left(f.proname, -6));
        execute format('comment on function %s is %L', replace(f.oid::regprocedure::text, f.proname, left(f.proname, -6)), obj_description(f.oid, 'pg_proc'));
    end loop;
end $$;
comment on function millrace_engine.each_ring(text) is 'The text of a function with a branch for each ring of the ledgers.';
comment on function millrace_engine.install_rings() is 'Creates or replaces the functions that are written with one ring and belong to no stream.';
