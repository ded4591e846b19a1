-- Workflow memory. Messages of one workflow (subject) are handled one after the other, often by different processes and days apart; what the handlers know of it is a row:
-- its state, a version that grows with each write, its parent and root, and who has locked it. A memory is a table of such rows; it may lie where its users like it.
--
-- One table, and not one each for states, locks and trees: a write compares the version and the lock's token in the row that it updates, in one statement, so there is no moment
-- between the look and the write. No index holds a column that changes while a workflow runs, so updates stay in their page (HOT).
--
-- millrace.create_memory(name, table, keep_completed_seconds) returns integer
-- Creates a memory, or changes what is given of its settings; returns its id. Repeating it is harmless, and brings back indexes that are missing.
--   table                   default millrace."<name>.memory". A table that is there is taken over when it has the right structure, with what is in it.
--   keep_completed_seconds  how long maintenance leaves completed workflows; 0, the default: for ever.
-- Raises: 42501 need_owner; MR004 bad name or value, another table than it has, or a table whose structure is another, with what differs.
create or replace function millrace.create_memory(p_name text, p_table text default null, p_keep_completed_seconds bigint default null) returns integer
language plpgsql volatile
set client_min_messages = warning as $$
declare
    m millrace_engine.memory;
    wanted text;
    target regclass;
    i record;
begin
    perform millrace_engine.need_owner();
    if p_name is null or p_name !~ '^[a-z][a-z0-9_]{0,47}$' then
        raise exception 'memory name % is not usable', coalesce(quote_literal(p_name), 'null') using errcode = 'MR004',
            hint = 'Use a lower case letter, then up to 47 lower case letters, digits or underscores.';
    end if;
    if p_keep_completed_seconds not between 0 and 3153600000 then
        raise exception 'completed workflows cannot be kept for % seconds', p_keep_completed_seconds using errcode = 'MR004',
            hint = 'Use 0, for ever, to 3153600000, a hundred years.';
    end if;
    perform pg_advisory_xact_lock(1836019570, 1);   -- as for streams
    select * into m from millrace_engine.memory x where x.name = p_name for no key update;
    wanted := case when p_table is not null then millrace_engine.table_name(p_table, 'shop.order_state')
        else coalesce(m.relation, format('millrace.%I', p_name || '.memory')) end;   -- no stream has a name with this dot
    target := to_regclass(wanted);
    if m.id is not null and m.relation is distinct from coalesce(millrace_engine.qualified(target), wanted) then
        raise exception 'memory "%" has the table %, and not %', p_name, m.relation, wanted using errcode = 'MR004',
            hint = 'Leave the table out, or drop the memory with millrace.drop_memory, which keeps its table.';
    end if;
    if target is null then
        execute format($ddl$
            create table %s (
                subject      text collate "C" primary key,
                state        jsonb,                          -- null while it is only locked
                version      bigint not null default 0,      -- counts the writes; 0 while it is only locked
                parent       text collate "C",
                root         text collate "C",               -- itself when it has no parent
                metadata     jsonb,
                completed_at timestamptz,
                lock_token   bigint,
                lock_holder  text,
                locked_until timestamptz,
                created_at   timestamptz not null default now(),
                updated_at   timestamptz not null default now()
            ) with (fillfactor = 70)$ddl$, wanted);
        target := wanted::regclass;
        execute format('comment on table %s is %L', target, format('Millrace workflow memory "%s". Read it as you like; write with millrace.write_memory.', p_name));
    elsif exists (select from millrace_engine.memory x where x.relation = millrace_engine.qualified(target) and x.name <> p_name) then
        raise exception 'table % belongs to another memory', wanted using errcode = 'MR004', hint = 'Name another table, or use that memory.';
    end if;
    if m.id is null then
        insert into millrace_engine.memory (name, relation, keep_completed_seconds)
            values (p_name, millrace_engine.qualified(target), coalesce(p_keep_completed_seconds, 0)) returning * into m;
    elsif p_keep_completed_seconds is distinct from m.keep_completed_seconds and p_keep_completed_seconds is not null then
        update millrace_engine.memory x set keep_completed_seconds = p_keep_completed_seconds where x.id = m.id;
    end if;
    perform millrace_engine.memory(p_name);
    for i in select * from millrace_engine.memory_indexes(target) x where x.missing loop
        execute i.statement;
    end loop;
    perform millrace_engine.install_memory(m.id);
    return m.id;
