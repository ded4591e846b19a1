-- millrace_engine.apply_stream(spec jsonb) returns integer
-- Creates the stream, or brings its settings and its database objects to the spec. Idempotent; concurrent callers wait for each other.
-- Keys: name, partitions, payload_type, segments, retention_policy, max_age_seconds, max_bytes, max_messages,
--       max_message_bytes, dedupe_window_seconds, priorities, versions, frames, owner. A missing key keeps the present value, or takes the default.
-- Priorities are lanes, streams of their own below this one (priority.sql), which follow it in everything.
-- Raises: 42501 need_owner; MR004 for what can never be done, with what to do instead; MR007 it has another owner.
create or replace function millrace_engine.apply_stream(p_spec jsonb) returns integer
language plpgsql volatile
set client_min_messages = warning as $$
declare
    spec constant jsonb := jsonb_strip_nulls(p_spec) - '{id,parent_id,priority,first_position,segment_started_at,created_at,has_tenants}'::text[];
    s millrace_engine.stream;
    wanted millrace_engine.stream;
    step record;
begin
    perform millrace_engine.need_owner();
    select x.* into s from millrace_engine.stream x where x.name = p_spec ->> 'name';
    perform millrace_engine.refuse_lane(s);
    if p_spec ->> 'name' is null or p_spec ->> 'name' !~ '^[a-z][a-z0-9_]{0,47}$' then
        raise exception 'stream name % is not usable', coalesce(quote_literal(p_spec ->> 'name'), 'null') using errcode = 'MR004',
            hint = 'Use a lower case letter, then up to 47 lower case letters, digits or underscores.';
    end if;
    -- One lock for all changes of structure: they are rare, and CREATE TABLE takes more than one lock.
    perform pg_advisory_xact_lock(1836019570, 1);
    select * into s from millrace_engine.stream x where x.name = p_spec ->> 'name' for no key update;
    if not found then
        wanted := jsonb_populate_record(null::millrace_engine.stream,
            '{"partitions": 8, "payload_type": "JSON", "segments": 4, "retention_policy": "Limits", "max_age_seconds": 0, "max_bytes": 0,
              "max_messages": 0, "max_message_bytes": 1048576, "dedupe_window_seconds": 120, "priorities": 1, "versions": false, "has_tenants": false}'::jsonb || spec);
        wanted.frames := millrace_engine.frame_settings(wanted.frames);
        perform millrace_engine.check_stream(wanted);
        insert into millrace_engine.stream (name, partitions, payload_type, segments, retention_policy, max_age_seconds, max_bytes,
                max_messages, max_message_bytes, dedupe_window_seconds, priorities, versions, frames, owner)
            values (wanted.name, wanted.partitions, wanted.payload_type, wanted.segments, wanted.retention_policy, wanted.max_age_seconds,
                wanted.max_bytes, wanted.max_messages, wanted.max_message_bytes, wanted.dedupe_window_seconds, wanted.priorities, wanted.versions,
                wanted.frames, wanted.owner)
            returning * into s;
    else
        wanted := jsonb_populate_record(s, spec);
        wanted.frames := millrace_engine.frame_settings(wanted.frames);
        if s.owner <> (p_spec -> 'owner') or (s.owner is not null and p_spec ->> 'owner' is null and wanted is distinct from s) then
            raise exception 'stream "%" belongs to %', s.name, s.owner using errcode = 'MR007', hint = 'Let its owner release it first.';
        end if;
        if wanted.partitions < s.partitions then
            raise exception 'stream "%" has % partitions and cannot go down to %', s.name, s.partitions, wanted.partitions
                using errcode = 'MR004', hint = format('Keep %s or more. For fewer, create another stream and move its consumers.', s.partitions);
        end if;
        if wanted.payload_type <> s.payload_type then
            raise exception 'the payload type of stream "%" is % and cannot become %', s.name, s.payload_type, wanted.payload_type
                using errcode = 'MR004', hint = 'Create another stream with that payload type.';
        end if;
        if wanted.segments < s.segments then
            raise exception 'stream "%" has % segments and cannot go down to %', s.name, s.segments, wanted.segments
                using errcode = 'MR004', hint = format('Keep %s or more.', s.segments);
        end if;
        if wanted.priorities < s.priorities then
            raise exception 'stream "%" has % priorities and cannot go down to %', s.name, s.priorities, wanted.priorities
                using errcode = 'MR004', hint = format('Keep %s or more: messages may wait in each of them.', s.priorities);
        end if;
        if s.versions and not wanted.versions then
            raise exception 'stream "%" has versions and cannot be without them', s.name using errcode = 'MR004', hint = 'Keep them, or create another stream.';
        end if;
        if wanted.retention_policy = 'WorkQueue'
                and (select count(*) from millrace_engine.consumer_group g where g.stream_id = s.id) > 1 then
            raise exception 'stream "%" has several consumer groups, and retention WorkQueue allows one', s.name
                using errcode = 'MR004', hint = 'Drop the other groups first, or use retention Interest.';
        end if;
        if wanted is distinct from s then
            perform millrace_engine.check_stream(wanted);
            update millrace_engine.stream x set partitions = wanted.partitions, segments = wanted.segments,
                    retention_policy = wanted.retention_policy, max_age_seconds = wanted.max_age_seconds, max_bytes = wanted.max_bytes,
                    max_messages = wanted.max_messages, max_message_bytes = wanted.max_message_bytes,
                    dedupe_window_seconds = wanted.dedupe_window_seconds, priorities = wanted.priorities, versions = wanted.versions, frames = wanted.frames,
                    owner = wanted.owner
                where x.id = s.id;
        end if;
    end if;
    for step in select r.statement from millrace_engine.stream_repairs(s.id) r loop
        execute step.statement;
    end loop;
    return s.id;
