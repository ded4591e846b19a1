-- millrace_engine.stream_repairs(stream id) returns table (summary, statement)
-- What is missing or wrong in the database objects of a stream, and the statement that mends it, in the order to run them. For a
-- new stream that is everything, so creating and repairing are one code. A stream's repairs include those of its priority lanes and their groups.
-- Reads the catalogue and the engine's settings only.
create or replace function millrace_engine.stream_repairs(p_stream integer) returns table (summary text, statement text)
language plpgsql stable as $$
declare
    s millrace_engine.stream;
    runtime text;
    parent regclass;
    leaf regclass;
    leaf_name text;
    target text;
    seq record;
    top bigint;
    lane millrace_engine.stream;
    repair record;
    tenant record;
begin
    select * into strict s from millrace_engine.stream x where x.id = p_stream;
    select v.value into runtime from millrace_engine.setting v where v.name = 'runtime_role';
    parent := to_regclass(format('millrace.%I', s.name));

    select q.* into seq from pg_sequences q
        where q.schemaname = 'millrace_engine' and q.sequencename = 'position_' || p_stream;
    if not found then
        if parent is not null then
            execute format('select coalesce(max(m."position"), 0) from millrace.%I m', s.name) into top;
        end if;
        summary := 'create the position sequence';
        statement := format('create sequence millrace_engine.position_%s as bigint increment 1 cache 1 no cycle start %s', p_stream,
            greatest(s.first_position, top + 1, (select coalesce(max(greatest(c.horizon, c.frontier)), 0) + 1 from millrace_engine.claim c
                join millrace_engine.lane l on l.id = c.lane_id
                join millrace_engine.consumer_group g on g.id = l.group_id where g.stream_id = p_stream)));
        return next;
    elsif seq.cache_size <> 1 or seq.increment_by <> 1 or seq.cycle then
        summary := 'restore the position sequence to cache 1, increment 1, no cycle';
        statement := format('alter sequence millrace_engine.position_%s increment 1 cache 1 no cycle', p_stream);
        return next;
    end if;

    foreach target in array array['state', 'notified'] || case when s.frames is not null then array['high'] else '{}' end loop
        if to_regclass(format('millrace_engine.%s_%s', target, p_stream)) is null then
            summary := format('create the %s sequence', target);
            statement := format('create sequence millrace_engine.%1$s_%2$s as bigint minvalue 0 start 0 cache 1;
                select setval(''millrace_engine.%1$s_%2$s'', 0);
                update millrace_engine.stream set fresh_locks = false, suspects = null where coalesce(parent_id, id) = %2$s', target, p_stream);
            return next;
        end if;
    end loop;

    if parent is null then
        summary := format('create table millrace.%I', s.name);
        statement := format($ddl$
            create table millrace.%2$I (
                "position" bigint not null default nextval('millrace_engine.position_%1$s'),
                created_at timestamptz not null default statement_timestamp(),
                segment    smallint not null default (ascii(current_setting('millrace.guard_%1$s')) - 97)::smallint,
                key        text,
                headers    jsonb,
                payload    %3$s not null
            ) partition by list (segment)$ddl$,
            p_stream, s.name, case s.payload_type when 'JSON' then 'jsonb' else 'bytea' end);
        return next;
        summary := format('describe table millrace.%I', s.name);
        statement := format('comment on table millrace.%I is %L', s.name,
            'Millrace stream. Insert or COPY key, headers and payload; everything else is filled in. Never update or delete.');
        return next;
    elsif exists (select from pg_attribute a where a.attname = 'position' and not a.atthasdef
            and (a.attrelid = parent or a.attrelid in (select i.inhrelid from pg_inherits i where i.inhparent = parent))) then
        -- Whoever drops the sequence with CASCADE takes the defaults away. The table's goes to every segment and tenant.
        summary := format('take the positions of millrace.%I from the sequence', s.name);
        statement := format('alter table millrace.%I alter "position" set default nextval(''millrace_engine.position_%s'')', s.name, p_stream);
        return next;
    end if;

    if to_regproc('millrace_engine.receive_' || p_stream) is null or to_regproc('millrace_engine.publish_guard_' || p_stream) is null
            or to_regproc('millrace_engine.publish_' || p_stream) is null or to_regproc('millrace_engine.publish_batch_' || p_stream) is null
            or s.versions and to_regproc('millrace_engine.append_' || p_stream) is null
            or s.frames is not null and to_regproc('millrace_engine.append_frame_' || p_stream) is null then
        summary := 'create the functions of the stream';
        statement := format('select millrace_engine.install_functions(%s)', p_stream);
        return next;
    end if;

    if s.versions and (parent is null or not exists (select from pg_attribute a where a.attrelid = parent and a.attname = 'version' and not a.attisdropped)) then
        summary := format('add versions to millrace.%I', s.name);
        statement := format('alter table millrace.%I add column version bigint', s.name);
        return next;
    end if;

    if s.frames is not null and (parent is null or not exists (select from pg_attribute a where a.attrelid = parent and a.attname = 'frame' and not a.attisdropped)) then
        summary := format('add frames to millrace.%I', s.name);
        statement := format('alter table millrace.%I add column frame bigint, add column frame_count bigint', s.name);
        return next;
    end if;

    for k in 0 .. s.segments - 1 loop
        leaf_name := format('segment_%s_%s', p_stream, k);
        leaf := to_regclass('millrace_engine.' || leaf_name);
        if leaf is null then
            -- All that a segment needs in one step and in as few statements as can be: they are most of the time that a new stream takes.
            summary := format('create segment %s of %s, with its indexes and its guard', k + 1, s.segments);
            statement := format('create table millrace_engine.%1$s partition of millrace.%2$I (segment default %3$s) for values in (%3$s)
                    with (autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_threshold = 2147483647);
                create index %1$s_position_idx on millrace_engine.%1$s ("position");
                create trigger publish_guard before insert on millrace_engine.%1$s for each statement
                    execute function millrace_engine.publish_guard_%4$s();
                alter table millrace_engine.%1$s enable always trigger publish_guard', leaf_name, s.name, k, p_stream)
                || case when s.versions then format('; create index %1$s_key_version_idx on millrace_engine.%1$s (key, version)', leaf_name) else '' end
                || case when s.frames is not null then format('; create index %1$s_key_frame_idx on millrace_engine.%1$s (key, frame) where frame is not null', leaf_name)
                    else '' end;
            return next;
            continue;
        end if;
        if not exists (select from pg_index i where i.indrelid = leaf and i.indisvalid
                and i.indkey::text = (select a.attnum::text from pg_attribute a where a.attrelid = leaf and a.attname = 'position')) then
            summary := format('index the positions of segment %s', k + 1);
            statement := format('drop index if exists millrace_engine.%1$s_position_idx;
                create index %1$s_position_idx on millrace_engine.%1$s ("position")', leaf_name);
            return next;
        end if;
        if s.versions and (leaf is null or not exists (select from pg_index i where i.indrelid = leaf and i.indisvalid
                and i.indkey::text = (select string_agg(a.attnum::text, ' ' order by a.attname) from pg_attribute a
                    where a.attrelid = leaf and a.attname in ('key', 'version')))) then
            summary := format('index the versions of segment %s', k + 1);
            statement := format('drop index if exists millrace_engine.%1$s_key_version_idx;
                create index %1$s_key_version_idx on millrace_engine.%1$s (key, version)', leaf_name);
            return next;
        end if;
        if s.frames is not null and not exists (select from pg_index i where i.indrelid = leaf and i.indisvalid and i.indpred is not null
                and i.indkey::text = (select string_agg(a.attnum::text, ' ' order by a.attname desc) from pg_attribute a
                    where a.attrelid = leaf and a.attname in ('key', 'frame'))) then
            summary := format('index the frames of segment %s', k + 1);
            statement := format('drop index if exists millrace_engine.%1$s_key_frame_idx;
                create index %1$s_key_frame_idx on millrace_engine.%1$s (key, frame) where frame is not null', leaf_name);
            return next;
        end if;
        if not exists (select from pg_trigger t where t.tgrelid = leaf and t.tgname = 'publish_guard' and t.tgenabled = 'A') then
            summary := format('guard inserts into segment %s', k + 1);
            statement := millrace_engine.guard_statement(p_stream, 'millrace_engine.' || leaf_name);
            return next;
        end if;
    end loop;

    for tenant in select t.name, t.segment from millrace_engine.tenant t where t.stream_id = p_stream and s.has_tenants order by t.segment loop
        leaf_name := s.name || '.' || tenant.name;
        leaf := to_regclass(format('millrace.%I', leaf_name));
        if leaf is null then
            -- Attached and not made as a partition, so that nobody waits.
            summary := format('create the table of tenant %s', tenant.name);
            statement := format('create table millrace.%1$I (like millrace.%2$I including defaults);
                alter table millrace.%1$I alter column segment set default %3$s;
                create index %5$I on millrace.%1$I ("position");
                create index %6$I on millrace.%1$I (key, version);
                create trigger publish_guard before insert on millrace.%1$I for each statement
                    execute function millrace_engine.publish_guard_%4$s();
                alter table millrace.%1$I enable always trigger publish_guard;
                alter table millrace.%2$I attach partition millrace.%1$I for values in (%3$s)', leaf_name, s.name, tenant.segment, p_stream,
                format('tenant_%s_%s_position_idx', p_stream, tenant.segment), format('tenant_%s_%s_key_version_idx', p_stream, tenant.segment));
            return next;
        elsif not exists (select from pg_trigger t where t.tgrelid = leaf and t.tgname = 'publish_guard' and t.tgenabled = 'A') then
            summary := format('guard inserts into the table of tenant %s', tenant.name);
            statement := millrace_engine.guard_statement(p_stream, format('millrace.%I', leaf_name));
            return next;
        end if;
        if runtime is not null and (leaf is null or not has_any_column_privilege(runtime, leaf, 'insert') or not has_table_privilege(runtime, leaf, 'select')) then
            summary := format('grant appending and reading to the runtime role for tenant %s', tenant.name);
            statement := format('grant select, insert (key, headers, payload, version) on millrace.%I to %I', leaf_name, runtime);
            return next;
        end if;
    end loop;

    if parent is null or not exists (select from pg_trigger t where t.tgrelid = parent and t.tgname = 'publish_guard' and t.tgenabled = 'A') then
        summary := format('guard inserts into millrace.%I', s.name);
        statement := millrace_engine.guard_statement(p_stream, format('millrace.%I', s.name));
        return next;
    end if;

    if runtime is not null and (parent is null or not has_any_column_privilege(runtime, parent, 'insert')
            or not has_table_privilege(runtime, parent, 'select')
            or exists (select from unnest(array['position', 'state', 'notified'] || case when s.frames is not null then array['high'] else '{}' end) q
                where has_sequence_privilege(runtime, to_regclass(format('millrace_engine.%s_%s', q, p_stream)), 'usage') is not true)
            or s.versions and not exists (select from pg_attribute a where a.attrelid = parent and a.attname = 'version' and has_column_privilege(runtime, parent, a.attnum, 'insert'))
            or s.frames is not null and not exists (select from pg_attribute a where a.attrelid = parent and a.attname = 'frame' and has_column_privilege(runtime, parent, a.attnum, 'insert'))) then
        target := quote_ident(runtime);
        summary := 'grant publishing and reading to the runtime role';
        statement := format('grant select, insert (key, headers, payload%4$s) on millrace.%1$I to %2$s;
            grant usage, select on sequence millrace_engine.position_%3$s to %2$s;
            grant usage, select, update on sequence millrace_engine.state_%3$s, millrace_engine.notified_%3$s to %2$s', s.name, target, p_stream,
            case when s.versions then ', version' when s.frames is not null then ', frame, frame_count' else '' end);
        if s.frames is not null then
            statement := statement || format('; grant usage, select, update on sequence millrace_engine.high_%s to %s', p_stream, target);
        end if;
        return next;
    end if;

    for n in 1 .. s.priorities - 1 loop
        select x.* into lane from millrace_engine.stream x where x.parent_id = s.id and x.priority = n;
        if not found then
            summary := 'create the lane of priority ' || n;
        elsif (lane.partitions, lane.segments, lane.retention_policy, lane.max_age_seconds, lane.max_bytes, lane.max_messages, lane.max_message_bytes,
                lane.dedupe_window_seconds) is distinct from (s.partitions, s.segments, s.retention_policy, s.max_age_seconds, s.max_bytes,
                s.max_messages, s.max_message_bytes, s.dedupe_window_seconds) then
            summary := format('bring the lane of priority %s to the stream''s settings', n);
        elsif exists (select from millrace_engine.consumer_group g where g.stream_id = s.id
                and not exists (select from millrace_engine.consumer_group m where m.stream_id = lane.id and m.parent_id = g.id)) then
            summary := format('mirror the consumer groups to the lane of priority %s', n);
        else
            for repair in select r.summary, r.statement from millrace_engine.stream_repairs(lane.id) r loop
                summary := format('priority %s: %s', n, repair.summary);
                statement := repair.statement;
                return next;
            end loop;
            continue;
        end if;
        statement := format('select millrace_engine.apply_lanes(%s)', p_stream);
        return next;
    end loop;
end $$;
comment on function millrace_engine.stream_repairs(integer) is
    'What is missing or wrong in the database objects of a stream, and the statements that mend it.';

-- millrace_engine.guard_statement(stream id, table) returns text
-- The DDL that puts the publish guard on a stream's table or on one of its segments.
create or replace function millrace_engine.guard_statement(p_stream integer, p_table text) returns text
language sql immutable
return format('drop trigger if exists publish_guard on %1$s;
    create trigger publish_guard before insert on %1$s for each statement
        execute function millrace_engine.publish_guard_%2$s();
    alter table %1$s enable always trigger publish_guard', p_table, p_stream);
