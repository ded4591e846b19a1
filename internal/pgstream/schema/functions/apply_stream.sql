-- millrace_engine.apply_stream(spec jsonb) returns integer
-- Creates the stream, or brings its settings and its database objects to the spec. Idempotent; concurrent callers wait for each other.
-- Keys: name, partitions, payload_type, segments, retention_policy, max_age_seconds, max_bytes, max_messages,
--       max_message_bytes, owner. A missing key keeps the present value, or takes the default.
-- Raises: MR004 for what can never be done, with what to do instead; MR007 it has another owner.
create or replace function millrace_engine.apply_stream(p_spec jsonb) returns integer
language plpgsql volatile
set client_min_messages = warning as $$
declare
    s millrace_engine.stream;
    wanted millrace_engine.stream;
    step record;
begin
    if p_spec ->> 'name' is null or p_spec ->> 'name' !~ '^[a-z][a-z0-9_]{0,47}$' then
        raise exception 'stream name % is not usable', coalesce(quote_literal(p_spec ->> 'name'), 'null') using errcode = 'MR004',
            hint = 'Use a lower case letter, then up to 47 lower case letters, digits or underscores.';
    end if;
    -- One lock for all changes of structure: they are rare, and CREATE TABLE takes more than one lock.
    perform pg_advisory_xact_lock(1836019570, 1);
    select * into s from millrace_engine.stream x where x.name = p_spec ->> 'name' for update;
    if not found then
        wanted := jsonb_populate_record(null::millrace_engine.stream,
            '{"partitions": 8, "payload_type": "JSON", "segments": 4, "retention_policy": "Limits", "max_age_seconds": 0, "max_bytes": 0,
              "max_messages": 0, "max_message_bytes": 1048576}'::jsonb || jsonb_strip_nulls(p_spec));
        insert into millrace_engine.stream (name, partitions, payload_type, segments, retention_policy, max_age_seconds, max_bytes,
                max_messages, max_message_bytes, owner)
            values (wanted.name, wanted.partitions, wanted.payload_type, wanted.segments, wanted.retention_policy, wanted.max_age_seconds,
                wanted.max_bytes, wanted.max_messages, wanted.max_message_bytes, wanted.owner)
            returning * into s;
    else
        wanted := jsonb_populate_record(s, jsonb_strip_nulls(p_spec) - 'id' - 'incarnation' - 'first_position' - 'segment_started_at' - 'created_at');
        if s.owner <> (p_spec -> 'owner') then
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
        if wanted is distinct from s then
            update millrace_engine.stream x set partitions = wanted.partitions, segments = wanted.segments,
                    retention_policy = wanted.retention_policy, max_age_seconds = wanted.max_age_seconds, max_bytes = wanted.max_bytes,
                    max_messages = wanted.max_messages,
                    max_message_bytes = wanted.max_message_bytes, owner = wanted.owner
                where x.id = s.id;
        end if;
    end if;
    for step in select r.statement from millrace_engine.stream_repairs(s.id) r loop
        execute step.statement;
    end loop;
    return s.id;
end $$;
comment on function millrace_engine.apply_stream(jsonb) is 'Creates a stream or brings it to the given settings; repairs what is missing.';