end $$;
comment on function millrace_engine.apply_stream(jsonb) is 'Creates a stream or brings it to the given settings; repairs what is missing.';

-- millrace_engine.check_stream(stream) returns void
-- The table's constraints say the same, but not what to do instead.
-- Raises: MR004.
create or replace function millrace_engine.check_stream(p_stream millrace_engine.stream) returns void
language plpgsql immutable as $$
begin
    if p_stream.partitions not between 1 and 1024 then
        raise exception 'a stream cannot have % partitions', p_stream.partitions using errcode = 'MR004', hint = 'Use 1 to 1024.';
    end if;
    if p_stream.payload_type not in ('JSON', 'Bytes') then
        raise exception 'payload type % is not known', quote_literal(p_stream.payload_type) using errcode = 'MR004', hint = 'Use JSON or Bytes.';
    end if;
    if p_stream.segments not between 2 and 16 then
        raise exception 'a stream cannot have % segments', p_stream.segments using errcode = 'MR004', hint = 'Use 2 to 16.';
    end if;
    if p_stream.priorities not between 1 and 8 then
        raise exception 'a stream cannot have % priorities', p_stream.priorities using errcode = 'MR004', hint = 'Use 1, for none, to 8.';
    end if;
    if p_stream.versions and (p_stream.payload_type <> 'JSON' or p_stream.priorities > 1) then
        raise exception 'a stream with versions has JSON payloads and one priority' using errcode = 'MR004',
            hint = 'The versions of a key are its order, and projections read its payloads. Leave payload type and priorities out.';
    end if;
    if p_stream.frames is not null and (p_stream.versions or p_stream.priorities > 1) then
        raise exception 'a stream with frames has no versions and one priority' using errcode = 'MR004',
            hint = 'The ids of the frames of a key are its order. Use a stream of its own for frames.';
    end if;
    if p_stream.has_tenants and (p_stream.retention_policy <> 'Limits' or greatest(p_stream.max_age_seconds, p_stream.max_bytes, p_stream.max_messages) > 0) then
        raise exception 'a stream with tenants keeps all messages' using errcode = 'MR004',
            hint = 'Use retention Limits without limits of age, bytes and number. millrace.drop_tenant removes what belongs to one tenant.';
    end if;
    if p_stream.dedupe_window_seconds not between 0 and 31536000 then
        raise exception 'a dedupe window cannot be % seconds long', p_stream.dedupe_window_seconds using errcode = 'MR004',
            hint = 'Use 0, for none, to 31536000, a year.';
    end if;
    if p_stream.retention_policy not in ('Limits', 'Interest', 'WorkQueue') then
        raise exception 'retention policy % is not known', quote_literal(p_stream.retention_policy) using errcode = 'MR004',
            hint = 'Use Limits, Interest or WorkQueue.';
    end if;
    if p_stream.max_age_seconds > 0 and not millrace_engine.is_duration(p_stream.max_age_seconds) then
        raise exception 'a stream cannot keep messages for % seconds', p_stream.max_age_seconds using errcode = 'MR004',
            hint = 'Use 0, for ever, to 3155760000, a hundred years.';
    end if;
    if least(p_stream.max_age_seconds, p_stream.max_bytes, p_stream.max_messages) < 0 or p_stream.max_message_bytes <= 0 then
        raise exception 'a limit of a stream cannot be negative' using errcode = 'MR004',
            hint = 'Use 0 for no limit of age, bytes or messages. A message may have at least 1 byte.';
    end if;
end $$;