end $$;
comment on function millrace.create_memory(text, text, bigint) is 'Creates a workflow memory, or changes its settings. Repeating it is harmless.';

-- millrace_engine.memory_indexes(table) returns table (statement, missing)
-- The indexes of a memory besides its primary key: the workflows of a tree, the open ones last; the children of a workflow; the roots that are completed, for cleaning up.
create or replace function millrace_engine.memory_indexes(p_table regclass) returns table (statement text, missing boolean)
language sql stable as $$
    select format('create index on %s %s', p_table, w.definition),
           not exists (select from pg_index i where i.indrelid = p_table and i.indisvalid
               and regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING btree ', '') = w.definition)
    from (values ('(root, completed_at)'), ('(parent) WHERE (parent IS NOT NULL)'),
                 ('(completed_at) WHERE ((subject = root) AND (completed_at IS NOT NULL))')) w(definition);
$$;

-- millrace_engine.memory_problem(table) returns text
-- What keeps a table from being a memory; null when nothing does. Columns that others have added are none of our business, unless they refuse our rows.
-- Cost: a look at the catalogue, 38 µs.
create or replace function millrace_engine.memory_problem(p_table text) returns text
language plpgsql stable as $$
declare
    relation constant regclass := to_regclass(p_table);
    differs text;
begin
    if relation is null then
        return format('table %s is missing', p_table);
    end if;
    select string_agg(d.text, '; ') into differs from (
        select case when a.attname is null then format('column %s %s is missing', w.name, w.type::regtype)
                    when a.atttypid <> w.type then format('column %s is of type %s, not %s', w.name, a.atttypid::regtype, w.type::regtype)
                    when a.attnotnull and not w.required then format('column %s is not null', w.name)
                    when w.name is null then format('column %s, which is none of ours, is not null and has no default', a.attname) end as text
        from (values ('subject', 25, true), ('state', 3802, false), ('version', 20, true), ('parent', 25, false), ('root', 25, false), ('metadata', 3802, false),
                     ('completed_at', 1184, false), ('lock_token', 20, false), ('lock_holder', 25, false), ('locked_until', 1184, false),
                     ('created_at', 1184, true), ('updated_at', 1184, true)) w(name, type, required)
        full join (select * from pg_attribute x where x.attrelid = relation and x.attnum > 0 and not x.attisdropped) a on a.attname = w.name
        where a.attname is null or w.name is not null and (a.atttypid <> w.type or a.attnotnull and not w.required)
           or w.name is null and a.attnotnull and not a.atthasdef and a.attidentity = '' and a.attgenerated = ''
        order by w.name, a.attname) d;
    if not exists (select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attname = 'subject'
            where i.indrelid = relation and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null and i.indkey::text = a.attnum::text) then
        differs := concat_ws('; ', differs, 'no primary key (subject)');
    end if;
    return 'table ' || p_table || ': ' || nullif(differs, '');
end $$;

-- millrace.check_memory(name) returns void
-- Raises: MR002 no such memory; MR004 its table is missing, or has another structure, with what differs.
create or replace function millrace.check_memory(p_name text) returns void
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_name);
    i record;
begin
    for i in select * from millrace_engine.memory_indexes(to_regclass(m.relation)) x where x.missing loop
        raise exception 'memory "%" cannot be used: table %: an index is missing', p_name, m.relation using errcode = 'MR004',
            hint = format('Run millrace.create_memory(%L), which makes it: %s.', p_name, i.statement);
    end loop;
end $$;
comment on function millrace.check_memory(text) is 'Raises when the table of a workflow memory is not what it has to be, with what differs.';

-- millrace_engine.memory(name) returns memory
-- The memory that a verb is called with. A table that somebody has altered is refused before anything is read or written.
-- Cost:   the look at the table once in a transaction, which remembers in a setting of its own which memory it has looked at.
-- Raises: as check_memory, but for indexes.
create or replace function millrace_engine.memory(p_name text) returns millrace_engine.memory
language plpgsql volatile as $$
declare
    looked constant text := now() || ' ' || p_name;
    m millrace_engine.memory;
    problem text;
begin
    select * into m from millrace_engine.memory x where x.name = p_name;
    if not found then
        raise exception 'memory % does not exist', coalesce(quote_literal(p_name), 'null') using errcode = 'MR002',
            hint = 'Create it with millrace.create_memory, or name it in a Processor''s spec.memory.';
    end if;
    if current_setting('millrace.memory', true) is distinct from looked then
        problem := millrace_engine.memory_problem(m.relation);
        if problem is not null then
            raise exception 'memory "%" cannot be used: %', p_name, problem using errcode = 'MR004',
                hint = 'Give the table back the structure of docs/workflow-memory.md, or drop the memory, which keeps its table, and create it with another.';
        end if;
        perform set_config('millrace.memory', looked, true);
    end if;
    return m;
end $$;

-- millrace_engine.install_memory(memory id) returns void
-- Makes the memory's own copy of each function whose name ends in _memory_pattern, as install_functions.sql does for streams, and lets the runtime role use its table.
create or replace function millrace_engine.install_memory(p_memory integer) returns void
language plpgsql volatile
set check_function_bodies = off as $$
declare
    m millrace_engine.memory;
    f record;
    runtime text;
    target regclass;
begin
    select * into strict m from millrace_engine.memory x where x.id = p_memory;
    select v.value into runtime from millrace_engine.setting v where v.name = 'runtime_role';
    for f in select p.oid, p.proname from pg_proc p where p.pronamespace = 'millrace_engine'::regnamespace and p.proname like '%\_memory\_pattern' loop
        execute replace(replace(pg_get_functiondef(f.oid), 'millrace.memory_pattern', m.relation), '_memory_pattern', '_memory_' || p_memory);
        if runtime is not null then
            execute format('grant execute on function millrace_engine.%I to %I', replace(f.proname, '_pattern', '_' || p_memory), runtime);
        end if;
    end loop;
    target := to_regclass(m.relation);
    -- A table that is another's, only that other can grant.
    if runtime is not null and (select pg_has_role(c.relowner, 'usage') from pg_class c where c.oid = target) then
        execute format('grant select, insert, update, delete on %s to %I', target, runtime);
    end if;
end $$;

-- millrace.drop_memory(name, drop_table) returns boolean
-- Ends a memory; its table stays, with what is in it, unless drop_table asks otherwise. False when there was none.
create or replace function millrace.drop_memory(p_name text, p_drop_table boolean default false) returns boolean
language plpgsql volatile as $$
declare
    m millrace_engine.memory;
    f record;
begin
    perform millrace_engine.need_owner();
    perform pg_advisory_xact_lock(1836019570, 1);
    delete from millrace_engine.memory x where x.name = p_name returning * into m;
    if not found then
        return false;
    end if;
    for f in select p.oid::regprocedure as signature from pg_proc p
             where p.pronamespace = 'millrace_engine'::regnamespace and p.proname like '%\_memory\_' || m.id loop
        execute 'drop function ' || f.signature;
    end loop;
    if p_drop_table then
        execute 'drop table if exists ' || m.relation;
    end if;
    return true;
end $$;
comment on function millrace.drop_memory(text, boolean) is 'Ends a workflow memory; its table stays unless it is asked for.';

-- millrace.memories() returns table (name, table, keep_completed_seconds, workflows, bytes, problem)
-- The memories of the database. workflows is PostgreSQL's estimate, -1 when there is none yet; problem is what keeps a memory from being used.
create or replace function millrace.memories()
returns table (name text, "table" text, keep_completed_seconds bigint, workflows bigint, bytes bigint, problem text)
language sql stable as $$
    select m.name, m.relation, m.keep_completed_seconds, c.reltuples::bigint, pg_total_relation_size(c.oid), millrace_engine.memory_problem(m.relation)
    from millrace_engine.memory m left join pg_class c on c.oid = to_regclass(m.relation) order by m.name;
$$;
comment on function millrace.memories() is 'The workflow memories of the database, with what keeps one from being used.';

-- millrace_engine.check_subject(subject) returns void
-- Raises: MR004.
create or replace function millrace_engine.check_subject(p_subject text) returns void
language plpgsql immutable as $$
begin
    if p_subject is null or p_subject = '' or octet_length(p_subject) > 1024 then
        raise exception 'a workflow needs a subject of 1 to 1024 bytes' using errcode = 'MR004', hint = 'Pass the id of the workflow, such as an order''s.';
    end if;
end $$;
